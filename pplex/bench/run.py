"""How fast a model answers here: the whole loop as a user runs it, and its parts.

One recording goes through ``Conversation.run`` as in ``pplex respond``, several through
``converse_many`` as in ``pplex batch``. The user's side is noise, which costs what
speech costs. Warming up is left out of every figure but its own.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from pplex.batch.decoding import is_out_of_memory
from pplex.bench.parts import Parts, Traffic, measure_parts, traffic
from pplex.bench.random_model import (
    DENSE_BITS,
    SIZES,
    random_model,
    random_prompt,
)
from pplex.checkpoint.hub import resolve
from pplex.conversation.compute import Choice, Compute, choose, load_as
from pplex.conversation.many import Item, converse_many
from pplex.conversation.prompt import Prefilled, prefill
from pplex.conversation.roles import DEFAULT_ROLE, ROLES
from pplex.conversation.session import (
    Conversation,
    Model,
    Timings,
    chunk_frames,
    make_role,
)
from pplex.errors import PplexError
from pplex.layers.device import on_cpu
from pplex.layers.memory import copy_bandwidth_gb_s, peak_process_gb
from pplex.model.sampling import SamplingConfig
from pplex.respond.stats import Latency, device_name, latency

SCHEMA = 1
SEED = 0
SAMPLING = SamplingConfig()
# Recordings a row where lengths are mixed, so that rows change hands.
_TURNS = 3
_WARM_UP_FRAMES_CPU = 4


@dataclass(frozen=True)
class Plan:
    """What to measure.

    A model by name, or ``random`` (a size) stored with ``bits``. Recordings have
    ``frames`` frames, or ``lengths`` (least, most) of them.
    """

    model_name: str
    random: str | None
    bits: int
    batch_sizes: tuple[int, ...]
    frames: int
    lengths: tuple[int, int] | None = None
    offline: bool = False
    compute: Compute = "auto"


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

    ``peak_process_gb`` is of the whole process, copies and all; a run's
    ``peak_memory_gb`` is what MLX held.
    """

    schema: int
    pplex: str
    mlx: str
    platform: str
    device: str
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


def bench(plan: Plan, note: Callable[[str], None]) -> Bench:
    """Measure; ``note`` is told what is being done."""
    note("loading" if plan.random is None else f"making a random {plan.random} model")
    model = _load(plan, note)
    start = time.perf_counter()
    prefilled = _prefill(model, plan)
    prefill_s = time.perf_counter() - start
    sizes = sorted(set(plan.batch_sizes))
    runs = []
    for size in sizes:
        note(f"batch size {size}")
        runs.append(_measured(plan, model, prefilled, size))
    peak_gb = peak_process_gb()
    # Last, as the arrays it copies may be larger than the model.
    bandwidth = copy_bandwidth_gb_s()
    return Bench(
        schema=SCHEMA,
        pplex=importlib.metadata.version("pplex"),
        mlx=importlib.metadata.version("mlx"),
        platform=platform.platform(),
        device=device_name(),
        dtype=model.dtype,
        model=model.local.name,
        bits=model.bits,
        compute=model.compute,
        frame_rate=model.config.frame_rate,
        frames=plan.frames,
        lengths=plan.lengths,
        prompt_frames=prefilled.prompt.num_frames,
        warm_up_frames=_warm_up_frames(_longest(plan)),
        load_s=model.load_s,
        prefill_s=prefill_s,
        copy_bandwidth_gb_s=bandwidth,
        peak_process_gb=peak_gb,
        runs=[_against(run, bandwidth) for run in runs],
    )


def _load(plan: Plan, note: Callable[[str], None]) -> Model:
    many = max(plan.batch_sizes) > 1
    if plan.random is None:
        local = resolve(plan.model_name, offline=plan.offline)
        model, choice = load_as(local, plan.compute, many=many)
    else:
        choice = Choice(True, f"stored in {plan.bits} bits")
        if plan.bits < DENSE_BITS:
            choice = choose(plan.compute, SIZES[plan.random].lm, many=many)
        model = random_model(plan.random, plan.bits, dense=choice.dense)
    note(f"compute {choice}")
    return model


