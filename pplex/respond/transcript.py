"""What the agent said and when: words of the text stream, in files of five formats.

For the eye, ``Captions`` shows them while they are said.
"""

from __future__ import annotations

import codecs
import json
import re
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pplex.errors import PplexError
from pplex.files import Place, put, write_text
from pplex.model.config import NUM_SPECIAL

FORMATS = ("json", "srt", "vtt", "tsv", "txt")
SUBTITLES = ("srt", "vtt")  # formats whose lines have a width

_MAX_CUE_S = 7.0
_MAX_GAP_S = 1.0

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SENTENCE_END = re.compile(r"[.!?\u2026][\"')\]\u2019\u201d]*$")


@dataclass(frozen=True)
class Word:
    """A word, the frame of its first piece, and its time in the recording (seconds).

    `end_s` is the end of the frame of its last piece; a ``scripted`` word is one that
    the agent was made to say.
    """

    text: str
    start_s: float
    end_s: float
    frame: int
    scripted: bool = False

    def entry(self) -> dict[str, object]:
        """The word as JSON has it: only what is scripted says so."""
        entry = asdict(self)
        if not self.scripted:
            del entry["scripted"]
        return entry


@dataclass(frozen=True)
class CueShape:
    """How much of the text a cue holds: lines, and characters a line."""

    lines: int = 1
    width: int = 42

    def wrap(self, text: str) -> list[str]:
        """Lines of whole words; one that is wider has a line of its own."""
        return textwrap.wrap(
            text, self.width, break_long_words=False, break_on_hyphens=False
        )


def words(
    text_tokens: Iterable[int],
    piece: Callable[[int], str],
    frame_rate: float,
    scripted: Container[int] = (),
) -> list[Word]:
    """Join the text stream, one id a frame, into words.

    `piece` maps an id to its piece; one that starts with a space (or U+2581) begins a
    word, any other continues the word before, whatever padding lies between. Byte
    pieces are joined as UTF-8; what is not UTF-8 becomes U+FFFD. Words that begin in
    ``scripted`` frames are.
    """
    found: list[Word] = []
    content = bytearray()
    start = end = 0

    def close() -> None:
        text = _printable(content.decode("utf-8", errors="replace")).strip()
        if text:
            times_s = start / frame_rate, end / frame_rate
            found.append(Word(text, *times_s, start, start in scripted))
        content.clear()

    for frame, idx in enumerate(int(i) for i in text_tokens):
        if idx < NUM_SPECIAL:
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


def text_of(words: Sequence[Word]) -> str:
    """The words in a row."""
    return " ".join(word.text for word in words)


def format_of(path: Path) -> str:
    """The format that the suffix of a transcript's name says."""
    form = path.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise PplexError(
            f"cannot tell the transcript's format from {path}: "
            "end its name in .json, .srt, .vtt or .txt, or in .tsv for a table"
        )
    return form


def write_transcript(
    path: Path,
    words: Sequence[Word],
    duration_s: float,
    metadata: Mapping[str, object],
    shape: CueShape = CueShape(),
    place: Place = put,
) -> None:
    """Write words in the format that the path's suffix names, atomically.

    JSON has the keys `text`, `duration_s`, `metadata` and `words`; the other formats
    have no place for metadata.
    """
    form = format_of(path)
    text = text_of(words)
    if form == "json":
        content = {
            "text": text,
            "duration_s": duration_s,
            "metadata": dict(metadata),
            "words": [word.entry() for word in words],
        }
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    elif form == "txt":
        text = text + "\n" if text else ""
    else:
        text = _render_cues(form, [("", cue) for cue in cues(words, shape)], shape)
    write_text(path, text, place=place)


def write_dialogue(
    path: Path,
    said: Mapping[str, Sequence[Word]],
    metadata: Mapping[str, object] | None = None,
    shape: CueShape = CueShape(),
    place: Place = put,
) -> None:
    """Write what several speakers ``said`` in the order in which it was, atomically.

    JSON has ``words`` and ``cues``, each with its ``speaker``, and ``metadata`` if
    there are any; times are the recording's, in seconds. Cues of two may overlap, as
    speech does.
    """
    form = format_of(path)
    spoken = _ordered({name: cues(words, shape) for name, words in said.items()})
    if form == "json":
        content: dict[str, object]
        content = {} if metadata is None else {"metadata": dict(metadata)}
        content |= {
            "cues": [_entry(speaker, cue) for speaker, cue in spoken],
            "words": [_entry(speaker, word) for speaker, word in _ordered(said)],
        }
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    elif form == "txt":
        text = "".join(
            f"[{_clock(cue.start_s)}] {speaker.title()}: {cue.text}\n"
            for speaker, cue in spoken
        )
    else:
        text = _render_cues(form, spoken, shape)
    write_text(path, text, place=place)


