"""What a run took: the figures of ``--stats`` and of the summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pplex.files import write_text
from pplex.respond.transcript import Word

FRAME_BUDGET_MS = 80.0


@dataclass(frozen=True)
class Latency:
    """Milliseconds a step took, and how many were over a frame's 80 ms."""

    p50: float
    p95: float
    p99: float
    max: float
    mean: float
    late_frames: int


def latency(steps_s: Sequence[float]) -> Latency:
    """Summarise the seconds of each step."""
    ms = np.array(steps_s) * 1000.0
    p50, p95, p99 = (float(p) for p in np.percentile(ms, [50, 95, 99]))
    late = int((ms > FRAME_BUDGET_MS).sum())
    return Latency(p50, p95, p99, float(ms.max()), float(ms.mean()), late)


@dataclass(frozen=True)
class Stats:
    """One recording's run; seconds are wall time, parts do not overlap.

    Of what the codec does beside the language model's steps, ``encode_s`` and
    ``decode_s`` count only what was waited for.

    ``total_s`` runs from the start of the command's work to the last file written;
    ``other_s`` is what no part accounts for. ``real_time_factor`` is computing time
    over audio time: everything but loading the model and warming up;
    ``real_time_factor_with_load`` is ``total_s`` over audio time.

    Of streams only: ``latency_ms`` from a frame's last sample to its reply,
    ``start_up_frames`` that came before the model was ready and were late, and
    ``source_pace``, audio time over the time it took to come. A source faster than
    real time has no latency.

    ``step_ms_series`` has the milliseconds of every step, for one recording only: a
    stream has no end, and a batch's steps belong to many.
    """

    input: str
    outputs: dict[str, str]
    audio_s: float
    tail_s: float
    frames: int
    prompt_frames: int
    load_s: float
    read_s: float
    prefill_s: float
    warm_up_s: float
    encode_s: float
    steps_s: float
    decode_s: float
    write_s: float
    other_s: float
    total_s: float
    step_ms: Latency
    real_time_factor: float
    real_time_factor_with_load: float
    peak_memory_gb: float
    device: str
    dtype: str
    bits: tuple[int, ...]
    compute: str
    layout: str
    model: str
    repo: str | None
    revision: str | None
    voice: str
    prompt: str
    seed: int
    temp: float
    top_k: int
    text_temp: float
    text_top_k: int
    channel: int | str
    source_rate: int
    source_channels: int
    pplex: str
    mlx: str
    latency_ms: Latency | None = None
    start_up_frames: int | None = None
    source_pace: float | None = None
    step_ms_series: list[float] | None = None

    def write(self, path: Path) -> None:
        """Write the figures as JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Outcome:
    """A check of an answer: its name, whether it passed, and what was found."""

    check: str
    passed: bool
    detail: str


# Checks what was written for a recording: its path, the files by what they are, the
# figures, and what the agent said.
Check = Callable[[Path, dict[str, Path], Stats, Sequence[Word]], list[Outcome]]
