"""How fast a model answers here: the whole loop as a user runs it, and its parts.

One recording goes through ``Conversation.run`` as in ``pplex respond``, several through
``converse_many`` as in ``pplex batch``. The user's side is noise, which costs what
speech costs. Warming up is left out of every figure but its own.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from pplex.audio.files import Samples
from pplex.audio.streams import LiveFrame
from pplex.bench.parts import Parts, Traffic, measure_parts, traffic
from pplex.bench.random_model import random_model, random_prompt
from pplex.checkpoint.hub import resolve
from pplex.conversation.answer import Timings
from pplex.conversation.prompts import make_role
from pplex.conversation.scheduler import converse, converse_live, converse_many
from pplex.conversation.session import Model, load
from pplex.conversation.tracks import Conversation
from pplex.engine.base import Start
from pplex.engine.choose import Compute
from pplex.engine.device import (
    copy_bandwidth_gb_s,
    device_name,
    is_out_of_memory,
    measurable,
    peak_memory_gb,
    peak_process_gb,
    reset_peak_memory,
)
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig
from pplex.respond.stats import Latency, latency

SCHEMA = 1
SEED = 0
SAMPLING = SamplingConfig()
# Recordings a row where lengths are mixed, so that rows change hands.
_TURNS = 3
_WARM_UP_FRAMES = 4


@dataclass(frozen=True)
class Plan:
    """What to measure.

    A model by name, or ``random`` (a size) stored with ``bits``. Recordings have
    ``frames`` frames, or ``lengths`` (least, most) of them. Then ``live_s`` seconds are
    answered as they come.
    """

    model_name: str
    random: str | None
    bits: int
    batch_sizes: tuple[int, ...]
    frames: int
    lengths: tuple[int, int] | None = None
    offline: bool = False
    compute: Compute = "auto"
    kv_bits: int | None = None
    live_s: int = 0


@dataclass(frozen=True)
class Loop:
    """Where a mean frame's milliseconds went in the whole loop, as it saw them itself.

    ``rest`` is what is left: the loop's own work, less what ran at the same time.
    """

    encode: float
    step: float
    decode: float
    rest: float


@dataclass(frozen=True)
class Run:
    """The figures of one batch size; a frame is a step of all its rows.

    ``frame_ms`` is a step's time and an even share of all else, the codec above all.
    ``tokens`` are those the model chose. ``moved_gb_s`` is ``moved_mb`` at the mean
    frame's pace, ``bandwidth_percent`` that against the measured copies. Where lengths
    are mixed a step has no fixed number of rows: what depends on it is None.
    """

    batch_size: int
    recordings: int
    frames: int
    tokens: int
    audio_s: float
    wall_s: float
    warm_up_s: float
    audio_s_per_s: float
    peak_memory_gb: float
    frame_ms: Latency | None = None
    loop_ms: Loop | None = None
    parts_ms: Parts | None = None
    late_percent: float | None = None
    real_time_factor: float | None = None
    moved_mb: Traffic | None = None
    moved_gb_s: float | None = None
    bandwidth_percent: float | None = None
    frame_ms_series: list[float] | None = None


@dataclass(frozen=True)
class Bench:
    """Everything ``pplex bench`` found out; seconds are wall time.

    ``engine`` is what ran the model. ``peak_process_gb`` is of the whole process; a
    run's ``peak_memory_gb`` on a GPU is what MLX held, else the process so far.
    ``live_ms`` is from the end of a user's frame, in real time, to the sound after it.
    """

    schema: int
    pplex: str
    mlx: str
    platform: str
    device: str
    engine: str
    dtype: str
    model: str
    bits: tuple[int, ...]
    compute: str
    frame_rate: float
    frames: int
    lengths: tuple[int, int] | None
    prompt_frames: int
    warm_up_frames: int
    load_s: float
    prefill_s: float
    copy_bandwidth_gb_s: float
    peak_process_gb: float | None
    runs: list[Run]
    live_ms: Latency | None


def bench(plan: Plan, note: Callable[[str], None]) -> Bench:
    """Measure; ``note`` is told what is being done."""
    note("loading" if plan.random is None else f"making a random {plan.random} model")
    model = _load(plan, note)
    start = time.perf_counter()
    begin = _prefill(model, plan)
    prefill_s = time.perf_counter() - start
    sizes = sorted(set(plan.batch_sizes))
    runs = []
    for size in sizes:
        note(f"batch size {size}")
        runs.append(_measured(plan, model, begin, size))
    live_ms = None
    if plan.live_s:
        note(f"{plan.live_s} s live")
        live_ms = _live(model, begin, plan.live_s)
    peak_gb = peak_process_gb()
    # Last, as the arrays it copies may be larger than the model.
    bandwidth = copy_bandwidth_gb_s()
    return Bench(
        schema=SCHEMA,
        pplex=importlib.metadata.version("pplex"),
        mlx=importlib.metadata.version("mlx"),
        platform=platform.platform(),
        device=device_name(),
        engine=model.engine.name,
        dtype=model.engine.dtype,
        model=model.local.name,
        bits=model.bits,
        compute=model.engine.compute,
        frame_rate=model.config.frame_rate,
        frames=plan.frames,
        lengths=plan.lengths,
        prompt_frames=begin.prompt.num_frames,
        warm_up_frames=_warm_up_frames(model, _longest(plan)),
        load_s=model.load_s,
        prefill_s=prefill_s,
        copy_bandwidth_gb_s=bandwidth,
        peak_process_gb=peak_gb,
        runs=[_against(run, bandwidth) for run in runs],
        live_ms=live_ms,
    )


def _load(plan: Plan, note: Callable[[str], None]) -> Model:
    many, kv_bits = max(plan.batch_sizes) > 1, plan.kv_bits
    if plan.random is None:
        local = resolve(plan.model_name, offline=plan.offline)
        model = load(local, compute=plan.compute, kv_bits=kv_bits, many=many)
    else:
        size, bits, compute = plan.random, plan.bits, plan.compute
        model = random_model(size, bits, compute, kv_bits=kv_bits, many=many)
    note(f"compute {model.form}")
    return model


def _prefill(model: Model, plan: Plan) -> Start:
    if plan.random is None:
        prompt = make_role(model, None, None).prompt
    else:
        prompt = random_prompt(model.config)
    return model.engine.prefill(prompt)


def _longest(plan: Plan) -> int:
    return plan.frames if plan.lengths is None else plan.lengths[1]


def _warm_up_frames(model: Model, frames: int) -> int:
    """Frames that are run first, so that a GPU has seen every shape of chunk."""
    if not model.engine.is_async:
        return min(frames, _WARM_UP_FRAMES)
    size = model.engine.codec.chunk_frames
    return min(frames, size + frames % size)


def _against(run: Run, bandwidth_gb_s: float) -> Run:
    if run.moved_gb_s is None:
        return run
    return replace(run, bandwidth_percent=100.0 * run.moved_gb_s / bandwidth_gb_s)


def _measured(plan: Plan, model: Model, start: Start, size: int) -> Run:
    try:
        return _run(plan, model, start, size)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    raise PplexError(
        f"the memory does not suffice for batch size {size}: give smaller ones with "
        "--batch-size, or shorter recordings with --frames"
    )


def _run(plan: Plan, model: Model, start: Start, size: int) -> Run:
    warm = _warm_up_frames(model, _longest(plan))
    begun = time.perf_counter()
    _answer(model, start, _recordings(model, [warm] * size), size)
    warm_up_s = time.perf_counter() - begun
    reset_peak_memory()
    lengths = _lengths(plan, size)
    recordings = _recordings(model, lengths)
    begun = time.perf_counter()
    timings = _answer(model, start, recordings, size)
    wall_s = measurable(time.perf_counter() - begun)
    audio_s = sum(lengths) / model.config.frame_rate
    run = Run(
        batch_size=size,
        recordings=len(lengths),
        frames=sum(lengths),
        tokens=sum(lengths) * model.config.lm.num_agent_streams,
        audio_s=audio_s,
        wall_s=wall_s,
        warm_up_s=warm_up_s,
        audio_s_per_s=audio_s / wall_s,
        peak_memory_gb=peak_memory_gb(),
    )
    if plan.lengths is not None:
        return run
    return _with_frames(run, model, start, timings)


def _with_frames(
    run: Run, model: Model, start: Start, timings: Sequence[Timings]
) -> Run:
    """``run`` with what can be told where all rows step together from end to end."""
    rows, config = run.batch_size, model.config
    # Every row has an equal share of a step.
    steps = [rows * share for share in timings[0].steps]
    count, steps_s = len(steps), sum(steps)
    encode_s = sum(one.encode_s for one in timings)
    decode_s = sum(one.decode_s for one in timings)
    spent_s = (encode_s, steps_s, decode_s, run.wall_s - encode_s - steps_s - decode_s)
    frame_s = [step + (run.wall_s - steps_s) / count for step in steps]
    frame_ms = latency(frame_s, config.frame_s)
    position = start.prompt.num_frames + (count + 1) / 2
    moved = traffic(model.engine, rows, position)
    return replace(
        run,
        frame_ms=frame_ms,
        loop_ms=Loop(*(1000.0 * s / count for s in spent_s)),
        parts_ms=measure_parts(model.engine, rows),
        late_percent=100.0 * frame_ms.late_frames / count,
        real_time_factor=frame_ms.mean / 1000.0 * config.frame_rate,
        moved_mb=moved,
        moved_gb_s=moved.total / frame_ms.mean,
        frame_ms_series=[round(1000.0 * s, 3) for s in frame_s],
    )


def _live(model: Model, start: Start, seconds: int) -> Latency:
    """Answer noise that comes frame by frame, in real time."""
    config = model.config
    (pcm,) = _recordings(model, [round(seconds * config.frame_rate)])

    def frames() -> Iterator[LiveFrame]:
        due = time.perf_counter()
        for frame in pcm.reshape(-1, config.frame_size):
            due += config.frame_s
            time.sleep(max(0.0, due - time.perf_counter()))
            yield LiveFrame(frame, len(frame), due)

    delays = [
        time.perf_counter() - cast(float, frame.arrived)
        for frame, _ in converse_live(model.engine, start, SEED, frames(), SAMPLING)
    ]
    return latency(delays, config.frame_s)


def _lengths(plan: Plan, size: int) -> list[int]:
    """Frames of each recording."""
    if plan.lengths is None:
        return [plan.frames] * size
    low, high = plan.lengths
    rng = np.random.default_rng(SEED)
    return rng.integers(low, high + 1, _TURNS * size).tolist()


def _recordings(model: Model, lengths: Sequence[int]) -> list[np.ndarray]:
    """Noise (samples,), as quiet as speech."""
    frame_size = model.config.frame_size
    noise = np.random.default_rng(SEED).uniform(-0.1, 0.1, max(lengths) * frame_size)
    noise = noise.astype(np.float32)
    return [noise[: length * frame_size] for length in lengths]


def _answer(
    model: Model, start: Start, recordings: list[np.ndarray], size: int
) -> list[Timings]:
    """Answer ``recordings``, ``size`` at a time; what each took."""
    engine, chunk = model.engine, model.engine.codec.chunk_frames
    timings = []
    if len(recordings) == 1:
        frames = recordings[0].reshape(-1, model.config.frame_size)
        chunks = (frames[i : i + chunk] for i in range(0, len(frames), chunk))
        pieces = converse(engine, start, SEED, chunks, SAMPLING, decode_frames=chunk)
        for piece in pieces:
            _check(piece.pcm)
        return [piece.timings]
    conversations = (
        Conversation(str(idx), Samples(pcm), start, SEED + idx)
        for idx, pcm in enumerate(recordings)
    )
    for _, answer in converse_many(engine, conversations, SAMPLING, batch_size=size):
        _check(answer.pcm)
        timings.append(answer.timings)
    return timings


def _check(pcm: np.ndarray) -> None:
    if not np.isfinite(pcm.sum()):
        raise PplexError("the model gave sound that is no finite number")
