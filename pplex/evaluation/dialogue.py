"""What both sides said, in one transcript."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pplex.files import write_text
from pplex.respond.transcript import Word, clock, cues, format_of, render_cues


def write_dialogue(path: Path, user: Sequence[Word], agent: Sequence[Word]) -> None:
    """Write both sides' words in the order in which they were said, atomically.

    JSON has ``words`` and ``cues``, each with its ``speaker``; times are the
    recording's, in seconds. Cues of the two may overlap, as speech does.
    """
    form = format_of(path)
    said = _ordered(cues(user), cues(agent))
    if form == "json":
        content = {
            "cues": [_entry(speaker, cue) for speaker, cue in said],
            "words": [_entry(speaker, w) for speaker, w in _ordered(user, agent)],
        }
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    elif form == "txt":
        text = "".join(
            f"[{clock(cue.start_s)}] {speaker.title()}: {cue.text}\n"
            for speaker, cue in said
        )
    else:
        text = render_cues(form, said)
    write_text(path, text)


def _ordered(user: Sequence[Word], agent: Sequence[Word]) -> list[tuple[str, Word]]:
    both = [("user", word) for word in user] + [("agent", word) for word in agent]
    return sorted(both, key=lambda pair: (pair[1].start_s, pair[1].end_s))


def _entry(speaker: str, word: Word) -> dict[str, object]:
    entry = word.entry()
    del entry["frame"]
    entry |= {"start_s": round(word.start_s, 3), "end_s": round(word.end_s, 3)}
    return {"speaker": speaker, **entry}
