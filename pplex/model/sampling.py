"""Logits to ids: greedy, or temperature and top-k in float32.

Follows NVIDIA's PersonaPlex, ``utils/sampling.py``: softmax, the k most probable ids,
then the id with the largest ``p / e`` for exponential noise ``e``.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class SamplingConfig:
    """How ids are drawn: temperature 0 is greedy, top-k 0 keeps every id."""

    temp: float = 0.8
    top_k: int = 250
    text_temp: float = 0.7
    text_top_k: int = 25


GREEDY = SamplingConfig(temp=0.0, text_temp=0.0)


class Sampler:
    """Draws the ids of a frame for a batch of rows with a random stream each.

    The noise of a frame follows from the row's seed and the number of the frame alone,
    so a row's draws do not depend on the rows beside it.
    """

    def __init__(
        self, config: SamplingConfig, text_card: int, card: int, num_codebooks: int
    ) -> None:
        self.config = config
        self._text_width = _kept(config.text_top_k, text_card)
        self._audio_width = _kept(config.top_k, card)
        self._text_noise = self._text_width if config.text_temp > 0 else 0
        self._audio_noise = self._audio_width if config.temp > 0 else 0
        self._noise_width = self._text_noise + num_codebooks * self._audio_noise

    @property
    def draws(self) -> bool:
        """Whether anything is drawn; if not, no noise is needed."""
        return self._noise_width > 0

    def noise(self, keys: mx.array) -> mx.array:
        """Exponential noise (rows, values) for a frame, from ``noise_keys``."""

        def row(key: mx.array) -> mx.array:
            return mx.random.uniform(shape=(self._noise_width,), key=key)

        return -mx.log(1.0 - mx.vmap(row)(keys))

    def text(self, logits: mx.array, noise: mx.array | None) -> mx.array:
        """Text ids (batch,) from logits (batch, text_card)."""
        if not self._text_noise or noise is None:
            return mx.argmax(logits, axis=-1)
        share = noise[:, : self._text_noise]
        return draw(logits, self.config.text_temp, self._text_width, share)

    def audio(self, logits: mx.array, noise: mx.array | None, step: int) -> mx.array:
        """Audio ids (batch,) of depformer step ``step`` from logits (batch, card)."""
        if not self._audio_noise or noise is None:
            return mx.argmax(logits, axis=-1)
        start = self._text_noise + step * self._audio_noise
        share = noise[:, start : start + self._audio_noise]
        return draw(logits, self.config.temp, self._audio_width, share)


def noise_keys(seeds: list[int], frames: list[int]) -> mx.array:
    """Keys (rows, 2) of the noise of frame ``frames[r]`` of a row with ``seeds[r]``."""
    return mx.array(
        [
            [(seed ^ (seed >> 32)) & 0xFFFFFFFF, frame]
            for seed, frame in zip(seeds, frames, strict=True)
        ],
        mx.uint32,
    )


def _kept(top_k: int, card: int) -> int:
    return card if top_k == 0 else min(top_k, card)


# A long row is cut into blocks of this many; the blocks that can matter are a quarter
# of it at most.
BLOCK = 64


def top_k_ids(logits: mx.array, k: int) -> mx.array:
    """The ids (batch, k) of the ``k`` largest logits, in no particular order."""
    b, card = logits.shape
    if k == card:
        return mx.broadcast_to(mx.arange(card), logits.shape)
    if card < 4 * BLOCK * k or card % BLOCK:
        return mx.argpartition(logits, kth=card - k, axis=-1)[:, card - k :]
    # The k largest lie in the k blocks with the largest maxima: sorting those is less.
    blocks = logits.reshape(b, card // BLOCK, BLOCK)
    best = top_k_ids(blocks.max(axis=-1), k)
    ids = (best[..., None] * BLOCK + mx.arange(BLOCK)).reshape(b, k * BLOCK)
    inside = top_k_ids(mx.take_along_axis(logits, ids, axis=-1), k)
    return mx.take_along_axis(ids, inside, axis=-1)


def draw(logits: mx.array, temp: float, k: int, noise: mx.array) -> mx.array:
    """Draw ids (batch,) from the ``k`` largest of ``logits`` (batch, card).

    ``noise`` (batch, k) is exponential, in the order of ``top_k_ids``.
    """
    logits = logits.astype(mx.float32)
    ids = top_k_ids(logits, k)
    kept = mx.take_along_axis(logits, ids, axis=-1) / temp
    best = mx.argmax(kept - mx.log(noise), axis=-1, keepdims=True)
    return mx.take_along_axis(ids, best, axis=-1)[:, 0]
