"""Words that the agent is made to say, and when: its text is given, its voice follows.

The text stream has a word's pieces one a frame, from about where it begins to sound,
``TEXT_EPAD`` in the frame before and ``TEXT_PAD`` in all others. A line's first word is
given at its time; when the next one comes the model says, as where Moshi reads aloud:
it may choose padding or its end, and in place of any other id the next word is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.errors import PplexError
from pplex.model.config import NUM_SPECIAL, TEXT_EPAD, TEXT_PAD, ModelConfig
from pplex.model.streams import NOT_FORCED, instead
from pplex.values import read_rows, seconds_of, shown, text_of

COLUMNS = ("at", "say")
_MAX_AT_S = 1e6

# About how many frames a word takes, and the pauses behind it: fitted to 920 words that
# mini said of its own accord (2.6 and 3.1 frames a word in its two voices).
_WORD, _LETTER = 0.75, 0.7
_PAUSES = {",": 3.0, ";": 3.0, ":": 3.0, ".": 4.0, "!": 4.0, "?": 4.0, "\u2026": 4.0}
# The most frames, by those: a model that waits longer waits for something else.
_MOST, _SPARE = 1.5, 2.0
_ROUNDING = 1e-6  # frames by which a time that names one may pass it
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Line:
    """Words to say from ``at_s`` seconds of the answer on; ``name`` is for messages."""

    at_s: float
    say: str
    name: str = field(compare=False)


def read_script(path: Path) -> tuple[Line, ...]:
    """The lines of a ``.jsonl`` or ``.csv`` file, in the order of their times."""
    lines = []
    for number, fields in read_rows(path, "script", COLUMNS):
        where = f"{path} line {number}"
        for name in COLUMNS:
            if name not in fields:
                found = ", ".join(map(str, fields)) or "nothing"
                raise PplexError(
                    f"{where} has no {name}: at, in seconds, and say, the words, are "
                    f"expected; it has {found}"
                )
        at_s = seconds_of(fields["at"], where, "at", _MAX_AT_S)
        lines.append(_line(at_s, text_of(fields["say"], where, "say"), where))
    if not lines:
        raise PplexError(f"the script {path} has no lines")
    return tuple(sorted(lines, key=lambda line: line.at_s))


def first_words(text: str, name: str = "--first-words") -> Line:
    """The line that begins the answer."""
    return _line(0.0, text, name)


def _line(at_s: float, text: str, name: str) -> Line:
    say = " ".join(text.split())
    if not say:
        raise PplexError(f"{name}: there are no words to say")
    return Line(at_s, say, name)


@dataclass(frozen=True)
class _Word:
    """The pieces of a word, and about how many frames it takes."""

    pieces: tuple[int, ...]
    frames: float

    @property
    def most_frames(self) -> float:
        """How long it may take until the next one."""
        return max(len(self.pieces), _MOST * self.frames + _SPARE)


@dataclass(frozen=True)
class Cue:
    """A line laid out: its words, and the frame of the first.

    ``end`` is about the frame after its last.
    """

    line: Line
    words: tuple[_Word, ...]
    first: int
    end: int


# What the agent is to say, in order.
Script = tuple[Cue, ...]


def lay_out(
    lines: Sequence[Line], tokenizer: TextTokenizer, config: ModelConfig
) -> Script:
    """Lines as the model's text has them; those that overlap are refused."""
    rate = config.frame_rate
    # Before it there is one of padding, and PersonaPlex's answer begins with a frame of
    # the prompt.
    earliest = 1 if config.lm.is_moshi else config.lm.lag + 1
    cues: list[Cue] = []
    for line in sorted(lines, key=lambda line: line.at_s):
        words = _words(line, tokenizer)
        first = max(math.ceil(line.at_s * rate - _ROUNDING), earliest)
        if cues and first <= cues[-1].end:
            before = cues[-1]
            raise PplexError(
                f"{line.name} begins at {line.at_s:g} s, and {before.line.name} takes "
                f"until about {before.end / rate:.1f} s: leave time between them"
            )
        frames = sum(max(word.frames, len(word.pieces)) for word in words)
        cues.append(Cue(line, words, first, math.ceil(first + frames)))
    return tuple(cues)


def too_late(script: Script, num_frames: int, frame_rate: float) -> str:
    """What an answer of ``num_frames`` has no room for, in a sentence."""
    for cue in script:
        if cue.end > num_frames:
            return (
                f"{cue.line.name}: {shown(cue.line.say)} takes until about "
                f"{cue.end / frame_rate:.1f} s, and the answer ends at "
                f"{num_frames / frame_rate:.1f} s"
            )
    return ""


