"""Arrays to a GPU and back through memory of the host's that stays where it is.

MLX moves what the host touches to memory that both have by pages, and gives that to any
array of its size afterwards: a kernel that writes there waits for page after page, and
what runs beside it waits too.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading

import mlx.core as mx
import numpy as np

from pplex.engine.cuda.compiler import Kernel, read_source, with_constants
from pplex.engine.cuda.driver import pinned_memory
from pplex.engine.mlx.exchange import Coming, Exchange

_THREADS, _MOST_BLOCKS = 256, 64
_EACH = 4  # words that a thread copies at least, where there are as many
_LEAST_BYTES = 1 << 12
_DTYPES = {np.dtype(name): getattr(mx, name) for name in ("int32", "uint32", "float32")}
_NUMPYS = {theirs: ours for ours, theirs in _DTYPES.items()}


class _Buffer:
    """Flags, and ``data`` behind them."""

    def __init__(self, address: int, size: int) -> None:
        memory = (ctypes.c_uint8 * size).from_address(address)
        whole: np.ndarray = np.ctypeslib.as_array(memory)
        self.address, self.size = address, size
        self._flags = whole[: 4 * _MOST_BLOCKS].view(np.uint32)
        self._flags[:] = 1
        self.data = whole[4 * _MOST_BLOCKS :]
        self.is_read = True  # or nobody will

    @property
    def is_free(self) -> bool:
        """Whether nobody needs any more what is in it."""
        return self.is_read and bool(self._flags.all())

    def begin(self, blocks: int) -> None:
        """Nothing is done yet by so many blocks."""
        self._flags[:blocks] = 0


class _Reading:
    """Waits for what comes into a buffer, which is free when nobody can call this."""

    def __init__(
        self, done: mx.array, buffer: _Buffer, dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        self._done, self._buffer, self._kind = done, buffer, (dtype, shape)
        buffer.is_read = False

    def __call__(self) -> np.ndarray:
        self._done.item()
        return np.array(_numbers(self._buffer, *self._kind))

    def __del__(self) -> None:
        self._buffer.is_read = True


class PinnedExchange(Exchange):
    """Arrays of four bytes a number; others, and without such memory, by MLX."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: list[_Buffer] = []
        self._nothing = mx.zeros(1, mx.int32)
        mx.eval(self._nothing)

    def send(self, x: np.ndarray) -> mx.array:
        """An array of MLX's; ``x`` may change afterwards."""
        dtype = _DTYPES.get(x.dtype)
        if dtype is None or (buffer := self._take(x.nbytes)) is None:
            return super().send(x)
        _numbers(buffer, x.dtype, x.shape)[:] = x
        return _copy(buffer, self._nothing, (x.shape, dtype), x.size, sends=True)

    def bring(self, x: mx.array) -> Coming:
        """An array that nothing is to write to any more."""
        dtype = _NUMPYS.get(x.dtype)
        if dtype is None or (buffer := self._take(x.nbytes)) is None:
            return super().bring(x)
        done = _copy(buffer, x, ((1,), mx.int32), x.size, sends=False)
        return Coming(done, _Reading(done, buffer, dtype, x.shape))

    def _take(self, num_bytes: int) -> _Buffer | None:
        """A free buffer with room; None for nothing, or without memory of the kind."""
        if not num_bytes:
            return None
        size = _LEAST_BYTES
        while size < num_bytes:
            size *= 2
        size += 4 * _MOST_BLOCKS
        with self._lock:
            for buffer in self._buffers:
                if buffer.size == size and buffer.is_free:
                    break
            else:
                address = pinned_memory(size)
                if address is None:
                    return None
                buffer = _Buffer(address, size)
                self._buffers.append(buffer)
            buffer.begin(_blocks(num_bytes // 4))
            return buffer


@functools.cache
def pinned_exchange() -> PinnedExchange:
    """The one of this process, whose memory is never given back."""
    return PinnedExchange()


def _numbers(buffer: _Buffer, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    numbers: np.ndarray = buffer.data[: 4 * math.prod(shape)].view(dtype)
    return numbers.reshape(shape)


def _blocks(words: int) -> int:
    return min(_MOST_BLOCKS, -(-words // (_EACH * _THREADS)))


def _copy(
    buffer: _Buffer,
    x: mx.array,
    output: tuple[tuple[int, ...], mx.Dtype],
    words: int,
    *,
    sends: bool,
) -> mx.array:
    low, high = np.array([buffer.address], np.uint64).view(np.int32).tolist()
    scalars = [low, high, words, int(sends)]
    (y,) = _kernel()([x], [output], scalars, blocks=(_blocks(words), 1))
    return y


def source() -> str:
    """The text of the kernel."""
    sizes = {"THREADS": _THREADS, "MOST_BLOCKS": _MOST_BLOCKS}
    return with_constants(sizes, read_source("exchange.cu"))


@functools.cache
def _kernel() -> Kernel:
    return Kernel.of("exchange", source(), _THREADS)
