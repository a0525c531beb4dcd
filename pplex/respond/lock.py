"""One run at a time on an output folder, and what it has begun to write.

Locks are the kernel's (``flock``): they vanish with the process, however it ends. The
file beside them names the process and lists outputs that were begun, so that the next
run knows the files of a killed one from those of others. A run that ends removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pplex.errors import PplexError
from pplex.files import read_regular
from pplex.respond.manifest import LOCK_PATTERN, OUTPUT, Line
from pplex.values import fit, parse_json

LOCK_NAME = ".pplex-batch.lock"

_BEGUN = OUTPUT | {"recording": str, "settings": str}
_LINE = {"begun": (_BEGUN, None), "pid": (int, None), "host": (str, None)}
_MAX_BYTES = 1 << 28


class FolderLock:
    """The right to write to ``outdir``: alone, or as one of several shards.

    ``begun`` are the outputs that earlier runs, since killed, were about to name.
    """

    def __init__(self, outdir: Path, shard: tuple[int, int] | None = None) -> None:
        """Take the lock, or say who has it."""
        self._outdir = outdir
        self._files: list[_LockFile] = []
        try:
            self._files.append(_LockFile(outdir / LOCK_NAME, shared=shard is not None))
            if shard is not None:
                own = f".pplex-batch.{shard[0]}-of-{shard[1]}.lock"
                self._files.append(_LockFile(outdir / own, shared=False))
            self.begun = begun_in(outdir)
            self._files[-1].append({"pid": os.getpid(), "host": socket.gethostname()})
        except OSError as e:
            self.release()
            raise PplexError(f"cannot write to {outdir}: {e.strerror or e}") from e
        except PplexError:
            self.release()
            raise

    def begin(self, output: Line) -> None:
        """Note an output that is whole and about to be given its name."""
        self._files[-1].append({"begun": output})

    def release(self, *, ended: bool = False) -> None:
        """Give the lock back; ``ended`` if all that was begun is in the manifest."""
        if ended and not self._files[0].shared:
            # Nobody else is here: what killed shards left can go.
            for path in self._outdir.glob(LOCK_PATTERN):
                path.unlink(missing_ok=True)
        for file in reversed(self._files):
            file.release(remove=ended)
        self._files.clear()


def begun_in(outdir: Path) -> list[Line]:
    """What runs that were killed were about to name, as ``begin`` was told."""
    return [
        line["begun"]
        for file in outdir.glob(LOCK_PATTERN)
        for line in _lines(file)
        if line["begun"] is not None
    ]


def is_held_by(outdir: Path, pid: int, host: str) -> bool:
    """Whether the run of this process is at work here, and not in another folder."""
    return any(
        (line["pid"], line["host"]) == (pid, host)
        for file in outdir.glob(LOCK_PATTERN)
        for line in _lines(file)
    )


_LEFTOVER = re.compile(r"\.(.{0,48})\.pplex-[0-9a-f]{8}\.tmp", re.DOTALL)


def remove_leftovers(
    outdir: Path, files: Iterable[Path], spared: Iterable[Path] | None = None
) -> int:
    """Remove temporary files of a run that was killed; how many there were.

    They are in ``outdir`` and beside ``files``. Where other shards may be at work,
    whose files are ``spared``, only those that were to be one of ``files`` go.
    """
    own, theirs = set(map(_kept_part, files)), set(map(_kept_part, spared or ()))
    removed = 0
    for folder in {outdir, *(folder for folder, _ in own)}:
        if not folder.is_dir():
            continue
        for entry in os.scandir(folder):
            match = _LEFTOVER.fullmatch(entry.name)
            name = (folder, match[1]) if match else None
            if name and (spared is None or (name in own and name not in theirs)):
                Path(entry.path).unlink(missing_ok=True)
                removed += 1
    return removed


def _kept_part(path: Path) -> tuple[Path, str]:
    """The folder and the part of a name that ``atomic_write`` keeps."""
    return path.parent, path.name[:48]


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    try:
        content = read_regular(path, _MAX_BYTES)
    except FileNotFoundError:
        return []
    for raw in content.splitlines():
        try:
            found.append(fit(parse_json(raw), _LINE))
        except ValueError:  # torn, or none of ours
            continue
    return found


def _open(path: Path) -> int:
    """The file, made if need be; never one that has another name as well."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as e:
        if not path.is_symlink():
            raise
        raise PplexError(f"{path} is a link, which no lock is; remove it") from e
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise PplexError(f"{path} is no lock but a file of another use; remove it")
    return fd


class _LockFile:
    def __init__(self, path: Path, shared: bool) -> None:
        self._path = path
        self.shared = shared
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        while True:
            self._fd = _open(path)
            try:
                fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                raise PplexError(
                    f"{path.parent} is being written by another run of pplex batch or "
                    f"talk{self._holder()}; wait until it ends, or choose another "
                    "folder"
                ) from None
            if self._is_in_place():
                self._tells = any(line["begun"] for line in _lines(path))
                return
            os.close(self._fd)  # the run before removed it in between

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        named = [line for line in _lines(self._path) if line["pid"] is not None]
        return f" (process {named[-1]['pid']} on {named[-1]['host']})" if named else ""

    def append(self, line: dict[str, Any]) -> None:
        self._tells |= "begun" in line
        os.write(self._fd, json.dumps(line).encode() + b"\n")

    def release(self, remove: bool) -> None:
        try:
            if self.shared:  # the last shard removes it
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove = False  # what it tells is another run's
            if remove or not self._tells:
                self._path.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(self._fd)
