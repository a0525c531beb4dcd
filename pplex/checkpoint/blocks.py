"""Matrices from a file to the form they are stored in, a few MB at a time.

Threads read blocks of a file and round them with ``_quantize.c``, which computes what
``checkpoint.quantize`` does, as fast as a disk delivers. It is there on Linux, where a
compiler was at hand.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pplex.backend import find_extension
from pplex.checkpoint.layouts import Quantization
from pplex.errors import PplexError

BLOCK_BYTES = 1 << 22
MAX_THREADS = 8
_KINDS = {"BF16": 0, "F16": 1, "F32": 2}
_VALUE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}

# Takes the address of values, their kind, how many came before and how many there are;
# whether all of them fit what they become.
_Round = Callable[[int, int, int, int], int]


@dataclass(frozen=True)
class Stretch:
    """Values that lie one after another in a file; ``dtype`` as safetensors has it."""

    path: Path
    begin: int
    num_values: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes that the values take."""
        return self.num_values * _VALUE_BYTES[self.dtype]

    def blocks(self, row: int) -> Iterator[Stretch]:
        """The same values in blocks of whole rows of ``row`` values."""
        value_bytes = _VALUE_BYTES[self.dtype]
        step = max(1, BLOCK_BYTES // (row * value_bytes)) * row
        for first in range(0, self.num_values, step):
            begin = self.begin + first * value_bytes
            count = min(step, self.num_values - first)
            yield Stretch(self.path, begin, count, self.dtype)


@contextmanager
def open_rounder() -> Iterator[Rounder | None]:
    """Yield a ``Rounder``, or None where the library was not built."""
    path = find_extension("_quantize")
    try:
        library = None if path is None else ctypes.CDLL(str(path))
    except OSError:
        library = None
    if library is None:
        yield None
        return
    rounder = Rounder(library)
    try:
        yield rounder
    finally:
        rounder.close()


class Rounder:
    """Reads matrices and rounds them, block after block on threads of its own."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
        self._quantize, self._halve = library.pplex_quantize, library.pplex_halve
        self._quantize.argtypes = [
            pointer,
            number,
            long,
            number,
            number,
            *[pointer] * 3,
        ]
        self._halve.argtypes = [pointer, number, long, pointer]
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS))
        self._own = threading.local()
        self._files: dict[Path, int] = {}

    def close(self) -> None:
        """End the threads and close the files."""
        self._threads.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def quantize(
        self, stretches: Sequence[Stretch], shape: tuple[int, int], form: Quantization
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """A matrix (rows, columns) as packed codes uint32, scales and biases float16.

        None if a value is no number, or too large for what it becomes.
        """
        rows, columns = shape
        bits, group_size = form.bits, form.group_size
        packed = np.empty((rows, columns * bits // 32), np.uint32)
        scales = np.empty((rows, columns // group_size), np.float16)
        biases = np.empty_like(scales)
        parts = [part.ctypes.data for part in (packed, scales, biases)]

        def round_block(values: int, kind: int, start: int, count: int) -> int:
            group = start // group_size
            to = parts[0] + start * bits // 8, *(p + 2 * group for p in parts[1:])
            groups = count // group_size
            return self._quantize(values, kind, groups, group_size, bits, *to)

        good = self._run(stretches, columns, round_block)
        return (packed, scales, biases) if good else None

    def halve(
        self, stretches: Sequence[Stretch], shape: tuple[int, int]
    ) -> np.ndarray | None:
        """A matrix (rows, columns) in float16; None if a value does not fit."""
        halves = np.empty(shape, np.float16)
        address = halves.ctypes.data

        def round_block(values: int, kind: int, start: int, count: int) -> int:
            return self._halve(values, kind, count, address + 2 * start)

        return halves if self._run(stretches, shape[1], round_block) else None

    def _run(self, stretches: Sequence[Stretch], row: int, round_block: _Round) -> bool:
        """Round every block of the matrix; whether all of it was good."""
        start, running = 0, []
        for stretch in stretches:
            file = self._open(stretch.path)
            for block in stretch.blocks(row):
                one = self._threads.submit(self._one, file, block, start, round_block)
                running.append(one)
                start += block.num_values
        return all([one.result() for one in running])

    def _one(self, file: int, block: Stretch, start: int, round_block: _Round) -> bool:
        values = self._read(file, block)
        kind = _KINDS[block.dtype]
        return bool(round_block(values.ctypes.data, kind, start, block.num_values))

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as e:
                raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e
        return self._files[path]

    def _read(self, file: int, block: Stretch) -> np.ndarray:
        """The block's bytes, in memory that this thread uses again and again."""
        size = block.num_bytes
        room = getattr(self._own, "room", None)
        if room is None or len(room) < size:
            room = self._own.room = np.empty(max(size, BLOCK_BYTES), np.uint8)
        done = 0
        try:
            while done < size:
                more = os.preadv(file, [room[done:size]], block.begin + done)
                if not more:
                    raise PplexError(f"{block.path} has become shorter; get it again")
                done += more
            # It will not be read again: without this, a file larger than memory
            # drives everything else out of the system's cache.
            os.posix_fadvise(file, block.begin, size, os.POSIX_FADV_DONTNEED)
        except OSError as e:
            raise PplexError(f"{block.path} cannot be read: {e.strerror or e}") from e
        return room
