"""Keys and values of many rows that step together: in one ring, or each its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from pplex.model.cache import GROWTH, KvCache, Mask


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


def take_rows(x: mx.array, rows: list[int]) -> mx.array:
    """``x[rows]``, by copies of stretches: MLX compiles its own kernel in seconds."""
    starts = [i for i, row in enumerate(rows) if not i or row != rows[i - 1] + 1]
    stretches = zip(starts, [*starts[1:], len(rows)], strict=True)
    return mx.concatenate([x[rows[i] : rows[i] + j - i] for i, j in stretches])


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
        self._replace(lambda store: take_rows(store, rows))

    def latest(self, row: int, count: int) -> list[mx.array]:
        """What ``row`` wrote last (1, heads, count, head_dim), in order."""
        mx.synchronize()
        stretches = [slots for slots, _ in self._latest(count)]
        return [
            mx.concatenate([store[row : row + 1, :, slots] for slots in stretches], 2)
            for store in self.stores
        ]

    def put(self, row: int, arrays: Sequence[mx.array]) -> None:
        """Let ``row`` have written ``arrays`` (1, heads, count, head_dim) last."""
        coming = iter(arrays)
        stretches = self._latest(arrays[0].shape[2])

        def change(store: mx.array) -> mx.array:
            new = next(coming)
            for slots, part in stretches:
                store[row : row + 1, :, slots] = new[:, :, part]
            return store

        self._replace(change)

    def _latest(self, count: int) -> list[tuple[slice, slice]]:
        """The slots of the last ``count`` positions in order, and which of these."""
        first = (self._step - count) % self.slots if count else 0
        before = min(count, self.slots - first)
        return [
            (slice(first, first + before), slice(before)),
            (slice(count - before), slice(before, count)),
        ]

    def grow(self, need: int) -> None:
        """Make room for ``need`` positions, or the window."""
        need = min(need, self.window)
        if need <= self.slots:
            return
        have = self.slots
        self.slots = min(self.window, -(-need // GROWTH) * GROWTH)
        room = [(0, 0), (0, 0), (0, self.slots - have), (0, 0)]
        rows, heads, _, head_dim = self.stores[0].shape
        shape = rows, heads, self.slots, head_dim
        # Oldest slot first, so that the new ones come after the latest.
        turn = -(self._step % have) if have else 0
        dtype = self.stores[0].dtype
        if have:
            self._replace(lambda store: mx.pad(mx.roll(store, turn, 2), room))
        else:
            self._replace(lambda store: mx.zeros(shape, dtype))
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


class CacheEach:
    """A cache for each row: nothing of a row depends on the rows beside it."""

    def __init__(self, num_rows: int) -> None:
        """Rows that nobody has."""
        self._rows: list[KvCache | None] = [None] * num_rows

    def put(self, row: int, source: KvCache, room: int = 0) -> None:
        """Replace ``row`` by the positions of a cache of one row, and ``room``."""
        cache = source.copy()
        cache.reserve(room)
        mx.async_eval(cache.arrays())
        self._rows[row] = cache

    def save(self, row: int) -> KvCache:
        """A cache from which ``row`` can go on, once its arrays are copied."""
        cache = self._rows[row]
        assert cache is not None
        return cache

    def leave(self, row: int) -> None:
        """Forget what ``row`` had; nobody uses it for now."""
        self._rows[row] = None

    def take(self, rows: list[int]) -> None:
        """Make the rows copies of these; a row may be there more than once."""
        chosen = [self._rows[row] for row in rows]
        self._rows = [None if cache is None else cache.copy() for cache in chosen]

    def mask(self, t: int) -> None:
        """A new position sees all that its row has."""
        assert t == 1

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of a new position of each row, which is added.

        ``qkv`` is (1, 3 heads, rows, head_dim), with rows of nobody behind.
        """
        heads = qkv.shape[1] // 3
        y = [qkv[:, :heads, row : row + 1] for row in range(qkv.shape[2])]
        for row, cache in enumerate(self._rows):
            if cache is not None:
                new = qkv[:, :, row : row + 1]
                y[row] = cache.attend(layer, new, max_period, mask)
        return mx.concatenate(y, axis=2)

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written in every row."""
        for cache in self._rows:
            if cache is not None:
                cache.advance(t)
