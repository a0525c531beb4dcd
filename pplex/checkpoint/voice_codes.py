"""Codes of voice recordings, kept in the user's cache between runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pplex.errors import PplexError
from pplex.files import atomic_write, cache_folder


def key(pcm: np.ndarray, codec: Path, device: str) -> str:
    """What the codes of ``pcm`` depend on: the sound, the codec's file, the device."""
    stat = codec.stat()
    what = f"{codec.resolve()} {stat.st_size} {stat.st_mtime_ns} {device}"
    digest = hashlib.sha256(what.encode())
    digest.update(np.ascontiguousarray(pcm).tobytes())
    return digest.hexdigest()


def read(name: str) -> np.ndarray | None:
    """The codes (codebooks, frames) kept under a key, None where there are none."""
    try:
        codes: np.ndarray = np.load(_path(name), allow_pickle=False)
    except (OSError, ValueError, EOFError):
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
