"""What a batch is to do: recordings, their names, settings and outputs.

Everything here follows from the command line, the file names and the jobs file; no
recording is opened. A recording's seed follows from its own name, never from what is
answered beside it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pplex.batch.identity import seed_for
from pplex.batch.jobsfile import Row, read_jobs
from pplex.batch.tasks import (
    Task,
    Wanted,
    outputs_apart,
    outputs_of,
    spare_inputs,
    with_hash,
)
from pplex.errors import PplexError
from pplex.respond.settings import Settings

SUFFIXES = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .w64 .rf64 .au .snd "
    ".caf".split()
)


@dataclass(frozen=True)
class Selection:
    """Which recordings: files and folders, or a jobs file."""

    inputs: tuple[Path, ...] = ()
    recursive: bool = False
    glob: str | None = None
    jobs: Path | None = None


@dataclass(frozen=True)
class _Found:
    """A recording before its name is settled.

    ``name`` is where its output goes, ``identity`` what its seed follows from, and
    ``details`` what tells it from others of that name.
    """

    source: Path
    name: str
    identity: str
    details: str
    settings: Settings
    chosen: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def make_plan(
    selection: Selection, outdir: Path, wanted: Wanted, settings: Settings
) -> list[Task]:
    """The tasks of a batch, sorted by name."""
    if selection.jobs is not None:
        found = _from_jobs(selection.jobs, settings)
    else:
        found = _from_inputs(selection, outdir, wanted, settings)
    tasks = [_task(one, outdir, wanted) for one in _named_apart(found)]
    tasks = outputs_apart(tasks, wanted)
    spare_inputs(tasks)
    return sorted(tasks, key=lambda task: task.key)


def _from_jobs(path: Path, settings: Settings) -> list[_Found]:
    seen: dict[object, Row] = {}
    found = []
    for row in read_jobs(path):
        same = (row.input, row.output, row.voice, row.text, row.seed, row.tail_s)
        other = seen.setdefault(same, row)
        if other is not row:
            raise PplexError(f"{path}: lines {other.number} and {row.number} are equal")
        name = PurePosixPath(row.output if row.output is not None else row.input)
        if not name.name:
            raise PplexError(f"{path} line {row.number}: {str(name)!r} is no file name")
        leaves = name.is_absolute() or ".." in name.parts
        if leaves and row.output is not None:
            raise PplexError(
                f"{path} line {row.number}: output {row.output!r} leaves the output "
                "folder; give a name within it"
            )
        if row.output is not None and name.suffix.lower() != ".wav":
            raise PplexError(
                f"{path} line {row.number}: output {row.output!r} is a WAV file; end "
                "its name in .wav"
            )
        identity = name.name if leaves else str(name)
        voice = row.voice
        if voice is not None and (path.parent / voice).is_file():
            voice = str(path.parent / voice)
        own = replace(
            settings,
            voice=settings.voice if voice is None else voice,
            text=settings.text if row.text is None else row.text,
            seed=seed_for(settings.seed, identity) if row.seed is None else row.seed,
            tail_s=settings.tail_s if row.tail_s is None else row.tail_s,
        )
        found.append(
            _Found(
                source=_file(path.parent / row.input),
                name=identity,
                identity=identity,
                details=repr(same),
                settings=own,
                chosen=row.output is not None,
                extra=row.extra,
            )
        )
    return found


def _from_inputs(
    selection: Selection, outdir: Path, wanted: Wanted, settings: Settings
) -> list[_Found]:
    bases = {p if p.is_dir() else p.parent for p in map(_absolute, selection.inputs)}
    top = Path(os.path.commonpath(bases)) if bases else Path()
    found: dict[Path, _Found] = {}
    for given in selection.inputs:
        path = _absolute(given)
        if path.is_dir():
            base, names = path, list(_names_in(path, selection, outdir, wanted))
            if not names:
                raise PplexError(_nothing_in(given, selection))
        else:
            base, names = path.parent, [path.name]
        for name in names:
            source = _file(given / name if path.is_dir() else given)
            mirrored = (base.relative_to(top) / name).as_posix()
            one = _Found(source, mirrored, name, mirrored, settings)
            # A folder and a file in it may both be given.
            found.setdefault(base / name, one)
    return [_seeded(one) for one in _identified_apart(found)]


def _identified_apart(found: Mapping[Path, _Found]) -> Iterator[_Found]:
    """Recordings of equal identities get one below the folder that they share."""
    groups = defaultdict(list)
    for path, one in found.items():
        groups[one.identity].append(path)
    for paths in groups.values():
        shared = os.path.commonpath([path.parent for path in paths])
        for path in paths:
            one = found[path]
            if len(paths) > 1:
                one = replace(one, identity=path.relative_to(shared).as_posix())
            yield one


def _seeded(found: _Found) -> _Found:
    """With the seed that follows from its identity."""
    seed = seed_for(found.settings.seed, found.identity)
    return replace(found, settings=replace(found.settings, seed=seed))


def _file(path: Path) -> Path:
    """A file called - is one, not stdin."""
    return _absolute(path) if path == Path("-") else path


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _names_in(
    folder: Path, selection: Selection, outdir: Path, wanted: Wanted
) -> Iterator[str]:
    """Recordings of a folder as relative names with slashes; hidden ones are left."""
    results = _absolute(outdir)
    spared = {results} if results != folder else set()
    own_names = _own_names(wanted) if results == folder else set()
    visited = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        here = Path(current)
        real = here.resolve()
        if real in visited or here in spared:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith("."))
        if not selection.recursive:
            folders.clear()
        for file in sorted(files):
            name = (here / file).relative_to(folder).as_posix()
            if not file.startswith(".") and file not in own_names:
                if _is_wanted(name, selection.glob):
                    yield name


def _own_names(wanted: Wanted) -> set[str]:
    """Names of our outputs where they lie beside the inputs."""
    if wanted.name is None:
        return set()
    outputs = outputs_of(Path(wanted.name), wanted)
    return {path.name for path in outputs.files().values()}


def _is_wanted(name: str, pattern: str | None) -> bool:
    path = PurePosixPath(name)
    if pattern is None:
        return path.suffix.lower() in SUFFIXES
    return fnmatchcase(name if "/" in pattern else path.name, pattern)


def _nothing_in(folder: Path, selection: Selection) -> str:
    what = f"file that fits {selection.glob!r}" if selection.glob else "recording"
    hint = "" if selection.recursive else "; --recursive looks in its folders too"
    return f"there is no {what} in {folder}{hint}"


def _named_apart(found: list[_Found]) -> list[_Found]:
    """Recordings of equal names get a hash each of what tells them apart."""
    groups = defaultdict(list)
    for one in found:
        groups[one.name].append(one)
    apart = []
    for name, group in groups.items():
        if len(group) > 1 and any(one.chosen for one in group):
            raise PplexError(f"two recordings have the output {name}; rename one")
        for one in group:
            new = with_hash(name, one.details) if len(group) > 1 else name
            apart.append(replace(one, name=new))
    return apart


def _task(found: _Found, outdir: Path, wanted: Wanted) -> Task:
    name = PurePosixPath(found.name)
    if wanted.name is not None and not found.chosen:
        target = name.with_name(wanted.name)
    elif name.suffix.lower() == ".wav":
        target = name.with_suffix(".wav")
    else:  # beside a.wav there may be an a.flac
        target = name.with_name(f"{name.name}.wav")
    outputs = outputs_of(outdir / target, wanted)
    return Task(found.name, found.source, outputs, found.settings, found.extra)
