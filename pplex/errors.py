"""The one exception that reaches the user as a message."""


class PplexError(Exception):
    """A failure the user can act on, whose text is the whole message."""


def first_line(error: BaseException) -> str:
    """What an exception says, as far as a sentence takes it; else its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
