"""How fast a model will be here, from a short measurement of the engine that runs it.

A small model is run as it is. Where a step takes the time of reading its weights, that
speed is measured. Elsewhere two models are made that have the widths of a large one and
few of its layers: what one layer takes and what the rest takes follows from both. As
such parts may lie in a server's cache, which the whole would not, other memory is read
before each step.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from pplex.bench.parts import measure_parts
from pplex.bench.random_model import TINY, random_codec, random_lm, random_prompt
from pplex.checkpoint.hub_cache import cached_snapshot
from pplex.checkpoint.known import KNOWN_MODELS, PUBLISHED_BITS
from pplex.checkpoint.weights import LmTensors
from pplex.conversation.scheduler import converse
from pplex.engine.base import Engine, Start
from pplex.engine.choose import (
    KINDS,
    choose_form,
    cost_of,
    kind_here,
    make_engine,
    need_bytes,
)
from pplex.engine.device import available_gb, memory_gb, num_cores
from pplex.model.config import MimiConfig, ModelConfig
from pplex.model.prompt import Prompt, initial_column
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import NOT_FORCED
from pplex.units import duration

SMALL_BYTES = 400 << 20  # of weights a step reads: such a model is run as it is
FRAMES = 128  # ten seconds
_BEST_FIRST = "bf16", "8bit", "4bit"
_LIVE_FACTOR = 0.9  # real-time factor; above it a live stream is not kept up with
_MEAN_POSITION = 192  # a prompt, and half of FRAMES
_LAYERS = 1, 3
_TEXT_CARD = 2048
_WARM_UP, _STEPS = 4, 12
_CACHE_BYTES = 1 << 29


def need_gb(config: ModelConfig, tensors: LmTensors) -> float:
    """What a conversation with a full memory takes, weights and all, in GB."""
    form = choose_form("auto", config, tensors, many=False)
    if form.dense:
        tensors = tensors.write_out()
    return need_bytes(config, cost_of(config, tensors, alone=form.alone)) / 1e9


def published_need_gb(name: str, kv_bits: int | None = None) -> float | None:
    """``need_gb`` of a published 7B, on disk or not; None for other names.

    Its keys and values are kept in ``kv_bits``.
    """
    bits, config = PUBLISHED_BITS.get(name), ModelConfig().with_kv_bits(kv_bits)
    return None if bits is None else need_gb(config, random_lm(config.lm, bits))


@functools.cache
def estimate_published(name: str) -> float | None:
    """The real-time factor of a published 7B here; None for other names."""
    bits, config = PUBLISHED_BITS.get(name), ModelConfig()
    frame_s = None if bits is None else estimate_frame_s(config, bits)
    return None if frame_s is None else frame_s * config.frame_rate


@dataclass(frozen=True)
class Choice:
    """The best published model that this machine has the memory and the speed for.

    ``takes`` is its need in words, and ``passed`` says of each better one why not.
    """

    name: str
    takes: str
    passed: tuple[str, ...]


def best_model(*, offline: bool, kv_bits: int | None = None) -> Choice:
    """What ``--model auto`` is: the best that fits and keeps up with the sound.

    Only models on disk where nothing may be downloaded; one whose licence must be
    accepted first is always one of these.
    """
    passed = []
    for name in _BEST_FIRST:
        need_gb, known = published_need_gb(name, kv_bits), KNOWN_MODELS[name]
        assert known.repo is not None and need_gb is not None
        if (offline or known.is_gated) and not cached_snapshot(known.repo, None):
            passed.append(f"{name} is not on this machine")
            continue
        room_gb = available_gb()
        if room_gb is not None and need_gb > room_gb:
            passed.append(f"{name} takes {need_gb:.1f} GB of memory, of {room_gb:.1f}")
            continue
        factor = estimate_published(name)
        if factor is None or factor >= _LIVE_FACTOR:
            speed = "an unknown time" if factor is None else minute_in_words(factor)
            passed.append(f"{name} takes {speed}")
            continue
        takes = f"{need_gb:.1f} GB of memory, {minute_in_words(factor)}"
        return Choice(name, takes, tuple(passed))
    return Choice("mini", "it runs anywhere", tuple(passed))


def minute_in_words(real_time_factor: float) -> str:
    """How long a minute of sound takes, for somebody who waits for it."""
    return f"about {duration(60 * real_time_factor)} for a minute of sound"


def live_in_words(real_time_factor: float) -> str:
    """Whether a live stream is kept up with."""
    if real_time_factor < _LIVE_FACTOR:
        return "keeps up with a live stream"
    return "slower than real time"


def estimate_frame_s(config: ModelConfig, bits: int) -> float | None:
    """Seconds that a frame takes, of a model stored with ``bits``, answered alone.

    None where the memory does not even suffice for a small part of it.
    """
    tensors = random_lm(config.lm, bits)
    dense = choose_form("auto", config, tensors, many=False).dense
    whole = cost_of(config, _tensors(config, bits, dense))
    if whole.step <= SMALL_BYTES:
        engine = _make_engine(config, bits, dense)
        return loop_frame_s(engine, engine.prefill(random_prompt(config)))
    measure = KINDS[kind_here()].bytes_per_s
    if measure is not None:
        read = whole.step + whole.position * min(config.lm.window, _MEAN_POSITION)
        codec_s, _ = _codec_s(config.mimi)
        return read / measure(16 if dense else bits) + codec_s / num_cores()
    parts = []
    for layers in _LAYERS:
        lm = replace(config.lm, num_layers=layers, text_card=_TEXT_CARD)
        if (part := _part(replace(config, lm=lm), bits, dense)) is None:
            return None
        parts.append(part)
    (step_s, more_s), (read, more_read) = _steps(parts)
    # What is left to read, most of it layers: at a layer's pace.
    step_s += (more_s - step_s) / (more_read - read) * (whole.step - read)
    codec_s, is_concurrent = _codec_s(config.mimi)
    return max(step_s, codec_s) if is_concurrent else step_s + codec_s


def _part(config: ModelConfig, bits: int, dense: bool) -> Engine | None:
    """A model that is small enough to be tried; None where memory does not suffice."""
    _, free = memory_gb()
    need = cost_of(config, _tensors(config, bits, dense)).held
    if free is not None and 2 * need > 1e9 * free:
        return None
    return _make_engine(config, bits, dense)


@functools.cache
def _codec_s(config: MimiConfig) -> tuple[float, bool]:
    """The codec's seconds of a frame, and whether it works beside the steps."""
    engine = _make_engine(replace(TINY, mimi=config), bits=16, dense=False)
    parts = measure_parts(engine, 1)
    return (parts.encode + parts.decode) / 1000.0, engine.codec.concurrent


