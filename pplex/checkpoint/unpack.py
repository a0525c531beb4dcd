"""Unpack a checkpoint's `voices.tgz` into the user's cache, trusting nothing in it."""

import gzip
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from pplex.checkpoint.hashes import sha256
from pplex.errors import PplexError
from pplex.files import cache_folder, open_regular, reading

MAX_VOICE_BYTES = 1 << 26
MAX_UNPACKED_BYTES = 1 << 29
MAX_MEMBERS = 1_000

MAX_HEADER_BYTES = 1 << 16

_HEADERS = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
}
_SUFFIXES = (".pt", ".safetensors")
_CHUNK_BYTES = 1 << 20


def unpack_voices(archive: Path) -> Path:
    """Return a folder with the voices of a tar.gz file, unpacked on first use.

    The folder is named by the archive's SHA-256. Only regular files whose names end
    in .pt or .safetensors are written, flat; a path that leads elsewhere, a link or a
    device stops everything. The folder appears whole or not at all.
    """
    with reading(archive, "is not a whole tar.gz archive; download it again"):
        folder = cache_folder() / "voices" / sha256(archive)
        if folder.is_dir():
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
            try:
                _unpack(archive, temporary)
                _move(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as e:
            if e.errno is None:  # gzip's, of the content
                raise
            raise PplexError(
                f"the voices of {archive} cannot be unpacked into {cache_folder()}: "
                f"{e.strerror or e}; set XDG_CACHE_HOME to a folder that can be written"
            ) from e
    return folder


class _LimitedReader:
    """Passes on what a stream gives, until it has given too much."""

    def __init__(self, archive: Path, stream: gzip.GzipFile) -> None:
        self._archive = archive
        self._stream = stream
        self._left = MAX_UNPACKED_BYTES

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise PplexError(
                f"{self._archive} is refused: it unpacks to more than "
                f"{MAX_UNPACKED_BYTES} bytes"
            )
        return content


class _Member(tarfile.TarInfo):
    """A member whose headers are small: tarfile reads them whole and believes them."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        """Read a block of 512 bytes."""
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError("it has a sparse file")
        if member.type in _HEADERS and member.size > MAX_HEADER_BYTES:
            raise ValueError(f"it has a header of {member.size} bytes")
        return member

    def _proc_gnusparse_10(self, *_: object) -> None:
        """Sparse files have a list of their holes, of any length, in their content."""
        raise ValueError("it has a sparse file")


def _unpack(archive: Path, folder: Path) -> None:
    names: set[str] = set()
    with open_regular(archive) as file, gzip.open(file) as stream:
        reader = _LimitedReader(archive, stream)
        # A stream is read once and in order: nothing seeks past the limit.
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=reader, mode="r|", tarinfo=_Member
        ) as tar:
            for count, member in enumerate(tar):
                if count >= MAX_MEMBERS:
                    raise PplexError(f"{archive} is refused: it has too many members")
                _check_member(archive, member)
                name = PurePosixPath(member.name).name
                if not member.isreg() or not name.endswith(_SUFFIXES):
                    continue
                if name.startswith("."):  # ._NAME.pt: what macOS adds to archives
                    continue
                if name in names:
                    raise PplexError(f"{archive} is refused: it has two files {name!r}")
                names.add(name)
                source = tar.extractfile(member)
                assert source is not None  # a regular file has content
                with source, (folder / name).open("xb") as target:
                    shutil.copyfileobj(source, target, _CHUNK_BYTES)
        while reader.read(_CHUNK_BYTES):  # to the end, where gzip checks the whole
            pass


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    found = None
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        found = "leads out of the archive's folder"
    elif "\0" in member.name:
        found = "has a name that is none"
    elif not (member.isreg() or member.isdir()):
        found = "is a link or a device"
    elif not 0 <= member.size <= MAX_VOICE_BYTES:
        found = f"has {member.size} bytes, where {MAX_VOICE_BYTES} are the most"
    if found:
        raise PplexError(
            f"{archive} is refused: its member {member.name[:200]!r} {found}; "
            "get the archive from its publisher"
        )


def _move(temporary: Path, folder: Path) -> None:
    """Give the folder its name; another process may have been first with the same."""
    temporary.chmod(0o755)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
