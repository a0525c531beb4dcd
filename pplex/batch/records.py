"""What a batch writes for one recording: its outputs, stats and manifest line."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pplex.audio.files import Recording
from pplex.batch.decoding import Answered
from pplex.batch.describe import Description
from pplex.conversation.quiet import longest
from pplex.conversation.script import unsaid
from pplex.errors import PplexError
from pplex.files import Together, make_folder, put, put_new, reading
from pplex.respond.ending import Ending, is_cut_off
from pplex.respond.lock import FolderLock
from pplex.respond.manifest import (
    DONE,
    FAILED,
    FilePrint,
    Line,
    Manifest,
    file_print,
    new_line,
    now,
)
from pplex.respond.outputs import (
    SoundWriter,
    Write,
    open_sink,
    spoken_words,
    write_outputs,
)
from pplex.respond.request import Request
from pplex.respond.run import read_user, tail_s
from pplex.respond.stats import Check, Outcome, Source, latency, make_stats
from pplex.respond.transcript import Word, text_of


@dataclass(frozen=True)
class Task:
    """A recording to answer, as ``request`` says, of about so many ``seconds``.

    ``local`` and ``outdir`` say where its files are where it is answered: on a machine
    that does not see those of ``request``, elsewhere. ``settings`` is their digest.
    """

    request: Request
    local: Request
    outdir: Path
    settings: str
    seconds: float


@dataclass(frozen=True)
class Read:
    """A recording in memory, and the file it was."""

    recording: Recording
    print: FilePrint
    seconds: float


@dataclass(frozen=True)
class Draft:
    """An output that is whole, in a ``hidden`` file beside where it will be."""

    hidden: Path
    print: FilePrint


@dataclass(frozen=True)
class Written:
    """The answer to the recording ``key``, whose outputs are still to be named.

    ``line`` is the manifest's, without outputs and checks; ``figures`` are those of
    ``Stats``.
    """

    key: str
    line: Line
    drafts: dict[str, Draft]
    figures: dict[str, Any]
    spoken: list[Word]
    peak_memory_gb: float


def check_name(request: Request) -> None:
    """Refuse a file name that can be written neither to stats nor on a screen."""
    try:
        str(request.source).encode()
    except UnicodeEncodeError:
        raise PplexError(
            f"the name {str(request.source)!r} is not UTF-8 text; rename the file"
        ) from None


def read_request(request: Request, sample_rate: int) -> Read:
    """Read the recording of ``request``, with its tail if that is known."""
    start = time.perf_counter()
    check_name(request)
    recording = read_user(request.source, request.settings, sample_rate)
    with reading(request.source, "cannot be read"):
        print_ = file_print(request.source)
    return Read(recording, print_, time.perf_counter() - start)


class Placing:
    """Gives the outputs of a recording their names, and keeps what is not ours.

    Unless it may ``overwrite``, only files that are as a run of pplex batch left them
    are replaced. ``written`` is what has its name.
    """

    def __init__(
        self, manifest: Manifest, lock: FolderLock, task: Task, overwrite: bool
    ) -> None:
        self._manifest, self._lock = manifest, lock
        self._told = {"recording": task.request.key, "settings": task.settings}
        self._files = task.request.outputs.files()
        self._overwrite = overwrite
        self.written: dict[str, Line] = {}

    def all(self, drafts: dict[str, Draft]) -> None:
        """Name ``drafts``, by what they are: all, or none where one is in the way."""
        try:
            for what in drafts:
                self._check(self._files[what])
            for what, draft in drafts.items():
                path = self._files[what]
                try:
                    self._place(what, path, draft)
                except OSError as e:
                    raise PplexError(f"cannot write {path}: {e.strerror or e}") from e
        finally:
            for draft in drafts.values():
                draft.hidden.unlink(missing_ok=True)

    def _check(self, path: Path) -> None:
        """Refuse a name at which somebody else's file is by now."""
        if self._overwrite or not os.path.lexists(path):
            return
        if self._manifest.origin_of(path, surely=True) is None:
            raise PplexError(
                f"{path} was changed by somebody and is kept; --overwrite replaces it"
            )

    def _place(self, what: str, path: Path, draft: Draft) -> None:
        """Tell the lock what will be at ``path``, then let it be there."""
        self._check(path)
        output = self._manifest.describe(path, draft.print)
        self._lock.begin(output | self._told)
        is_new = not self._overwrite and not os.path.lexists(path)
        (put_new if is_new else put)(draft.hidden, path)
        self.written[what] = output


def sound_writer(task: Task, drafts: Together, sample_rate: int) -> SoundWriter:
    """What writes the sound of an answer to the files of ``task``."""
    outputs = task.local.outputs

    def open_files() -> AbstractContextManager[Write]:
        if not task.outdir.is_dir():  # made anew it would have no manifest
            raise PplexError(f"{task.outdir} is not there any more")
        make_folder(outputs.audio.parent)
        return open_sink(outputs.layout, outputs.files(), sample_rate, place=drafts)

    return SoundWriter(open_files)


