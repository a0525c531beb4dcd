"""One recording: read it, let the agent answer it, write what was asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from pplex.audio.files import Recording, frames_of, read_pcm, write_wav
from pplex.audio.streams import StreamFormat
from pplex.checkpoint.hub import LocalModel, resolve
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.conversation.compute import Compute, load_as
from pplex.conversation.prompt import prefill
from pplex.conversation.session import (
    Conversation,
    Model,
    Reply,
    Role,
    chunk_frames,
    make_role,
    warm_up,
)
from pplex.errors import PplexError
from pplex.files import PIPE, atomic_write, is_pipe, write_text
from pplex.model.config import MimiConfig, ModelConfig
from pplex.respond.captions import Captions
from pplex.respond.figures import About, facts_of, make_stats
from pplex.respond.settings import Settings
from pplex.respond.sink import Layout, Write, open_sink
from pplex.respond.stats import Check, Outcome, Stats, latency
from pplex.respond.stopping import Stop
from pplex.respond.transcript import check_transcript_path, words, write_transcript


@dataclass(frozen=True)
class Outputs:
    """Where the results of one recording go; None for what is not wanted.

    ``-`` is stdout; transcript and stats may also be devices and pipes.
    """

    audio: Path
    layout: Layout
    transcript: Path | None = None
    stats: Path | None = None
    tokens: Path | None = None

    def files(self) -> dict[str, Path]:
        """Every file that will be written, by what it is."""
        if self.layout == "separate":
            stem = self.audio.with_suffix("")
            audio = {
                side: stem.with_name(f"{stem.name}.{side}.wav")
                for side in ("user", "agent")
            }
        else:
            audio = {"audio": self.audio}
        side_files = {
            "transcript": self.transcript,
            "stats": self.stats,
            "tokens": self.tokens,
        }
        return audio | {k: v for k, v in side_files.items() if v is not None}


def check_outputs(source: Path, outputs: Outputs, overwrite: bool) -> None:
    """Refuse outputs that would destroy something, before any work is done."""
    if outputs.audio == PIPE:
        if outputs.layout == "separate":
            raise PplexError("two files do not fit on stdout: choose another --layout")
    elif outputs.audio.suffix.lower() != ".wav":
        raise PplexError(
            f"cannot write {outputs.audio}: the output is a WAV file; end its name "
            "in .wav"
        )
    if outputs.transcript is not None and not is_pipe(outputs.transcript):
        check_transcript_path(outputs.transcript)
    if outputs.tokens is not None and outputs.tokens.suffix.lower() != ".npz":
        raise PplexError(
            f"cannot write {outputs.tokens}: tokens are a NumPy archive; end its name "
            "in .npz"
        )
    files = outputs.files()
    if sum(path == PIPE for path in files.values()) > 1:
        raise PplexError("only one output fits on stdout: give the others file names")
    seen = {} if source == PIPE else {os.path.realpath(source): "the input"}
    for what, path in files.items():
        if path == PIPE or (what in ("transcript", "stats") and is_pipe(path)):
            continue
        other = seen.setdefault(os.path.realpath(path), f"the {what} output")
        if other != f"the {what} output":
            raise PplexError(
                f"cannot write {path}: it is also {other}; choose another name"
            )
        _check_name(path)
        if path.exists() and os.path.exists(source) and path.samefile(source):
            raise PplexError(f"cannot write {path}: it is the input by another name")
        _check_place(path, overwrite)


def _check_name(path: Path) -> None:
    """Refuse a name that is too long, and links that go round in a circle."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:
        raise PplexError(f"cannot write {path}: {e.strerror or e}") from e


def _check_place(path: Path, overwrite: bool) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise PplexError(f"cannot write {path}: {path.parent} is not a folder")
    if not path.parent.is_dir():
        raise PplexError(
            f"cannot write {path}: the folder {path.parent} does not exist; "
            "create it first"
        )
    if path.is_dir():
        raise PplexError(f"cannot write {path}: it is a folder; give a file name")
    if path.exists() and not overwrite:
        raise PplexError(
            f"{path} exists already; choose another name or give --overwrite"
        )
    if not os.access(path.parent, os.W_OK):
        raise PplexError(
            f"cannot write {path}: no permission to write in {path.parent}; choose "
            "another folder"
        )