def _ordered(said: Mapping[str, Sequence[Word]]) -> list[tuple[str, Word]]:
    all_ = [(speaker, word) for speaker, words in said.items() for word in words]
    return sorted(all_, key=lambda pair: (pair[1].start_s, pair[1].end_s))


def _entry(speaker: str, word: Word) -> dict[str, object]:
    entry = word.entry()
    del entry["frame"]
    entry |= {"start_s": round(word.start_s, 3), "end_s": round(word.end_s, 3)}
    return {"speaker": speaker, **entry}


def cues(words: Sequence[Word], shape: CueShape = CueShape()) -> list[Word]:
    """Group words into subtitles.

    A new one begins after a sentence, after a gap over 1 s, where the lines of
    ``shape`` or 7 s would be passed, and where a script begins or ends.
    """
    grouped: list[Word] = []
    for word in words:
        last = grouped[-1] if grouped else None
        if last and _belongs(last, word, shape):
            text = f"{last.text} {word.text}"
            grouped[-1] = replace(last, text=text, end_s=word.end_s)
        else:
            grouped.append(word)
    return grouped


def _render_cues(
    form: str, said: Sequence[tuple[str, Word]], shape: CueShape = CueShape()
) -> str:
    """Cues as a file of ``form`` (srt, vtt, tsv) has them.

    Each comes with its speaker, all of them empty where there is only one. The TSV is
    Whisper's, in whole milliseconds, with a column for speakers if there are any. What
    is scripted is in italics, and in the TSV has a 1 in a column that is there then.
    """
    if form == "tsv":
        with_speaker = any(speaker for speaker, _ in said)
        marked = any(cue.scripted for _, cue in said)
        columns = ["speaker"] * with_speaker + ["scripted"] * marked
        rows = [["start", "end", *columns, "text"]]
        for speaker, cue in said:
            times_ms = (f"{round(s * 1000)}" for s in (cue.start_s, cue.end_s))
            text = " ".join(cue.text.split())
            mark = [str(int(cue.scripted))] * marked
            rows.append([*times_ms, *[speaker] * with_speaker, *mark, text])
        return "".join("\t".join(row) + "\n" for row in rows)
    point = "," if form == "srt" else "."
    blocks = [] if form == "srt" else ["WEBVTT"]
    for number, (speaker, cue) in enumerate(said, start=1):
        times = f"{_clock(cue.start_s, point)} --> {_clock(cue.end_s, point)}"
        text, name = "\n".join(shape.wrap(cue.text)), speaker.title()
        if form == "vtt":
            text = _escape(text)
        if cue.scripted:
            text = f"<i>{text}</i>"
        if form == "srt":
            text = f"{name}: {text}" if name else text
            blocks.append(f"{number}\n{times}\n{text}")
        else:
            text = f"<v {name}>{text}</v>" if name else text
            blocks.append(f"{times}\n{text}")
    return "".join(f"{block}\n\n" for block in blocks)


def _clock(seconds: float, point: str = ".") -> str:
    """Seconds as HH:MM:SS and milliseconds."""
    minutes, ms = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{ms // 1000:02}{point}{ms % 1000:03}"


class PieceText:
    """Turns one text id after another into text, as far as its characters are whole."""

    def __init__(self, piece: Callable[[int], str]) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, idx: int) -> str:
        """The text of the next id; empty for most."""
        if idx < NUM_SPECIAL:
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
        if idx < NUM_SPECIAL:
            return ""
        text = self._spoken.add(idx)
        gap = None if self._last is None else (frame - self._last) / self._frame_rate
        if gap is not None and gap <= _MAX_GAP_S:
            self._last = frame
            return text
        if not text.strip():
            return ""
        start = "" if self._last is None else "\n"
        self._last = frame
        return f"{start}[{_clock(frame / self._frame_rate)}] {text.lstrip()}"

    def end(self) -> str:
        """What to print after the last frame."""
        return "" if self._last is None else "\n"


def _belongs(cue: Word, word: Word, shape: CueShape) -> bool:
    return (
        not _SENTENCE_END.search(cue.text)
        and word.start_s - cue.end_s <= _MAX_GAP_S
        and word.end_s - cue.start_s <= _MAX_CUE_S
        and word.scripted == cue.scripted
        and len(shape.wrap(f"{cue.text} {word.text}")) <= shape.lines
    )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _piece_bytes(piece: str) -> bytes:
    """A piece as bytes, its word mark as a space."""
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")


def _printable(text: str) -> str:
    """A space for each control character."""
    return "".join(c if c.isprintable() else " " for c in text)
