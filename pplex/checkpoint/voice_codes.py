"""Codes of voice recordings, kept in the user's cache between runs."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from pplex.errors import PplexError
from pplex.files import atomic_write, cache_folder, read_regular, reading

_MAX_BYTES = 1 << 24


def key(pcm: np.ndarray, codec: Path, device: str) -> str:
    """What the codes of ``pcm`` depend on: the sound, the codec's file, the device."""
    stat = codec.stat()
    what = f"{codec.resolve()} {stat.st_size} {stat.st_mtime_ns} {device}"
    digest = hashlib.sha256(what.encode())
    digest.update(np.ascontiguousarray(pcm).tobytes())
    return digest.hexdigest()


def read(name: str) -> np.ndarray | None:
    """What is kept under a key, None where there is nothing."""
    path = _path(name)
    try:
        with reading(path, "is damaged"):
            content = io.BytesIO(read_regular(path, _MAX_BYTES))
            codes: np.ndarray = np.lib.format.read_array(content, allow_pickle=False)
    except PplexError:
        return None
    return codes


def write(name: str, codes: np.ndarray) -> None:
    """Keep codes; a cache that cannot be written is done without."""
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, codes)
    except (OSError, PplexError):
        return


def _path(name: str) -> Path:
    return cache_folder() / "voice-codes" / f"{name}.npy"
