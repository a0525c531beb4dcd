"""One recording: read it, let the agent answer it, write what was asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from pplex.audio.files import WHOLE, Recording, Sound, read_pcm
from pplex.audio.streams import StreamFormat
from pplex.checkpoint.hub import LocalModel, resolve
from pplex.conversation.answer import Answer, Kept
from pplex.conversation.prompts import open_role
from pplex.conversation.quiet import Quiet, longest
from pplex.conversation.scheduler import converse
from pplex.conversation.script import Script, last_cue, lay_out, too_late, unsaid
from pplex.conversation.session import Model, load, warm_up
from pplex.conversation.state import Opening, Saving, read_notes, read_state, state_of
from pplex.conversation.tracks import cut
from pplex.engine.base import KV_AT_8, Start
from pplex.engine.choose import Compute
from pplex.errors import PplexError
from pplex.files import Place, Together, put, put_new
from pplex.model.config import MimiConfig, ModelConfig
from pplex.respond.ending import Ending, is_cut_off
from pplex.respond.outputs import Write, open_sink, spoken_words, write_outputs
from pplex.respond.request import Request, Settings, check_outputs
from pplex.respond.stats import (
    Check,
    Outcome,
    Source,
    Stats,
    latency,
    make_stats,
    model_info,
)
from pplex.respond.stopping import Stop
from pplex.respond.transcript import Captions

# Samples of a recording that stay in memory, 32 MB and 6 min: a longer one is read
# again while it is answered.
MOST_KEPT = 1 << 23


@dataclass(frozen=True)
class Config:
    """How ``pplex respond`` answers a request: by which model, and what it may do.

    ``raw`` is how bare samples on stdin lie; None for a file or a WAV stream. One that
    is ``live`` begins when the model is ready, and its replies do not wait for frames.
    """

    model_name: str
    offline: bool
    overwrite: bool
    raw: StreamFormat | None = None
    live: bool = False
    compute: Compute = "auto"
    kv_bits: int | None = None
    check: Check | None = None


class Report(Protocol):
    """Who is told how a run gets on."""

    shows_bars: bool

    def reading(self, recording: Recording) -> None:
        """The recording was read."""

    def warn(self, message: str) -> None:
        """Something is odd about the sound, and was answered all the same."""

    def listening(self, stream: StreamFormat) -> None:
        """The input is a stream that has begun."""

    def loading(self, local: LocalModel) -> None:
        """The model's files are there and will be loaded."""

    def computing(self, how: str) -> None:
        """The model is loaded and computes in this form, for this reason."""

    def expecting(self, real_time_factor: float) -> None:
        """A frame was tried: how fast this machine is."""

    def answering(self, duration_s: float | None) -> None:
        """The agent starts to answer this many seconds of audio; None: a stream."""

    def advance(self, seconds: float) -> None:
        """Another stretch of audio is answered."""

    def checked(self, outcomes: Sequence[Outcome], audio: Path) -> None:
        """The outputs, ``audio`` and others, are written and were checked."""

    def said(self, text: str) -> None:
        """The agent says this; for captions, as it is to be printed."""