def write_answer(
    model: Description,
    task: Task,
    read: Read,
    writer: SoundWriter,
    drafts: Together,
    answered: Answered,
) -> Written:
    """Write the outputs of ``task`` to the end.

    Of the work, the figures have the recording's share; loading the model and its
    prompts is nobody's.
    """
    start = time.perf_counter()
    answer, timings = answered.answer, answered.answer.timings
    request, recording = task.request, read.recording
    voice = model.voice_of(request)
    if not writer.num_samples:  # it came whole, from a GPU
        missing = len(answer.pcm) - recording.num_samples
        writer(0, np.pad(recording.pcm, (0, missing)), answer.pcm)
    writer.finish()
    rate = model.config.sample_rate
    audio_s = writer.num_samples / rate
    files = task.local.outputs.files()
    write_outputs(model, task.local, answer, audio_s, voice, place=drafts)
    if answered.state is not None:
        answered.state.write(files["state"], drafts)
    seconds = {
        "read": read.seconds,
        "encode": timings.encode_s,
        "steps": sum(timings.steps),
        "decode": timings.decode_s,
        "write": time.perf_counter() - start,
    }
    took_s = tail_s(request.settings, recording.num_samples, writer.num_samples, rate)
    spoken = spoken_words(model, answer.text, request.settings.lines)
    stats = make_stats(
        request,
        Source(audio_s, took_s, recording.source_rate, recording.source_channels),
        Ending(
            len(spoken), is_cut_off(answer.pcm, answer.text, model.config.frame_size)
        ),
        model.local,
        answered.info,
        latency(timings.steps, model.config.frame_s),
        len(timings.steps),
        seconds,
        voice=voice,
        prompt_frames=answered.prompt_frames,
    )
    if "stats" in files:
        stats.write(files["stats"], drafts)
    line = _line(model, task, DONE, asdict(read.print)) | {
        "audio_s": round(audio_s, 3),
        "tail_s": took_s,
        "timings": {f"{part}_s": round(s, 4) for part, s in seconds.items()},
        "computed": {
            key: getattr(answered.info, key)
            for key in ("device", "dtype", "compute", "kernels")
        },
        "words": stats.words,
        "text": text_of(spoken),
        "cut_off": stats.cut_off,
        "unsaid": unsaid(model.script_of(request), answer.text) or None,
    }
    hidden = {what: drafts.hidden[path] for what, path in files.items()}
    with reading(task.outdir, "cannot be read"):
        whole = {what: Draft(path, file_print(path)) for what, path in hidden.items()}
    return Written(
        request.key,
        line,
        whole,
        asdict(stats),
        spoken,
        answered.info.peak_memory_gb,
    )


def finish(
    task: Task, written: Written, placing: Placing, check: Check | None
) -> tuple[Line, list[Outcome]]:
    """Give the outputs their names and check them.

    Returns the manifest's line, and how the checks went.
    """
    placing.all(written.drafts)
    outcomes: list[Outcome] = []
    if check is not None:
        request = task.request
        outcomes = check(
            request.source, request.outputs.files(), written.figures, written.spoken
        )
    line = written.line | {
        "outputs": placing.written,
        "checks": _checks(check, outcomes),
    }
    return line, outcomes


def _checks(check: Check | None, outcomes: list[Outcome]) -> Line | None:
    """What was asked of an answer, and what was found, as the manifest has it."""
    if check is None:
        return None
    return {"asked": check.asked(), "outcomes": [asdict(one) for one in outcomes]}


def check_again(manifest: Manifest, request: Request, check: Check) -> list[Outcome]:
    """How the checks of an answer of an earlier run went.

    Of those that it was not asked the outputs are read again, and the manifest told.
    """
    line = manifest.line_of(request.key)
    assert line is not None
    known = line["checks"]
    if known and known["asked"] == check.asked():
        return [
            Outcome(one["check"], one["passed"], one["detail"])
            for one in known["outcomes"]
        ]
    figures = {"tail_s": line["tail_s"]}
    if line["timings"] and line["audio_s"]:
        spent_s = sum(line["timings"].values())
        figures["real_time_factor"] = spent_s / line["audio_s"]
    outcomes = check(request.source, request.outputs.files(), figures, None)
    manifest.append(line | {"checks": _checks(check, outcomes), "time": now()})
    return outcomes


def failed_line(
    model: Description, task: Task, error: str, outputs: dict[str, Line]
) -> Line:
    """The manifest's line of a recording that cannot be answered.

    ``outputs`` are those that were written all the same.
    """
    try:
        known: Any = asdict(file_print(task.request.source))
    except (OSError, ValueError, PplexError):
        known = None
    return _line(model, task, FAILED, known) | {"error": error, "outputs": outputs}


def _line(model: Description, task: Task, status: str, known: Any) -> Line:
    request, settings = task.request, task.request.settings
    return new_line(request.key, status, task.settings) | {
        "input": None if known is None else {"path": str(request.source), **known},
        "voice": model.voice_of(request),
        "prompt": settings.text,
        "seed": settings.seed,
        "script": settings.said() or None,
        **asdict(settings.sampling),
        "channel": settings.channel,
        "layout": request.outputs.layout,
        "tail_s": longest(settings.tail),
        "resume": None if settings.resume is None else str(settings.resume),
        "model": model.local.name,
        "revision": model.local.revision,
        "weights": model.identity,
        "extra": request.extra,
    }
