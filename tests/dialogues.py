"""Makes dialogues whose times are known: speech where it is asked for, else silence.

``data/fdb/speech_user.flac`` and ``speech_agent.flac`` are flite's voices rms and slt
saying one long sentence, with the 10 ms blocks 30 dB under the loudest taken out, so
that any cut of them is speech without a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

DATA = Path(__file__).parent / "data" / "fdb"
RATE = 16_000

Times = Sequence[tuple[float, float]]


def track(
    voice: str, times: Times, duration_s: float, noise: float = 1e-4
) -> np.ndarray:
    """A side of ``duration_s`` that speaks at ``times``; ``noise`` is its amplitude."""
    speech, rate = soundfile.read(DATA / f"speech_{voice}.flac", dtype="float32")
    assert rate == RATE
    random = np.random.default_rng(0)
    pcm = noise * random.standard_normal(round(duration_s * RATE)).astype(np.float32)
    for start_s, end_s in times:
        start, end = round(start_s * RATE), round(end_s * RATE)
        # Not from the beginning each time, as no two utterances are alike.
        offset = int(random.integers(0, len(speech)))
        pcm[start:end] += np.resize(np.roll(speech, -offset), end - start)
    return pcm


def write_dialogue(
    path: Path, user: Times, agent: Times, duration_s: float, noise: float = 1e-4
) -> None:
    """A stereo WAV: left the user, right the agent."""
    sides = [
        track("user", user, duration_s, noise),
        track("agent", agent, duration_s, noise),
    ]
    soundfile.write(path, np.stack(sides, axis=1), RATE)