class Clock:
    """Seconds of wall time, split into parts that do not overlap."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Book the time since the last lap on ``part``."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start


def read_user(source: Path, settings: Settings, sample_rate: int) -> Recording:
    """The user's side of ``source``, followed by the tail of silence.

    One whose end is yet to be found is not there.
    """
    tail = 0.0 if settings.tail == "auto" else settings.tail
    return read_pcm(
        source,
        sample_rate=sample_rate,
        channel=settings.channel,
        tail=round(tail * sample_rate),
        most_kept=MOST_KEPT,
        part=settings.part or WHOLE,
    )


def check_script(
    script: Script, settings: Settings, num_samples: int, config: ModelConfig
) -> None:
    """Refuse a script that goes on when the answer ends.

    That is the one to ``num_samples``, a tail of known length included.
    """
    if settings.tail == "auto":
        num_samples += round(longest("auto") * config.sample_rate)
    num_frames = -(-num_samples // config.frame_size)
    if late := too_late(script, num_frames, config.frame_rate):
        raise PplexError(f"{late}: give a longer --tail, or an earlier time")


def tail_s(settings: Settings, num_samples: int, answered: int, rate: int) -> float:
    """Seconds of tail after a recording, where ``answered`` were in the end."""
    if settings.tail == "auto":
        return (answered - num_samples) / rate
    return settings.tail


@dataclass(frozen=True)
class Prepared:
    """A recording that was read, and the model that is about to answer it.

    ``request`` has the voice and the role that it was left open to choose.
    """

    request: Request
    recording: Recording
    model: Model
    opening: Opening
    script: Script
    clock: Clock


def prepare(
    request: Request, config: Config, report: Report, *, many: bool = False
) -> Prepared:
    """Read the recording, load the model, ``many`` as ``load``, and read the prompt."""
    clock, settings = Clock(), request.settings
    if settings.resume is not None:
        read_notes(settings.resume)
    # Before a model is downloaded or loaded: a bad recording shows at once.
    recording = read_user(request.source, settings, MimiConfig().sample_rate)
    report.reading(recording)
    clock.lap("read")
    model = load_model(config, report, many=many, resume=settings.resume)
    rate = model.config.sample_rate
    if rate != MimiConfig().sample_rate:
        recording = read_user(request.source, settings, rate)
    clock.lap("load")
    opening = begin(model, settings, clock, report)
    settings = replace(settings, voice=opening.voice, text=opening.text)
    script = lay_out(settings.lines, model.tokenizer, model.config)
    check_script(script, settings, recording.num_samples, model.config)
    for warning in recording.warnings:
        report.warn(warning)
    request = replace(request, settings=settings)
    return Prepared(request, recording, model, opening, script, clock)


def respond(
    request: Request, config: Config, report: Report, stop: Stop | None = None
) -> Stats:
    """Answer one recording and write what was asked for: all of it, or nothing."""
    stop, outputs = stop or Stop(), request.outputs
    check_outputs(request, config.overwrite)
    ready = prepare(request, config, report)
    request, settings = ready.request, ready.request.settings
    model, recording, clock = ready.model, ready.recording, ready.clock
    saving = None if outputs.state is None else Saving()
    rate = model.config.sample_rate
    with Together() as files, ExitStack() as stack:
        length = None if settings.tail == "auto" else recording.num_samples
        sink = open_sink(outputs.layout, outputs.files(), rate, length, place=files)
        write = stack.enter_context(sink)
        reply, answered = _answer(
            model,
            recording,
            ready.opening.start,
            settings,
            ready.script,
            report,
            write,
            saving,
        )
        if saving is not None:
            reply = replace(reply, saved=saving.arrays)
        clock.lap("answer")
        with stop.deferred():
            # Another program may have written there in the meantime.
            check_outputs(request, config.overwrite)
            stack.close()
            stats = finish(ready, request, reply, answered, files)
            files.name(put if config.overwrite else put_new)
    conclude(model, ready.script, request, reply.text, stats, config, report)
    return stats


def finish(
    ready: Prepared,
    request: Request,
    reply: Answer,
    num_samples: int,
    place: Place,
    *,
    is_share: bool = False,
) -> Stats:
    """Write what belongs to an answer whose sound, of ``num_samples``, is written.

    With ``is_share`` the run has other answers, too, and its time is not this one's.
    """
    model, outputs, settings = ready.model, request.outputs, request.settings
    clock, opening, timings = ready.clock, ready.opening, reply.timings
    recording, rate = ready.recording, model.config.sample_rate
    audio_s = num_samples / rate
    write_outputs(model, request, reply, audio_s, opening.voice, place=place)
    if outputs.state is not None and reply.saved is not None:
        seed, sampling = settings.seed, settings.sampling
        state = state_of(model, reply.saved, opening, seed, sampling)
        state.write(outputs.state, place)
    clock.lap("write")
    own = {
        "encode": timings.encode_s,
        "steps": sum(timings.steps),
        "decode": timings.decode_s,
    }
    stats = make_stats(
        request,
        Source(
            audio_s,
            tail_s(settings, recording.num_samples, num_samples, rate),
            recording.source_rate,
            recording.source_channels,
        ),
        Ending(
            len(spoken_words(model, reply.text, settings.lines)),
            is_cut_off(reply.pcm, reply.text, model.config.frame_size),
        ),
        model.local,
        model_info(model),
        latency(timings.steps, model.config.frame_s),
        len(timings.steps),
        clock.parts | own,
        voice=opening.voice,
        prompt_frames=opening.prompt_frames,
        total_s=None if is_share else clock.total(),
        steps_s=None if is_share else timings.steps,
    )
    if outputs.stats is not None:
        stats.write(outputs.stats, place)
    return stats


def conclude(
    model: Model,
    script: Script,
    request: Request,
    text: np.ndarray,
    stats: Stats,
    config: Config,
    report: Report,
) -> None:
    """Say what was not said in time, and check what was written, if that is wanted.

    ``text`` are the ids (frames,) of what was said.
    """
    if late := unsaid(script, text):
        report.warn(late)
    if config.check is not None:
        spoken = spoken_words(model, text, request.settings.lines)
        files = request.outputs.files()
        outcomes = config.check(request.source, files, asdict(stats), spoken)
        report.checked(outcomes, request.outputs.audio)


def load_model(
    config: Config,
    report: Report,
    *,
    live: bool = False,
    many: bool = False,
    resume: Path | None = None,
) -> Model:
    """Find the model, on the network if it may be, and load it.

    Where nothing else is asked for, in the form in which ``resume`` was computed.
    """
    local = resolve(
        config.model_name, offline=config.offline, progress=report.shows_bars
    )
    report.loading(local)
    compute, kv_bits = config.compute, config.kv_bits
    if resume is not None:
        forms: dict[str, Compute] = {"dense": "dense", "quantized": "quantized"}
        form = read_notes(resume).compute
        if kv_bits is None and form.endswith(KV_AT_8):
            kv_bits = 8
        if compute == "auto":
            compute = forms.get(form.removesuffix(f", {KV_AT_8}"), "alone")
    model = load(local, compute=compute, kv_bits=kv_bits, live=live, many=many)
    report.computing(str(model.form))
    return model


def begin(model: Model, settings: Settings, clock: Clock, report: Report) -> Opening:
    """The prompt that was asked for, or the saved conversation, read.

    The engine has seen a frame; but not where that means to copy what was saved once
    more, for nothing.
    """
    if settings.resume is not None:
        opening = read_state(settings.resume).open(model)
    else:
        opening = open_role(model, settings.voice, settings.text, report.warn)
    clock.lap("prefill")
    skips = settings.resume is not None and not model.engine.is_async
    frame_s = None
    if not skips:
        frame_s = warm_up(model.engine, opening.start, settings.sampling)
    if frame_s is not None:
        report.expecting(frame_s * model.config.frame_rate)
    clock.lap("warm_up")
    return opening


def _answer(
    model: Model,
    sound: Sound,
    start: Start,
    settings: Settings,
    script: Script,
    report: Report,
    write: Write,
    saving: Saving | None = None,
) -> tuple[Answer, int]:
    """The agent's answer to the whole of ``sound``, and how many samples it has.

    The conversation is saved where ``saving`` says. ``write`` is given both sides of
    each stretch as soon as it is there; of the sound only the end stays in the answer.
    """
    frame_rate, size = model.config.frame_rate, model.engine.codec.chunk_frames
    quiet = None
    if settings.tail == "auto":
        quiet = Quiet(model.config, last_cue(script))
    chunks, num_frames = cut(sound, start, model.config, size, quiet, saving)

    report.answering(None if quiet else num_frames / frame_rate)
    captions = Captions(model.tokenizer.piece, frame_rate)
    kept = Kept(model.config.frame_size)
    for piece in converse(
        model.engine,
        start,
        settings.seed,
        chunks,
        settings.sampling,
        decode_frames=size,
        quiet=quiet,
        num_samples=sound.num_samples,
        num_frames=num_frames,
        script=script,
        saving=saving,
    ):
        write(piece.heard, piece.pcm)
        kept.add(piece)
        report.advance(len(piece.text) / frame_rate)
        for idx in piece.text:
            report.said(captions.add(int(idx)))
    report.said(captions.end())
    return kept.answer(), kept.num_samples
