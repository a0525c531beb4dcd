"""A live conversation: frames from stdin, each answered before the next is read."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from time import perf_counter

import numpy as np

from pplex.audio.files import resampled_length
from pplex.audio.streams import Feed, LiveFrame, UserStream, open_stream
from pplex.conversation.answer import Answer, Timings
from pplex.conversation.quiet import Quiet, longest
from pplex.conversation.scheduler import converse
from pplex.conversation.session import Model
from pplex.engine.base import Start
from pplex.errors import PplexError
from pplex.files import put, put_new
from pplex.respond.ending import Ending, is_cut_off
from pplex.respond.outputs import open_sink, spoken_words, write_tokens, write_words
from pplex.respond.request import Request, Settings, check_outputs
from pplex.respond.run import Clock, Config, Report, begin, load_model
from pplex.respond.stats import (
    Histogram,
    Latency,
    Source,
    Stats,
    make_stats,
    model_info,
)
from pplex.respond.stopping import Stop
from pplex.respond.transcript import Captions

_STDIN = 0
# A source this much ahead of real time is no live one: its frames cannot be late.
_MAX_LIVE_PACE = 1.05

_NO_STEPS = Latency(0.0, 0.0, 0.0, 0.0, 0.0, 0)


class _Record:
    """What a conversation leaves behind, in memory that hardly grows."""

    def __init__(self, keeps_tokens: bool, frame_s: float) -> None:
        self._keeps_tokens = keeps_tokens
        self._text, self._codes = bytearray(), bytearray()
        self.end = np.zeros(0, np.float32)  # the agent's last sound: two frames
        self.steps, self.latency = Histogram(frame_s), Histogram(frame_s)
        self._frame_s = frame_s
        self.num_samples = self.start_up_frames = 0

    def add(self, reply: Answer, frame: LiveFrame, step_s: float, now: float) -> None:
        """Count a frame that was answered ``now``."""
        self.num_samples += frame.num_samples
        self.steps.add(step_s)
        pcm = reply.pcm[: frame.num_samples]
        self.end = np.concatenate([self.end[-len(reply.pcm) :], pcm])
        self._text += reply.text.astype(np.int32).tobytes()
        if self._keeps_tokens:
            codes = np.concatenate([reply.user, reply.agent])
            self._codes += codes.astype(np.int32).tobytes()
        if frame.arrived is None:
            return
        latency_s = now - frame.arrived
        if not self.latency.count and latency_s > self._frame_s:
            self.start_up_frames += 1  # it came while the model was loaded
        else:
            self.latency.add(latency_s)

    def text(self) -> np.ndarray:
        """Text ids (frames,)."""
        return np.frombuffer(bytes(self._text), np.int32)

    def codes(self) -> np.ndarray:
        """Codes of user and agent, one above the other (2 codebooks, frames)."""
        flat = np.frombuffer(bytes(self._codes), np.int32)
        return flat.reshape(len(self.text()), -1).T


def respond_stream(
    request: Request, config: Config, report: Report, stop: Stop | None = None
) -> Stats:
    """Answer what comes on stdin, frame by frame, until it ends or we are stopped."""
    stop = stop or Stop()
    clock = Clock()
    outputs, settings = request.outputs, request.settings
    check_outputs(request, config.overwrite)
    feed = Feed(_STDIN)
    user = UserStream(feed, open_stream(feed, config.raw), settings.channel)
    report.listening(user.format)
    clock.lap("read")
    model = load_model(config, report, live=True)
    clock.lap("load")
    role, start = begin(model, settings, clock, report)
    settings = replace(settings, voice=role.voice, text=role.text)
    request = replace(request, settings=settings)
    rate = model.config.sample_rate
    record = _Record(outputs.tokens is not None, model.config.frame_s)
    closed: BrokenPipeError | None = None
    timings = Timings()
    waited_s = feed.waited_s
    with stop.deferred(feed.stop):
        files, place = outputs.files(), put if config.overwrite else put_new
        with open_sink(outputs.layout, files, rate, place=place) as write:
            replies = _converse(model, start, user, settings)
            report.answering(None)
            captions = Captions(model.tokenizer.piece, model.config.frame_rate)
            try:
                for reply, frame in replies:
                    count = frame.num_samples
                    write(frame.pcm[:count], reply.pcm[:count])
                    timings = reply.timings
                    record.add(reply, frame, timings.steps.pop(), perf_counter())
                    report.said(captions.add(int(reply.text[0])))
                    report.advance(model.config.frame_s)
            except BrokenPipeError as e:
                closed = e
            report.said(captions.end())
            if not record.num_samples:  # nothing was answered: no file
                stop.check()
                if closed is not None:
                    raise closed
            # Another program may have written there in the meantime.
            check_outputs(request, config.overwrite)
        clock.lap("answer")
        audio_s = record.num_samples / rate
        write_words(model, request, record.text(), audio_s, role.voice, place)
        if outputs.tokens is not None:
            user_codes, agent_codes = np.split(record.codes(), 2)
            write_tokens(outputs.tokens, user_codes, agent_codes, record.text(), place)
        clock.lap("write")
        waited_s = feed.waited_s - waited_s
        clock.parts["read"] += waited_s
        spoken = spoken_words(model, record.text())
        heard = resampled_length(user.source_frames, user.format.rate, rate)
        step_ms, frames = record.steps.latency() or _NO_STEPS, record.steps.count
        stats = make_stats(
            request,
            Source(
                audio_s,
                max(0, record.num_samples - heard) / rate,
                user.format.rate,
                user.format.channels,
            ),
            Ending(
                len(spoken),
                is_cut_off(record.end, record.text(), model.config.frame_size),
            ),
            model.local,
            model_info(model),
            step_ms,
            frames,
            clock.parts
            | {
                # A frame is waited for when its codes are asked for.
                "encode": timings.encode_s - waited_s,
                "steps": step_ms.mean * frames / 1000.0,
                "decode": timings.decode_s,
            },
            voice=role.voice,
            prompt_frames=role.prompt.num_frames,
            total_s=clock.total(),
        )
        pace = user.pace
        stats = replace(
            stats,
            latency_ms=record.latency.latency() if pace <= _MAX_LIVE_PACE else None,
            start_up_frames=record.start_up_frames,
            source_pace=pace if math.isfinite(pace) else None,
        )
        if outputs.stats is not None:
            stats.write(outputs.stats, place)
        for warning in user.warnings():
            report.warn(warning)
    if config.check is not None:
        outcomes = config.check(request.source, files, asdict(stats), spoken)
        report.checked(outcomes, outputs.audio)
    if closed is not None:
        raise closed
    fault = user.fault
    if user.missing_bytes:
        fault = (
            f"the input stream ended {user.missing_bytes} bytes before the length its "
            "header names"
        )
    if fault:
        raise PplexError(f"{fault}; what came before was answered and written")
    return stats


def _converse(
    model: Model, start: Start, user: UserStream, settings: Settings
) -> Iterator[tuple[Answer, LiveFrame]]:
    """Yield each frame of the user with the reply to it, before the next is read."""
    under_way: deque[LiveFrame] = deque()
    quiet = Quiet(model.config) if settings.tail == "auto" else None

    def chunks() -> Iterator[np.ndarray]:
        sizes = model.config.sample_rate, model.config.frame_size
        frames = user.frames(*sizes, longest(settings.tail))
        for idx, frame in enumerate(frames):
            if quiet is not None and frame.arrived is None:
                quiet.begin(idx)
            under_way.append(frame)
            yield frame.pcm[None]

    for reply in converse(
        model.engine,
        start,
        settings.seed,
        chunks(),
        settings.sampling,
        decode_frames=1,
        live=True,
        quiet=quiet,
    ):
        yield reply, under_way.popleft()
