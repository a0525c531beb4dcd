"""Keys and values of the past positions of a row, and the memory they lie in.

What every step reads is found faster in few huge pages, which take longer to get.
"""

from __future__ import annotations

import copy
import functools
import math
import mmap
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from pplex.engine.base import Arrays, checked, number
from pplex.engine.c.structures import LANES, Row
from pplex.model.cache import GROWTH
from pplex.model.config import LmConfig
from pplex.model.rotary import angles

HUGE_PAGE = 2 << 20


def zeros(shape: tuple[int, ...], dtype: DTypeLike, *, huge: bool = True) -> np.ndarray:
    """Zeros of ``shape``, if they are large and the system can in huge pages.

    A page is taken from the system when a part of it is first written to. Of a huge one
    that may take it 100 ms: without ``huge`` pages are small.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE", None)
    if size < HUGE_PAGE // 2 or advice is None:
        return np.zeros(shape, dtype)
    pages = -(-size // HUGE_PAGE) + 1  # one more, for the first to begin at a page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANON
    try:
        memory = mmap.mmap(-1, pages * HUGE_PAGE, flags=flags)
    except OSError as e:
        raise MemoryError(f"no {pages * HUGE_PAGE >> 20} MB of it are free") from e
    try:
        memory.madvise(advice)
    except OSError:  # a system built without them
        return np.zeros(shape, dtype)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + size].view(dtype).reshape(shape)


class Arena:
    """Memory that is taken piece by piece and never given back."""

    _CHUNK = 64 * HUGE_PAGE
    _LINE = 64

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []
        self._free = 0

    def take(self, num_bytes: int) -> int:
        """The address of so many bytes, at the start of a cache line."""
        num_bytes = -(-num_bytes // self._LINE) * self._LINE
        if num_bytes > self._free:
            self._free = max(num_bytes + self._LINE, self._CHUNK)
            self._chunks.append(zeros((self._free,), np.uint8))
            self._free -= -self._chunks[-1].ctypes.data % self._LINE
        chunk = self._chunks[-1]
        place = chunk.ctypes.data + chunk.nbytes - self._free
        self._free -= num_bytes
        return place


class Pool:
    """Memory that is used again: for a new huge page the system may move others."""

    def __init__(self, most_bytes: int = 32 * HUGE_PAGE) -> None:
        """Of what is given back, ``most_bytes`` are kept."""
        self._most_bytes = most_bytes
        self._spare: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> np.ndarray:
        """At least ``count`` float32 values, whatever they are."""
        with self._lock:
            for idx, array in enumerate(self._spare):
                if len(array) >= count:
                    return self._spare.pop(idx)
        return zeros((count,), np.float32)

    def give_back(self, array: np.ndarray) -> None:
        """Take an array back that nobody uses."""
        with self._lock:
            self._spare.append(array)
            while sum(a.nbytes for a in self._spare) > self._most_bytes:
                self._spare.pop(0)


class RowCache:
    """Keys and values of the past positions of one row, as the compiled code has them.

    ``end`` is how many were written since the start; the last ``window`` are kept,
    position ``p`` in slot ``p % window``. Until it is full, a copy reads its first
    positions where its source has them: rows that start from one prompt read that once
    for all of them.
    """

    _keys: np.ndarray
    _values: np.ndarray

    def __init__(self, config: LmConfig, pool: Pool, *, at_8: bool = False) -> None:
        """An empty cache for the temporal transformer, in float32 or at 8 bits.

        Arrays of bytes are float32 as well, whatever that says. Of ``pool`` is the
        memory of copies whose size is known: it may take longer to get than a frame,
        and is faster to read.
        """
        self.window, self.end = config.window, 0
        self._pool, self._is_pooled = pool, False
        self._max_period = config.max_period
        self._layers, self._heads = config.num_layers, config.num_heads
        self._head_dim = config.dim // config.num_heads
        self._at_8 = at_8
        self._slots = 0
        self._source: RowCache | None = None
        self._num_first = 0
        self._grow(1)

    def copy(self, room: int = 0) -> RowCache:
        """A cache with the same contents that can go its own way.

        It has room for ``room`` more positions.
        """
        other = copy.copy(self)
        other._is_pooled = room > 0
        other._source, other._num_first = self, self.end // LANES * LANES
        other._make_room(self.end + room if room else self._slots)
        return other

    def part(self) -> RowCache:
        """Another with the same contents, and the same source; this one may end."""
        other = copy.copy(self)
        other._make_room(self._slots)
        return other

    def save(self, ahead: int = 0) -> dict[str, np.ndarray]:
        """Copies of the arrays as far as they are filled, and the positions so far.

        Without the last ``ahead``: in a full ring nothing sees what they wrote over.
        """
        end = self.end - ahead
        blocks = -(-min(end, self.window) // LANES)
        return {
            "keys": self._keys[:, :, :blocks].copy(),
            "values": self._values[:, :, : blocks * LANES].copy(),
            "end": np.array([end], np.int64),
        }

    def restore(self, saved: Arrays) -> None:
        """Take over the arrays of one that was saved; ValueError if they do not fit."""
        end = number(saved, "end")
        size = -(-min(end, self.window) // LANES) * LANES
        shapes = self._shapes(size)
        keys, values = (
            np.ascontiguousarray(checked(saved, name, shape, np.float32))
            for name, shape in zip(("keys", "values"), shapes, strict=True)
        )
        self._slots, self._keys, self._values = size, keys, values
        self._places, self.end = (keys.ctypes.data, values.ctypes.data), end

    def release(self) -> None:
        """Give its memory back: neither it nor a copy of it is used any more."""
        if self._is_pooled:
            self._pool.give_back(self._memory)

    def arrays(self) -> list[np.ndarray]:
        """The arrays held."""
        return [self._keys, self._values]

    def reserve(self) -> None:
        """Make room for the whole window now: growing later would keep a frame waiting.

        Memory that is not written to is not taken from the system yet.
        """
        if self._slots < self.window:
            self._make_room(self.window, huge=False)

    def fill(self, rows: Sequence[Row]) -> None:
        """Describe the next positions, a row each, with room for them."""
        last = self.end + len(rows)
        if last > self._slots and self._slots < self.window:
            self._grow(last)
        source = self._source
        if source and max(last, source.end) > self.window:
            source = self._source = None  # one of them writes over its first positions
        for position, row in enumerate(rows, self.end):
            row.keys, row.values = self._places
            row.slots, row.end = self._slots, position
            row.cosines, row.sines = _angles_of(
                position, self._head_dim, self._max_period
            )
            if source:
                row.first_keys, row.first_values = source._places
                row.first_slots, row.num_first = source._slots, self._num_first

    def _grow(self, need: int) -> None:
        """Make room for ``need`` positions, twice as many as before or the window."""
        self._make_room(max(2 * self._slots, -(-need // GROWTH) * GROWTH))

    def _make_room(self, size: int, *, huge: bool = True) -> None:
        """Move to arrays of ``size`` slots, but no more than the window."""
        size = -(-min(size, self.window) // LANES) * LANES
        key_shape, value_shape = self._shapes(size)
        num_keys = math.prod(key_shape)
        count = num_keys + math.prod(value_shape)
        if not huge:
            memory = zeros((count,), np.float32, huge=False)
        elif self._is_pooled:
            memory = self._pool.take(count)
        else:
            memory = np.zeros(count, np.float32)
        keys: np.ndarray = memory[:num_keys].reshape(key_shape)
        values: np.ndarray = memory[num_keys:count].reshape(value_shape)
        if self.end:
            blocks = -(-min(self.end, self.window) // LANES)
            held = blocks * LANES
            keys[:, :, :blocks] = self._keys[:, :, :blocks]
            values[:, :, :held] = self._values[:, :, :held]
        self._slots, self._memory = size, memory
        self._keys, self._values = keys, values
        self._places = keys.ctypes.data, values.ctypes.data

    def _shapes(self, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of keys and of values of ``size`` slots, a multiple of ``LANES``.

        At 8 bits a scale and four numbers in place of one: see ``Row`` in lm.c.
        """
        layers, heads, width = self._layers, self._heads, self._head_dim
        padded = -(-width // LANES) * LANES
        if self._at_8:
            width = padded = 1 + width // 4
        keys = layers, heads, size // LANES, width, LANES
        return keys, (layers, heads, size, padded)


_BLOCK = 128  # positions whose angles are made at once


def _angles_of(position: int, width: int, max_period: float) -> tuple[int, int]:
    """Where the cosines and the sines of a position lie."""
    block, idx = divmod(position, _BLOCK)
    _, cosines, sines = _block_angles(block, width, max_period)
    start = idx * (width // 2) * 4
    return cosines + start, sines + start


@functools.lru_cache(maxsize=512)
def _block_angles(
    block: int, width: int, max_period: float
) -> tuple[tuple[np.ndarray, np.ndarray], int, int]:
    """Arrays of cosines and sines, and where they lie."""
    both = cosines, sines = angles(block * _BLOCK, _BLOCK, width, max_period)
    return both, cosines.ctypes.data, sines.ctypes.data