def _tensors(config: ModelConfig, bits: int, dense: bool) -> LmTensors:
    """In the form that is faster; nothing is computed yet."""
    tensors = random_lm(config.lm, bits)
    return tensors.write_out() if dense else tensors


def _make_engine(config: ModelConfig, bits: int, dense: bool) -> Engine:
    tensors = _tensors(config, bits, dense)
    # Rows of tables are looked up, whatever they hold: zeros are made faster.
    table = tensors.weights["audio_emb.weight"]
    tensors.weights["audio_emb.weight"] = mx.zeros(table.shape, table.dtype)
    codec = {n: mx.zeros_like(w) for n, w in random_codec(config.mimi).items()}
    return make_engine(config, tensors, codec, alone=True)


def _steps(engines: Sequence[Engine]) -> tuple[list[float], list[int]]:
    """Median seconds of a step of one row of each, and the bytes it reads.

    No cache holds the weights. The engines take turns: what slows a machine down for a
    while slows all of them.
    """
    steps = [_stepper(engine) for engine in engines]
    other = np.zeros(_CACHE_BYTES // 8)
    spent: list[list[float]] = [[] for _ in engines]
    for _ in range(_STEPS):
        for step, seconds in zip(steps, spent, strict=True):
            other += 1.0
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
    medians = [float(np.median(seconds)) for seconds in spent]
    return medians, [engine.cost().step for engine in engines]


def _stepper(engine: Engine) -> Callable[[], object]:
    """A function that makes another step of one row, which has made some."""
    config = engine.config.lm
    nothing = np.full(config.num_streams, NOT_FORCED, np.int32)
    columns = np.stack([initial_column(config)] * 2, axis=1)
    rows = engine.rows(1, SamplingConfig())
    rows.join(engine.prefill(Prompt(None, columns, nothing)), 0)
    user = np.zeros((1, config.num_codebooks), np.int32)
    for _ in range(_WARM_UP):
        rows.step(user).tokens()
    return lambda: rows.step(user).tokens()


def loop_frame_s(engine: Engine, start: Start) -> float:
    """Seconds a frame in the whole loop, codec included, as ``respond`` runs it.

    A recording is answered twice, and the first time is not counted.
    """
    size, chunk = engine.config.frame_size, engine.codec.chunk_frames
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (FRAMES, size))
    frames, spent_s = noise.astype(np.float32), 0.0
    for _ in range(2):
        begun = time.perf_counter()
        chunks = (frames[i : i + chunk] for i in range(0, FRAMES, chunk))
        for piece in converse(
            engine, start, 0, chunks, SamplingConfig(), decode_frames=chunk
        ):
            if not np.isfinite(piece.pcm).all():
                return float("nan")
        spent_s = time.perf_counter() - begun
    return spent_s / FRAMES
