"""Arrays in pages of a chosen size.

What every step reads is found faster in few huge pages, which take longer to get.
"""

from __future__ import annotations

import math
import mmap
import threading

import numpy as np
from numpy.typing import DTypeLike

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
    memory = mmap.mmap(-1, pages * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    try:
        memory.madvise(advice)
    except OSError:  # a system built without them
        return np.zeros(shape, dtype)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + size].view(dtype).reshape(shape)


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
