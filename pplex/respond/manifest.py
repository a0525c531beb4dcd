"""``manifest.jsonl``: what was done with each recording of an output folder.

A line a result, only ever appended; the last line of a recording counts, whatever its
time says: a clock may have been set back. Of files that shards wrote side by side, the
one with the latest line counts. A line that was cut off by a kill or a full disk is
passed over, and its recording is done again.

A line says by which schema it was written; one without a number is as the first.
The number rises when a key goes or means something else, not when one is added.
"""

from __future__ import annotations

import datetime
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pplex.errors import PplexError
from pplex.files import composed, open_regular, read_regular
from pplex.values import fit, parse_json

_SCHEMA = 1
DONE = "done"
FAILED = "failed"
STOPPED = "stopped"
# Files that are there while a batch is at work, and after one that was killed.
LOCK_PATTERN = ".pplex-batch*.lock"

Line = dict[str, Any]
# What is looked into of a line.
_PRINT = {"size": (int, None), "mtime_ns": (int, None), "sha256": (str, None)}
OUTPUT: dict[str, Any] = {"path": str, **_PRINT}
_OUTCOME = {"check": str, "passed": bool, "detail": str}
_LINE = {
    "schema": (int, None),
    "recording": str,
    "status": str,
    "error": (str, None),
    "input": ({"path": (str, None), **_PRINT}, None),
    "settings": str,
    "outputs": {str: OUTPUT},
    "audio_s": (float, None),
    "tail_s": (float, None),
    "words": (int, None),
    "text": (str, None),
    "cut_off": (bool, None),
    "computed": ({str: str}, None),
    "checks": ({"asked": {}, "outcomes": [_OUTCOME]}, None),
    "timings": ({str: float}, None),
    "prompt": (str, None),
    "extra": ({}, None),
    "time": str,
}

# The version of a package: a file that is read once, not for every recording.
installed = functools.cache(importlib.metadata.version)

_BLOCK = 1 << 20
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class FilePrint:
    """A file's size, modification time and SHA-256."""

    size: int
    mtime_ns: int
    sha256: str


def file_print(path: Path) -> FilePrint:
    """Read the whole file at ``path``, an ordinary one."""
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
    return FilePrint(status.st_size, _mtime_ns(status), digest.hexdigest())


def _mtime_ns(status: os.stat_result) -> int:
    """When a file was changed: a clock may say what 64 bits do not hold."""
    return min(status.st_mtime_ns, (1 << 63) - 1)


def is_unchanged(path: Path, known: Mapping[str, object]) -> bool:
    """Whether ``path`` still is what ``known`` (a ``FilePrint`` as JSON) says.

    Size and time as before are taken for the same bytes; with another time the bytes
    are compared.
    """
    try:
        status = path.stat()
        if status.st_size != known.get("size"):
            return False
        if _mtime_ns(status) == known.get("mtime_ns"):
            return True
        return file_print(path).sha256 == known.get("sha256")
    except (OSError, ValueError, PplexError):
        return False


def manifest_name(shard: tuple[int, int] | None = None) -> str:
    """The file's name; shards that run side by side have one each."""
    if shard is None:
        return "manifest.jsonl"
    return f"manifest.{shard[0]}-of-{shard[1]}.jsonl"


def manifests_in(folder: Path) -> list[Path]:
    """The manifests of a folder: that of unsharded runs first, then the shards'."""
    whole = folder / manifest_name()
    return [whole] * whole.is_file() + sorted(folder.glob("manifest.*-of-*.jsonl"))


def read_lines(
    path: Path, note: Callable[[str], None] = lambda message: None
) -> list[Line]:
    """The whole lines of a manifest, in order; none where there is no file.

    ``note`` is told what was passed over.
    """
    try:
        content = read_regular(path, _MAX_BYTES)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e
    lines = []
    rows = content.split(b"\n")
    for number, raw in enumerate(rows, start=1):
        try:
            line = parse_json(raw) if raw.strip() else None
        except ValueError:
            why = "is not JSON and was left out"
            if number == len(rows):
                why = "is cut off; the batch was stopped or is still running"
            note(f"{path}: line {number} {why}")
            continue
        try:
            if raw.strip():
                line = fit(line, _LINE)
                line["schema"] = _known(line["schema"], f"{path}: line {number}")
                lines.append(line)
        except ValueError as e:
            note(f"{path}: line {number} is none of pplex batch and was left out: {e}")
    return lines


