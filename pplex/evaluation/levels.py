"""How loud a track is, and whether it is cut off at full scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pplex.evaluation.segments import Segment

# Samples in a row at full scale that make a clip; single ones are peaks.
CLIP_RUN = 3
SILENT_DB = -60.0
_FULL = 32766 / 32768
_QUIETEST = 1e-6


@dataclass(frozen=True)
class Levels:
    """Peak and speech level in dB relative to full scale; clipped stretches.

    ``speech_db`` is the RMS of what was given as speech, None without any;
    ``clips`` counts runs of ``CLIP_RUN`` samples or more at full scale and
    ``first_clip_s`` says where the first one is.
    """

    peak_db: float
    speech_db: float | None
    clips: int
    first_clip_s: float | None


def measure_levels(
    pcm: np.ndarray, sample_rate: int, speech: Sequence[Segment] = ()
) -> Levels:
    """Measure PCM (samples,) whose speech is at these times."""
    peak = float(np.abs(pcm).max(initial=0.0))
    parts = [
        pcm[round(s.start_s * sample_rate) : round(s.end_s * sample_rate)]
        for s in speech
    ]
    spoken = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    rms = float(np.sqrt((spoken.astype(np.float64) ** 2).mean())) if len(spoken) else 0
    full = np.concatenate([[0], (np.abs(pcm) >= _FULL).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(full))
    starts, ends = edges[::2], edges[1::2]
    clips = starts[ends - starts >= CLIP_RUN]
    return Levels(
        peak_db=decibels(peak),
        speech_db=decibels(rms) if len(spoken) else None,
        clips=len(clips),
        first_clip_s=float(clips[0] / sample_rate) if len(clips) else None,
    )


def decibels(value: float) -> float:
    """A linear level in dB relative to full scale; -120 for silence."""
    return float(20 * np.log10(max(value, _QUIETEST)))