def _prefill(model: Model, plan: Plan) -> Prefilled:
    if plan.random is None:
        return prefill(model.lm, make_role(model, None, ROLES[DEFAULT_ROLE]).prompt)
    return prefill(model.lm, random_prompt(model.config))


def _longest(plan: Plan) -> int:
    return plan.frames if plan.lengths is None else plan.lengths[1]


def _warm_up_frames(frames: int) -> int:
    """Frames that are run first, so that a GPU has seen every shape of chunk."""
    if on_cpu():
        return min(frames, _WARM_UP_FRAMES_CPU)
    size = chunk_frames()
    return min(frames, size + frames % size)


def _against(run: Run, bandwidth_gb_s: float) -> Run:
    if run.moved_gb_s is None:
        return run
    return replace(run, bandwidth_percent=100.0 * run.moved_gb_s / bandwidth_gb_s)


def _measured(plan: Plan, model: Model, prefilled: Prefilled, size: int) -> Run:
    try:
        return _run(plan, model, prefilled, size)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    raise PplexError(
        f"the memory does not suffice for batch size {size}: give smaller ones with "
        "--batch-size, or shorter recordings with --frames"
    )


def _run(plan: Plan, model: Model, prefilled: Prefilled, size: int) -> Run:
    warm = _warm_up_frames(_longest(plan))
    start = time.perf_counter()
    _answer(model, prefilled, _recordings(model, [warm] * size), size)
    warm_up_s = time.perf_counter() - start
    mx.reset_peak_memory()
    lengths = _lengths(plan, size)
    recordings = _recordings(model, lengths)
    start = time.perf_counter()
    timings = _answer(model, prefilled, recordings, size)
    wall_s = time.perf_counter() - start
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
        peak_memory_gb=mx.get_peak_memory() / 1e9,
    )
    if plan.lengths is not None:
        return run
    return _with_frames(run, model, prefilled, timings)


def _with_frames(
    run: Run,
    model: Model,
    prefilled: Prefilled,
    timings: Sequence[Timings],
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
    position = prefilled.prompt.num_frames + (count + 1) / 2
    moved = traffic(model, prefilled, rows, position)
    return replace(
        run,
        frame_ms=frame_ms,
        loop_ms=Loop(*(1000.0 * s / count for s in spent_s)),
        parts_ms=measure_parts(model, prefilled, SAMPLING, rows, count // 2),
        late_percent=100.0 * frame_ms.late_frames / count,
        real_time_factor=frame_ms.mean / 1000.0 * config.frame_rate,
        moved_mb=moved,
        moved_gb_s=moved.total / frame_ms.mean,
        frame_ms_series=[round(1000.0 * s, 3) for s in frame_s],
    )


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
    model: Model, prefilled: Prefilled, recordings: list[np.ndarray], size: int
) -> list[Timings]:
    """Answer ``recordings``, ``size`` at a time; what each took."""
    if len(recordings) == 1:
        conversation = Conversation(model, prefilled, SAMPLING, SEED)
        chunk = chunk_frames()
        frames = recordings[0].reshape(-1, model.config.frame_size)
        chunks = (frames[i : i + chunk] for i in range(0, len(frames), chunk))
        for reply in conversation.run(chunks, decode_frames=chunk):
            _check(reply.pcm)
        return [conversation.timings]
    items = (
        Item(idx, pcm, prefilled, SEED + idx) for idx, pcm in enumerate(recordings)
    )
    timings = []
    for result in converse_many(model, items, SAMPLING, batch_size=size):
        _check(result.agent_pcm)
        timings.append(result.timings)
    return timings


def _check(pcm: np.ndarray) -> None:
    if not np.isfinite(pcm).all():
        raise PplexError("the model gave sound that is no finite number")
