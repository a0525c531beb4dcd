"""A few small arrays in the safetensors format, read with every size checked first.

For voice prompts: NumPy has no bfloat16, and a file from a stranger must not decide
how much memory is taken. Model weights are read by MLX.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pplex.errors import PplexError
from pplex.files import atomic_write

MAX_HEADER_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 28  # 65 536 voice frames of width 1024; voices take under 1 MB

DTYPES = {
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F16": ("float16", np.dtype("<f2")),
    "F32": ("float32", np.dtype("<f4")),
    "I32": ("int32", np.dtype("<i4")),
    "I64": ("int64", np.dtype("<i8")),
}


def read_arrays(
    path: Path, names: tuple[str, ...]
) -> dict[str, tuple[str, np.ndarray]]:
    """Read named arrays as (dtype name, array); bfloat16 comes back as float32."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(path, file, size)
            return {
                name: _read_array(path, file, header[name], start, size)
                for name in names
                if name in header
            }
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e


def read_metadata(path: Path) -> dict[str, str]:
    """The words that a file's header holds besides its tensors."""
    try:
        with path.open("rb") as file:
            header, _ = _read_header(path, file, os.fstat(file.fileno()).st_size)
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e
    found = header.get("__metadata__")
    words = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in words if isinstance(value, str)}


def write_arrays(
    path: Path,
    arrays: dict[str, tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays given as (safetensors dtype, array of that storage), atomically."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, array) in arrays.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def widen_bfloat16(raw: np.ndarray) -> np.ndarray:
    """Turn bfloat16 bits in uint16 into the same values in float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def narrow_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 values to bfloat16, half to even, as bits in uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict, int]:
    """Return the header and the position at which the data starts."""
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise _broken(path, "its header does not fit in the file")
    try:
        header = json.loads(file.read(length).decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise _broken(path, "its header is not JSON") from e
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a table of tensors")
    return header, 8 + length


def _read_array(
    path: Path, file: BinaryIO, entry: object, start: int, size: int
) -> tuple[str, np.ndarray]:
    entry = entry if isinstance(entry, dict) else {}
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise _broken(path, "a tensor has no proper shape or offsets")
    if str(entry.get("dtype")) not in DTYPES:
        raise _broken(path, f"dtype {entry.get('dtype')} is not one a voice has")
    name, dtype = DTYPES[str(entry["dtype"])]
    num_bytes = math.prod(shape) * dtype.itemsize
    if not 0 < num_bytes <= MAX_ARRAY_BYTES:
        raise _broken(path, f"a tensor of {num_bytes} bytes is none of a voice")
    begin, end = offsets
    if end - begin != num_bytes or start + end > size:
        raise _broken(path, "a tensor's offsets do not fit its shape or the file")
    file.seek(start + begin)
    array = np.frombuffer(file.read(num_bytes), dtype).reshape(shape)
    return name, widen_bfloat16(array) if name == "bfloat16" else array


def _are_sizes(values: object) -> bool:
    """Whether a header value is a short list of integers from 0."""
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(v) is int and 0 <= v < 1 << 48 for v in values)
    )


def _broken(path: Path, why: str) -> PplexError:
    return PplexError(f"{path} is not a whole safetensors file: {why}; get it again")
