"""The parts of a frame, each run by itself, and the bytes a frame must move.

In the step loop parts overlap: a GPU works on the next frame while this one is decoded.
Here each part is run alone and waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from pplex.conversation.generate import make_frame, make_sampler
from pplex.conversation.many import GROUP, in_groups
from pplex.conversation.prompt import Prefilled
from pplex.conversation.session import Model, chunk_frames
from pplex.layers.cache import Cache, KvCache, RowCaches, SlotCache
from pplex.layers.cuda.cache import SharedCache
from pplex.layers.device import on_cpu
from pplex.model.native import native_lm
from pplex.model.sampling import SamplingConfig, noise_keys

_ROUNDS = 12
_CODEC_ROUNDS = 3
_POSITIONS = 512  # read at a time to fill a cache


@dataclass(frozen=True)
class Parts:
    """Milliseconds a frame of all rows, the median of some runs of each part alone.

    ``depformer`` is all of a step after the temporal transformer: text head, depformer
    and sampling. Both are None where something other than MLX's operations makes the
    step, in one piece.
    """

    encode: float
    temporal: float | None
    depformer: float | None
    decode: float


@dataclass(frozen=True)
class Traffic:
    """MB (1e6 bytes) that a frame of all rows must move at least.

    ``weights`` of the language model are read once a step; ``kv`` is what attention
    reads at the mean length of the run; ``codec`` its weights and keys, once a chunk.
    """

    weights: float
    kv: float
    codec: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.kv + self.codec


def measure_parts(
    model: Model,
    prefilled: Prefilled,
    sampling: SamplingConfig,
    rows: int,
    position: int,
) -> Parts:
    """Time the parts with ``rows`` recordings that have come ``position`` frames."""
    encode, decode = _codec_ms(model, rows)
    temporal = depformer = None
    start = prefilled.start(model.config.lm, 0, beside_others=rows > 1)
    if type(start.cache) is KvCache:
        temporal, depformer = _step_ms(model, prefilled, sampling, rows, position)
    return Parts(encode, temporal, depformer, decode)


def _codec_ms(model: Model, rows: int) -> tuple[float, float]:
    """Encoding and decoding of a frame of all rows, in chunks as the loop has them."""
    codec, count = model.codec, chunk_frames()
    rng = np.random.default_rng(1)
    pcm = rng.uniform(-0.1, 0.1, (count, model.config.frame_size)).astype(np.float32)
    group = _group(model, rows)
    if group > 1:
        codes = codec.encode_many([pcm] * group)
        codec.decode_many(codes)
        encode = _median_ms(lambda: codec.encode_many([pcm] * group), _CODEC_ROUNDS)
        decode = _median_ms(lambda: codec.decode_many(codes), _CODEC_ROUNDS)
    else:
        encoder, decoder = codec.make_state(), codec.make_state()
        one = codec.encode(pcm, encoder)
        codec.decode(one, decoder)
        encode = _median_ms(lambda: codec.encode(pcm, encoder), _CODEC_ROUNDS)
        decode = _median_ms(lambda: codec.decode(one, decoder), _CODEC_ROUNDS)
    share = rows / (group * count)
    return encode * share, decode * share


def _group(model: Model, rows: int) -> int:
    """How many recordings the codec takes at a time."""
    return min(rows, GROUP) if in_groups(model) else 1


def _step_ms(
    model: Model,
    prefilled: Prefilled,
    sampling: SamplingConfig,
    rows: int,
    position: int,
) -> tuple[float, float]:
    """The temporal transformer, and all that follows it."""
    lm = model.lm
    cache = _cache(model, prefilled, rows, position)
    column = mx.repeat(mx.array(prefilled.prompt.columns[None, :, -1:]), rows, axis=0)
    sampler = make_sampler(model.config.lm, sampling)
    frame = make_frame(lm, sampler)
    inputs = {"user": mx.zeros((rows, model.config.lm.num_codebooks), mx.int32)}
    if sampler.draws:
        inputs["keys"] = noise_keys(list(range(rows)), [0] * rows)
    x = lm.temporal(lm.embed(column), cache)
    mx.eval(x, inputs)

    def temporal() -> None:
        mx.eval(lm.temporal(lm.embed(column), cache))

    def depformer() -> None:
        mx.eval(frame(x[:, 0], inputs))

    temporal()
    depformer()
    return _median_ms(temporal, _ROUNDS), _median_ms(depformer, _ROUNDS)


def _cache(model: Model, prefilled: Prefilled, rows: int, position: int) -> Cache:
    """Rows that have come ``position`` frames, as a batch has them on this backend."""
    config, one = model.config.lm, prefilled.cache.copy()
    assert isinstance(one, KvCache)
    if rows > 1 and SharedCache.serves(one):
        shared = SharedCache(one, rows)
        for row in range(rows):
            shared.put(row, one)
        shared.mask(1)
        shared.advance(position)  # it makes room for them at the next step
        return shared
    for start in range(0, position, _POSITIONS):
        length = min(_POSITIONS, position - start)
        dtype = one.arrays()[0].dtype
        silence = mx.zeros((1, length, config.dim), dtype)
        mx.eval(model.lm.temporal(silence, one), one.arrays())
    if rows == 1:
        return one
    if on_cpu():
        return RowCaches([one.copy() for _ in range(rows)])
    ring = SlotCache(one, rows)
    for row in range(rows):
        ring.put(row, one)
    return ring


def _median_ms(part: Callable[[], object], rounds: int) -> float:
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        part()
        spent.append(time.perf_counter() - start)
    return 1000.0 * float(np.median(spent))


def traffic(
    model: Model, prefilled: Prefilled, rows: int, mean_position: float
) -> Traffic:
    """The least a frame moves; ``mean_position`` counts keys, the prompt's included."""
    lm, codec = model.config.lm, model.config.mimi.transformer
    if native := native_lm(model.lm):
        weights = native.matrix_bytes
    else:
        weights = sum(
            array.nbytes
            for name, array in tree_flatten(model.lm.parameters())
            if "text_emb" not in name and "audio_emb" not in name  # of tables, a row
        )
    item_bytes = prefilled.cache.arrays()[0].itemsize
    kv = 2 * lm.num_layers * lm.dim * item_bytes * min(mean_position, lm.window)
    codec_weights = model.codec.nbytes
    # Keys and values of both transformers, in float32.
    codec_kv = 2 * 2 * codec.num_layers * codec.d_model * codec.window * 4
    codec_bytes = (codec_weights / _group(model, rows) + codec_kv) / chunk_frames()
    return Traffic(weights / 1e6, rows * kv / 1e6, rows * codec_bytes / 1e6)
