"""Keys and values of many rows that step together, in one ring."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from pplex.model.cache import GROWTH, KvCache, Mask, scaled_attention


class FastCache(KvCache):
    """Keys and values of one row whose rotation MLX computes in one operation."""

    def rotate(self, x: mx.array, max_period: float) -> mx.array:
        """``x`` (batch, heads, t, head_dim) turned by the next ``t`` positions."""
        return rope(x, max_period, self.end)


def rope(x: mx.array, max_period: float, offset: int | mx.array) -> mx.array:
    """``model.rotary.rotate`` as one operation; ``offset`` may be one a row."""
    return mx.fast.rope(
        x,
        x.shape[-1],
        traditional=True,
        base=max_period,
        scale=1.0,
        offset=offset,
    )


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
        """Make the rows copies of these; a row may be there more than once."""
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
            lambda store: mx.concatenate([mx.roll(store, turn, 2), room], axis=2)
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
        self._is_used = np.zeros(num_rows, bool)
        self._offsets = mx.array(self._lengths)

    def put(self, row: int, source: KvCache) -> None:
        """Replace ``row`` by the positions of a cache of one row."""
        ring, length = self._ring, min(source.end, self._ring.window)
        ring.grow(length + 1)
        self._lengths[row], self._is_used[row] = source.end, True
        start = (ring.slot - length) % ring.slots
        first = min(length, ring.slots - start)
        for into, new in zip(ring.stores, source.ordered(length), strict=True):
            into[row : row + 1, :, start : start + first] = new[:, :, :first]
            into[row : row + 1, :, : length - first] = new[:, :, first:]

    def leave(self, row: int) -> None:
        """Forget what ``row`` had; nobody uses it for now."""
        self._is_used[row] = False

    def take(self, rows: list[int]) -> None:
        """Make the rows copies of these; a row may be there more than once."""
        self._lengths, self._is_used = self._lengths[rows], self._is_used[rows]
        self._ring.take(rows)

    def mask(self, t: int) -> mx.array:
        """Boolean (rows, 1, 1, slots): the slots that hold a position of the row."""
        assert t == 1
        ring = self._ring
        self._lengths[~self._is_used] = 0
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
        rotated = rope(qkv[:, : 2 * heads], max_period, self._offsets)
        keys[:, :, slot : slot + 1] = rotated[:, heads:]
        values[:, :, slot : slot + 1] = qkv[:, 2 * heads :]
        return scaled_attention(rotated[:, :heads], keys, values, mask)

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written in every row."""
        self._ring.advance(t)
        self._lengths += t
