"""What the agent said and when: words of the text stream as json, srt, vtt or txt.

For the eye, ``Captions`` shows them while they are said.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pplex.errors import PplexError
from pplex.files import Place, put, write_text

SUFFIXES = (".json", ".srt", ".vtt", ".txt")

MAX_CUE_CHARACTERS = 42
MAX_CUE_S = 7.0
MAX_GAP_S = 1.0

_NUM_SPECIAL = 4  # ids 0 to 3: end of padding, start, end, padding; nothing is said
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SENTENCE_END = re.compile(r"[.!?\u2026][\"')\]\u2019\u201d]*$")


@dataclass(frozen=True)
class Word:
    """A word, the frame of its first piece, and its time in the recording (seconds).

    `end_s` is the end of the frame of its last piece.
    """

    text: str
    start_s: float
    end_s: float
    frame: int


def words(
    text_tokens: Iterable[int], piece: Callable[[int], str], frame_rate: float
) -> list[Word]:
    """Join the text stream, one id a frame, into words.

    `piece` maps an id to its piece; one that starts with a space (or U+2581) begins a
    word, any other continues the word before, whatever padding lies between. Byte
    pieces are joined as UTF-8; what is not UTF-8 becomes U+FFFD.
    """
    found: list[Word] = []
    content = bytearray()
    start = end = 0

    def close() -> None:
        text = _printable(content.decode("utf-8", errors="replace")).strip()
        if text:
            found.append(Word(text, start / frame_rate, end / frame_rate, start))
        content.clear()

    for frame, idx in enumerate(int(i) for i in text_tokens):
        if idx < _NUM_SPECIAL:
            continue
        raw = _piece_bytes(piece(idx))
        if raw[:1].isspace():
            close()
        if not content:
            start = frame
        content += raw
        end = frame + 1
    close()
    return found


def check_transcript_path(path: Path) -> None:
    """Refuse a name whose suffix is none of the four formats."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PplexError(
            f"cannot tell the transcript's format from {path}: "
            "end its name in .json, .srt, .vtt or .txt"
        )


def write_transcript(
    path: Path,
    words: Sequence[Word],
    duration_s: float,
    metadata: Mapping[str, object],
    place: Place = put,
) -> None:
    """Write words in the format that the path's suffix names, atomically.

    JSON has the keys `text`, `duration_s`, `metadata` and `words`; the other formats
    have no place for metadata.
    """
    check_transcript_path(path)
    suffix = Path(path).suffix.lower()
    text = " ".join(word.text for word in words)
    if suffix == ".json":
        content = {
            "text": text,
            "duration_s": duration_s,
            "metadata": dict(metadata),
            "words": [asdict(word) for word in words],
        }
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        write_text(path, text, place=place)
    elif suffix == ".srt":
        write_text(path, _srt(cues(words)), place=place)
    elif suffix == ".vtt":
        write_text(path, _vtt(cues(words)), place=place)
    else:
        write_text(path, text + "\n" if text else "", place=place)


def cues(words: Sequence[Word]) -> list[Word]:
    """Group words into subtitles.

    A new one begins after a sentence, after a gap over 1 s, and where 42 characters
    or 7 s would be passed.
    """
    grouped: list[Word] = []
    for word in words:
        last = grouped[-1] if grouped else None
        if last and _belongs(last, word):
            grouped[-1] = Word(
                f"{last.text} {word.text}", last.start_s, word.end_s, last.frame
            )
        else:
            grouped.append(word)
    return grouped


class PieceText:
    """Turns one text id after another into text, as far as its characters are whole."""

    def __init__(self, piece: Callable[[int], str]) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, idx: int) -> str:
        """The text of the next id; empty for most."""
        if idx < _NUM_SPECIAL:
            return ""
        return _printable(self._utf8.decode(_piece_bytes(self._piece(idx))))


class Captions:
    """Turns one text id a frame into what to print; a line begins with its time."""

    def __init__(self, piece: Callable[[int], str], frame_rate: float) -> None:
        self._spoken = PieceText(piece)
        self._frame_rate = frame_rate
        self._frame = 0
        self._last: int | None = None

    def add(self, idx: int) -> str:
        """What to print for the next frame; empty for most."""
        frame, self._frame = self._frame, self._frame + 1
        if idx < _NUM_SPECIAL:
            return ""
        text = self._spoken.add(idx)
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


def _belongs(cue: Word, word: Word) -> bool:
    return (
        not _SENTENCE_END.search(cue.text)
        and word.start_s - cue.end_s <= MAX_GAP_S
        and len(cue.text) + 1 + len(word.text) <= MAX_CUE_CHARACTERS
        and word.end_s - cue.start_s <= MAX_CUE_S
    )


def _srt(cues: Sequence[Word]) -> str:
    return "".join(
        f"{number}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n"
        f"{cue.text}\n\n"
        for number, cue in enumerate(cues, start=1)
    )


def _vtt(cues: Sequence[Word]) -> str:
    return "WEBVTT\n\n" + "".join(
        f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n"
        f"{_escape(cue.text)}\n\n"
        for cue in cues
    )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(seconds: float, point: str) -> str:
    """Print seconds as HH:MM:SS and milliseconds."""
    total_ms = round(seconds * 1000)
    minutes, ms = divmod(total_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{ms // 1000:02}{point}{ms % 1000:03}"


def _piece_bytes(piece: str) -> bytes:
    """A piece as bytes, its word mark as a space."""
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")


def _printable(text: str) -> str:
    """A space for each control character."""
    return "".join(c if c.isprintable() else " " for c in text)
