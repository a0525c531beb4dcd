"""Output files that appear whole or not at all; input files opened with care."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import termios
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pplex.errors import PplexError, first_line

PIPE = Path("-")  # stdin or stdout
# Gives a temporary file, which is whole, its name; what raises leaves an older one.
Place = Callable[[Path, Path], None]

_STDOUT = 1
_BLOCK = 1 << 20
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,6})")
_STANDARD = {"-": _STDOUT, "/dev/stdout": _STDOUT, "/dev/stderr": 2}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def cache_folder() -> Path:
    """The folder for what pplex can make again: under $XDG_CACHE_HOME or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "pplex"


def put(temporary: Path, path: Path) -> None:
    """Replace what is at `path`, whose mode stays. Links are followed."""
    target = real_path(path)
    if target.exists():
        temporary.chmod(stat.S_IMODE(target.stat().st_mode))
    os.replace(temporary, target)


def check_new(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file unasked, or a place that is none; not of pipes."""
    if is_pipe(path):
        return
    if path.exists() and not overwrite:
        raise _exists(path)
    if not _folder_of(path).is_dir():
        raise _no_folder(path)


def check_new_folder(path: Path) -> None:
    """Refuse a folder's name that is taken, or a place that is none."""
    _check_no_pipe(path)
    if os.path.lexists(path):
        raise PplexError(f"{path} exists already; give the name of a new folder")
    if not path.absolute().parent.is_dir():
        raise _no_folder(path)


def _exists(path: Path) -> PplexError:
    return PplexError(f"{path} exists already; choose another name or give --overwrite")


def put_new(temporary: Path, path: Path) -> None:
    """Give `path` its content if nobody else has; of several programs one does."""
    target = real_path(path)
    try:
        os.link(temporary, target)
    except OSError as e:
        # Where files cannot have two names, looking has to do.
        if isinstance(e, FileExistsError) or os.path.lexists(target):
            raise _exists(path) from e
        os.replace(temporary, target)


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """Open an ordinary file to read; whatever else is wrong with it is an OSError.

    A pipe or device, which may have no end, is refused, and so is a file of over
    `limit` bytes.
    """
    file = open(path, "rb", opener=open_without_waiting)
    status = os.fstat(file.fileno())
    fault = None
    if not stat.S_ISREG(status.st_mode):
        fault = "is a device or pipe; give an ordinary file"
    elif limit is not None and status.st_size > limit:
        fault = f"has {status.st_size} bytes, where {limit} are the most"
    if fault:
        file.close()
        raise PplexError(f"{path} {fault}")
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """The whole of an ordinary file of at most `limit` bytes."""
    content = bytearray()
    with open_regular(path, limit) as file:
        while block := file.read(_BLOCK):
            content += block
            if len(content) > limit:  # some files tell no size, others grow
                raise PplexError(f"{path} has over {limit} bytes, which are the most")
    return bytes(content)


@contextmanager
def reading(what: object, broken: str) -> Iterator[None]:
    """Make one sentence of all that reading a file from outside may raise.

    It begins with `what`; `broken` says what the file then is, or is not.
    """
    try:
        yield
    except PplexError:
        raise
    except Exception as e:  # of whichever library takes it apart
        if isinstance(e, OSError) and e.errno is not None:
            raise PplexError(f"{what} cannot be read: {e.strerror or e}") from e
        raise PplexError(f"{what} {broken} ({first_line(e)[:200]})") from e


@contextmanager
def atomic_write(path: Path, *, place: Place = put) -> Iterator[Path]:
    """Yield a hidden temporary path beside `path`; `place` it when the body is done.

    The body writes to the yielded path and does nothing else: an OSError inside it
    is reported as a failure to write `path`. On any failure the temporary file is
    removed and an older file at `path` is left as it was. Links are followed. A
    descriptor gets the bytes of the file.
    """
    if is_descriptor(path):
        try:
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / "output"
                yield temporary
                with open_pipe(path) as write, temporary.open("rb") as file:
                    while content := file.read(_BLOCK):
                        write(content)
        except BrokenPipeError:
            raise
        except OSError as e:
            raise PplexError(_reason(path, e)) from e
        return
    target = Path(os.path.realpath(path))
    _check_target(path, target)
    temporary = hidden_beside(target)
    try:
        temporary.open("xb").close()
        yield temporary
        place(temporary, path)
    except OSError as e:
        raise PplexError(_reason(path, e)) from e
    finally:
        # One that is gone or out of reach is no new error.
        with suppress(OSError):
            temporary.unlink()


class Together:
    """Files that get their names once all are whole; a ``place`` of ``atomic_write``.

    ``hidden`` is where each is until then. As a context it leaves none of these behind.
    """

    def __init__(self) -> None:
        self.hidden: dict[Path, Path] = {}

    def __call__(self, temporary: Path, path: Path) -> None:
        """Keep what is to be at ``path``."""
        hidden = hidden_beside(temporary.with_name(path.name))
        os.replace(temporary, hidden)
        self.hidden[path] = hidden

    def name(self, place: Place) -> None:
        """Have ``place`` name them; where it cannot, none that is new is there."""
        new: list[Path] = []
        try:
            for path, hidden in self.hidden.items():
                target = real_path(path)
                is_new = not target.exists()
                try:
                    place(hidden, path)
                except OSError as e:
                    raise PplexError(_reason(path, e)) from e
                new += [target] * is_new
        except BaseException:
            for path in new:
                path.unlink(missing_ok=True)
            raise
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind of what has no name."""
        for hidden in self.hidden.values():
            with suppress(OSError):
                hidden.unlink()

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


def hidden_beside(path: Path) -> Path:
    """A new name for a temporary file in the folder of ``path``."""
    # A long name is cut so that the temporary one stays within 255 bytes.
    return path.with_name(f".{path.name[:48]}.pplex-{secrets.token_hex(4)}.tmp")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that gets the name ``target`` when the body is done, else is removed."""
    target = target.absolute()
    new = hidden_beside(target)
    try:
        new.mkdir()
        yield new
        new.rename(target)
    except OSError as e:
        raise PplexError(f"cannot write {target}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path, text: str, *, place: Place = put) -> None:
    """Write `text` to `path` as UTF-8 with Unix line ends, whole or not at all.

    `-` is stdout; devices and pipes are written to as they are. What is no text, a
    byte of a file's name, becomes \\udc80 to \\udcff: in JSON that stands for it.
    """
    content = text.encode("utf-8", "backslashreplace")
    if is_pipe(path):
        with open_pipe(path) as write:
            write(content)
        return
    with atomic_write(path, place=place) as temporary:
        temporary.write_bytes(content)


@contextmanager
def open_pipe(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yield what writes bytes at once to what `is_pipe`.

    A reader that has left is a BrokenPipeError.
    """
    number = descriptor(path)
    try:
        # A file that the shell has opened goes on where it is, which /dev/fd forgets.
        fd = os.open(path, os.O_WRONLY) if number is None else os.dup(number)
    except OSError as e:
        raise PplexError(_reason(path, e)) from e

    def write(content: bytes) -> None:
        view = memoryview(content)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except BrokenPipeError:
            raise
        except OSError as e:
            raise PplexError(_reason(path, e)) from e

    try:
        yield write
    finally:
        os.close(fd)


def check_named(
    path: Path, suffixes: Sequence[str], overwrite: bool, *, is_text: bool = False
) -> None:
    """Refuse an output whose name tells no format, or that exists; not a descriptor."""
    if is_descriptor(path):
        check_descriptor(path, is_text=is_text)
    elif path.suffix.lower() not in suffixes:
        *others, last = suffixes
        ending = f"{', '.join(others)} or {last}" if others else last
        raise PplexError(f"cannot write {path}: end its name in {ending}")
    else:
        check_new(path, overwrite)


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
    if len({folded(path) for path in planned.values()}) < len(names):
        raise PplexError(
            f"two recordings would have one file in {folder}; take them one by one"
        )
    for path in planned.values():
        if path.exists() and not overwrite:
            raise PplexError(
                f"{path} exists already; choose another folder or give --overwrite"
            )
    make_folder(folder)
    return planned


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in, unless it is there."""
    _check_no_pipe(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise PplexError(f"{folder} is a file; give the name of a folder") from e
    except OSError as e:
        raise PplexError(f"cannot write to {folder}: {e.strerror or e}") from e


def _check_no_pipe(folder: Path) -> None:
    if folder == PIPE:
        raise PplexError("stdout is no folder: many files are written; name a folder")


def composed(name: str) -> str:
    """A name in the form of Unicode that most systems have; Macs may have another.

    Names are written as the system gave them, and compared so.
    """
    return unicodedata.normalize("NFC", name)


def folded(path: Path) -> str:
    """What a name is to a file system for which capitals are small letters.

    Nor does it tell Unicode's forms of one letter apart, or see what has no width.
    """
    text = unicodedata.normalize("NFD", str(path)).casefold()
    text = unicodedata.normalize("NFC", text)
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def real_path(path: Path) -> Path:
    """The path with its links followed, in a circle as far as the system does.

    What can be no path at all stays as it is.
    """
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return path


def is_descriptor(path: Path) -> bool:
    """Whether `path` names an open descriptor: `-` for stdout, or `/dev/fd/N`."""
    return descriptor(path) is not None


def check_descriptor(path: Path, *, is_text: bool) -> None:
    """Refuse a descriptor that is not open for writing, before any work is done.

    And a terminal, for what is no text.
    """
    fd = descriptor(path) or 0
    try:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError as e:
        raise PplexError(f"cannot write {name_of(path)}: it is not open") from e
    if mode == os.O_RDONLY:
        raise PplexError(
            f"cannot write {name_of(path)}: it is closed, or open to read only"
        )
    if not is_text and os.isatty(fd):
        raise PplexError(
            f"{name_of(path)} is a terminal: pipe it into a player or a file"
        )


def unread_bytes(path: Path) -> int:
    """What waits in a descriptor's pipe to be read; 0 where the system does not say."""
    fd = descriptor(path)
    if fd is None or not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return 0
    count = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def name_of(path: Path) -> str:
    """An output as messages name it."""
    return "stdout" if path == PIPE else str(path)


def descriptor(path: Path) -> int | None:
    """The number of the open descriptor that `path` names."""
    match = _DESCRIPTOR.fullmatch(str(path))
    return int(match[1]) if match else _STANDARD.get(str(path))


def is_pipe(path: Path) -> bool:
    """Whether `path` is a descriptor, device or pipe: nothing that can be replaced."""
    if is_descriptor(path):
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_without_waiting(name: str, flags: int) -> int:
    """Open a file; a named pipe that nobody writes to does not block the program."""
    return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)


def not_a_file(path: Path) -> PplexError:
    """What is said of a folder where a file is to be written."""
    return PplexError(f"cannot write {path}: it is a folder; give a file name")


def no_permission(path: Path) -> PplexError:
    """What is said of a place where nothing may be written."""
    return PplexError(
        f"cannot write {name_of(path)}: no permission to write in {path.parent}; "
        "choose another folder"
    )


def _check_target(path: Path, target: Path) -> None:
    """Refuse what a rename would wrongly replace: folders and devices."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise PplexError(_reason(path, e)) from e
    if stat.S_ISDIR(mode):
        raise not_a_file(path)
    if not stat.S_ISREG(mode):
        raise PplexError(
            f"cannot write {path}: it is a device or pipe; give an ordinary file name"
        )


def _folder_of(path: Path) -> Path:
    """Where a file is written; that of a link where it leads."""
    return (real_path(path) if os.path.islink(path) else path).parent


def _no_folder(path: Path) -> PplexError:
    folder = _folder_of(path)
    return PplexError(
        f"cannot write {path}: the folder {folder} does not exist; create it first"
    )


def _reason(path: Path, error: OSError) -> str:
    folder, name = _folder_of(path), name_of(path)
    if error.errno in _DISK_FULL:
        return f"cannot write {name}: the disk is full; free some space and try again"
    if error.errno in _DENIED:
        return str(no_permission(path))
    if error.errno in {errno.ENOENT, errno.ENOTDIR} and not folder.is_dir():
        return str(_no_folder(path))
    return f"cannot write {name}: {error.strerror or error}"
