"""What a run took: the figures of ``--stats`` and of the summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pplex.files import PIPE, Place, put, write_text
from pplex.respond.ending import Ending
from pplex.respond.manifest import installed
from pplex.respond.request import Request
from pplex.respond.transcript import Word

if TYPE_CHECKING:
    from pplex.checkpoint.hub import LocalModel
    from pplex.conversation.session import Model


@dataclass(frozen=True)
class Latency:
    """Milliseconds a step took, and how many took longer than a frame lasts."""

    p50: float
    p95: float
    p99: float
    max: float
    mean: float
    late_frames: int


def latency(steps_s: Sequence[float], frame_s: float) -> Latency:
    """Summarise the seconds of each step; a frame lasts ``frame_s``."""
    ms = np.array(steps_s, np.float64) * 1000.0
    p50, p95, p99 = (float(p) for p in np.percentile(ms, [50, 95, 99]))
    late = int((ms > 1000.0 * frame_s).sum())
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

    Of streams only: ``latency_ms`` from a frame's last sample to its reply;
    ``latency_with_step_ms``, what it would be were the reply not made before;
    ``start_up_frames`` that came before the model was ready and were late; and
    ``source_pace``, audio time over the time it took to come since. A source faster
    than real time has no latency. ``skipped_s`` came before the model was ready and
    was left out, with ``--live``; so were ``left_out_frames`` of the reply, of which a
    player had too many.

    ``step_ms_series`` has the milliseconds of every step, for one recording only: a
    stream has no end, and a batch's steps belong to many.
    """

    input: str
    outputs: dict[str, str]
    audio_s: float
    tail_s: float
    words: int
    cut_off: bool
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
    kernels: str
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
    start_s: float = 0.0
    script: list[dict[str, object]] | None = None
    resume: str | None = None
    latency_ms: Latency | None = None
    latency_with_step_ms: Latency | None = None
    start_up_frames: int | None = None
    source_pace: float | None = None
    skipped_s: float = 0.0
    left_out_frames: int = 0
    step_ms_series: list[float] | None = None

    def write(self, path: Path, place: Place = put) -> None:
        """Write the figures as JSON, whole or not at all; ``place`` as there."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_text(path, text, place=place)


_PARTS = ("load", "read", "prefill", "warm_up", "encode", "steps", "decode", "write")


@dataclass(frozen=True)
class ModelInfo:
    """What the figures of a run say of a loaded model and of its machine.

    ``peak_memory_gb`` is the most held so far, on a GPU by MLX, else by this process.
    """

    device: str
    dtype: str
    bits: tuple[int, ...]
    compute: str
    kernels: str
    layout: str
    peak_memory_gb: float


def model_info(model: Model) -> ModelInfo:
    """The facts as they are now."""
    from pplex.engine.choose import kernels_of
    from pplex.engine.device import device_name, peak_memory_gb

    return ModelInfo(
        device=device_name(),
        dtype=model.engine.dtype,
        bits=model.bits,
        compute=model.engine.compute + model.engine.codec.form,
        kernels=kernels_of(model.engine),
        layout=model.layout,
        peak_memory_gb=peak_memory_gb(),
    )


@dataclass(frozen=True)
class Source:
    """The sound that was answered: its length, tail included, and how it came."""

    audio_s: float
    tail_s: float
    rate: int
    channels: int


def make_stats(
    request: Request,
    source: Source,
    ending: Ending,
    local: LocalModel,
    info: ModelInfo,
    step_ms: Latency,
    frames: int,
    seconds: Mapping[str, float],
    *,
    voice: str,
    prompt_frames: int,
    total_s: float | None = None,
    steps_s: Sequence[float] | None = None,
) -> Stats:
    """The figures of a run whose last part is done.

    ``seconds`` has wall time by the parts of ``Stats``; those it lacks took none.
    ``total_s`` is their sum unless it is given. ``steps_s`` are the seconds of each
    step, for a list of them.
    """
    parts = {part: seconds.get(part, 0.0) for part in _PARTS}
    known_s = sum(parts.values())
    total_s = known_s if total_s is None else total_s
    computing_s = total_s - parts["load"] - parts["warm_up"]
    if request.source == PIPE:  # a stream is waited for while it is read
        computing_s -= parts["read"]
    spent: dict[str, Any] = {f"{part}_s": s for part, s in parts.items()}
    settings = request.settings
    return Stats(
        input=str(request.source),
        outputs={k: str(path) for k, path in request.outputs.files().items()},
        audio_s=source.audio_s,
        tail_s=source.tail_s,
        words=ending.words,
        cut_off=ending.cut_off,
        frames=frames,
        prompt_frames=prompt_frames,
        **spent,
        other_s=total_s - known_s,
        total_s=total_s,
        step_ms=step_ms,
        real_time_factor=computing_s / source.audio_s,
        real_time_factor_with_load=total_s / source.audio_s,
        **vars(info),
        model=local.name,
        repo=local.repo,
        revision=local.revision,
        voice=voice,
        prompt=settings.text or "",
        seed=settings.seed,
        **vars(settings.sampling),
        channel=settings.channel,
        start_s=settings.part.start_s if settings.part else 0.0,
        script=settings.said() or None,
        resume=None if settings.resume is None else str(settings.resume),
        source_rate=source.rate,
        source_channels=source.channels,
        pplex=installed("pplex"),
        mlx=installed("mlx"),
        step_ms_series=([round(1000.0 * s, 3) for s in steps_s] if steps_s else None),
    )


@dataclass(frozen=True)
class Outcome:
    """A check of an answer: its name, whether it passed, and what was found."""

    check: str
    passed: bool
    detail: str


class Check(Protocol):
    """Checks what was written for a recording."""

    def asked(self) -> dict[str, Any]:
        """What is asked, as JSON has it: the same question gives the same."""

    def __call__(
        self,
        source: Path,
        files: dict[str, Path],
        figures: Mapping[str, Any],
        words: Sequence[Word] | None,
    ) -> list[Outcome]:
        """Check the answer to ``source`` in ``files``, by what they are.

        ``figures`` are those of ``Stats``, as far as they are known; they and what
        the agent said are looked for beside the output where they are not.
        """
