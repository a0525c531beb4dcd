"""The codec's parts of a frame, each run by itself, and the bytes a frame must move.

In the loop parts overlap: a GPU works on the next frame while this one is decoded. Here
each part is run alone and waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pplex.engine.base import Engine

_ROUNDS = 3


@dataclass(frozen=True)
class Parts:
    """Milliseconds a frame of all rows, the median of some runs of each part alone."""

    encode: float
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


def measure_parts(engine: Engine, rows: int) -> Parts:
    """Time encoding and decoding of ``rows`` recordings in chunks as the loop has."""
    codec, count = engine.codec, engine.codec.chunk_frames
    rng = np.random.default_rng(1)
    frames = rng.uniform(-0.1, 0.1, (count, engine.config.frame_size))
    pcm = frames.astype(np.float32)
    group = min(rows, codec.group)
    encoder, decoder = codec.make_state(), codec.make_state()
    if group > 1:
        together = [pcm] * group
        codes = codec.encode_next(together, encoder)()
        codec.decode_next(codes, decoder)()
        encode = _median_ms(lambda: codec.encode_next(together, encoder)())
        decode = _median_ms(lambda: codec.decode_next(codes, decoder)())
    else:
        one = codec.encode(pcm, encoder)
        codec.decode(one, decoder)
        encode = _median_ms(lambda: codec.encode(pcm, encoder))
        decode = _median_ms(lambda: codec.decode(one, decoder))
    share = rows / (group * count)
    return Parts(encode * share, decode * share)


def _median_ms(part: Callable[[], object]) -> float:
    spent = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        part()
        spent.append(time.perf_counter() - start)
    return 1000.0 * float(np.median(spent))


def traffic(engine: Engine, rows: int, mean_position: float) -> Traffic:
    """The least a frame moves; ``mean_position`` counts keys, the prompt's included."""
    cost, codec = engine.cost(), engine.codec
    kv = rows * cost.position * min(mean_position, engine.config.lm.window)
    # Weights once for all that is coded together, and both directions' states.
    shared = cost.codec / min(rows, codec.group) + 2 * cost.codec_state
    return Traffic(cost.step / 1e6, kv / 1e6, rows * shared / codec.chunk_frames / 1e6)
