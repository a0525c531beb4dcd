"""The one exception that reaches the user as a message, and what messages share."""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Iterable
from typing import SupportsIndex


class PplexError(Exception):
    """A failure the user can act on, whose text is the whole message, in one line.

    What it quotes of a file or a name may hold line ends and other controls.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


def visible(text: str) -> str:
    """A text in one line, that has no controls: names may hold those of a terminal."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    """A character, or what stands for one that is a control or half of a pair."""
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return repr(character)[1:-1] if is_control else character


def first_line(error: BaseException) -> str:
    """What an exception says, as far as a sentence takes it; else its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or a smaller one than ``least``."""
    if not isinstance(value, SupportsIndex) or operator.index(value) < least:
        raise PplexError(
            f"{name} is {value!r}, where a whole number from {least} on is expected"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question about the known name that is nearest, to end a message; or nothing."""
    import difflib

    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f". Did you mean {by_lower[near[0]]}?" if near else ""
