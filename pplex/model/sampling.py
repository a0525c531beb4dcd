"""Logits to ids: greedy, or temperature and top-k in float32.

Follows NVIDIA's PersonaPlex, ``utils/sampling.py``: softmax, the k most probable ids,
then the id with the largest ``p / e`` for exponential noise ``e``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pplex.errors import PplexError, check_count
from pplex.model.config import TEMP, TEXT_TEMP, TEXT_TOP_K, TOP_K, LmConfig

# Below it noise is lost in the rounding of logits of 0.5 and more, and further down the
# division leaves float32: such a temperature is greedy.
LEAST_TEMP = 1e-9


@dataclass(frozen=True)
class SamplingConfig:
    """How ids are drawn: temperature 0 is greedy, top-k 0 keeps every id.

    A temperature below ``LEAST_TEMP`` becomes 0; PplexError for what is none.
    """

    temp: float = TEMP
    top_k: int = TOP_K
    text_temp: float = TEXT_TEMP
    text_top_k: int = TEXT_TOP_K

    def __post_init__(self) -> None:
        """Make what is greedy 0."""
        for name in ("temp", "text_temp"):
            temp = getattr(self, name)
            if not 0.0 <= temp < math.inf:
                raise PplexError(
                    f"{name} is {temp}, where a number from 0 on is expected"
                )
            if temp < LEAST_TEMP:
                object.__setattr__(self, name, 0.0)
        for name in ("top_k", "text_top_k"):
            check_count(name, getattr(self, name), 0)


GREEDY = SamplingConfig(temp=0.0, text_temp=0.0)


class Sampler:
    """Draws the ids of a frame for a batch of rows with a random stream each.

    The noise of a frame follows from the row's seed and the number of the frame alone,
    and in it every id of every head has a place of its own: a row's draws depend
    neither on the rows beside it nor on the order in which ids are looked at.
    """

    def __init__(
        self, config: SamplingConfig, text_card: int, card: int, num_codebooks: int
    ) -> None:
        self.config = config
        self.text_top_k = _kept(config.text_top_k, text_card)
        self.top_k = _kept(config.top_k, card)
        self.text_noise = text_card if config.text_temp > 0 else 0
        self.audio_noise = card if config.temp > 0 else 0
        self.noise_width = self.text_noise + num_codebooks * self.audio_noise

    @classmethod
    def of(cls, lm: LmConfig, config: SamplingConfig) -> Sampler:
        """The sampler for a model's heads."""
        return cls(config, lm.text_card, lm.card, lm.num_codebooks)

    def layout(self) -> dict[str, float]:
        """The sampling as the compiled step takes it (``Sampling`` in ``lm.c``)."""
        return {
            "text_temp": self.config.text_temp,
            "temp": self.config.temp,
            "text_top_k": self.text_top_k,
            "top_k": self.top_k,
            "text_noise": self.text_noise,
            "noise_width": self.noise_width,
        }

    @property
    def draws(self) -> bool:
        """Whether anything is drawn; if not, no noise is needed."""
        return self.noise_width > 0

    def noise(self, keys: mx.array) -> mx.array:
        """Exponential noise (rows, values) for a frame, from ``noise_keys``.

        A value for each text id, then for each id of each codebook, where it is drawn.
        """

        def row(key: mx.array) -> mx.array:
            return mx.random.uniform(shape=(self.noise_width,), key=key)

        return -mx.log(mx.maximum(mx.vmap(row)(keys), LEAST_UNIFORM))

    def text(self, logits: mx.array, noise: mx.array | None) -> mx.array:
        """Text ids (batch,) from logits (batch, text_card)."""
        if not self.text_noise or noise is None:
            return mx.argmax(logits, axis=-1)
        share = noise[:, : self.text_noise]
        return draw(logits, self.config.text_temp, self.text_top_k, share)

    def audio(self, logits: mx.array, noise: mx.array | None, step: int) -> mx.array:
        """Audio ids (batch,) of depformer step ``step`` from logits (batch, card)."""
        if not self.audio_noise or noise is None:
            return mx.argmax(logits, axis=-1)
        start = self.text_noise + step * self.audio_noise
        share = noise[:, start : start + self.audio_noise]
        return draw(logits, self.config.temp, self.top_k, share)


# In place of a uniform number of 0, which lies a bit below the others.
LEAST_UNIFORM = 2.0**-33


def noise_key(seed: int, frame: int) -> tuple[int, int]:
    """The key of the noise of frame ``frame`` of a row with ``seed``, two words."""
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF, frame


def noise_keys(seeds: list[int], frames: list[int]) -> np.ndarray:
    """Keys uint32 (rows, 2) of the noise of rows: of ``seeds``, in their ``frames``."""
    return np.array(list(map(noise_key, seeds, frames)), np.uint32)


def _kept(top_k: int, card: int) -> int:
    return card if top_k == 0 else min(top_k, card)


# A long row is cut into blocks of this many; the blocks that can matter are a quarter
# of it at most.
BLOCK = 64


def kth_largest(logits: mx.array, k: int) -> mx.array:
    """The ``k``-th largest (batch, 1) of each row of logits (batch, card)."""
    b, card = logits.shape
    if card < 4 * BLOCK * k or card % BLOCK:
        return mx.partition(logits, card - k, axis=-1)[:, card - k : card - k + 1]
    # The k largest lie in the k blocks with the largest maxima: sorting those is less.
    blocks = logits.reshape(b, card // BLOCK, BLOCK)
    maxima = blocks.max(axis=-1)
    best = mx.argpartition(maxima, maxima.shape[1] - k, axis=-1)[:, -k:]
    inside = mx.take_along_axis(blocks, best[..., None], axis=1)
    return kth_largest(inside.reshape(b, k * BLOCK), k)


def largest(logits: mx.array, k: int) -> mx.array:
    """Whether each of ``logits`` (batch, card) is among the ``k`` largest of its row.

    Exactly ``k`` are: of several that equal the last, those of the lowest ids.
    """
    least = kth_largest(logits, k)
    # One running sum counts both: those above it, and those like it, times ``many``.
    many = mx.array(logits.shape[-1] + 1, mx.int64)
    like = mx.where(logits == least, many, 0)
    counts = mx.cumsum(mx.where(logits > least, 1, like), axis=-1)
    room = k - counts[:, -1:] % many
    # In other words than above: what is compiled stores neither comparison.
    return (least < logits) | ((logits >= least) & (counts // many <= room))


def draw(logits: mx.array, temp: float, k: int, noise: mx.array) -> mx.array:
    """Draw ids (batch,) from the ``k`` largest of ``logits`` (batch, card).

    ``noise`` (batch, card) is exponential, a value for each id.
    """
    scores = logits.astype(mx.float32) / temp - mx.log(noise)
    if k < logits.shape[-1]:
        scores = mx.where(largest(logits, k), scores, -mx.inf)
    return mx.argmax(scores, axis=-1)
