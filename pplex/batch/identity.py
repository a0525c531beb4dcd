"""What makes a recording, a model and an answer the same ones: hashes and seeds."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pplex.checkpoint.hub import LocalModel

_BLOCK = 1 << 20
# A file of weights up to this size is hashed whole, a larger one in samples.
_WHOLE_BYTES = 256 << 20
_NUM_SAMPLES = 64


@dataclass(frozen=True)
class FilePrint:
    """A file's size, modification time and SHA-256."""

    size: int
    mtime_ns: int
    sha256: str


def file_print(path: Path) -> FilePrint:
    """Read the whole file at ``path``."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
    return FilePrint(status.st_size, status.st_mtime_ns, digest.hexdigest())


def is_unchanged(path: Path, known: Mapping[str, object]) -> bool:
    """Whether ``path`` still is what ``known`` (a ``FilePrint`` as JSON) says.

    Size and time as before are taken for the same bytes; with another time the bytes
    are compared.
    """
    try:
        status = path.stat()
        if status.st_size != known.get("size"):
            return False
        if status.st_mtime_ns == known.get("mtime_ns"):
            return True
        return file_print(path).sha256 == known.get("sha256")
    except OSError:
        return False


def digest_of(value: object) -> str:
    """A short hash of anything that JSON can hold, the same on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def number_of(*parts: object) -> int:
    """A number below 2**32 that follows from ``parts`` alone.

    Small enough that no JSON reader rounds it. Names are taken in one Unicode form, so
    that they count the same on every file system.
    """
    text = unicodedata.normalize("NFC", "\0".join(str(part) for part in parts))
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")


def seed_for(seed: int, identity: str) -> int:
    """The seed of the recording ``identity`` in a run that was given ``seed``."""
    return number_of("seed", seed, identity)


def model_identity(local: LocalModel) -> str:
    """What tells a model from another: its commit, or else its files' contents."""
    if local.repo is not None:
        return f"{local.repo}@{local.revision}"
    folder = local.folder
    # Without voices: one counts where it is used.
    own = [*folder.lm_files, folder.codec, folder.tokenizer]
    if folder.config_file.is_file():
        own.append(folder.config_file)
    return f"files:{digest_of({path.name: _sampled(path) for path in own})}"


def _sampled(path: Path) -> list[object]:
    """Size and hash of a file; of a large one, hash of evenly spaced samples."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return [size, file_print(path).sha256]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for idx in range(_NUM_SAMPLES):
            file.seek(idx * (size - _BLOCK) // (_NUM_SAMPLES - 1))
            digest.update(file.read(_BLOCK))
    return [size, digest.hexdigest()]
