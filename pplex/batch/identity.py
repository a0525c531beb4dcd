"""What makes a recording, a model and an answer the same ones: hashes and seeds."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from fnmatch import fnmatchcase
from pathlib import Path

from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.needed import MIMI_PATTERNS, TOKENIZER_PATTERN, needed_files
from pplex.respond.manifest import file_print

_BLOCK = 1 << 20
# A file of weights up to this size is hashed whole, a larger one in samples.
_WHOLE_BYTES = 256 << 20
_NUM_SAMPLES = 64


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
    folder = local.path if local.path.is_dir() else local.path.parent
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if local.path.is_dir():
        own = {name for name in needed_files(names) if name in names}
    else:
        own = {local.path.name} | {
            name
            for name in names
            for pattern in ("config.json", TOKENIZER_PATTERN, *MIMI_PATTERNS)
            if fnmatchcase(name, pattern)
        }
    own.discard("voices.tgz")  # a voice counts where it is used
    return f"files:{digest_of({name: _sampled(folder / name) for name in own})}"


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