def _known(schema: int | None, where: str) -> int:
    """A line's schema; what a newer version wrote may mean something else."""
    if schema is not None and schema > _SCHEMA:
        raise PplexError(
            f"{where} has schema {schema}, and this pplex knows {_SCHEMA}: update pplex"
        )
    return schema or 1


def latest_lines(
    outdir: Path, note: Callable[[str], None] = lambda message: None
) -> list[Line]:
    """The line that counts of each recording, by name; ``note`` as ``read_lines``."""
    if not manifests_in(outdir):
        why = "has no" if outdir.is_dir() else "is no folder with a"
        raise PplexError(
            f"{outdir} {why} {manifest_name()}; give the output folder of pplex batch"
        )
    return [line for _, line in sorted(Manifest(outdir, note=note).last.items())]


def now() -> str:
    """The time as lines have it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat()


def new_line(recording: str, status: str, settings: str) -> Line:
    """What every line has, now, of a recording answered with such settings."""
    return {
        "schema": _SCHEMA,
        "recording": recording,
        "status": status,
        "error": None,
        "input": None,
        "settings": settings,
        "outputs": {},
        "pplex": installed("pplex"),
        "time": now(),
    }


def stopped_line(output: Line) -> Line:
    """The line of an output that is about to get its name, or was when a run ended.

    It has the ``recording`` and the ``settings``, too.
    """
    line = new_line(output["recording"], STOPPED, output["settings"])
    why = "a run was killed while it wrote this"
    return line | {"error": why, "outputs": {"audio": output}}


def passes(line: Line) -> bool | None:
    """Whether every check of a recording passed; None if nothing was asked."""
    outcomes = (line["checks"] or {"outcomes": []})["outcomes"]
    return all(one["passed"] for one in outcomes) if outcomes else None


def flat(line: Line) -> dict[str, object]:
    """A line as a row of a table: ``timings.read_s``, files by their paths alone."""
    return _flat(line | {"checks": passes(line)}, "")


def _flat(value: Any, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        return {name: value}
    if OUTPUT.keys() <= value.keys():
        return {name: value["path"]}
    row: dict[str, object] = {}
    for key, part in value.items():
        row |= _flat(part, f"{name}.{key}" if name else key)
    return row


class Manifest:
    """What is known of an output folder, and the file that new lines go to."""

    def __init__(
        self,
        outdir: Path,
        shard: tuple[int, int] | None = None,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Read every manifest of ``outdir``; nothing is written yet.

        ``note`` is told of lines that were passed over.
        """
        self.outdir = outdir
        self.path = outdir / manifest_name(shard)
        self.last: dict[str, Line] = {}
        # By composed names: recordings as they are called in `last`, and of each
        # output's name every file that was ever written there.
        self._names: dict[str, str] = {}
        self._written: dict[str, list[Line]] = {}
        kept: set[int] = set()
        for path in manifests_in(outdir):
            latest: dict[str, Line] = {}
            for line in read_lines(path, note):
                for output in line["outputs"].values():
                    told = {k: line[k] for k in ("recording", "settings")}
                    self.know(output | told)
                latest[line["recording"]] = line
            for recording, line in latest.items():
                known = self.last.get(recording)
                if known is None or known["time"] <= line["time"]:
                    self._keep(line)
                    if path == self.path:
                        kept.add(id(line))
        # An unsharded run takes over what shards did, so that one file tells all.
        self._missing = (
            []
            if shard
            else [line for line in self.last.values() if id(line) not in kept]
        )
        self._fd: int | None = None

    def _keep(self, line: Line) -> None:
        name = line["recording"]
        self.last[name] = line
        self._names[composed(name)] = name

    def line_of(self, key: str) -> Line | None:
        """The last line of a recording, whose name may have another form there."""
        return self.last.get(key) or self.last.get(self._names.get(composed(key), key))

    def know(self, output: Line) -> None:
        """Take note of a file, the ``recording`` it is of, and its ``settings``."""
        self._written.setdefault(composed(output["path"]), []).append(output)

    def knows(self, output: Line) -> bool:
        """Whether ``know`` was told of these bytes."""
        return any(
            known["sha256"] == output["sha256"]
            for known in self._written.get(composed(output["path"]), [])
        )

    def has_written(self, path: Path) -> bool:
        """Whether an output of that name was ever written."""
        return composed(self.relative(path)) in self._written

    def origin_of(self, path: Path, *, surely: bool = False) -> tuple[str, str] | None:
        """Recording and settings of which the file at ``path`` is; None if of none.

        Nor is what somebody changed since; ``surely`` goes by its bytes.
        """
        for output in reversed(self._written.get(composed(self.relative(path)), [])):
            if is_unchanged(path, output | {"mtime_ns": None} if surely else output):
                return output["recording"], output["settings"]
        return None

    def open(self) -> None:
        """Make the file ready for new lines."""
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise PplexError(f"{self.path} is a device or pipe; remove it")
            size = status.st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                os.write(self._fd, b"\n")
        except OSError as e:
            raise PplexError(f"cannot write {self.path}: {e.strerror or e}") from e
        for line in self._missing:
            self.append(line)

    def append(self, line: Line) -> None:
        """Write a line at once; it survives the end of this process."""
        assert self._fd is not None
        data = _json(line) + b"\n"
        if not _is_in_place(self._fd, self.path):
            raise PplexError(
                f"{self.path} was removed or replaced while the batch ran; run the "
                "same command again"
            )
        try:
            size = os.fstat(self._fd).st_size
            if os.write(self._fd, data) != len(data):
                os.ftruncate(self._fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise PplexError(f"cannot write {self.path}: {e.strerror or e}") from e
        self._keep(line)

    def close(self) -> None:
        """No more lines."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def relative(self, path: Path) -> str:
        """How the manifest writes an output's name."""
        return Path(os.path.relpath(path, self.outdir)).as_posix()

    def describe(self, path: Path, content: FilePrint) -> Line:
        """An output as the manifest has it."""
        return {"path": self.relative(path), **asdict(content)}

    def is_done(
        self, key: str, settings: str, source: Path | None, outputs: Iterable[Path]
    ) -> bool:
        """Whether the recording was answered so, and its files are as they were.

        A talk has no ``source``.
        """
        line = self.line_of(key)
        if line is None or line["status"] != DONE or line["settings"] != settings:
            return False
        written = {composed(o["path"]): o for o in line["outputs"].values()}
        files = {composed(self.relative(path)): path for path in outputs}
        return (
            written.keys() == files.keys()
            and all(is_unchanged(files[name], o) for name, o in written.items())
            and (line["input"] is None) == (source is None)
            and (source is None or is_unchanged(source, line["input"]))
        )

    def answers_another(self, key: str, source: Path) -> bool:
        """Whether what is there answers another recording, which is there as well."""
        known = (self.line_of(key) or {}).get("input") or {}
        other = known.get("path")
        if not isinstance(other, str) or not os.path.exists(other):
            return False
        same = os.path.exists(source) and os.path.samefile(source, other)
        return (
            not same
            and not is_unchanged(source, known)
            and is_unchanged(Path(other), known)
        )

    def has_failed(self, key: str, settings: str, source: Path) -> bool:
        """Whether the recording failed, and nothing has changed since."""
        line = self.line_of(key)
        if line is None or line["status"] != FAILED or line["settings"] != settings:
            return False
        if line["input"] is None:
            return not source.is_file()
        return is_unchanged(source, line["input"])


def _is_in_place(fd: int, path: Path) -> bool:
    """Whether the open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _json(line: Line) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json.dumps(line, ensure_ascii=True).encode()
