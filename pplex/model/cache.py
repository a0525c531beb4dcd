"""Keys and values of past positions: growing at first, then a ring of fixed size.

The window follows NVIDIA's PersonaPlex (``modules/transformer.py``), whose ring of
``context`` slots hides one slot once it is full: ``context - 1`` keys are visible,
counted back from the last position written. When positions are written in blocks (the
codec brings two latents a frame), the earlier ones of a block therefore see fewer.

At 8 bits each vector is rounded once, when it is written, and all that attends to it
reads what was kept.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from pplex.model.rotary import rotate

GROWTH = 256  # slots a cache grows by
_SMALLEST = 1e-30  # scale by which is divided

Mask = mx.array | str | None

# Keys, or values, of a layer: an array, or words uint32 of four numbers and the scales
# float32 of vectors, both (..., numbers), at 8 bits.
Kept = mx.array | tuple[mx.array, mx.array]


class Cache(Protocol):
    """What a transformer needs of a cache."""

    def mask(self, t: int) -> Mask:
        """What ``t`` new positions may see; made once for all layers."""

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of new positions (batch, 3 heads, t, head_dim), which are added."""

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written, once every layer has attended."""


class KvCache:
    """Keys and values of every layer of one transformer, for a batch of rows.

    ``window`` is the number of positions kept, ``block`` how many positions arrive at
    a time in streaming use, ``end`` how many were written since the start, ``said`` of
    these, how many after a prompt. Arrays are ``(batch, heads, slots, head_dim)``;
    position ``p`` lies in slot ``p % window``. With ``bits`` 8 there are two arrays for
    each, of all layers those of words first: see ``Kept``.
    """

    def __init__(
        self, num_layers: int, window: int, block: int = 1, bits: int | None = None
    ) -> None:
        self.window = window
        self.block = block
        self.bits = bits
        self.end = self.said = 0
        self.num_layers = num_layers
        self._expected = 0
        count = num_layers if bits is None else 2 * num_layers
        self._keys: list[mx.array | None] = [None] * count
        self._values: list[mx.array | None] = [None] * count

    def copy(self) -> KvCache:
        """A cache with the same contents that can go its own way."""
        other = copy.copy(self)
        # New array objects: assignment to a slice changes the object it is done to.
        other._keys = [None if a is None else mx.array(a) for a in self._keys]
        other._values = [None if a is None else mx.array(a) for a in self._values]
        return other

    def arrays(self) -> list[mx.array]:
        """The arrays held, for evaluation."""
        return [a for a in self._keys + self._values if a is not None]

    def put(self, arrays: Sequence[mx.array]) -> None:
        """Take over arrays, in the order of ``arrays()``."""
        half = len(arrays) // 2
        self._keys[:], self._values[:] = arrays[:half], arrays[half:]

    def reserve(self, room: int) -> None:
        """Have room for ``room`` more positions from now on, or the window.

        Growing later would copy what there is, and hold both for a while.
        """
        self._expected = self.end + room
        for store in (self._keys, self._values):
            for layer, buffer in enumerate(store):
                if buffer is not None:
                    store[layer] = self._grown(buffer, buffer, 0)

    def mask(self, t: int) -> Mask:
        """What ``t`` new positions may see of the keys ``update`` will return.

        Boolean ``(t, keys)``, or what stands for it in MLX's attention.
        """
        if t > self.block:
            if self.end == 0 and self.block == 1 and t <= self.window:
                return "causal"
            # Past the window, what is seen is the same so many blocks further.
            full = -(-self.window // self.block) * self.block
            end = min(self.end, full + self.end % self.block)
            return _visible_behind(end, t, self.window, self.block)
        if t == 1:
            return None
        filled = min(self.end + t, self.window)
        slots = np.arange(filled)
        last = self.end + t - 1
        positions = last - (last - slots) % self.window
        queries = np.arange(self.end, self.end + t)
        return mx.array(_visible(queries, positions, self.window, self.block))

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of new positions (batch, 3 heads, t, head_dim), which are added."""
        heads = qkv.shape[1] // 3
        rotated = self.rotate(qkv[:, : 2 * heads], max_period)
        keys, values = self.update(layer, rotated[:, heads:], qkv[:, 2 * heads :])
        return self.read(rotated[:, :heads], keys, values, mask)

    def read(self, q: mx.array, keys: Kept, values: Kept, mask: Mask) -> mx.array:
        """Attention of queries (batch, heads, t, head_dim) to all that is kept."""
        keys, values = (written_out(kept, q.dtype) for kept in (keys, values))
        return scaled_attention(q, keys, values, mask)

    def rotate(self, x: mx.array, max_period: float) -> mx.array:
        """``x`` (batch, heads, t, head_dim) turned by the next ``t`` positions."""
        return rotate(x, max_period, self.end)

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[Kept, Kept]:
        """Add new positions ``(batch, heads, t, head_dim)``; all visible ones.

        ``advance`` must follow once every layer has been updated.
        """
        return (
            self._keep(self._keys, layer, keys),
            self._keep(self._values, layer, values),
        )

    def _keep(self, store: list[mx.array | None], layer: int, new: mx.array) -> Kept:
        t = new.shape[2]
        if self.bits is None:
            return self._update(store, layer, new, t)
        words, scales = quantize_vectors(new)
        return (
            self._update(store, layer, words, t),
            self._update(store, layer + self.num_layers, scales, t),
        )

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written, once every layer has attended."""
        self.end += t
        self.said += t

    def ordered(self, length: int) -> list[mx.array]:
        """The last ``length`` positions of ``arrays()``, in order."""
        whole = [self._in_order(array) for array in self.arrays()]
        return [array[:, :, -length:] for array in whole if array is not None]

    def _update(
        self, store: list[mx.array | None], layer: int, new: mx.array, t: int
    ) -> mx.array:
        if t > self.block:
            return self._append(store, layer, new, t)
        buffer = self._grown(store[layer], new, t)
        start = self.end % self.window
        first = min(t, self.window - start)
        buffer[:, :, start : start + first] = new[:, :, :first]
        if first < t:
            buffer[:, :, : t - first] = new[:, :, first:]
        store[layer] = buffer
        filled = min(self.end + t, self.window)
        return buffer if filled == buffer.shape[2] else buffer[:, :, :filled]

    def _append(
        self, store: list[mx.array | None], layer: int, new: mx.array, t: int
    ) -> mx.array:
        """Add many positions at once: keys in order, whole old window included."""
        past = self._in_order(store[layer])
        everything = new if past is None else mx.concatenate([past, new], axis=2)
        kept = everything[:, :, -self.window :]
        if kept.shape[2] == self.window:
            # Put each position in its slot.
            kept = mx.roll(kept, (self.end + t) % self.window, 2)
        store[layer] = kept
        return everything

    def _in_order(self, buffer: mx.array | None) -> mx.array | None:
        if buffer is None or self.end == 0:
            return None
        if self.end <= self.window:
            return buffer[:, :, : self.end]
        return mx.roll(buffer, -(self.end % self.window), 2)

    def _grown(self, buffer: mx.array | None, new: mx.array, t: int) -> mx.array:
        have = 0 if buffer is None else buffer.shape[2]
        need = min(max(self.end + t, self._expected), self.window)
        if need <= have:
            assert buffer is not None
            return buffer
        if need > self._expected:
            need = min(self.window, -(-need // GROWTH) * GROWTH)
        b, h, _, d = new.shape
        if buffer is None:
            return mx.zeros((b, h, need, d), new.dtype)
        return mx.pad(buffer, [(0, 0), (0, 0), (0, need - have), (0, 0)])


def _visible(
    queries: np.ndarray, keys: np.ndarray, window: int, block: int
) -> np.ndarray:
    """Which of the positions ``keys`` each of ``queries`` sees."""
    queries = queries[:, None]
    block_end = (queries // block + 1) * block
    seen: np.ndarray = (keys <= queries) & (keys >= block_end - window)
    return seen


@functools.lru_cache(maxsize=16)  # chunks of all streams ask for the same ones
def _visible_behind(end: int, t: int, window: int, block: int) -> mx.array:
    """What ``t`` positions after ``end`` others see of these, in order, and of each
    other.
    """
    keys = np.arange(end - min(end, window), end + t)
    return mx.array(_visible(np.arange(end, end + t), keys, window, block))


def quantize_vectors(x: mx.array) -> tuple[mx.array, mx.array]:
    """Vectors (..., width) at 8 bits: words (..., width / 4), scales (..., 1).

    A number is its byte less 128, times the scale.
    """
    x = x.astype(mx.float32)
    scales = mx.abs(x).max(axis=-1, keepdims=True) / 127
    whole = mx.round(x / mx.maximum(scales, _SMALLEST)) + 128
    return whole.astype(mx.uint8).view(mx.uint32), scales


def written_out(kept: Kept, dtype: mx.Dtype) -> mx.array:
    """Vectors (..., width) as numbers."""
    if isinstance(kept, mx.array):
        return kept
    return mx.dequantize(kept[0], **as_mlx(kept)).astype(dtype)


def as_mlx(kept: tuple[mx.array, mx.array]) -> dict[str, Any]:
    """What MLX's functions are to know of words."""
    words, scales = kept
    return {
        "scales": scales,
        "biases": -128 * scales,
        "group_size": 4 * words.shape[-1],
        "bits": 8,
    }


def scaled_attention(
    q: mx.array, keys: mx.array, values: mx.array, mask: Mask
) -> mx.array:
    """Attention scaled by the root of the head's width."""
    return mx.fast.scaled_dot_product_attention(
        q, keys, values, scale=q.shape[-1] ** -0.5, mask=mask
    )
