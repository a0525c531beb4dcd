"""What CUDA's driver says and does without MLX."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_MULTIPROCESSORS, _SHARED_MEMORY = 16, 97  # of ``CUdevice_attribute``
_FOR_ALL_CONTEXTS = 1  # ``CU_MEMHOSTALLOC_PORTABLE``


def num_devices() -> int:
    """How many GPUs this process sees; 0 where nobody says."""
    count, cuda = ctypes.c_int(), _cuda()
    if cuda is None or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def num_multiprocessors() -> int:
    """How many multiprocessors the GPU has."""
    return _attribute(_MULTIPROCESSORS)


def shared_memory() -> int:
    """Bytes of shared memory that a block may have."""
    return _attribute(_SHARED_MEMORY)


def _attribute(number: int) -> int:
    """A ``CUdevice_attribute`` of the first device, MLX's; 0 where nobody says."""
    value, cuda = ctypes.c_int(), _cuda()
    if cuda is None or cuda.cuDeviceGetAttribute(ctypes.byref(value), number, 0):
        return 0
    return value.value


def pinned_memory(size: int) -> int | None:
    """The address of so many bytes of the host's memory that GPUs read and write.

    It is never given back. None where there is none.
    """
    pointer, count = ctypes.c_void_p(), ctypes.c_size_t(size)
    with _current() as cuda:
        if cuda is None:
            return None
        if cuda.cuMemHostAlloc(ctypes.byref(pointer), count, _FOR_ALL_CONTEXTS):
            return None
    return pointer.value


def copy_seconds(size: int, copies: int, rounds: int) -> float | None:
    """The best time of ``copies`` plain copies of ``size`` bytes; None without memory.

    They are the driver's own, in memory of its own.
    """
    mx.eval(mx.zeros(1))  # the device's context is there, and this thread's
    count, spent = ctypes.c_size_t(size), []
    with _current() as cuda:
        if cuda is None:
            return None
        held: list[ctypes.c_void_p] = []
        try:
            for _ in range(2):
                pointer = ctypes.c_void_p()
                if cuda.cuMemAlloc_v2(ctypes.byref(pointer), count):
                    return None
                held.append(pointer)
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(copies):
                    cuda.cuMemcpyDtoDAsync_v2(held[1], held[0], count, None)
                if cuda.cuCtxSynchronize():
                    return None
                spent.append(time.perf_counter() - start)
        finally:
            for pointer in held:
                cuda.cuMemFree_v2(pointer)
    return min(spent)


@contextmanager
def _current() -> Iterator[ctypes.CDLL | None]:
    """The driver, with the first device's context as this thread's; None without."""
    cuda, context = _cuda(), ctypes.c_void_p()
    if cuda is None or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0):
        yield None
        return
    try:
        yield None if cuda.cuCtxSetCurrent(context) else cuda
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(0)


def _cuda() -> ctypes.CDLL | None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if cuda.cuInit(0) else cuda
