"""What both sides said, in one transcript: json, srt, vtt or txt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pplex.errors import PplexError
from pplex.files import write_text
from pplex.respond.transcript import Word, cues


def write_dialogue(path: Path, user: Sequence[Word], agent: Sequence[Word]) -> None:
    """Write both sides' words in the order in which they were said, atomically.

    JSON has ``words`` and ``cues``, each with its ``speaker``; times are the
    recording's, in seconds. Cues of the two may overlap, as speech does.
    """
    form = path.suffix.lower()
    lines = _ordered(cues(user), cues(agent))
    if form == ".json":
        content = {
            "cues": [_entry(speaker, cue) for speaker, cue in lines],
            "words": [_entry(speaker, w) for speaker, w in _ordered(user, agent)],
        }
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    elif form == ".srt":
        write_text(
            path,
            "".join(
                f"{number}\n{clock(cue.start_s, ',')} --> {clock(cue.end_s, ',')}\n"
                f"{speaker.title()}: {cue.text}\n\n"
                for number, (speaker, cue) in enumerate(lines, start=1)
            ),
        )
    elif form == ".vtt":
        write_text(
            path,
            "WEBVTT\n\n"
            + "".join(
                f"{clock(cue.start_s, '.')} --> {clock(cue.end_s, '.')}\n"
                f"<v {speaker.title()}>{_escape(cue.text)}</v>\n\n"
                for speaker, cue in lines
            ),
        )
    elif form == ".txt":
        write_text(
            path,
            "".join(
                f"[{clock(cue.start_s, '.')}] {speaker.title()}: {cue.text}\n"
                for speaker, cue in lines
            ),
        )
    else:
        raise PplexError(
            f"cannot tell the transcript's format from {path}: "
            "end its name in .json, .srt, .vtt or .txt"
        )


def clock(seconds: float, point: str = ".") -> str:
    """Seconds as HH:MM:SS and milliseconds."""
    minutes, ms = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{ms // 1000:02}{point}{ms % 1000:03}"


def _ordered(user: Sequence[Word], agent: Sequence[Word]) -> list[tuple[str, Word]]:
    both = [("user", word) for word in user] + [("agent", word) for word in agent]
    return sorted(both, key=lambda pair: (pair[1].start_s, pair[1].end_s))


def _entry(speaker: str, word: Word) -> dict[str, object]:
    entry = asdict(word)
    del entry["frame"]
    entry |= {key: round(entry[key], 3) for key in ("start_s", "end_s")}
    return {"speaker": speaker, **entry}


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