class Speaker:
    """Says what text is given in each frame, from what was said in those before.

    ``left`` are the lines that are not said to their ends.
    """

    def __init__(self, script: Script) -> None:
        self.left = list(script)
        self._words: list[_Word] = []  # still to come in the first of them
        self._pieces: list[int] = []  # still to come in a word
        self._patience = 0.0  # frames that are left for it

    def needs_last(self, frame: int) -> bool:
        """Whether the text of a frame depends on what is said in the one before."""
        return bool(self.left) and (self._is_speaking or frame >= self.left[0].first)

    @property
    def _is_speaking(self) -> bool:
        return bool(self._words or self._pieces)

    def _is_due(self, frame: int) -> bool:
        return bool(self.left) and frame >= self.left[0].first - 1

    def text(self, frame: int) -> int:
        """The id for a frame, the next; ``NOT_FORCED`` for any, or ``instead``."""
        if self._pieces:
            return self._pieces[0]
        if self._words and self._patience > 0:
            return instead(self._words[0].pieces[0])
        return TEXT_EPAD if self._words or self._is_due(frame) else NOT_FORCED

    def said(self, frame: int, idx: int) -> bool:
        """Take what was said in a frame; whether it is of the script."""
        if not self._is_speaking:
            if not self._is_due(frame):
                return False
            self._words = list(self.left[0].words)
            self._begin()
            return True
        self._patience -= 1
        if not self._pieces:
            if idx == TEXT_PAD:
                return True
            self._begin()
        if idx == self._pieces[0]:  # else it was the end of the padding
            del self._pieces[0]
        if not self._is_speaking:
            del self.left[0]
        return True

    def _begin(self) -> None:
        """The next word comes."""
        word = self._words.pop(0)
        self._pieces, self._patience = list(word.pieces), word.most_frames


def scripted(script: Script, text: Iterable[int]) -> set[int]:
    """The frames of ``text`` ids (frames,) that are of the script."""
    if not script:
        return set()
    speaker = Speaker(script)
    return {frame for frame, idx in enumerate(text) if speaker.said(frame, int(idx))}


def unsaid(script: Script, text: Iterable[int]) -> str:
    """What of a script was not said in ``text`` ids (frames,), in a sentence."""
    if not script:
        return ""
    speaker = Speaker(script)
    for frame, idx in enumerate(text):
        speaker.said(frame, int(idx))
    if not speaker.left:
        return ""
    line, more = speaker.left[0].line, len(speaker.left) - 1
    others = f", nor were {more} lines after it" if more else ""
    return f"{line.name}: {shown(line.say)} was not said to its end{others}"


def last_cue(script: Script) -> int:
    """The frame in which the last line begins, 0 without."""
    return script[-1].first if script else 0


def _words(line: Line, tokenizer: TextTokenizer) -> tuple[_Word, ...]:
    """The words of a line."""
    words: list[list[int]] = []
    for idx in tokenizer.encode(line.say):
        if _is_unknown(idx, tokenizer):
            unknown = _unknown_in(line.say, tokenizer)
            raise PplexError(
                f"{line.name}: {shown(line.say)} has {unknown!r}, which the model's "
                "text has no piece for: write it in other letters"
            )
        if tokenizer.piece(idx).startswith(" ") or not words:
            words.append([])
        words[-1].append(idx)
    return tuple(_Word(tuple(ids), _frames(ids, tokenizer)) for ids in words)


def _frames(ids: Sequence[int], tokenizer: TextTokenizer) -> float:
    """About how many frames a word of these pieces takes."""
    text = "".join(map(tokenizer.piece, ids)).strip()
    pause = _PAUSES.get(text.rstrip("\"')\u2019\u201d")[-1:], 0.0)
    return _WORD + _LETTER * sum(c.isalnum() for c in text) + pause


def _is_unknown(idx: int, tokenizer: TextTokenizer) -> bool:
    is_byte = _BYTE_PIECE.fullmatch(tokenizer.piece(idx)) is not None
    return idx < NUM_SPECIAL or is_byte


def _unknown_in(text: str, tokenizer: TextTokenizer) -> str:
    """The first character that has no piece, or all of the text."""
    for c in text:
        if any(_is_unknown(idx, tokenizer) for idx in tokenizer.encode(c)):
            return c
    return text
