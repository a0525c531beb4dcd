"""Keys and values of past positions: growing at first, then a ring of fixed size.

The window follows NVIDIA's PersonaPlex (``modules/transformer.py``), whose ring of
``context`` slots hides one slot once it is full: ``context - 1`` keys are visible,
counted back from the last position written. When positions are written in blocks (the
codec brings two latents a frame), the earlier ones of a block therefore see fewer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from pplex.layers.rotary import rotate

GROWTH = 256

Mask = mx.array | str | None


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
    a time in streaming use, ``end`` how many were written since the start. Arrays are
    ``(batch, heads, slots, head_dim)``; position ``p`` lies in slot ``p % window``.
    """

    def __init__(self, num_layers: int, window: int, block: int = 1) -> None:
        self.window = window
        self.block = block
        self.end = 0
        self._keys: list[mx.array | None] = [None] * num_layers
        self._values: list[mx.array | None] = [None] * num_layers

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

    def mask(self, t: int) -> Mask:
        """What ``t`` new positions may see of the keys ``update`` will return.

        Boolean ``(t, keys)``, or what stands for it in MLX's attention.
        """
        if t > self.block:
            if self.end == 0 and self.block == 1 and t <= self.window:
                return "causal"
            past = min(self.end, self.window)
            keys = np.arange(self.end - past, self.end + t)
            return mx.array(self._visible(np.arange(self.end, self.end + t), keys))
        if t == 1:
            return None
        filled = min(self.end + t, self.window)
        slots = np.arange(filled)
        last = self.end + t - 1
        positions = last - (last - slots) % self.window
        queries = np.arange(self.end, self.end + t)
        return mx.array(self._visible(queries, positions))

    def _visible(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        queries = queries[:, None]
        block_end = (queries // self.block + 1) * self.block
        return (keys <= queries) & (keys >= block_end - self.window)

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of new positions (batch, 3 heads, t, head_dim), which are added."""
        heads = qkv.shape[1] // 3
        rotated = rotate(qkv[:, : 2 * heads], max_period, self.end)
        keys, values = self.update(layer, rotated[:, heads:], qkv[:, 2 * heads :])
        return scaled_attention(rotated[:, :heads], keys, values, mask)

    def update(
        self, layer: int, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Add new positions ``(batch, heads, t, head_dim)``; all visible ones.

        ``advance`` must follow once every layer has been updated.
        """
        t = keys.shape[2]
        return (
            self._update(self._keys, layer, keys, t),
            self._update(self._values, layer, values, t),
        )

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written, once every layer has attended."""
        self.end += t

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
            kept = mx.roll(kept, (self.end + t) % self.window, axis=2)
        store[layer] = kept
        return everything

    def _in_order(self, buffer: mx.array | None) -> mx.array | None:
        if buffer is None or self.end == 0:
            return None
        if self.end <= self.window:
            return buffer[:, :, : self.end]
        return mx.roll(buffer, -(self.end % self.window), axis=2)

    def _grown(self, buffer: mx.array | None, new: mx.array, t: int) -> mx.array:
        have = 0 if buffer is None else buffer.shape[2]
        need = min(self.end + t, self.window)
        if need <= have:
            assert buffer is not None
            return buffer
        size = min(self.window, -(-need // GROWTH) * GROWTH)
        b, h, _, d = new.shape
        room = mx.zeros((b, h, size - have, d), new.dtype)
        return room if buffer is None else mx.concatenate([buffer, room], axis=2)


class RowCaches:
    """A cache a row, for rows at different positions that share all other work.

    What a row computes does not depend on the rows beside it, bit for bit.
    """

    def __init__(self, rows: Sequence[KvCache]) -> None:
        self.rows = list(rows)

    def mask(self, t: int) -> None:
        """Rows take one position at a time, which sees all that is kept."""
        assert t == 1

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of new positions (rows, 3 heads, 1, head_dim), which are added."""
        return mx.concatenate(
            [
                row.attend(layer, qkv[idx : idx + 1], max_period, mask)
                for idx, row in enumerate(self.rows)
            ]
        )

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written in every row."""
        for row in self.rows:
            row.advance(t)


class Ring:
    """Keys, then values, of every layer: arrays (rows, heads, slots, head_dim).

    Every step writes one slot for all rows, and a row's earlier positions lie in the
    slots before it. The ring grows up to the window.
    """

    def __init__(self, like: KvCache, num_rows: int) -> None:
        """No slots yet; layers, heads, type and window are those of ``like``."""
        self.window = like.window
        self.slots = self._step = 0
        arrays = like.arrays()
        _, heads, _, head_dim = arrays[0].shape
        empty = mx.zeros((num_rows, heads, 0, head_dim), arrays[0].dtype)
        self.stores = [mx.array(empty) for _ in arrays]

    @property
    def slot(self) -> int:
        """The next slot to be written."""
        return self._step % self.slots

    def advance(self, t: int) -> None:
        """Count ``t`` slots as written."""
        self._step += t

    def keys_values(self, layer: int) -> tuple[mx.array, mx.array]:
        """The arrays of a layer."""
        return self.stores[layer], self.stores[layer + len(self.stores) // 2]

    def take(self, rows: list[int]) -> None:
        """Keep only ``rows``."""
        self._replace(lambda store: store[mx.array(rows)])

    def grow(self, need: int) -> None:
        """Make room for ``need`` positions, or the window."""
        need = min(need, self.window)
        if need <= self.slots:
            return
        have = self.slots
        self.slots = min(self.window, -(-need // GROWTH) * GROWTH)
        rows, heads, _, head_dim = self.stores[0].shape
        shape = rows, heads, self.slots - have, head_dim
        room = mx.zeros(shape, self.stores[0].dtype)
        # Oldest slot first, so that the new ones come after the latest.
        turn = -(self._step % have) if have else 0
        self._replace(
            lambda store: mx.concatenate([mx.roll(store, turn, axis=2), room], axis=2)
        )
        self._step = have

    def _replace(self, change: Callable[[mx.array], mx.array]) -> None:
        """Exchange the arrays one by one, as two whole rings may not fit.

        A kernel may write into them without MLX's knowledge: it is waited for.
        """
        mx.synchronize()
        for idx, store in enumerate(self.stores):
            self.stores[idx] = change(store)
            del store
            mx.eval(self.stores[idx])


class SlotCache:
    """One ring for all rows: a row's prompt lies in it as what it said does."""

    def __init__(self, like: KvCache, num_rows: int) -> None:
        """Empty rows; layers, heads, type and window are those of ``like``."""
        self._ring = Ring(like, num_rows)
        self._lengths = np.zeros(num_rows, np.int32)
        self._offsets = mx.array(self._lengths)

    def put(self, row: int, source: KvCache) -> None:
        """Replace ``row`` by the positions of a cache of one row."""
        ring, length = self._ring, min(source.end, self._ring.window)
        ring.grow(length + 1)
        self._lengths[row] = source.end
        start = (ring.slot - length) % ring.slots
        first = min(length, ring.slots - start)
        for into, new in zip(ring.stores, source.ordered(length), strict=True):
            into[row : row + 1, :, start : start + first] = new[:, :, :first]
            into[row : row + 1, :, : length - first] = new[:, :, first:]

    def take(self, rows: list[int]) -> None:
        """Keep only ``rows``."""
        self._lengths = self._lengths[rows]
        self._ring.take(rows)

    def mask(self, t: int) -> mx.array:
        """Boolean (rows, 1, 1, slots): the slots that hold a position of the row."""
        assert t == 1
        ring = self._ring
        ring.grow(int(self._lengths.max()) + 1)
        self._offsets = mx.array(self._lengths)
        ages = (ring.slot - np.arange(ring.slots)) % ring.slots
        visible = mx.array(ages.astype(np.int32))[None] <= self._offsets[:, None]
        return visible[:, None, None]

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of new positions (rows, 3 heads, 1, head_dim), which are added."""
        heads = qkv.shape[1] // 3
        slot = self._ring.slot
        keys, values = self._ring.keys_values(layer)
        rotated = rotate(qkv[:, : 2 * heads], max_period, self._offsets)
        keys[:, :, slot : slot + 1] = rotated[:, heads:]
        values[:, :, slot : slot + 1] = qkv[:, 2 * heads :]
        return scaled_attention(rotated[:, :heads], keys, values, mask)

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written in every row."""
        self._ring.advance(t)
        self._lengths += t


def scaled_attention(
    q: mx.array, keys: mx.array, values: mx.array, mask: Mask
) -> mx.array:
    """Attention scaled by the root of the head's width."""
    return mx.fast.scaled_dot_product_attention(
        q, keys, values, scale=q.shape[-1] ** -0.5, mask=mask
    )
