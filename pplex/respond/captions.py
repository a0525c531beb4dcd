"""Words for the eye while they are said: the text stream, piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from pplex.respond.transcript import MAX_GAP_S, _clock, _piece_bytes

_NUM_SPECIAL = 4  # ids 0 to 3: nothing is said


class Captions:
    """Turns one text id a frame into what to print; a line begins with its time."""

    def __init__(self, piece: Callable[[int], str], frame_rate: float) -> None:
        self._piece = piece
        self._frame_rate = frame_rate
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._frame = 0
        self._last: int | None = None

    def add(self, idx: int) -> str:
        """What to print for the next frame; empty for most."""
        frame, self._frame = self._frame, self._frame + 1
        if idx < _NUM_SPECIAL:
            return ""
        text = self._utf8.decode(_piece_bytes(self._piece(idx)))
        text = "".join(c if c.isprintable() else " " for c in text)
        gap = None if self._last is None else (frame - self._last) / self._frame_rate
        if gap is not None and gap <= MAX_GAP_S:
            self._last = frame
            return text
        if not text.strip():
            return ""
        start = "" if self._last is None else "\n"
        self._last = frame
        return f"{start}[{_clock(frame / self._frame_rate, '.')}] {text.lstrip()}"

    def end(self) -> str:
        """What to print after the last frame."""
        return "" if self._last is None else "\n"
