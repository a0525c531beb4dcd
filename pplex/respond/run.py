"""One recording: read it, let the agent answer it, write what was asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from pplex.audio.files import WHOLE, Recording, Sound, read_pcm
from pplex.audio.streams import StreamFormat
from pplex.checkpoint.hub import LocalModel, resolve
from pplex.conversation.answer import Answer, Kept
from pplex.conversation.prompts import Role, make_role
from pplex.conversation.quiet import MAX_TAIL_S, Quiet
from pplex.conversation.scheduler import converse
from pplex.conversation.script import Script, last_cue, lay_out, too_late, unsaid
from pplex.conversation.session import Model, load, warm_up
from pplex.conversation.tracks import cut
from pplex.engine.base import Start
from pplex.engine.choose import Compute
from pplex.errors import PplexError
from pplex.files import put, put_new
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
        num_samples += round(MAX_TAIL_S * config.sample_rate)
    num_frames = -(-num_samples // config.frame_size)
    if late := too_late(script, num_frames, config.frame_rate):
        raise PplexError(f"{late}: give a longer --tail, or an earlier time")


def tail_s(settings: Settings, num_samples: int, answered: int, rate: int) -> float:
    """Seconds of tail after a recording, where ``answered`` were in the end."""
    if settings.tail == "auto":
        return (answered - num_samples) / rate
    return settings.tail


def respond(
    request: Request, config: Config, report: Report, stop: Stop | None = None
) -> Stats:
    """Answer one recording and write what was asked for: all of it, or nothing."""
    stop = stop or Stop()
    clock = Clock()
    outputs, settings = request.outputs, request.settings
    check_outputs(request, config.overwrite)
    # Before a model is downloaded or loaded: a bad recording shows at once.
    recording = read_user(request.source, settings, MimiConfig().sample_rate)
    report.reading(recording)
    clock.lap("read")
    model = load_model(config, report)
    rate = model.config.sample_rate
    if rate != MimiConfig().sample_rate:
        recording = read_user(request.source, settings, rate)
    clock.lap("load")
    role, start = begin(model, settings, clock, report)
    settings = replace(settings, voice=role.voice, text=role.text)
    request = replace(request, settings=settings)
    script = lay_out(settings.lines, model.tokenizer, model.config)
    check_script(script, settings, recording.num_samples, model.config)
    for warning in recording.warnings:
        report.warn(warning)
    place = put if config.overwrite else put_new
    num_samples = recording.num_samples
    with ExitStack() as stack:
        length = None if settings.tail == "auto" else num_samples
        sink = open_sink(outputs.layout, outputs.files(), rate, length, place=place)
        write = stack.enter_context(sink)
        reply, answered = answer(
            model, recording, start, settings, script, report, write
        )
        clock.lap("answer")
        spoken = spoken_words(model, reply.text, settings.lines)
        with stop.deferred():
            # Another program may have written there in the meantime.
            check_outputs(request, config.overwrite)
            stack.close()
            audio_s = answered / rate
            write_outputs(model, request, reply, audio_s, role.voice, place=place)
            clock.lap("write")
            timings = reply.timings
            stats = make_stats(
                request,
                Source(
                    audio_s,
                    tail_s(settings, num_samples, answered, rate),
                    recording.source_rate,
                    recording.source_channels,
                ),
                Ending(
                    len(spoken),
                    is_cut_off(reply.pcm, reply.text, model.config.frame_size),
                ),
                model.local,
                model_info(model),
                latency(timings.steps, model.config.frame_s),
                len(timings.steps),
                clock.parts
                | {
                    "encode": timings.encode_s,
                    "steps": sum(timings.steps),
                    "decode": timings.decode_s,
                },
                voice=role.voice,
                prompt_frames=role.prompt.num_frames,
                total_s=clock.total(),
                steps_s=timings.steps,
            )
            if outputs.stats is not None:
                stats.write(outputs.stats, place)
    if late := unsaid(script, reply.text):
        report.warn(late)
    if config.check is not None:
        files = outputs.files()
        outcomes = config.check(request.source, files, asdict(stats), spoken)
        report.checked(outcomes, outputs.audio)
    return stats


def load_model(config: Config, report: Report, *, live: bool = False) -> Model:
    """Find the model, on the network if it may be, and load it."""
    local = resolve(
        config.model_name, offline=config.offline, progress=report.shows_bars
    )
    report.loading(local)
    model = load(local, compute=config.compute, live=live)
    report.computing(str(model.form))
    return model


def begin(
    model: Model, settings: Settings, clock: Clock, report: Report
) -> tuple[Role, Start]:
    """The prompt that was asked for, read; the engine has seen a frame."""
    role = make_role(model, settings.voice, settings.text, report.warn)
    start = model.engine.prefill(role.prompt)
    clock.lap("prefill")
    frame_s = warm_up(model.engine, start, settings.sampling)
    if frame_s is not None:
        report.expecting(frame_s * model.config.frame_rate)
    clock.lap("warm_up")
    return role, start


def answer(
    model: Model,
    sound: Sound,
    start: Start,
    settings: Settings,
    script: Script,
    report: Report,
    write: Write,
) -> tuple[Answer, int]:
    """The agent's answer to the whole of ``sound``, and how many samples it has.

    ``write`` is given both sides of each stretch as soon as it is there; of the sound
    only the end stays in the answer.
    """
    frame_rate, size = model.config.frame_rate, model.engine.codec.chunk_frames
    quiet = None
    if settings.tail == "auto":
        quiet = Quiet(model.config, last_cue(script))
    chunks, num_frames = cut(sound, model.config, size, quiet)

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
    ):
        write(piece.heard, piece.pcm)
        kept.add(piece)
        report.advance(len(piece.text) / frame_rate)
        for idx in piece.text:
            report.said(captions.add(int(idx)))
    report.said(captions.end())
    return kept.answer(), kept.num_samples
