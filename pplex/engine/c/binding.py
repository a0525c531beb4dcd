"""The compiled library: found and loaded once, None where it was not built."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

BEST = 2  # instruction sets: 0 any, 1 AVX2, 2 AVX-512

_int, _long, _pointer = ctypes.c_int, ctypes.c_long, ctypes.c_void_p

# By part and function: what it returns, what it takes.
_FUNCTIONS: dict[str, dict[str, tuple[type | None, list[type]]]] = {
    "lm": {
        "use": (_int, [_int]),
        "packed_bytes": (_long, [_pointer]),
        "pack": (None, [*[_pointer] * 4, _int, _int, _int]),
        "fits": (_int, [_pointer, _long, _int, _int, _int]),
        "multiply": (None, [*[_pointer] * 4, _int]),
        "embed": (_int, [_pointer, _long, _pointer, _pointer]),
        "scratch": (_long, [_pointer, _long]),
        "step": (_int, [_pointer, _pointer, _long, *[_pointer] * 6]),
        "read_scratch": (_long, [_pointer, _long]),
        "read": (None, [_pointer, _long, *[_pointer] * 3]),
    },
    "codec": {
        "use": (_int, [_int]),
        "room": (_long, [_pointer, _long]),
        "encode": (None, [*[_pointer] * 2, _long, _pointer, _long, *[_pointer] * 2]),
        "decode": (None, [*[_pointer] * 2, _long, _pointer, _long, *[_pointer] * 2]),
        "quantize": (None, [*[_pointer] * 2, _long, *[_pointer] * 2]),
        "dequantize": (None, [*[_pointer] * 2, _long, *[_pointer] * 2]),
        "activate": (None, [_long, _pointer, _long]),
    },
}


@functools.cache
def load_library(name: str) -> ctypes.CDLL | None:
    """The library with the functions of ``lm`` or ``codec``, ``pplex_NAME_...``."""
    path = find_extension("_native")
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    for function, (result, arguments) in _FUNCTIONS[name].items():
        bound = getattr(library, f"pplex_{name}_{function}")
        bound.restype, bound.argtypes = result, arguments
    getattr(library, f"pplex_{name}_use")(BEST)
    return library


def is_built() -> bool:
    """Whether this machine has the library."""
    return load_library("lm") is not None and load_library("codec") is not None


def find_extension(name: str) -> Path | None:
    """The compiled library ``name`` beside this module; None where it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"{name}{suffix}")
        if path.is_file():
            return path
    return None