@dataclass(frozen=True)
class Answer:
    """The agent's track and tokens for one recording, frame by frame.

    ``user_pcm`` and ``agent_pcm`` are (samples,) of equal length; ``text`` is
    (frames,), ``agent`` and ``user`` are (codebooks, frames).
    """

    user_pcm: np.ndarray
    agent_pcm: np.ndarray
    text: np.ndarray
    agent: np.ndarray
    user: np.ndarray


@dataclass(frozen=True)
class Run:
    """One call of ``pplex respond``.

    ``raw`` is how bare samples on stdin lie; None for a file or a WAV stream.
    """

    source: Path
    outputs: Outputs
    settings: Settings
    model_name: str
    offline: bool
    overwrite: bool
    raw: StreamFormat | None = None
    compute: Compute = "auto"
    check: Check | None = None


class Report(Protocol):
    """Who is told how a run gets on."""

    shows_bars: bool

    def reading(self, recording: Recording) -> None:
        """The recording was read."""

    def listening(self, stream: StreamFormat) -> None:
        """The input is a stream that has begun."""

    def loading(self, local: LocalModel) -> None:
        """The model's files are there and will be loaded."""

    def computing(self, how: str) -> None:
        """The model is loaded and computes in this form, for this reason."""

    def answering(self, duration_s: float | None) -> None:
        """The agent starts to answer this many seconds of audio; None: a stream."""

    def advance(self, seconds: float) -> None:
        """Another stretch of audio is answered."""

    def checked(self, outcomes: Sequence[Outcome]) -> None:
        """The outputs are written and were checked."""

    def said(self, text: str) -> None:
        """The agent says this; for captions, as it is to be printed."""


class Described(Protocol):
    """What the outputs need to know of a model, loaded or not."""

    local: LocalModel
    config: ModelConfig
    tokenizer: TextTokenizer


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
    """The user's side of ``source``, followed by the tail of silence."""
    recording = read_pcm(source, sample_rate=sample_rate, channel=settings.channel)
    tail = np.zeros(round(settings.tail_s * sample_rate), np.float32)
    return replace(recording, pcm=np.concatenate([recording.pcm, tail]))


def answer(
    model: Model,
    user_pcm: np.ndarray,
    conversation: Conversation,
    report: Report,
    write: Write | None = None,
) -> Answer:
    """Run ``conversation`` over the whole of ``user_pcm`` (samples,).

    ``write`` is given both sides of each reply as soon as it is there.
    """
    frames = frames_of(user_pcm, model.config.frame_size)
    frame_rate = model.config.frame_rate

    size = chunk_frames()
    chunks = (frames[i : i + size] for i in range(0, len(frames), size))

    report.answering(len(frames) / frame_rate)
    captions = Captions(model.tokenizer.piece, frame_rate)
    replies: list[Reply] = []
    done = 0
    for reply in conversation.run(chunks, decode_frames=size):
        replies.append(reply)
        if write is not None:
            user = user_pcm[done : done + len(reply.pcm)]
            write(user, reply.pcm[: len(user)])
            done += len(user)
        report.advance(len(reply.text) / frame_rate)
        for idx in reply.text:
            report.said(captions.add(int(idx)))
    report.said(captions.end())
    agent_pcm = np.concatenate([reply.pcm for reply in replies])
    return Answer(
        user_pcm=user_pcm,
        agent_pcm=agent_pcm[: len(user_pcm)],
        text=np.concatenate([reply.text for reply in replies]),
        agent=np.concatenate([reply.agent for reply in replies], axis=1),
        user=np.concatenate([reply.user for reply in replies], axis=1),
    )


def write_outputs(
    model: Described,
    outputs: Outputs,
    result: Answer,
    voice: str,
    text: str,
    seed: int,
    *,
    replace: bool = True,
) -> None:
    """Write everything but the stats, sound first; ``replace`` as ``atomic_write``."""
    rate = model.config.sample_rate
    files = outputs.files()
    if outputs.audio == PIPE:
        pass  # it was written as it was made
    elif outputs.layout == "stereo":
        tracks = np.stack([result.user_pcm, result.agent_pcm], axis=1)
        write_wav(files["audio"], tracks, rate, replace=replace)
    elif outputs.layout == "agent":
        write_wav(files["audio"], result.agent_pcm, rate, replace=replace)
    else:
        write_wav(files["user"], result.user_pcm, rate, replace=replace)
        write_wav(files["agent"], result.agent_pcm, rate, replace=replace)
    if outputs.transcript is not None:
        duration_s = len(result.user_pcm) / rate
        said = voice, text, seed
        write_words(model, outputs.transcript, result.text, duration_s, *said)
    if outputs.tokens is not None:
        write_tokens(outputs.tokens, result.user, result.agent, result.text)


