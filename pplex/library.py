"""Use from Python: load a model, let it answer recordings, many of them, and streams.

The names here are those of ``pplex`` itself: ``pplex.load`` and what it returns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from pplex.audio.files import Samples, first_unsound, probe
from pplex.audio.streams import LiveFrame
from pplex.batch.decoding import Answered, Decoder, Job, Size
from pplex.bench.estimate import best_model
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.known import AUTO_MODEL, DEFAULT_MODEL
from pplex.conversation import answer, session
from pplex.conversation.prompts import choose_text, choose_voice, open_role
from pplex.conversation.quiet import Tail, longest
from pplex.conversation.roles import DEFAULT_SEED
from pplex.conversation.scheduler import converse_live
from pplex.conversation.state import Opening, State, read_state, state_of
from pplex.conversation.tracks import Conversation
from pplex.engine.choose import Compute
from pplex.errors import PplexError, check_count
from pplex.files import check_named, put, put_new
from pplex.model.sampling import SamplingConfig
from pplex.respond.outputs import open_sink, spoken_words
from pplex.respond.request import MAX_SEED, MOST_TAIL_S, SOUND_FORMATS, Settings
from pplex.respond.run import read_user
from pplex.respond.takes import answers_to
from pplex.respond.transcript import PieceText, Word

Recording = str | os.PathLike[str] | np.ndarray  # a file, or samples (samples,)

_SAMPLING = SamplingConfig()


@dataclass(frozen=True)
class Answer:
    """What the agent said: ``audio`` float32 (samples,) and its ``words`` with times.

    ``text`` and ``agent`` tokens are kept as ids: (frames,) and (codebooks, frames).
    ``state`` is what the conversation goes on from, where that was asked for.
    """

    audio: np.ndarray
    sample_rate: int
    words: list[Word]
    text_ids: np.ndarray
    codes: np.ndarray
    state: State | None = None

    @property
    def text(self) -> str:
        """What was said, by the model's own text stream."""
        return " ".join(word.text for word in self.words)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write it in mono, whole or not at all: 16-bit WAV, or as the suffix says.

        PplexError if the file exists, unless ``overwrite``, or cannot be written.
        """
        path, place = Path(path), put if overwrite else put_new
        check_named(path, (".wav", *SOUND_FORMATS), overwrite)
        sink = open_sink("agent", {"audio": path}, self.sample_rate, place=place)
        with sink as write:
            write(self.audio, self.audio)


@dataclass(frozen=True)
class Piece:
    """The answer to one frame: ``audio`` float32 (samples,), ``text`` said in it."""

    audio: np.ndarray
    text: str


class Model:
    """A loaded model; ``voices`` are the names of its voices, sounds are at
    ``sample_rate``, one frame is ``frame_size`` samples.

    ``voice`` is a name or a file, by default the command's; ``prompt`` the role in
    words. What cannot be done raises ``PplexError``, whose text is one sentence.
    """

    def __init__(self, model: session.Model) -> None:
        """The model of a session, as ``load`` returns it."""
        self._model = model
        self._last: tuple[tuple[str, str], Opening] | None = None
        self.voices = list(model.voices)
        self.sample_rate = model.config.sample_rate
        self.frame_size = model.config.frame_size

    def respond(
        self,
        recording: Recording,
        *,
        voice: str | None = None,
        prompt: str | None = None,
        tail: Tail = 0.0,
        seed: int | None = None,
        sampling: SamplingConfig | None = None,
        resume: State | str | os.PathLike[str] | None = None,
        saves: bool = False,
    ) -> Answer:
        """Answer a file, or samples float32 (samples,) at ``sample_rate``.

        ``tail`` is how many seconds of silence follow it, or ``"auto"``. With ``saves``
        the answer has a ``state``; ``resume`` goes on from one, or from its file, with
        its voice and role, and its seed and sampling unless they are given.
        """
        (answer,) = self.takes(
            recording,
            1,
            voice=voice,
            prompt=prompt,
            tail=tail,
            seed=seed,
            sampling=sampling,
            resume=resume,
            saves=saves,
        )
        return answer

    def takes(
        self,
        recording: Recording,
        count: int,
        *,
        voice: str | None = None,
        prompt: str | None = None,
        tail: Tail = 0.0,
        seed: int | None = None,
        sampling: SamplingConfig | None = None,
        resume: State | str | os.PathLike[str] | None = None,
        saves: bool = False,
    ) -> list[Answer]:
        """``count`` answers, with ``seed`` and those that follow, each as by itself."""
        check_count("count", count, 1)
        if resume is not None and not isinstance(resume, State):
            resume = read_state(Path(resume))
        if resume is None:
            seed = DEFAULT_SEED if seed is None else seed
            settings = self._settings(voice, prompt, tail, seed, sampling or _SAMPLING)
            opening = self._opening(settings)
        else:
            if voice is not None or prompt is not None:
                raise PplexError("a conversation that goes on has its voice and role")
            notes = resume.notes
            seed = notes.seed if seed is None else seed
            known = notes.voice, notes.prompt, tail, seed, sampling or notes.sampling
            settings, opening = _checked(*known), resume.open(self._model)
        model, sound = self._model, Samples(self._read(recording, settings))
        takes = [
            Conversation(
                key=str(number),
                sound=sound,
                start=opening.start,
                seed=(settings.seed + number) & MAX_SEED,
                until_quiet=tail == "auto",
                saves=saves,
            )
            for number in range(count)
        ]
        answers, drawn = [], settings.sampling
        replies = answers_to(model, opening, takes, drawn)
        for one, said in zip(takes, replies, strict=True):
            state = None
            if said.saved is not None:
                state = state_of(model, said.saved, opening, one.seed, drawn)
            answers.append(replace(self._answer(said), state=state))
        return answers

    def batch(
        self,
        recordings: Iterable[Recording],
        *,
        voice: str | None = None,
        prompt: str | None = None,
        tail: Tail = 0.0,
        seed: int = DEFAULT_SEED,
        sampling: SamplingConfig = _SAMPLING,
        batch_size: int | None = None,
    ) -> Iterator[Answer]:
        """Answer many, several at a time, each as ``respond`` does; in their order.

        ``batch_size`` is how many at a time, by default what memory holds.
        """
        settings = self._settings(voice, prompt, tail, seed, sampling)
        if batch_size is not None:
            check_count("batch_size", batch_size, 1)
        every = list(recordings)
        if not every:
            return
        seconds = [self._seconds(recording, tail) for recording in every]
        size = Size.of(batch_size, seconds, self._model.config)
        decoder = Decoder(self._model, sampling, size, lambda note: None)
        jobs = (
            Job(
                key=str(idx),
                sound=Samples(self._read(recording, settings)),
                voice=settings.voice or "",
                text=settings.text or "",
                seed=settings.seed,
                until_quiet=tail == "auto",
            )
            for idx, recording in enumerate(every)
        )
        done: dict[str, Answered] = {}
        given = 0
        for result in decoder.run(jobs):
            if not isinstance(result, Answered):
                raise PplexError(result.error)
            done[result.key] = result
            while (first := done.pop(str(given), None)) is not None:
                given += 1
                yield self._answer(first.answer)

    def stream(
        self,
        chunks: Iterable[np.ndarray],
        *,
        voice: str | None = None,
        prompt: str | None = None,
        seed: int = DEFAULT_SEED,
        sampling: SamplingConfig = _SAMPLING,
    ) -> Iterator[Piece]:
        """Answer sound as it comes, each frame before the next is asked for.

        ``chunks`` are float32 (samples,) at ``sample_rate``, of any length.
        """
        settings = self._settings(voice, prompt, 0.0, seed, sampling)
        start, seed = self._opening(settings).start, settings.seed
        spoken = PieceText(self._model.tokenizer.piece)
        frames = self._frames(chunks)
        for frame, said in converse_live(
            self._model.engine, start, seed, frames, sampling
        ):
            text = spoken.add(int(said.text[0]))
            yield Piece(said.pcm[: frame.num_samples], text)

    def _settings(
        self,
        voice: str | None,
        prompt: str | None,
        tail: Tail,
        seed: int,
        sampling: SamplingConfig,
    ) -> Settings:
        voice = choose_voice(self._model, voice)
        text = choose_text(self._model, prompt)
        return _checked(voice, text, tail, seed, sampling)

    def _opening(self, settings: Settings) -> Opening:
        """The prompt, read; a named voice's last one is kept."""
        key = voice, _ = settings.voice or "", settings.text or ""
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        opening = open_role(self._model, *key, _warn)
        if voice in self._model.voices:
            self._last = key, opening
        return opening

    def _read(self, recording: Recording, settings: Settings) -> np.ndarray:
        """Samples float32 (samples,), with the tail if its length is given."""
        if isinstance(recording, np.ndarray):
            pcm = _samples(recording)
            if not len(pcm):
                raise PplexError("the recording holds no samples")
            seconds = 0.0 if settings.tail == "auto" else settings.tail
            tail = np.zeros(round(seconds * self.sample_rate), np.float32)
            return np.concatenate([pcm, tail])
        read = read_user(Path(recording), settings, self.sample_rate)
        for warning in read.warnings:
            _warn(warning)
        return read.pcm

    def _seconds(self, recording: Recording, tail: Tail) -> float | None:
        """How long it is with the longest tail, None where its file does not say."""
        if isinstance(recording, np.ndarray):
            return len(recording) / self.sample_rate + longest(tail)
        seconds = probe(Path(recording)).duration_s
        return None if seconds is None else seconds + longest(tail)

    def _frames(self, chunks: Iterable[np.ndarray]) -> Iterator[LiveFrame]:
        """The frames of a stream, the last filled with silence."""
        waiting, size = np.zeros(0, np.float32), self.frame_size
        for chunk in chunks:
            waiting = np.concatenate([waiting, _samples(chunk)])
            while len(waiting) >= size:
                yield LiveFrame(waiting[:size], size, None)
                waiting = waiting[size:]
        if len(waiting):
            last = np.pad(waiting, (0, size - len(waiting)))
            yield LiveFrame(last, len(waiting), None)

    def _answer(self, said: answer.Answer) -> Answer:
        words = spoken_words(self._model, said.text)
        return Answer(said.pcm, self.sample_rate, words, said.text, said.agent)


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    offline: bool = False,
    compute: Compute = "auto",
    kv_bits: int | None = None,
    many: bool = False,
) -> Model:
    """Load what ``--model`` names: a known name, ``auto``, a folder, file, owner/name.

    Without ``offline`` a model that is not on disk is downloaded. ``many`` says that
    ``batch`` will be asked for: on some devices another form of the weights is faster
    then; ``compute`` and ``kv_bits`` are those of the command line. PplexError for a
    model that is not there or cannot be read.
    """
    if compute not in get_args(Compute) or kv_bits not in (None, 8):
        raise PplexError(
            f"compute is {compute!r} and kv_bits {kv_bits!r}: one of "
            f"{', '.join(get_args(Compute))}, and 8 or None are expected"
        )
    name = os.fspath(model)
    if name == AUTO_MODEL:
        name = best_model(offline=offline, kv_bits=kv_bits).name
    local = resolve(name, offline=offline)
    return Model(session.load(local, compute=compute, kv_bits=kv_bits, many=many))


def _checked(
    voice: str, prompt: str, tail: Tail, seed: int, sampling: SamplingConfig
) -> Settings:
    """Settings; PplexError for a tail or a seed that is none."""
    check_count("seed", seed, 0)
    if seed > MAX_SEED:
        raise PplexError(f"seed is {seed}, where at most 2**63 - 1 is expected")
    if tail != "auto" and not (
        isinstance(tail, int | float) and 0.0 <= tail <= MOST_TAIL_S
    ):
        raise PplexError(
            f"tail is {tail!r}, where 0 to {MOST_TAIL_S:.0f} seconds or 'auto' are "
            "expected"
        )
    return Settings(voice, prompt, sampling, int(seed), tail=tail)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _samples(pcm: np.ndarray) -> np.ndarray:
    """Checked samples, float32 (samples,)."""
    pcm = np.asarray(pcm)
    if pcm.ndim != 1 or pcm.dtype.kind != "f":
        raise PplexError(
            f"samples are floating-point numbers in an array of one dimension, from -1 "
            f"to 1: {pcm.dtype} of shape {pcm.shape} was given"
        )
    if found := first_unsound(pcm):
        raise PplexError(f"sample {found[0]} is {found[1]}; leave it out")
    return pcm.astype(np.float32)
