"""Keys and values of many rows that step together: in one ring, or each its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from pplex.model.cache import GROWTH, Kept, KvCache, Mask, as_mlx


class FastCache(KvCache):
    """Keys and values of one row whose rotation MLX computes in one operation."""

    def rotate(self, x: mx.array, max_period: float) -> mx.array:
        """``x`` (batch, heads, t, head_dim) turned by the next ``t`` positions."""
        return rope(x, max_period, self.end)

    def read(self, q: mx.array, keys: Kept, values: Kept, mask: Mask) -> mx.array:
        """Attention to all that is kept; of one query to bytes as they are.

        MLX 0.32.4 has no such product on CUDA.
        """
        if isinstance(keys, mx.array) or isinstance(values, mx.array):
            return super().read(q, keys, values, mask)
        if q.shape[2] > 1 or mx.cuda.is_available():
            return super().read(q, keys, values, mask)
        scores = mx.quantized_matmul(q, keys[0], **as_mlx(keys))
        shares = mx.softmax(q.shape[-1] ** -0.5 * scores, axis=-1)
        kind = as_mlx(values)
        y = mx.quantized_matmul(shares, values[0], transpose=False, **kind)
        return y.astype(q.dtype)


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


# A ring grows by so many slots where it is known how many a row will need: it is to
# have few more than those, and not to be copied for each row that needs a few more.
RING_STEP = 32


class Ring:
    """The arrays of a ``KvCache``, of so many rows: (rows, heads, slots, ...).

    Every step writes one slot for all rows, and a row's earlier positions lie in the
    slots before it. The ring grows up to the window.
    """

    def __init__(self, like: KvCache, num_rows: int) -> None:
        """No slots yet; layers, heads, type and window are those of ``like``."""
        self.window = like.window
        self.slots = self._step = 0
        self.num_layers = like.num_layers
        self.stores = [
            mx.zeros((num_rows, a.shape[1], 0, a.shape[3]), a.dtype)
            for a in like.arrays()
        ]

    @property
    def slot(self) -> int:
        """The next slot to be written."""
        return self._step % self.slots

    def advance(self, t: int) -> None:
        """Count ``t`` slots as written."""
        self._step += t

    def of_layer(self, layer: int) -> list[mx.array]:
        """The arrays of a layer, of keys first."""
        return self.stores[layer :: self.num_layers]

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

    def grow(self, need: int, step: int = GROWTH) -> None:
        """Make room for ``need`` positions, or the window, in so many ``step``."""
        need = min(need, self.window)
        if need <= self.slots:
            return
        have = self.slots
        self.slots = min(self.window, -(-need // step) * step)
        room = [(0, 0), (0, 0), (0, self.slots - have), (0, 0)]
        # Oldest slot first, so that the new ones come after the latest.
        turn = -(self._step % have) if have else 0
        if have:
            self._replace(lambda store: mx.pad(mx.roll(store, turn, 2), room))
        else:
            self._replace(
                lambda store: mx.zeros(
                    (*store.shape[:2], self.slots, store.shape[3]), store.dtype
                )
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
