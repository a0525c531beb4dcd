"""Read the tensors of a `torch.save` file without torch, executing nothing.

Follows the zip layout of PyTorch's `torch.serialization`. The pickle inside may only
name the handful of globals below, and these are replaced by objects that do no more
than note down their arguments.
"""

import lzma
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from pplex.checkpoint.safetensors import widen_bfloat16
from pplex.errors import PplexError

MAX_PICKLE_BYTES = 1 << 16
MAX_STORAGE_BYTES = 1 << 28
_MAX_MEMO = 10_000
_MAX_ENTRIES = 1_000

_STORAGES: dict[str, tuple[str, np.dtype[Any]]] = {
    "BFloat16Storage": ("bfloat16", np.dtype("<u2")),
    "HalfStorage": ("float16", np.dtype("<f2")),
    "FloatStorage": ("float32", np.dtype("<f4")),
    "LongStorage": ("int64", np.dtype("<i8")),
    "IntStorage": ("int32", np.dtype("<i4")),
}


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Read the saved dict's tensors as (dtype name, array); bfloat16 as float32."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(path, archive)
            root = _root(path, entries)
            content = _read(path, archive, entries, f"{root}data.pkl", MAX_PICKLE_BYTES)
            saved = _unpickle(path, content)
            if f"{root}byteorder" in entries:
                order = _read(path, archive, entries, f"{root}byteorder", 16)
                if order.strip() != b"little":
                    raise _broken(path, "its byte order is not little-endian")
            return {
                name: _materialise(path, archive, entries, root, tensor)
                for name, tensor in saved.items()
                if isinstance(name, str) and isinstance(tensor, _Tensor)
            }
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,  # names that are not UTF-8
        lzma.LZMAError,
        struct.error,
        zlib.error,
    ) as e:
        raise _broken(path, f"it is not a readable zip archive ({e})") from e
    except EOFError as e:
        raise _broken(path, "it ends too early") from e
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e


class _Storage(NamedTuple):  # a tuple: a pickle's BUILD cannot change it afterwards
    kind: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _StorageType:
    """Stands for a `torch.*Storage` class; can be passed about, and nothing else."""

    __slots__ = ("kind",)
    kind: str

    def __init__(self, kind: str) -> None:
        object.__setattr__(self, "kind", kind)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("a storage type cannot be changed")


class _MakeDict:
    """Stands for `collections.OrderedDict`, called without arguments."""

    __slots__ = ()

    def __call__(self) -> dict[object, object]:
        return {}


class _MakeTensor:
    """Stands for `torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def __call__(
        self,
        storage: object,
        offset: object,
        size: object,
        stride: object,
        *ignored: object,
    ) -> _Tensor:
        if not (
            isinstance(storage, _Storage)
            and _is_size(offset)
            and _are_sizes(size)
            and _are_sizes(stride)
            and len(size) == len(stride) <= 8
            and len(ignored) <= 3
        ):
            raise pickle.UnpicklingError("a tensor is not described properly")
        return _Tensor(storage, offset, size, stride)


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _MakeTensor()
        if (module, name) == ("collections", "OrderedDict"):
            return _MakeDict()
        raise _ForbiddenGlobal(f"{module}.{name}")

    def persistent_load(self, pid: object) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a storage is not described properly")
        _, kind, key, _location, numel = pid
        if not (
            isinstance(kind, _StorageType) and isinstance(key, str) and _is_size(numel)
        ):
            raise pickle.UnpicklingError("a storage is not described properly")
        return _Storage(kind.kind, key, numel)


class _ForbiddenGlobal(Exception):
    """Names a global that a voice file has no business to mention."""


def _unpickle(path: Path, content: bytes) -> dict[object, object]:
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # An index far beyond what is stored would make the memo take gigabytes.
            if opcode.name.endswith("PUT") and int(argument or 0) > _MAX_MEMO:
                raise _broken(path, "its pickle asks for too much memory")
        saved = _SafeUnpickler(BytesIO(content)).load()
    except _ForbiddenGlobal as e:
        raise PplexError(
            f"{path} is refused: it names {str(e)[:200]!r}, which no voice file needs "
            "and which could run code; get the voice from its publisher"
        ) from e
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        raise _broken(path, f"its pickle cannot be read ({e})") from e
    if not isinstance(saved, dict):
        raise _broken(path, "it does not hold a dict")
    return saved


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos) or len(infos) > _MAX_ENTRIES:
        raise _broken(path, "it has too many entries or two of one name")
    return entries


def _root(path: Path, entries: dict[str, zipfile.ZipInfo]) -> str:
    """The archive's one top folder, with its slash."""
    roots = [
        name.removesuffix("data.pkl")
        for name in entries
        if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise _broken(path, "it does not have exactly one data.pkl")
    return roots[0]


def _read(
    path: Path,
    archive: zipfile.ZipFile,
    entries: dict[str, zipfile.ZipInfo],
    name: str,
    limit: int,
) -> bytes:
    """Read one entry whole, its size known to be within `limit` before that."""
    if name not in entries:
        raise _broken(path, f"its entry {name} is missing")
    if entries[name].file_size > limit:
        raise _broken(path, f"its entry {name} is too large for a voice")
    with archive.open(entries[name]) as file:
        return file.read(limit + 1)


def _materialise(
    path: Path,
    archive: zipfile.ZipFile,
    entries: dict[str, zipfile.ZipInfo],
    root: str,
    tensor: _Tensor,
) -> tuple[str, np.ndarray]:
    name, dtype = _STORAGES[tensor.storage.kind]
    num_bytes = tensor.storage.numel * dtype.itemsize
    num_values = math.prod(tensor.size)
    if max(num_bytes, num_values * dtype.itemsize) > MAX_STORAGE_BYTES:
        raise _broken(path, f"a tensor of {num_bytes} bytes is too large for a voice")
    raw = _read(path, archive, entries, f"{root}data/{tensor.storage.key}", num_bytes)
    if len(raw) != num_bytes:
        raise _broken(
            path, f"a storage has {len(raw)} bytes where {num_bytes} are promised"
        )
    # The stride of an axis of one element means nothing and may be anything.
    strides = [
        0 if size == 1 else step
        for size, step in zip(tensor.size, tensor.stride, strict=True)
    ]
    last = tensor.offset + sum(
        (size - 1) * step for size, step in zip(tensor.size, strides, strict=True)
    )
    if num_values and last >= tensor.storage.numel:
        raise _broken(path, "a tensor reaches beyond its storage")
    if not num_values:
        return name, np.zeros(tensor.size, np.float32)
    flat = np.frombuffer(raw, dtype)[tensor.offset :]
    array = np.lib.stride_tricks.as_strided(
        flat, tensor.size, [step * dtype.itemsize for step in strides]
    ).copy()
    return name, widen_bfloat16(array) if name == "bfloat16" else array


def _are_sizes(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(map(_is_size, values))


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 48


def _broken(path: Path, why: str) -> PplexError:
    return PplexError(f"{path} is not a whole voice file: {why}; get it again")
