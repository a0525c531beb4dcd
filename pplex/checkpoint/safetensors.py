"""Safetensors files: headers checked before anything is believed, values, writing.

A file from a stranger must not decide how much memory is taken: voices have limits of
their own, and MLX, which reads the weights, believes what a header says of sizes.
"""

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
from typing import TYPE_CHECKING, Any

import numpy as np

from pplex.errors import PplexError, first_line
from pplex.files import Place, atomic_write, open_regular, put
from pplex.values import parse_json

if TYPE_CHECKING:
    import mlx.core as mx

MAX_HEADER_BYTES = 1 << 25
_MAX_SMALL_HEADER_BYTES = 1 << 20
_MAX_ARRAY_BYTES = 1 << 28  # 65 536 voice frames of width 1024; voices take under 1 MB
_MAX_DIMS = 8
_MAX_WAITING = 4  # arrays that are done and not written yet

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
# What NumPy reads, and as what: it has no bfloat16.
_STORAGE: dict[str, tuple[str, np.dtype[Any]]] = {
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F16": ("float16", np.dtype("<f2")),
    "F32": ("float32", np.dtype("<f4")),
    "I32": ("int32", np.dtype("<i4")),
    "U32": ("uint32", np.dtype("<u4")),
    "I64": ("int64", np.dtype("<i8")),
}
# What ``write_tensors`` writes: names of array types; uint16 has bfloat16's bits.
_WRITTEN = {
    "bfloat16": "BF16",
    "uint16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "int32": "I32",
    "int64": "I64",
    "uint32": "U32",
}


class BrokenError(PplexError):
    """``why`` a file is not a whole one."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is not a whole safetensors file: {why}; get it again")
        self.why = why


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
    return _read_header(path, MAX_HEADER_BYTES)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The words that a small file's header holds besides its tensors."""
    return _read_header(path, _MAX_SMALL_HEADER_BYTES)[1]


def read_arrays(
    path: Path, names: tuple[str, ...]
) -> dict[str, tuple[str, np.ndarray]]:
    """Read named arrays of a small file, every size checked first.

    As (dtype name, array); bfloat16 comes back as float32.
    """
    specs, _ = _read_header(path, _MAX_SMALL_HEADER_BYTES)
    return {name: _read_array(path, specs[name]) for name in names if name in specs}


def read_values(path: Path, spec: TensorSpec) -> np.ndarray:
    """The values of a tensor, or of a part of one, at ``spec.begin``.

    bfloat16 comes as its bits in uint16.
    """
    count = math.prod(spec.shape)
    try:
        with open_regular(path) as file:
            file.seek(spec.begin)
            values = np.fromfile(file, _STORAGE[spec.dtype][1], count)
            if spec.num_bytes >= _PIECE_BYTES and hasattr(os, "posix_fadvise"):
                # Without this, a file larger than memory drives everything else out
                # of the system's cache.
                os.posix_fadvise(
                    file.fileno(), spec.begin, spec.num_bytes, os.POSIX_FADV_DONTNEED
                )
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e
    if values.size != count:
        raise BrokenError(path, "it has become shorter")
    return values.reshape(spec.shape)


def load_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a file of weights, read when they are first used."""
    import mlx.core as mx

    read_specs(path)
    try:
        arrays = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as e:
        raise BrokenError(path, first_line(e)) from e
    assert isinstance(arrays, dict)
    return arrays


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    arrays: Iterable[mx.array | np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    place: Place = put,
) -> str:
    """Write ``arrays`` in the order of ``specs``, while the next ones are made.

    The file appears whole or not at all, by ``place`` as ``atomic_write``; its SHA-256
    is returned. An array that is not
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
        atomic_write(path, place=place) as temporary,
        temporary.open("wb") as file,
        ThreadPoolExecutor(1) as thread,
    ):

        def add(content: bytes | memoryview) -> None:
            for start in range(0, len(content), _PIECE_BYTES):
                piece = content[start : start + _PIECE_BYTES]
                digest.update(piece)
                file.write(piece)

        add(len(text).to_bytes(8, "little") + text)
        waiting: deque[Future[None]] = deque()
        for spec, array in zip(specs, arrays, strict=True):
            dtype = _WRITTEN.get(_type_of(array))
            if dtype != spec.dtype or tuple(array.shape) != spec.shape:
                raise ValueError(
                    f"{spec} was announced, {array.dtype} {array.shape} came"
                )
            waiting.append(thread.submit(add, _bytes_of(array)))
            if len(waiting) > _MAX_WAITING:
                waiting.popleft().result()
        for last in waiting:
            last.result()
    return digest.hexdigest()


def spec_of(name: str, array: np.ndarray) -> TensorSpec:
    """How ``write_tensors`` writes an array."""
    return TensorSpec(name, _WRITTEN[_type_of(array)], tuple(array.shape))


def widen_bfloat16(raw: np.ndarray) -> np.ndarray:
    """Turn bfloat16 bits in uint16 into the same values in float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def narrow_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 values to bfloat16, half to even, as bits in uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _read_header(
    path: Path, max_bytes: int
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """A file's tensors by name, and its metadata."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or not 2 <= length <= min(size - 8, max_bytes):
                raise BrokenError(path, "its header does not fit in the file")
            header = parse_json(file.read(length))
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise BrokenError(path, "its header is not JSON") from e
    if not isinstance(header, dict):
        raise BrokenError(path, "its header is not a table of tensors")
    words = header.pop("__metadata__", None)
    specs, end = {}, 0
    for name, entry in header.items():
        specs[name], last = _spec(path, name, entry, 8 + length)
        end = max(end, last)
    if size != 8 + length + end:
        raise BrokenError(
            path, f"it has {size} bytes, its header speaks of {8 + length + end}"
        )
    pairs = words.items() if isinstance(words, dict) else ()
    return specs, {key: value for key, value in pairs if isinstance(value, str)}


def _spec(path: Path, name: str, entry: Any, start: int) -> tuple[TensorSpec, int]:
    """A tensor of a header, and where it ends; ``start`` is where all values do."""
    try:
        begin, end = entry["data_offsets"]
        spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]), start + begin)
        sizes = (begin, end, *spec.shape)
        are_sizes = len(spec.shape) <= _MAX_DIMS and all(
            type(n) is int and 0 <= n < 1 << 48 for n in sizes
        )
        fits = are_sizes and end - begin == spec.num_bytes
    except (KeyError, TypeError, ValueError) as e:
        raise BrokenError(path, f"the entry of `{name}` in its header is none") from e
    if not fits:
        raise BrokenError(path, f"the offsets of `{name}` do not fit its shape")
    return spec, end


def _read_array(path: Path, spec: TensorSpec) -> tuple[str, np.ndarray]:
    if spec.dtype not in _STORAGE:
        raise BrokenError(path, f"dtype {spec.dtype} is not one a voice has")
    if not 0 < spec.num_bytes <= _MAX_ARRAY_BYTES:
        raise BrokenError(
            path, f"a tensor of {spec.num_bytes} bytes is none of a voice"
        )
    name = _STORAGE[spec.dtype][0]
    array = read_values(path, spec)
    return name, widen_bfloat16(array) if name == "bfloat16" else array


def _type_of(array: mx.array | np.ndarray) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _bytes_of(array: mx.array | np.ndarray) -> memoryview:
    if not isinstance(array, np.ndarray):
        import mlx.core as mx

        if array.dtype == mx.bfloat16:  # NumPy has none
            array = array.view(mx.uint16)
    whole = np.ascontiguousarray(np.array(array, copy=False))
    return whole.reshape(-1).view(np.uint8).data
