"""Read the tensors of a `torch.save` file without torch, executing nothing.

Follows the zip layout of PyTorch's `torch.serialization`. The pickle inside is followed
here: it may have the opcodes and name the handful of globals that a dict of tensors
needs, and what these would do is noted down, not done.
"""

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from pplex.checkpoint.safetensors import widen_bfloat16
from pplex.errors import PplexError, first_line
from pplex.files import open_regular, reading

MAX_PICKLE_BYTES = 1 << 16
_MAX_STORAGE_BYTES = 1 << 28
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
    with reading(path, "is not a whole voice file; get it again"):
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
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
                if isinstance(tensor, _Tensor)
            }


class _Storage(NamedTuple):
    kind: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Global(NamedTuple):
    """Stands for a class or function that a pickle names."""

    module: str
    name: str


_MAKE_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_MAKE_DICT = _Global("collections", "OrderedDict")
_GLOBALS = {_MAKE_TENSOR, _MAKE_DICT, *(_Global("torch", name) for name in _STORAGES)}

# Opcodes by what they do here: what torch.save writes for a dict of tensors, and of
# notes beside them.
_PUSH = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2"}
_PUSH |= {"LONG1", "BINFLOAT"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}


class _Mark:
    """Where a tuple or a row of items begins on the stack."""


def _unpickle(path: Path, content: bytes) -> dict[str, object]:
    """The saved dict: its pickle is followed here, step by step, nothing called.

    Keys are text and nothing else is hashed: tuples of tuples of tuples would take
    ages.
    """
    try:
        saved = _follow(content)
    except _ForbiddenGlobal as e:
        raise PplexError(
            f"{path} is refused: it names {str(e)[:200]!r}, which no voice file needs "
            "and which could run code; get the voice from its publisher"
        ) from e
    except (ValueError, TypeError, LookupError) as e:
        raise _broken(path, f"its pickle cannot be read ({first_line(e)})") from e
    if not isinstance(saved, dict):
        raise _broken(path, "it does not hold a dict")
    return saved


def _follow(content: bytes) -> object:
    """What a pickle makes; ValueError, TypeError or LookupError where it is broken."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "TUPLE":
            stack.append(tuple(_to_mark(stack)))
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in _PUTS:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(_global(module, last))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_call(called, arguments))
        elif name == "SETITEM":
            _set(stack, [stack.pop(-2), stack.pop()])
        elif name == "SETITEMS":
            _set(stack, _to_mark(stack))
        elif name == "APPEND":
            _append(stack, [stack.pop()])
        elif name == "APPENDS":
            _append(stack, _to_mark(stack))
        else:
            raise ValueError(f"no voice needs its opcode {name}")
    raise ValueError("it has no end")


def _to_mark(stack: list[Any]) -> list[Any]:
    """Take what lies above the last mark, and the mark."""
    items = []
    while (item := stack.pop()) is not _Mark:
        items.append(item)
    return items[::-1]


def _set(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], dict) or len(items) % 2:
        raise ValueError("it sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise ValueError("a key of its dict is not text")
        stack[-1][key] = value


def _append(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise ValueError("it appends to what is no list")
    stack[-1] += items


def _global(module: object, name: object) -> _Global:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a name in it is not text")
    found = _Global(module, name)
    if found not in _GLOBALS:
        raise _ForbiddenGlobal(f"{module}.{name}")
    return found


def _storage(pid: object) -> _Storage:
    match pid:
        case ("storage", _Global("torch", kind), str(key), _, numel) if _is_size(numel):
            return _Storage(kind, key, numel)
    raise ValueError("a storage is not described properly")


def _call(called: object, arguments: object) -> object:
    """What the two functions that a voice names would make."""
    if called == _MAKE_DICT and arguments == ():
        return {}
    match arguments:
        case (_Storage() as storage, offset, size, stride, *more) if (
            called == _MAKE_TENSOR
            and _is_size(offset)
            and _are_sizes(size)
            and _are_sizes(stride)
            and len(size) == len(stride) <= 8
            and len(more) <= 3
        ):
            return _Tensor(storage, offset, size, stride)
    raise ValueError("a tensor is not described properly")


class _ForbiddenGlobal(Exception):
    """Names a global that a voice file has no business to mention."""


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
    if max(num_bytes, num_values * dtype.itemsize) > _MAX_STORAGE_BYTES:
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
