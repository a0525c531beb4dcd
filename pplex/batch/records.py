"""What a batch writes for one recording: its outputs, stats and manifest line."""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from dataclasses import asdict, dataclass
from typing import Any

from pplex.audio.files import Recording
from pplex.batch.decoding import Answered
from pplex.batch.describe import Description
from pplex.batch.tasks import Task
from pplex.errors import PplexError
from pplex.respond.figures import About, make_stats
from pplex.respond.manifest import DONE, FAILED, FilePrint, Line, file_print
from pplex.respond.run import Answer, read_user, write_outputs
from pplex.respond.stats import Check, Outcome, Stats, latency
from pplex.respond.transcript import words


@dataclass(frozen=True)
class Read:
    """A recording in memory, and the file it was."""

    recording: Recording
    print: FilePrint
    seconds: float


def check_name(task: Task) -> None:
    """Refuse a file name that can be written neither to stats nor on a screen."""
    try:
        str(task.source).encode()
    except UnicodeEncodeError:
        raise PplexError(
            f"the name {str(task.source)!r} is not UTF-8 text; rename the file"
        ) from None


def read_task(task: Task, sample_rate: int) -> Read:
    """Read the recording of ``task``, its tail included."""
    start = time.perf_counter()
    check_name(task)
    recording = read_user(task.source, task.settings, sample_rate)
    try:
        print_ = file_print(task.source)
    except OSError as e:
        raise PplexError(f"{task.source}: {e.strerror or e}") from e
    return Read(recording, print_, time.perf_counter() - start)


def write_task(
    model: Description,
    task: Task,
    read: Read,
    done: Answered,
    check: Check | None,
) -> tuple[dict[str, float], list[Outcome]]:
    """Write the outputs of ``task`` and check them.

    Returns the seconds spent on it, by part, and how the checks went.
    """
    start = time.perf_counter()
    result, timings = done.result, done.result.timings
    voice = model.voice_of(task)
    folder = task.outputs.audio.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PplexError(f"cannot write to {folder}: {e.strerror or e}") from e
    write_outputs(
        model,
        task.outputs,
        Answer(
            user_pcm=read.recording.pcm,
            agent_pcm=result.agent_pcm,
            text=result.text,
            agent=result.agent,
            user=result.user,
        ),
        voice,
        task.settings.text,
        task.settings.seed,
    )
    seconds = {
        "read": read.seconds,
        "encode": timings.encode_s,
        "steps": sum(timings.steps),
        "decode": timings.decode_s,
        "write": time.perf_counter() - start,
    }
    stats = stats_of(model, task, read, done, seconds)
    if task.outputs.stats is not None:
        stats.write(task.outputs.stats)
    outcomes: list[Outcome] = []
    if check is not None:
        spoken = words(result.text, model.tokenizer.piece, model.config.frame_rate)
        files = task.outputs.files()
        outcomes = check(task.source, files, stats, spoken)
    return {f"{part}_s": round(s, 4) for part, s in seconds.items()}, outcomes


def stats_of(
    model: Description,
    task: Task,
    read: Read,
    done: Answered,
    seconds: dict[str, float],
) -> Stats:
    """The figures of one recording of a batch: its share of the work, by part.

    Loading the model and its prompts is nobody's share.
    """
    about = About(
        source=task.source,
        outputs=task.outputs.files(),
        audio_s=len(read.recording.pcm) / model.config.sample_rate,
        rate=read.recording.source_rate,
        channels=read.recording.source_channels,
        settings=task.settings,
        voice=model.voice_of(task),
        prompt_frames=done.prompt_frames,
        local=model.local,
        facts=done.facts,
    )
    steps = done.result.timings.steps
    return make_stats(about, seconds, latency(steps), len(steps))


def done_line(
    model: Description,
    task: Task,
    read: Read,
    outputs: dict[str, Line],
    seconds: dict[str, float],
) -> Line:
    """The manifest's line of a recording that was answered."""
    audio_s = len(read.recording.pcm) / model.config.sample_rate
    return _line(model, task, DONE, asdict(read.print)) | {
        "outputs": outputs,
        "audio_s": round(audio_s, 3),
        "timings": seconds,
    }


def failed_line(model: Description, task: Task, error: str) -> Line:
    """The manifest's line of a recording that cannot be answered."""
    try:
        known: Any = asdict(file_print(task.source))
    except OSError:
        known = None
    return _line(model, task, FAILED, known) | {"error": error}


def _line(model: Description, task: Task, status: str, known: Any) -> Line:
    settings = task.settings
    return {
        "recording": task.key,
        "status": status,
        "error": None,
        "input": None if known is None else {"path": str(task.source), **known},
        "settings": model.settings_digest(task),
        "outputs": {},
        "voice": model.voice_of(task),
        "prompt": settings.text,
        "seed": settings.seed,
        "tail_s": settings.tail_s,
        "model": model.local.name,
        "revision": model.local.revision,
        "weights": model.identity,
        "pplex": importlib.metadata.version("pplex"),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "extra": task.extra,
    }
