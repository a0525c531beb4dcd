"""The one exception that reaches the user as a message."""


class PplexError(Exception):
    """A failure the user can act on, whose text is the whole message."""
