"""What tells one model from another, wherever its files lie."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pplex.checkpoint.hashes import sha256
from pplex.checkpoint.hub import LocalModel
from pplex.files import open_regular

_BLOCK = 1 << 20
# A file of weights up to this size is hashed whole, a larger one in samples.
_WHOLE_BYTES = 256 << 20
_NUM_SAMPLES = 64


def digest_of(value: object) -> str:
    """A short hash of anything that JSON can hold, the same on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def model_identity(local: LocalModel) -> str:
    """What tells a model from another: its commit, or else its files' contents."""
    if local.repo is not None:
        return f"{local.repo}@{local.revision}"
    folder = local.folder
    # Without voices: one counts where it is used.
    own = [*folder.lm_files, folder.codec, folder.tokenizer]
    if folder.config_file.is_file():
        own.append(folder.config_file)
    return f"files:{digest_of({path.name: sampled(path) for path in own})}"


def sampled(path: Path) -> list[object]:
    """Size and hash of a file; of a large one, hash of evenly spaced samples."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return [size, sha256(path)]
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for idx in range(_NUM_SAMPLES):
            file.seek(idx * (size - _BLOCK) // (_NUM_SAMPLES - 1))
            digest.update(file.read(_BLOCK))
    return [size, digest.hexdigest()]
