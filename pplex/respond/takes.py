"""Several answers to one recording, whose prompt and sound are read once for all."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np

from pplex.conversation.answer import Answer
from pplex.conversation.quiet import longest
from pplex.conversation.scheduler import converse_many
from pplex.conversation.session import Model
from pplex.conversation.state import Opening
from pplex.conversation.tracks import Conversation
from pplex.engine.choose import batch_size
from pplex.errors import PplexError
from pplex.files import Together, is_pipe, name_of, put, put_new
from pplex.model.sampling import SamplingConfig
from pplex.respond.outputs import SoundWriter, open_sink
from pplex.respond.request import Request, check_outputs, takes_of
from pplex.respond.run import Config, Prepared, Report, conclude, finish, prepare
from pplex.respond.stats import Stats
from pplex.respond.stopping import Stop


def respond_takes(
    request: Request,
    takes: int,
    config: Config,
    report: Report,
    stop: Stop | None = None,
) -> list[Stats]:
    """Answer one recording so many times; each as by itself with its seed."""
    stop = stop or Stop()
    pipes = [path for path in request.outputs.files().values() if is_pipe(path)]
    if pipes:
        raise PplexError(
            f"--takes writes many files, and {name_of(pipes[0])} is none: give a name"
        )
    for one in takes_of(request, takes):
        check_outputs(one, config.overwrite)
    ready = prepare(request, config, report, many=True)
    every = takes_of(ready.request, takes)
    recording, rate = ready.recording, ready.model.config.sample_rate
    with Together() as files, ExitStack() as stack:
        writers = []
        for one in every:
            sound, layout = one.outputs.files(), one.outputs.layout
            writers.append(
                SoundWriter(partial(open_sink, layout, sound, rate, place=files))
            )
            stack.callback(writers[-1].abandon)
        replies = _answer(ready, every, writers, report)
        ready.clock.lap("answer")
        done = []
        with stop.deferred():
            # Another program may have written there in the meantime.
            for one in every:
                check_outputs(one, config.overwrite)
            for one, writer, reply in zip(every, writers, replies, strict=True):
                if not writer.num_samples:  # it came whole, from a GPU
                    missing = len(reply.pcm) - recording.num_samples
                    writer(0, np.pad(recording.pcm, (0, missing)), reply.pcm)
                writer.finish()
                count = writer.num_samples
                done.append(finish(ready, one, reply, count, files, is_share=True))
            files.name(put if config.overwrite else put_new)
    for one, stats, reply in zip(every, done, replies, strict=True):
        conclude(ready.model, ready.script, one, reply.text, stats, config, report)
    return done


def answers_to(
    model: Model, opening: Opening, takes: list[Conversation], sampling: SamplingConfig
) -> list[Answer]:
    """The answers to ``takes`` of one sound, as many at a time as the memory holds."""
    config, one = model.config, takes[0]
    seconds = one.sound.num_samples / config.sample_rate
    seconds += longest("auto") if one.until_quiet else 0.0
    frames = math.ceil(seconds * config.frame_rate)
    cost, prompt_frames = model.engine.cost(), opening.prompt_frames
    rows = batch_size(config, cost, frames, prompt_frames=prompt_frames, takes=True)
    every = [replace(take, more_takes=True) for take in takes[:-1]] + takes[-1:]
    answers: dict[str, Answer] = {}
    for take, reply in converse_many(
        model.engine, every, sampling, batch_size=min(rows, len(every))
    ):
        if reply.fault:
            raise PplexError(reply.fault)
        answers[take.key] = reply
    return [answers[take.key] for take in every]


def _answer(
    ready: Prepared, every: list[Request], writers: list[SoundWriter], report: Report
) -> list[Answer]:
    """The answers of all takes, whose sound is written as it is made."""
    settings, sound = ready.request.settings, ready.recording
    rate, until_quiet = ready.model.config.sample_rate, settings.tail == "auto"
    report.answering(None if until_quiet else sound.num_samples / rate * len(every))

    def write(idx: int, start: int, user: np.ndarray, agent: np.ndarray) -> None:
        writers[idx](start, user, agent)
        report.advance(len(agent) / rate)

    takes = [
        Conversation(
            key=str(idx),
            sound=sound,
            start=ready.opening.start,
            seed=one.settings.seed,
            until_quiet=until_quiet,
            write=partial(write, idx),
            script=ready.script,
            saves=one.outputs.state is not None,
        )
        for idx, one in enumerate(every)
    ]
    return answers_to(ready.model, ready.opening, takes, settings.sampling)
