"""Hashes: of files, in lists as ``sha256sum -c`` reads them, and what a model is."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pplex.errors import PplexError
from pplex.files import open_regular, read_regular, reading, write_text

if TYPE_CHECKING:
    from pplex.checkpoint.hub import LocalModel

SUMS_FILE = "SHA256SUMS"

_CHUNK_BYTES = 1 << 22
_MAX_BYTES = 1 << 24
_BLOCK = 1 << 20
# A file of weights up to this size is hashed whole, a larger one in samples.
_WHOLE_BYTES = 256 << 20
_NUM_SAMPLES = 64


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return _digest(path, hashlib.sha256())


def copy(source: Path, target: Path) -> str:
    """Copy a file's content; its SHA-256."""
    digest = hashlib.sha256()
    try:
        with open_regular(source) as reader, target.open("xb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
    except OSError as e:
        raise PplexError(f"cannot copy {source} to {target}: {e.strerror or e}") from e
    return digest.hexdigest()


def write_sums(path: Path, sums: dict[str, str]) -> None:
    """Write a list: file names, relative and with slashes, to their SHA-256."""
    lines = (f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    write_text(path, "".join(lines))


def read_sums(path: Path) -> dict[str, str]:
    """Read a list as ``write_sums`` and ``sha256sum`` make it."""
    with reading(path, "is not a list of SHA-256 sums in UTF-8"):
        lines = read_regular(path, _MAX_BYTES).decode("utf-8").splitlines()
    sums = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        name = match[2] if match else ""
        if not match or name.startswith("/") or ".." in Path(name).parts:
            raise PplexError(
                f"{path}, line {number}: expected a SHA-256 and a file of the folder"
            )
        sums[name] = match[1]
    return sums


def cached_name(path: Path) -> tuple[str, str] | None:
    """What the Hugging Face cache calls a file, and what its content gives instead.

    None for a file that does not lie in such a cache. Large files are named by their
    SHA-256 there, small ones by git's hash of a blob.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs":
        return None
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name, sha256(blob)
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):
        size = blob.stat().st_size
        return blob.name, _digest(blob, hashlib.sha1(b"blob %d\0" % size))
    return None


def name_or_sha256(path: Path) -> str:
    """A file's SHA-256; the name by which Hugging Face's cache has it is believed."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return sha256(path)


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


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with reading(path, "cannot be read"), open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
