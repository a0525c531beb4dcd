"""The figures of one recording's run, from whoever ran it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from pplex.checkpoint.hub import LocalModel
from pplex.conversation.session import Model
from pplex.files import PIPE
from pplex.layers.device import on_cpu
from pplex.respond.settings import Settings
from pplex.respond.stats import Latency, Stats

# The parts of a run that Stats has seconds of; those nobody names took none.
PARTS = ("load", "read", "prefill", "warm_up", "encode", "steps", "decode", "write")


@dataclass(frozen=True)
class Facts:
    """What the figures of a run say of model and machine.

    ``peak_memory_gb`` is the most that MLX has held so far.
    """

    device: str
    dtype: str
    bits: tuple[int, ...]
    compute: str
    layout: str
    peak_memory_gb: float


def facts_of(model: Model) -> Facts:
    """The facts as they are now."""
    return Facts(
        device=device_name(),
        dtype=model.dtype,
        bits=model.bits,
        compute=model.compute,
        layout=model.layout,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
    )


def device_name() -> str:
    """The device that MLX computes on, with its name where MLX knows one."""
    device = mx.default_device()
    kind = "cpu" if on_cpu() else "gpu"
    name = mx.device_info(device).get("device_name", "")
    return f"{kind} ({name})" if name else kind


@dataclass(frozen=True)
class About:
    """What was answered, how and by what.

    ``audio_s`` includes the tail; ``rate`` and ``channels`` are the recording's own.
    """

    source: Path
    outputs: Mapping[str, Path]
    audio_s: float
    rate: int
    channels: int
    settings: Settings
    voice: str
    prompt_frames: int
    local: LocalModel
    facts: Facts


def make_stats(
    about: About,
    seconds: Mapping[str, float],
    step_ms: Latency,
    frames: int,
    *,
    total_s: float | None = None,
    steps_s: Sequence[float] | None = None,
) -> Stats:
    """The figures of a run whose last part is done.

    ``seconds`` has wall time by part, see ``PARTS``; ``total_s`` is their sum unless
    it is given. ``steps_s`` are the seconds of each step, for a list of them.
    """
    parts = {f"{part}_s": seconds.get(part, 0.0) for part in PARTS}
    known_s = sum(parts.values())
    total_s = known_s if total_s is None else total_s
    computing_s = total_s - parts["load_s"] - parts["warm_up_s"]
    if about.source == PIPE:  # a stream is waited for while it is read
        computing_s -= parts["read_s"]
    settings, sampling = about.settings, about.settings.sampling
    local, facts = about.local, about.facts
    return Stats(
        input=str(about.source),
        outputs={what: str(path) for what, path in about.outputs.items()},
        audio_s=about.audio_s,
        tail_s=settings.tail_s,
        frames=frames,
        prompt_frames=about.prompt_frames,
        **parts,
        other_s=total_s - known_s,
        total_s=total_s,
        step_ms=step_ms,
        real_time_factor=computing_s / about.audio_s,
        real_time_factor_with_load=total_s / about.audio_s,
        peak_memory_gb=facts.peak_memory_gb,
        device=facts.device,
        dtype=facts.dtype,
        bits=facts.bits,
        compute=facts.compute,
        layout=facts.layout,
        model=local.name,
        repo=local.repo,
        revision=local.revision,
        voice=about.voice,
        prompt=settings.text,
        seed=settings.seed,
        temp=sampling.temp,
        top_k=sampling.top_k,
        text_temp=sampling.text_temp,
        text_top_k=sampling.text_top_k,
        channel=settings.channel,
        source_rate=about.rate,
        source_channels=about.channels,
        pplex=importlib.metadata.version("pplex"),
        mlx=importlib.metadata.version("mlx"),
        step_ms_series=steps_s and [round(1000.0 * s, 3) for s in steps_s],
    )