def write_words(
    model: Described,
    path: Path,
    text_tokens: np.ndarray,
    duration_s: float,
    voice: str,
    text: str,
    seed: int,
) -> None:
    """Write the transcript of ``text_tokens`` (frames,)."""
    spoken = words(text_tokens, model.tokenizer.piece, model.config.frame_rate)
    if is_pipe(path):
        write_text(path, " ".join(word.text for word in spoken) + "\n")
        return
    metadata = {
        "model": model.local.name,
        "revision": model.local.revision,
        "voice": voice,
        "prompt": text,
        "seed": seed,
    }
    write_transcript(path, spoken, duration_s, metadata)


def write_tokens(
    path: Path, user: np.ndarray, agent: np.ndarray, text: np.ndarray
) -> None:
    """Write token arrays as .npz."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            user=user.astype(np.int32),
            agent=agent.astype(np.int32),
            text=text.astype(np.int32),
        )


def respond(run: Run, report: Report, stop: Stop | None = None) -> Stats:
    """Answer one recording and write what was asked for: all of it, or nothing."""
    stop = stop or Stop()
    clock = Clock()
    check_outputs(run.source, run.outputs, run.overwrite)
    # Before a model is downloaded or loaded: a bad recording shows at once.
    recording = read_user(run.source, run.settings, MimiConfig().sample_rate)
    report.reading(recording)
    clock.lap("read")
    local = resolve(run.model_name, offline=run.offline, progress=report.shows_bars)
    report.loading(local)
    model, choice = load_as(local, run.compute, many=False)
    report.computing(str(choice))
    if model.config.sample_rate != MimiConfig().sample_rate:
        recording = read_user(run.source, run.settings, model.config.sample_rate)
    clock.lap("load")
    role, conversation = start(run, model, clock)
    rate, length = model.config.sample_rate, len(recording.pcm)
    if run.outputs.audio == PIPE:
        files = run.outputs.files()
        with open_sink(run.outputs.layout, files, rate, length) as write:
            result = answer(model, recording.pcm, conversation, report, write)
    else:
        result = answer(model, recording.pcm, conversation, report)
    clock.lap("answer")
    with stop.deferred():
        # Another program may have written there in the meantime.
        check_outputs(run.source, run.outputs, run.overwrite)
        write_outputs(
            model,
            run.outputs,
            result,
            role.voice,
            role.text,
            run.settings.seed,
            replace=run.overwrite,
        )
        clock.lap("write")
        source = Source(length / rate, recording.source_rate, recording.source_channels)
        timings = conversation.timings
        spent = clock.parts | {
            "encode": timings.encode_s,
            "steps": sum(timings.steps),
            "decode": timings.decode_s,
        }
        stats = make_stats(
            about_run(run, model, role, source),
            spent,
            latency(timings.steps),
            len(timings.steps),
            total_s=clock.total(),
            steps_s=timings.steps,
        )
        if run.outputs.stats is not None:
            stats.write(run.outputs.stats)
    if run.check is not None:
        spoken = words(result.text, model.tokenizer.piece, model.config.frame_rate)
        files = run.outputs.files()
        report.checked(run.check(run.source, files, stats, spoken))
    return stats


def start(run: Run, model: Model, clock: Clock) -> tuple[Role, Conversation]:
    """The prompt that was asked for, and a conversation that begins after it."""
    role = make_role(model, run.settings.voice, run.settings.text)
    prefilled = prefill(model.lm, role.prompt)
    clock.lap("prefill")
    warm_up(model, prefilled)
    clock.lap("warm_up")
    settings = run.settings
    return role, Conversation(model, prefilled, settings.sampling, settings.seed)


def about_run(run: Run, model: Model, role: Role, source: Source) -> About:
    """What a run was, for its figures."""
    return About(
        source=run.source,
        outputs=run.outputs.files(),
        audio_s=source.audio_s,
        rate=source.rate,
        channels=source.channels,
        settings=run.settings,
        voice=role.voice,
        prompt_frames=role.prompt.num_frames,
        local=model.local,
        facts=facts_of(model),
    )


@dataclass(frozen=True)
class Source:
    """What was answered: its length, tail included, and how it came."""

    audio_s: float
    rate: int
    channels: int
