"""What a batch is to do: recordings, their names, settings and outputs.

Everything here follows from the command line, the file names and the jobs file; no
recording is opened. A recording's seed follows from its own name, never from what is
answered beside it. No two recordings are written to the same file, on any file system,
and none over another.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pplex.audio.folders import LeftOut, is_recording, list_folder
from pplex.batch.jobsfile import Row, read_jobs
from pplex.checkpoint.hashes import digest_of
from pplex.conversation.script import first_words, read_script
from pplex.conversation.seeds import number_of, seed_for
from pplex.conversation.state import read_notes
from pplex.errors import PplexError
from pplex.files import folded, real_path
from pplex.respond.manifest import manifest_name, manifests_in
from pplex.respond.request import (
    Layout,
    Outputs,
    Request,
    Settings,
    check_state_name,
    takes_of,
    transcript_beside,
)
from pplex.respond.transcript import CueShape
from pplex.units import some


@dataclass(frozen=True)
class Selection:
    """Which recordings: files and folders, or a jobs file."""

    inputs: tuple[Path, ...] = ()
    recursive: bool = False
    glob: str | None = None
    jobs: Path | None = None


@dataclass(frozen=True)
class OutputOptions:
    """What is written for each recording.

    ``transcripts`` are formats such as ``"srt"``, in the order of ``FORMATS``, ``cue``
    the shape of subtitles; ``name`` replaces the file name. Of each recording there
    are so many ``takes``, whose names are numbered, or for 0 one answer.
    """

    layout: Layout = "stereo"
    transcripts: tuple[str, ...] = ()
    cue: CueShape = CueShape()
    stats: bool = False
    tokens: bool = False
    name: str | None = None
    takes: int = 0


@dataclass(frozen=True)
class _Found:
    """A recording before its name is settled.

    ``name`` is where its output goes, ``identity`` what its seed follows from, and
    ``details`` what tells it from others of that name. ``state`` is the name of the
    conversation that is saved.
    """

    source: Path
    name: str
    identity: str
    details: str
    settings: Settings
    chosen: bool = False
    state: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Plan:
    """The requests of a batch, sorted by key, and what folders hold beside them."""

    requests: list[Request]
    left_out: LeftOut


def make_plan(
    selection: Selection, outdir: Path, options: OutputOptions, settings: Settings
) -> Plan:
    """What a batch is to do."""
    left_out = LeftOut()
    if selection.jobs is not None:
        found = _from_jobs(selection.jobs, settings)
    else:
        found = _from_inputs(selection, outdir, options, settings, left_out)
    requests = [_request(one, outdir, options) for one in _named_apart(found)]
    requests = _outputs_apart(requests, options)
    if options.takes:
        requests = [take for one in requests for take in takes_of(one, options.takes)]
    _spare_inputs(requests)
    return Plan(sorted(requests, key=lambda request: request.key), left_out)


def in_shard(key: str, shard: tuple[int, int]) -> bool:
    """Whether a recording belongs to part ``shard[0]`` (from 1) of ``shard[1]``."""
    number, count = shard
    return number_of("shard", key) % count == number - 1


def _from_jobs(path: Path, settings: Settings) -> list[_Found]:
    seen: dict[object, Row] = {}
    found = []
    for row in read_jobs(path):
        same: tuple[object, ...]
        same = (row.input, row.output, row.voice, row.text, row.seed, row.tail)
        # Without them a name is what it was before they were there.
        for more in ((row.script, row.first_words), (row.resume,)):
            if any(one is not None for one in more):
                same = *same, *more
        other = seen.setdefault(same, row)
        if other is not row:
            raise PplexError(f"{path}: lines {other.number} and {row.number} are equal")
        where = f"{path} line {row.number}"
        name = PurePosixPath(row.output if row.output is not None else row.input)
        if not name.name:
            raise PplexError(f"{where}: {str(name)!r} is no file name")
        leaves = _leaves(name)
        for column, given in (("output", row.output), ("save_state", row.save_state)):
            if given is not None and _leaves(PurePosixPath(given)):
                raise PplexError(
                    f"{where}: {column} {given!r} leaves the output folder; give a "
                    "name within it"
                )
        if row.output is not None and name.suffix.lower() != ".wav":
            raise PplexError(
                f"{where}: output {row.output!r} is a WAV file; end its name in .wav"
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
            tail=settings.tail if row.tail is None else row.tail,
        )
        if row.script is not None:
            own = replace(own, script=read_script(path.parent / row.script))
        if row.first_words is not None:
            words = first_words(row.first_words, f"{where} first_words")
            own = replace(own, first_words=words)
        if row.resume is not None:
            own = _resumed(own, path.parent / row.resume, row.seed, where)
        found.append(
            _Found(
                source=_file(path.parent / row.input),
                name=identity,
                identity=identity,
                details=repr(same),
                settings=own,
                chosen=row.output is not None,
                state=row.save_state,
                extra=row.extra,
                where=where,
            )
        )
    return found


def _leaves(name: PurePosixPath) -> bool:
    """Whether a name leads out of the output folder."""
    return name.is_absolute() or ".." in name.parts


def _resumed(settings: Settings, saved: Path, seed: int | None, where: str) -> Settings:
    """Settings with what a saved conversation decides."""
    notes = read_notes(saved)
    if settings.sampling != notes.sampling:
        drawn = ", ".join(f"{k} {v:g}" for k, v in asdict(notes.sampling).items())
        raise PplexError(
            f"{where}: {saved} was drawn with {drawn}; give the batch the same, or "
            "answer it with pplex respond --resume"
        )
    return replace(
        settings,
        voice=notes.voice,
        text=notes.prompt,
        seed=notes.seed if seed is None else seed,
        resume=saved,
    )


def _from_inputs(
    selection: Selection,
    outdir: Path,
    options: OutputOptions,
    settings: Settings,
    left_out: LeftOut,
) -> list[_Found]:
    bases = {p if p.is_dir() else p.parent for p in map(_absolute, selection.inputs)}
    top = Path(os.path.commonpath(bases)) if bases else Path()
    found: dict[Path, _Found] = {}
    for given in selection.inputs:
        path = _absolute(given)
        if path.is_dir():
            base, names = path, _names_in(path, selection, outdir, options, left_out)
            if not names:
                raise PplexError(_nothing_in(given, selection, left_out))
        else:
            base, names = path.parent, [path.name]
        for name in names:
            source = _file(given / name if path.is_dir() else given)
            mirrored = (base.relative_to(top) / name).as_posix()
            one = _Found(source, mirrored, name, mirrored, settings)
            # A folder and a file in it may both be given.
            found.setdefault(base / name, one)
    return [
        replace(
            one, settings=replace(settings, seed=seed_for(settings.seed, one.identity))
        )
        for one in _identified_apart(found)
    ]


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


def _file(path: Path) -> Path:
    """A file called - is one, not stdin."""
    return _absolute(path) if path == Path("-") else path


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _names_in(
    folder: Path,
    selection: Selection,
    outdir: Path,
    options: OutputOptions,
    left_out: LeftOut,
) -> list[str]:
    """Recordings of a folder as relative names with slashes; hidden ones are left."""
    results, real = real_path(outdir), real_path(folder)
    beside = results == real
    if beside and options.takes and options.name is None:
        raise PplexError(
            f"takes in {folder} would be taken for recordings next time; choose "
            "another output folder, or other names with --output-name"
        )
    if selection.recursive and real in results.parents and results.is_dir():
        inside = list_folder(results, recursive=True).names
        lost = [name for name in inside if _is_wanted(name, selection.glob)]
        if lost and not manifests_in(results):
            raise PplexError(
                f"{outdir} is the output folder and holds {some(lost)}, which would be "
                "left out; choose another output folder"
            )
    spared = () if beside else (results,)
    listed = list_folder(folder, recursive=selection.recursive, spared=spared)
    own_names = _own_names(options) if beside else set()
    names: list[str] = []
    left: list[str] = []
    for name in listed.names:
        if PurePosixPath(name).name not in own_names:
            (names if _is_wanted(name, selection.glob) else left).append(name)
    # With a pattern the user has said what to leave out.
    left_out.add(listed, left if selection.glob is None else [])
    return names


def _own_names(options: OutputOptions) -> set[str]:
    """Names of what we write, where it lies beside the inputs."""
    own = {manifest_name()}
    if options.name is not None:
        outputs = _outputs_of(Path(options.name), options)
        takes = [outputs.take(n) for n in range(1, options.takes + 1)]
        for one in takes or [outputs]:
            own |= {path.name for path in one.files().values()}
    return own


def _is_wanted(name: str, pattern: str | None) -> bool:
    if pattern is None:
        return is_recording(name)
    return fnmatchcase(name if "/" in pattern else PurePosixPath(name).name, pattern)


def _nothing_in(folder: Path, selection: Selection, left_out: LeftOut) -> str:
    what = f"file that fits {selection.glob!r}" if selection.glob else "recording"
    why = left_out.sentences()
    if not selection.recursive and not left_out.folders:
        why.append("--recursive looks in its folders too")
    return "; ".join([f"there is no {what} in {folder}", *why])


def _named_apart(found: list[_Found]) -> list[_Found]:
    """Recordings of equal names get a hash each of what tells them apart."""
    _check_chosen(found)
    groups = defaultdict(list)
    for one in found:
        groups[one.name].append(one)
    apart = []
    for name, group in groups.items():
        if len(group) > 1 and any(one.chosen for one in group):
            raise PplexError(f"two recordings have the output {name}; rename one")
        for one in group:
            new = _with_hash(name, one.details) if len(group) > 1 else name
            apart.append(replace(one, name=new))
    return apart


def _check_chosen(found: list[_Found]) -> None:
    """Refuse outputs that a jobs file gives and a file system may take for one."""
    names: dict[str, _Found] = {}
    for one in found:
        other = names.setdefault(folded(Path(one.name)), one)
        if other.name != one.name and (one.chosen or other.chosen):
            raise PplexError(
                f"the outputs {other.name} and {one.name} are one file where capitals, "
                "or forms of a letter, are not told apart; rename one"
            )


def _request(found: _Found, outdir: Path, options: OutputOptions) -> Request:
    name = PurePosixPath(found.name)
    if options.name is not None and not found.chosen:
        target = name.with_name(options.name)
    elif name.suffix.lower() == ".wav":
        target = name.with_suffix(".wav")
    else:  # beside a.wav there may be an a.flac
        target = name.with_name(f"{name.name}.wav")
    outputs = _outputs_of(outdir / target, options)
    if found.state is not None:
        outputs = replace(outputs, state=outdir / found.state)
        check_state_name(outputs.state)
    return Request(
        found.source, outputs, found.settings, found.name, found.extra, found.where
    )


def _outputs_of(audio: Path, options: OutputOptions) -> Outputs:
    stem = audio.with_suffix("")
    return Outputs(
        audio=audio,
        layout=options.layout,
        transcripts=tuple(transcript_beside(audio, f) for f in options.transcripts),
        stats=stem.with_name(f"{stem.name}.stats.json") if options.stats else None,
        tokens=stem.with_name(f"{stem.name}.npz") if options.tokens else None,
        cue=options.cue,
    )


def _outputs_apart(requests: list[Request], options: OutputOptions) -> list[Request]:
    """Requests of the same output file get names with a hash."""
    shared = _sharing(requests)
    if shared and options.name is not None:
        one, other = next(iter(shared.values()))[:2]
        raise PplexError(
            f"{one.source} and {other.source} would both be written to "
            f"{one.outputs.audio}; pick one of them with --glob"
        )
    colliding = {request.key for group in shared.values() for request in group}
    apart = []
    for request in requests:
        if request.key in colliding:
            audio = request.outputs.audio
            name = audio.with_name(_with_hash(audio.name, request.key))
            outputs = replace(_outputs_of(name, options), state=request.outputs.state)
            request = replace(request, outputs=outputs)
        apart.append(request)
    if colliding and (still := _sharing(apart)):
        one, other = next(iter(still.values()))[:2]
        raise PplexError(
            f"{one.source} and {other.source} would both be written to "
            f"{one.outputs.audio}; rename one of them"
        )
    return apart


def _sharing(requests: list[Request]) -> dict[str, list[Request]]:
    """Files that more than one request would write, on any file system."""
    writers: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        for path in request.outputs.files().values():
            writers[folded(path)].append(request)
    return {path: group for path, group in writers.items() if len(group) > 1}


def _spare_inputs(requests: list[Request]) -> None:
    """Refuse outputs that would replace a recording."""
    sources = {os.path.realpath(request.source) for request in requests}
    for request in requests:
        for path in request.outputs.files().values():
            if os.path.realpath(path) in sources:
                raise PplexError(
                    f"{path} is a recording of this batch and would be overwritten; "
                    "choose another output folder, or other names with --output-name"
                )


def _with_hash(name: str, details: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{digest_of(details)[:8]}{path.suffix}"))
