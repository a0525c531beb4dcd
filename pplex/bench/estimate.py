"""How fast a model will be here, from a short measurement of the engine that runs it.

A small model is run as it is. Of a large one two are made that have its widths and few
of its layers: what one layer takes and what the rest takes follows from both.
"""

from __future__ import annotations

import time
from dataclasses import replace

import mlx.core as mx
import numpy as np

from pplex.bench.parts import measure_parts
from pplex.bench.random_model import random_codec, random_lm, random_prompt
from pplex.conversation.scheduler import converse
from pplex.engine.base import Engine, Start
from pplex.engine.choose import choose_form, cost_of, make_engine
from pplex.engine.device import memory_gb
from pplex.model.config import ModelConfig
from pplex.model.sampling import SamplingConfig

SMALL_BYTES = 400 << 20  # of weights a step reads: such a model is run as it is
FRAMES = 128  # ten seconds
_LAYERS = 2, 4
_TEXT_CARD = 2048
_STEPS = 10


def estimate_frame_s(config: ModelConfig, bits: int) -> float | None:
    """Seconds that a frame takes, of a model stored with ``bits``, answered alone.

    None where the memory does not even suffice for a small part of it.
    """
    tensors = random_lm(config.lm, bits)
    dense = choose_form("auto", config, tensors, many=False).dense
    whole = cost_of(config, tensors.write_out() if dense else tensors)
    if whole.step <= SMALL_BYTES:
        return loop_frame_s(*_begin(config, bits, dense))
    few, more = (
        replace(config, lm=replace(config.lm, num_layers=n, text_card=_TEXT_CARD))
        for n in _LAYERS
    )
    if (probe := _part(few, bits, dense)) is None:
        return None
    step_s, layer_bytes, codec_s, is_concurrent = probe
    if (other := _part(more, bits, dense)) is None:
        return None
    layer_s = (other[0] - step_s) / (_LAYERS[1] - _LAYERS[0])
    per_layer = (other[1] - layer_bytes) / (_LAYERS[1] - _LAYERS[0])
    # What is left to read, most of it layers: at a layer's pace.
    step_s += layer_s * (whole.step - layer_bytes) / per_layer
    return max(step_s, codec_s) if is_concurrent else step_s + codec_s


def _part(
    config: ModelConfig, bits: int, dense: bool
) -> tuple[float, int, float, bool] | None:
    """A step's seconds, the bytes it reads, the codec's seconds, if it runs beside."""
    tensors = random_lm(config.lm, bits)
    _, free = memory_gb()
    need = cost_of(config, tensors.write_out() if dense else tensors).held
    if free is not None and 2 * need > 1e9 * free:
        return None
    engine, start = _begin(config, bits, dense)
    parts = measure_parts(engine, 1)
    codec_s = (parts.encode + parts.decode) / 1000.0
    return (
        step_s(engine, start),
        engine.cost().step,
        codec_s,
        engine.codec.concurrent,
    )


def _begin(config: ModelConfig, bits: int, dense: bool) -> tuple[Engine, Start]:
    tensors = random_lm(config.lm, bits)
    if dense:
        tensors = tensors.write_out()
    # Rows of tables are looked up, whatever they hold: zeros are made faster.
    table = tensors.weights["audio_emb.weight"]
    tensors.weights["audio_emb.weight"] = mx.zeros(table.shape, table.dtype)
    engine = make_engine(config, tensors, random_codec(config.mimi))
    return engine, engine.prefill(random_prompt(config))


def step_s(engine: Engine, start: Start) -> float:
    """The median seconds of a step of one row."""
    rows = engine.rows(1, SamplingConfig())
    rows.join(start, 0, 2 * _STEPS)
    user = np.zeros((1, engine.config.lm.num_codebooks), np.int32)
    spent = []
    for _ in range(2 * _STEPS):
        begun = time.perf_counter()
        rows.step(user).tokens()
        spent.append(time.perf_counter() - begun)
    return float(np.median(spent[_STEPS:]))


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
