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
from pplex.errors import PplexError
from pplex.files import reading
from pplex.respond.manifest import DONE, FAILED, FilePrint, Line, Manifest, file_print
from pplex.respond.outputs import spoken_words, write_outputs
from pplex.respond.request import Request
from pplex.respond.run import read_user
from pplex.respond.stats import Check, Outcome, Source, latency, make_stats


@dataclass(frozen=True)
class Read:
    """A recording in memory, and the file it was."""

    recording: Recording
    print: FilePrint
    seconds: float


def check_name(request: Request) -> None:
    """Refuse a file name that can be written neither to stats nor on a screen."""
    try:
        str(request.source).encode()
    except UnicodeEncodeError:
        raise PplexError(
            f"the name {str(request.source)!r} is not UTF-8 text; rename the file"
        ) from None


def read_request(request: Request, sample_rate: int) -> Read:
    """Read the recording of ``request``, its tail included."""
    start = time.perf_counter()
    check_name(request)
    recording = read_user(request.source, request.settings, sample_rate)
    with reading(request.source, "cannot be read"):
        print_ = file_print(request.source)
    return Read(recording, print_, time.perf_counter() - start)


def write_answer(
    model: Description,
    manifest: Manifest,
    request: Request,
    read: Read,
    answered: Answered,
    check: Check | None,
) -> tuple[Line, list[Outcome]]:
    """Write the outputs of ``request`` and check them.

    Returns the manifest's line, and how the checks went. Of the work, the figures have
    the recording's share; loading the model and its prompts is nobody's.
    """
    start = time.perf_counter()
    answer, timings = answered.answer, answered.answer.timings
    recording, outputs = read.recording, request.outputs
    voice = model.voice_of(request)
    folder = outputs.audio.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PplexError(f"cannot write to {folder}: {e.strerror or e}") from e
    write_outputs(model, request, recording.pcm, answer, voice)
    seconds = {
        "read": read.seconds,
        "encode": timings.encode_s,
        "steps": sum(timings.steps),
        "decode": timings.decode_s,
        "write": time.perf_counter() - start,
    }
    audio_s = len(recording.pcm) / model.config.sample_rate
    stats = make_stats(
        request,
        Source(audio_s, recording.source_rate, recording.source_channels),
        model.local,
        answered.info,
        latency(timings.steps, model.config.frame_s),
        len(timings.steps),
        seconds,
        voice=voice,
        prompt_frames=answered.prompt_frames,
    )
    if outputs.stats is not None:
        stats.write(outputs.stats)
    outcomes: list[Outcome] = []
    if check is not None:
        spoken = spoken_words(model, answer.text)
        outcomes = check(request.source, outputs.files(), stats, spoken)
    line = _line(model, request, DONE, asdict(read.print)) | {
        "outputs": manifest.describe(outputs.files()),
        "audio_s": round(audio_s, 3),
        "timings": {f"{part}_s": round(s, 4) for part, s in seconds.items()},
    }
    return line, outcomes


def failed_line(model: Description, request: Request, error: str) -> Line:
    """The manifest's line of a recording that cannot be answered."""
    try:
        known: Any = asdict(file_print(request.source))
    except (OSError, ValueError, PplexError):
        known = None
    return _line(model, request, FAILED, known) | {"error": error}


def _line(model: Description, request: Request, status: str, known: Any) -> Line:
    settings = request.settings
    return {
        "recording": request.key,
        "status": status,
        "error": None,
        "input": None if known is None else {"path": str(request.source), **known},
        "settings": model.settings_digest(request),
        "outputs": {},
        "voice": model.voice_of(request),
        "prompt": settings.text,
        "seed": settings.seed,
        "tail_s": settings.tail_s,
        "model": model.local.name,
        "revision": model.local.revision,
        "weights": model.identity,
        "pplex": importlib.metadata.version("pplex"),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "extra": request.extra,
    }
