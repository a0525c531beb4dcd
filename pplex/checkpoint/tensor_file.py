"""Large safetensors files: what the header says, and writing one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.errors import PplexError
from pplex.files import atomic_write

MAX_HEADER_BYTES = 1 << 25
MAX_WAITING = 4  # arrays that are done and not written yet

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint32": "U32"}
_PIECE_BYTES = 1 << 22
_ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "BF16": 2,
    "F16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file; ``dtype`` as safetensors spells it.

    ``begin`` is where its values start in a file that was read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = field(default=0, compare=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a file by name, from its header alone.

    The file must be exactly as long as the header says; values are not read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _broken(path, "its header does not fit in the file")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise _broken(path, "its header is not JSON") from e
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a table of tensors")
    specs, ends = {}, [0]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            spec = TensorSpec(name, dtype, shape, 8 + length + begin)
            sizes = (begin, end, *spec.shape)
            are_sizes = len(sizes) < 16 and all(
                type(n) is int and n >= 0 for n in sizes
            )
            fits = are_sizes and end - begin == spec.num_bytes
        except (KeyError, TypeError, ValueError) as e:
            raise _broken(path, f"the entry of `{name}` in its header is none") from e
        if not fits:
            raise _broken(path, f"the offsets of `{name}` do not fit its shape")
        specs[name] = spec
        ends.append(end)
    expected = 8 + length + max(ends)
    if size != expected:
        raise _broken(path, f"it has {size} bytes, its header speaks of {expected}")
    return specs


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    arrays: Iterable[mx.array | np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write ``arrays`` in the order of ``specs``, while the next ones are made.

    The file appears whole or not at all; its SHA-256 is returned. An array that is not
    what its spec says is a mistake of the caller.
    """
    digest = hashlib.sha256()
    specs = list(specs)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
        ThreadPoolExecutor(1) as thread,
    ):

        def put(content: bytes | memoryview) -> None:
            for start in range(0, len(content), _PIECE_BYTES):
                piece = content[start : start + _PIECE_BYTES]
                digest.update(piece)
                file.write(piece)

        put(len(text).to_bytes(8, "little") + text)
        waiting: deque[Future[None]] = deque()
        for spec, array in zip(specs, arrays, strict=True):
            dtype = _DTYPES.get(str(array.dtype).removeprefix("mlx.core."))
            if dtype != spec.dtype or tuple(array.shape) != spec.shape:
                raise ValueError(
                    f"{spec} was announced, {array.dtype} {array.shape} came"
                )
            waiting.append(thread.submit(put, _bytes_of(array)))
            if len(waiting) > MAX_WAITING:
                waiting.popleft().result()
        for last in waiting:
            last.result()
    return digest.hexdigest()


def _bytes_of(array: mx.array | np.ndarray) -> memoryview:
    if array.dtype == mx.bfloat16:  # NumPy has none
        array = array.view(mx.uint16)
    return memoryview(np.ascontiguousarray(np.array(array, copy=False))).cast("B")


def _broken(path: Path, why: str) -> PplexError:
    return PplexError(f"{path} is not a whole safetensors file: {why}; get it again")
