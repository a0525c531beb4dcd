"""Who spoke when in a recording, as another program found: RTTM files.

A line is ``SPEAKER file channel start duration <NA> <NA> speaker <NA> <NA>``, in
seconds (NIST Rich Transcription, 2009 evaluation plan, appendix A).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pplex.errors import PplexError
from pplex.evaluation.speech_activity import Segment, merge
from pplex.files import read_regular, reading

_MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class Diarization:
    """Speech by recording, then by speaker; ``speaker`` is the user, None all."""

    found: Mapping[str, Mapping[str, list[Segment]]]
    speaker: str | None = None

    def describe(self) -> str:
        """Where the user's speech comes from, for the output."""
        whose = f"speaker {self.speaker}" if self.speaker else "every speaker"
        return f"RTTM, {whose}"

    def user(self, names: Iterable[str]) -> list[Segment] | None:
        """The user's speech in the recording of one of these names.

        None if no line is about it. PplexError if the speaker is not in it.
        """
        for name in names:
            speakers = self.found.get(name)
            if speakers is None:
                continue
            if self.speaker is None:
                return merge((s for some in speakers.values() for s in some), 0.0)
            if self.speaker not in speakers:
                raise PplexError(
                    f"--speaker {self.speaker}: the RTTM lines of {name} have "
                    f"{', '.join(speakers)} only"
                )
            return merge(speakers[self.speaker], 0.0)
        return None


def read_rttm(paths: Iterable[Path], speaker: str | None = None) -> Diarization:
    """Read RTTM files; a folder is all the ``.rttm`` files in it."""
    found: dict[str, dict[str, list[Segment]]] = {}
    for path in paths:
        files = sorted(path.glob("*.rttm")) if path.is_dir() else [path]
        if not files:
            raise PplexError(f"{path} holds no .rttm file")
        for file in files:
            _read(file, found)
    return Diarization(found, speaker)


def _read(path: Path, found: dict[str, dict[str, list[Segment]]]) -> None:
    with reading(path, "is not text"):
        lines = read_regular(path, _MAX_BYTES).decode("utf-8-sig").splitlines()
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0].startswith(";;"):
            continue
        if not fields[0].isupper():
            raise PplexError(
                f"{path}, line {number}: no RTTM, whose lines begin with SPEAKER"
            )
        if fields[0] != "SPEAKER":
            continue  # other kinds of lines that the format has
        try:
            start, duration = float(fields[3]), float(fields[4])
            name, speaker = fields[1], fields[7]
            if not (math.isfinite(start) and 0 <= duration < math.inf and start >= 0):
                raise ValueError("times are seconds from 0 on")
        except (ValueError, IndexError) as e:
            raise PplexError(
                f"{path}, line {number}: no speaker's turn in RTTM ({e}); it has a "
                "name, a channel, start, duration and speaker"
            ) from e
        turns = found.setdefault(name, {}).setdefault(speaker, [])
        turns.append(Segment(start, start + duration))
