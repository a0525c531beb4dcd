"""How fast this machine's cores read weights in a step: a short measurement."""

from __future__ import annotations

import ctypes
import functools
import time

import numpy as np

from pplex.engine.c.binding import load_library
from pplex.engine.c.memory import zeros
from pplex.engine.c.structures import BFLOAT16, FLOAT16, Matrix
from pplex.engine.device import measurable, memory_gb, num_cores

_BYTES = 1 << 30  # of a matrix that no cache holds: those of servers have 0.3 GB
_SHARE = 16  # it takes at most one part in so many of the free memory
_COLUMNS = 4096
_GROUP = 64
_ROUNDS = 5


@functools.cache
def bytes_per_s(bits: int) -> float:
    """Bytes of weights that products of one row read a second, all cores together.

    ``bits`` are those of the weights: 4, 8 or 16. What is found is the speed of the
    memory, or that of the cores where they are few and slow.
    """
    library = load_library("lm")
    assert library is not None
    _, free_gb = memory_gb()
    size = _BYTES if free_gb is None else min(_BYTES, int(free_gb * 1e9) // _SHARE)
    quantized = bits < 16
    matrix = Matrix(
        None,
        max(1, size * 8 // bits // _COLUMNS),
        _COLUMNS,
        bits if quantized else 0,
        _GROUP if quantized else 0,
        FLOAT16 if quantized else BFLOAT16,
    )
    size = library.pplex_lm_packed_bytes(ctypes.byref(matrix))
    data = zeros((size,), np.uint8)
    data.fill(0x11)  # small numbers of any type
    matrix.data = data.ctypes.data
    threads = num_cores()
    x = np.ones(_COLUMNS, np.float32)
    y = np.empty(matrix.rows + 16, np.float32)
    own = np.empty((threads, _COLUMNS), np.float32)
    spent = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        library.pplex_lm_multiply(
            ctypes.byref(matrix),
            *(array.ctypes.data for array in (x, y, own)),
            threads,
        )
        spent.append(time.perf_counter() - begun)
    return float(size / measurable(float(np.median(spent))))
