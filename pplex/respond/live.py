"""A live conversation: frames from stdin, each answered before the next is read."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from pplex.audio.files import resampled_length, to_pcm16
from pplex.audio.streams import Feed, LiveFrame, UserStream, open_stream
from pplex.conversation.answer import Answer, Timings
from pplex.conversation.quiet import Quiet, is_quiet, longest
from pplex.conversation.scheduler import converse_live
from pplex.conversation.script import Script, last_cue, lay_out
from pplex.conversation.session import Model
from pplex.conversation.state import Opening, Saving, read_notes, state_of
from pplex.engine.base import Start
from pplex.errors import PplexError
from pplex.files import Place, is_pipe, put, put_new, unread_bytes
from pplex.respond.ending import Ending, is_cut_off
from pplex.respond.outputs import (
    Write,
    open_sink,
    spoken_words,
    write_tokens,
    write_words,
)
from pplex.respond.request import Request, Settings, check_outputs
from pplex.respond.run import Clock, Config, Report, begin, conclude, load_model
from pplex.respond.stats import (
    Latency,
    Source,
    Stats,
    latency,
    make_stats,
    model_info,
)
from pplex.respond.stopping import Stop
from pplex.respond.transcript import Captions
from pplex.units import counted

_STDIN = 0
_MOST_WAITING = 3  # frames of speech that a player may be behind

_NO_STEPS = Latency(0.0, 0.0, 0.0, 0.0, 0.0, 0)


class _Delays:
    """Seconds from a frame's last sample to its reply, of each frame.

    ``with_step`` is how long it would have been, were all that is done ahead (the step
    and the codec's work) done then.
    """

    def __init__(self) -> None:
        self.reply, self.with_step = array("f"), array("f")

    def add(self, seconds: float, ahead_s: float) -> None:
        """Count a frame."""
        self.reply.append(seconds)
        self.with_step.append(seconds + ahead_s)


class _Player:
    """Who plays the agent's sound as soon as it is made, through a pipe.

    Once it had to wait it plays all that follows later, and what is ahead waits in the
    pipe. Then a reply is left out, where the agent is quiet if that is soon.
    """

    def __init__(self, path: Path, write: Write, record: _Record) -> None:
        self._path, self._write, self._record = path, write, record
        record.left_out_frames = 0

    def play(self, reply: Answer) -> None:
        """Give it a reply, or leave that out."""
        waiting = unread_bytes(self._path) // to_pcm16(reply.pcm).nbytes
        quiet = is_quiet(reply.pcm, int(reply.text[0]) if len(reply.text) else None)
        if waiting < (1 if quiet else _MOST_WAITING):
            self._write(reply.pcm, reply.pcm)
        else:
            self._record.left_out_frames += 1


class _Record:
    """What a conversation leaves behind: of an hour less than 1 MB."""

    def __init__(self, model: Model, *, keeps_tokens: bool) -> None:
        self._keeps_tokens = keeps_tokens
        self._is_ahead = not model.config.lm.is_moshi
        self._frame_s = model.config.frame_s
        self._text, self._user, self._agent = bytearray(), bytearray(), bytearray()
        self.end = np.zeros(0, np.float32)  # the agent's last sound: two frames
        self.steps = array("f")  # seconds
        self._start_up, self._delays = _Delays(), _Delays()
        self.timings, self._codec_s, self.num_samples = Timings(), 0.0, 0
        self.left_out_frames = 0

    def hear(self, codes: np.ndarray) -> None:
        """Keep the user's codes (codebooks, frames), where they are wanted."""
        if self._keeps_tokens:
            self._user += codes.T.astype(np.int32).tobytes()

    def add(self, frame: LiveFrame, reply: Answer, now: float) -> None:
        """Count a frame that was answered ``now``."""
        self.num_samples += frame.num_samples
        self.end = np.concatenate(
            [self.end[-len(reply.pcm) :], reply.pcm[: frame.num_samples]]
        )
        self._text += reply.text.astype(np.int32).tobytes()
        if self._keeps_tokens:
            self._agent += reply.agent.T.astype(np.int32).tobytes()
        self.timings = reply.timings
        step_s, codec_s = self.timings.steps.pop(), self._codec_s
        self._codec_s = self.timings.encode_s + self.timings.decode_s
        self.steps.append(step_s)
        if frame.arrived is None:
            return
        latency_s = now - frame.arrived
        # Until one is in time they came while the model was loaded, or wait for those.
        in_time = len(self._delays.reply) or latency_s <= self._frame_s
        delays = self._delays if in_time else self._start_up
        delays.add(latency_s, (step_s + self._codec_s - codec_s) * self._is_ahead)

    def text(self) -> np.ndarray:
        """Text ids (frames,)."""
        return np.frombuffer(bytes(self._text), np.int32)

    def codes(self) -> Iterator[np.ndarray]:
        """The user's codes (codebooks, frames), and the agent's."""
        for codes in (self._user, self._agent):
            flat = np.frombuffer(bytes(codes), np.int32)
            yield flat.reshape(len(self.text()), -1).T

    def with_delays(self, stats: Stats, user: UserStream) -> Stats:
        """``stats`` with how late replies were, where ``user`` came in real time."""
        delays, start_up_frames = self._delays, len(self._start_up.reply)
        if not delays.reply:  # it was never caught up with
            delays, start_up_frames = self._start_up, 0
        if delays.reply and user.is_live:
            stats = replace(
                stats,
                latency_ms=latency(delays.reply, self._frame_s),
                latency_with_step_ms=latency(delays.with_step, self._frame_s),
            )
        return replace(
            stats,
            start_up_frames=start_up_frames,
            source_pace=user.pace,
            skipped_s=user.skipped_s,
            left_out_frames=self.left_out_frames,
        )


def respond_stream(
    request: Request, config: Config, report: Report, stop: Stop | None = None
) -> Stats:
    """Answer what comes on stdin, frame by frame, until it ends or we are stopped."""
    stop = stop or Stop()
    clock = Clock()
    check_outputs(request, config.overwrite)
    if request.settings.resume is not None:
        read_notes(request.settings.resume)
    feed = Feed(_STDIN)
    user = UserStream(feed, open_stream(feed, config.raw), request.settings.channel)
    report.listening(user.format)
    clock.lap("read")
    model = load_model(config, report, live=True, resume=request.settings.resume)
    clock.lap("load")
    opening = begin(model, request.settings, clock, report)
    voice, text = opening.voice, opening.text
    settings = replace(request.settings, voice=voice, text=text)
    request = replace(request, settings=settings)
    script = lay_out(settings.lines, model.tokenizer, model.config)
    outputs, rate = request.outputs, model.config.sample_rate
    files, place = outputs.files(), put if config.overwrite else put_new
    record = _Record(model, keeps_tokens=outputs.tokens is not None)
    is_played = config.live and outputs.layout == "agent" and is_pipe(outputs.audio)
    saving = None if outputs.state is None else Saving()
    waited_s = feed.waited_s
    if config.live:
        user.pass_over()
    with stop.deferred(feed.stop):
        with open_sink(outputs.layout, files, rate, place=place) as write:
            player = _Player(outputs.audio, write, record) if is_played else None
            start = opening.start
            replies = _converse(
                model, start, settings, user, record, player, script, saving
            )
            closed = _answer(model, replies, record, None if player else write, report)
            if not record.num_samples:  # nothing was answered: no file
                stop.check()
                if closed is not None:
                    raise closed
            # Another program may have written there in the meantime.
            check_outputs(request, config.overwrite)
        clock.lap("answer")
        with _kept_sound():
            _write_tokens(model, request, record, place)
            if outputs.state is not None and saving is not None and closed is None:
                seed, sampling = settings.seed, settings.sampling
                state = state_of(model, saving.arrays, opening, seed, sampling)
                state.write(outputs.state, place)
            clock.lap("write")
            clock.parts["read"] += feed.waited_s - waited_s
            stats = _stats(model, request, opening, record, user, clock)
            if outputs.stats is not None:
                stats.write(outputs.stats, place)
        for warning in user.warnings() if closed is None else ():  # else unheard
            report.warn(warning)
    conclude(model, script, request, record.text(), stats, config, report)
    if closed is not None:
        raise closed
    _check_whole(user)
    return stats


def _converse(
    model: Model,
    start: Start,
    settings: Settings,
    user: UserStream,
    record: _Record,
    player: _Player | None,
    script: Script,
    saving: Saving | None,
) -> Iterator[tuple[LiveFrame, Answer]]:
    """Each frame of the user with its reply, which a ``player`` has got before."""
    sizes = model.config.sample_rate, model.config.frame_size
    quiet = None
    if settings.tail == "auto":
        quiet = Quiet(model.config, last_cue(script))
    return converse_live(
        model.engine,
        start,
        settings.seed,
        user.frames(*sizes, longest(settings.tail), start.rest),
        settings.sampling,
        quiet=quiet,
        keep=record.hear,
        made=player.play if player else None,
        script=script,
        saving=saving,
    )


def _answer(
    model: Model,
    replies: Iterator[tuple[LiveFrame, Answer]],
    record: _Record,
    write: Write | None,
    report: Report,
) -> BrokenPipeError | None:
    """``write`` each frame and its reply; what says that nobody reads them any more."""
    report.answering(None)
    captions = Captions(model.tokenizer.piece, model.config.frame_rate)
    closed = None
    try:
        for frame, reply in replies:
            count = frame.num_samples
            if write is not None:
                write(frame.pcm[:count], reply.pcm[:count])
            record.add(frame, reply, perf_counter())
            for idx in reply.text:
                report.said(captions.add(int(idx)))
            report.advance(model.config.frame_s)
    except BrokenPipeError as e:
        closed = e
    report.said(captions.end())
    return closed


@contextmanager
def _kept_sound() -> Iterator[None]:
    """A conversation cannot be had again: what fails beside its sound leaves that."""
    try:
        yield
    except PplexError as e:
        raise PplexError(f"{e}; the sound was written") from e


def _write_tokens(
    model: Model, request: Request, record: _Record, place: Place
) -> None:
    """Write transcripts and token arrays, where they are wanted."""
    duration_s = record.num_samples / model.config.sample_rate
    voice, text = request.settings.voice or "", record.text()
    write_words(model, request, text, duration_s, voice, place)
    if (path := request.outputs.tokens) is not None:
        arrays = dict(zip(("user", "agent"), record.codes(), strict=True))
        write_tokens(path, arrays | {"text": text}, place)


def _stats(
    model: Model,
    request: Request,
    opening: Opening,
    record: _Record,
    user: UserStream,
    clock: Clock,
) -> Stats:
    """The figures of a stream that has ended."""
    rate, text, timings = model.config.sample_rate, record.text(), record.timings
    heard = resampled_length(user.source_frames, user.format.rate, rate)
    frames = len(record.steps)
    step_ms = latency(record.steps, model.config.frame_s) if frames else _NO_STEPS
    stats = make_stats(
        request,
        Source(
            record.num_samples / rate,
            max(0, record.num_samples - heard) / rate,
            user.format.rate,
            user.format.channels,
        ),
        Ending(
            len(spoken_words(model, text, request.settings.lines)),
            is_cut_off(record.end, text, model.config.frame_size),
        ),
        model.local,
        model_info(model),
        step_ms,
        frames,
        clock.parts
        | {
            "encode": timings.encode_s,
            "steps": step_ms.mean * frames / 1000.0,
            "decode": timings.decode_s,
        },
        voice=opening.voice,
        prompt_frames=opening.prompt_frames,
        total_s=clock.total(),
    )
    return record.with_delays(stats, user)


def _check_whole(user: UserStream) -> None:
    """Say what ended a stream before its time."""
    fault = user.fault
    if user.missing_bytes:
        fault = (
            f"the input stream ended {counted(user.missing_bytes, 'byte')} before the "
            "length its header names"
        )
    if fault:
        raise PplexError(f"{fault}; what came before was answered and written")
