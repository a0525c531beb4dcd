"""Output files that appear whole or not at all."""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pplex.errors import PplexError

PIPE = Path("-")  # stdin or stdout
# Gives a temporary file, which is whole, its name; what raises leaves an older one.
Place = Callable[[Path, Path], None]

_STDOUT = 1
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def cache_folder() -> Path:
    """The folder for what pplex can make again: under $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pplex"


def put(temporary: Path, path: Path) -> None:
    """Replace what is at `path`, whose mode stays. Links are followed."""
    target = real_path(path)
    if target.exists():
        temporary.chmod(stat.S_IMODE(target.stat().st_mode))
    os.replace(temporary, target)


def put_new(temporary: Path, path: Path) -> None:
    """Give `path` its content if nobody else has; of several programs one does."""
    target = real_path(path)
    try:
        os.link(temporary, target)
    except OSError as e:
        # Where files cannot have two names, looking has to do.
        if isinstance(e, FileExistsError) or os.path.lexists(target):
            raise PplexError(
                f"{path} exists already; choose another name or give --overwrite"
            ) from e
        os.replace(temporary, target)


@contextmanager
def atomic_write(path: Path, *, place: Place = put) -> Iterator[Path]:
    """Yield a hidden temporary path beside `path`; `place` it when the body is done.

    The body writes to the yielded path and does nothing else: an OSError inside it
    is reported as a failure to write `path`. On any failure the temporary file is
    removed and an older file at `path` is left as it was. Links are followed.
    """
    target = Path(os.path.realpath(path))
    _check_target(path, target)
    # A long name is cut so that the temporary one stays within 255 bytes.
    temporary = target.with_name(
        f".{target.name[:48]}.pplex-{secrets.token_hex(4)}.tmp"
    )
    try:
        temporary.open("xb").close()
        yield temporary
        place(temporary, path)
    except OSError as e:
        raise PplexError(_reason(path, e)) from e
    finally:
        _remove(temporary)


def write_text(path: Path, text: str, *, place: Place = put) -> None:
    """Write `text` to `path` as UTF-8 with Unix line ends, whole or not at all.

    `-` is stdout; devices and pipes are written to as they are.
    """
    if path == PIPE:
        write_stdout(text.encode("utf-8"))
        return
    if is_pipe(path):
        try:
            with path.open("wb", buffering=0) as file:
                file.write(text.encode("utf-8"))
        except OSError as e:
            raise PplexError(_reason(path, e)) from e
        return
    with atomic_write(path, place=place) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def plan_files(
    folder: Path, names: Sequence[str], ending: str, overwrite: bool
) -> dict[str, Path]:
    """Where a file for each recording goes; the folder is made, nothing lost unasked.

    Folders in a recording's name become part of its file's.
    """
    planned = {}
    for name in names:
        stem = name.removesuffix(".wav").replace("/", "-").replace("\\", "-")
        planned[name] = folder / (stem.strip(".-") + ending)
    if len(set(planned.values())) < len(names):
        raise PplexError(
            f"two recordings would have one file in {folder}; take them one by one"
        )
    for path in planned.values():
        if path.exists() and not overwrite:
            raise PplexError(
                f"{path} exists already; choose another folder or give --overwrite"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PplexError(f"cannot write to {folder}: {e.strerror or e}") from e
    return planned


def real_path(path: Path) -> Path:
    """The path with its links followed, in a circle as far as the system does.

    What can be no path at all stays as it is.
    """
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return path


def is_pipe(path: Path) -> bool:
    """Whether `path` is stdout, a device or a pipe: nothing that can be replaced."""
    if path == PIPE:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_stdout(content: bytes) -> None:
    """Write bytes to stdout at once; a reader that has left is a BrokenPipeError."""
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(_STDOUT, view) :]
    except BrokenPipeError:
        raise
    except OSError as e:
        raise PplexError(_reason(Path("stdout"), e)) from e


def _check_target(path: Path, target: Path) -> None:
    """Refuse what a rename would wrongly replace: folders and devices."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise PplexError(_reason(path, e)) from e
    if stat.S_ISDIR(mode):
        raise PplexError(f"cannot write {path}: it is a folder; give a file name")
    if not stat.S_ISREG(mode):
        raise PplexError(
            f"cannot write {path}: it is a device or pipe; give an ordinary file name"
        )


def _remove(temporary: Path) -> None:
    """Remove the temporary file; one that is gone or out of reach is no new error."""
    try:
        temporary.unlink()
    except OSError:
        pass


def _reason(path: Path, error: OSError) -> str:
    folder = path.parent
    if error.errno in _DISK_FULL:
        return f"cannot write {path}: the disk is full; free some space and try again"
    if error.errno in _DENIED:
        return (
            f"cannot write {path}: no permission to write in {folder}; "
            "choose another folder"
        )
    if error.errno in {errno.ENOENT, errno.ENOTDIR} and not folder.is_dir():
        return (
            f"cannot write {path}: the folder {folder} does not exist; create it first"
        )
    return f"cannot write {path}: {error.strerror or error}"
