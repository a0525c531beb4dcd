"""What is written of an answer: sound, transcript and tokens, each whole or not at all.

Sound may also go out while it is made: to WAV files or to stdout, frame by frame.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pplex.audio.files import encoder, to_pcm16
from pplex.audio.streams import wav_header
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.conversation.answer import Answer
from pplex.conversation.script import Line, lay_out, scripted
from pplex.errors import PplexError
from pplex.files import (
    Place,
    atomic_write,
    is_descriptor,
    is_pipe,
    open_pipe,
    put,
    write_text,
)
from pplex.model.config import ModelConfig
from pplex.respond.request import SOUND_FORMATS, Layout, Request, Settings
from pplex.respond.transcript import Word, text_of, words, write_transcript

# Takes both sides of a stretch: user and agent (samples,).
Write = Callable[[np.ndarray, np.ndarray], None]

_BLOCK_SAMPLES = 1 << 18
_MAX_BYTES = (1 << 32) - 64  # of a WAV file's samples


class Described(Protocol):
    """What the outputs need to know of a model, loaded or not."""

    @property
    def local(self) -> LocalModel:
        """Where it is."""

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """Its words."""


def write_outputs(
    model: Described,
    request: Request,
    reply: Answer,
    duration_s: float,
    voice: str,
    *,
    place: Place = put,
) -> None:
    """Write transcript and tokens of the whole answer; ``place`` as ``atomic_write``.

    Its sound was written as it was made.
    """
    outputs = request.outputs
    write_words(model, request, reply.text, duration_s, voice, place)
    if outputs.tokens is not None:
        arrays = {"user": reply.user, "agent": reply.agent, "text": reply.text}
        write_tokens(outputs.tokens, arrays, place)


def spoken_words(
    model: Described, text_tokens: np.ndarray, lines: Sequence[Line] = ()
) -> list[Word]:
    """The words of ``text_tokens`` (frames,), for which ``lines`` were given."""
    script = lay_out(lines, model.tokenizer, model.config)
    piece, frame_rate = model.tokenizer.piece, model.config.frame_rate
    return words(text_tokens, piece, frame_rate, scripted(script, text_tokens))


def write_words(
    model: Described,
    request: Request,
    text_tokens: np.ndarray,
    duration_s: float,
    voice: str,
    place: Place = put,
) -> None:
    """Write the transcripts of ``text_tokens`` (frames,) that are wanted."""
    outputs, settings = request.outputs, request.settings
    if not outputs.transcripts:
        return
    spoken = spoken_words(model, text_tokens, settings.lines)
    metadata = metadata_of(model, replace(settings, voice=voice))
    for path in outputs.transcripts:
        if is_pipe(path):
            write_text(path, text_of(spoken) + "\n")
        else:
            write_transcript(path, spoken, duration_s, metadata, outputs.cue, place)


def metadata_of(model: Described, settings: Settings) -> dict[str, object]:
    """What a transcript says of how it came about."""
    metadata: dict[str, object] = {
        "model": model.local.name,
        "revision": model.local.revision,
        "voice": settings.voice,
        "prompt": settings.text,
        "seed": settings.seed,
    }
    return metadata | ({"script": settings.said()} if settings.lines else {})


def write_tokens(
    path: Path, arrays: Mapping[str, np.ndarray], place: Place = put
) -> None:
    """Write token arrays as .npz, by their names."""
    with atomic_write(path, place=place) as temporary, temporary.open("wb") as file:
        kept: dict[str, Any] = {k: v.astype(np.int32) for k, v in arrays.items()}
        np.savez_compressed(file, **kept)


@contextmanager
def open_sink(
    layout: Layout,
    files: dict[str, Path],
    sample_rate: int,
    num_samples: int | None = None,
    *,
    place: Place = put,
) -> Iterator[Write]:
    """Yield what writes both sides, 16 bits a sample, to the audio of ``files``.

    Files appear whole when the body is done, or not at all. A descriptor gets each
    stretch at once; ``num_samples`` is what its header names, None for an unknown one.
    ``place`` is that of ``atomic_write``.
    """
    channels = 2 if layout == "stereo" else 1
    with ExitStack() as stack:
        audio = files.get("audio")
        if audio is not None and is_descriptor(audio):
            write = stack.enter_context(open_pipe(audio))
            write(wav_header(num_samples, channels, sample_rate))
            yield _in_blocks(lambda user, agent: write(_pcm(layout, user, agent)))
            return
        names = ("user", "agent") if layout == "separate" else ("audio",)
        tracks = {
            name: stack.enter_context(
                _sound_file(files[name], channels, sample_rate, place)
            )
            for name in names
        }

        def write_files(user: np.ndarray, agent: np.ndarray) -> None:
            if layout == "separate":
                tracks["user"](_pcm("agent", user, user))
                tracks["agent"](_pcm("agent", user, agent))
            else:
                tracks["audio"](_pcm(layout, user, agent))

        yield _in_blocks(write_files)


def _in_blocks(write: Write) -> Write:
    """``write``, but little at a time: copies of long stretches take much memory."""

    def write_blocks(user: np.ndarray, agent: np.ndarray) -> None:
        for start in range(0, len(agent), _BLOCK_SAMPLES):
            end = start + _BLOCK_SAMPLES
            write(user[start:end], agent[start:end])

    return write_blocks


def _pcm(layout: Layout, user: np.ndarray, agent: np.ndarray) -> bytes:
    sides = np.stack([user, agent], axis=1) if layout == "stereo" else agent
    return to_pcm16(sides).astype("<i2").tobytes()


@contextmanager
def _wav_file(
    path: Path, channels: int, sample_rate: int, place: Place
) -> Iterator[Callable[[bytes], None]]:
    """Yield what appends samples to a WAV file, whose header is written last.

    It is open only while it is written to: a batch has one for every row.
    """
    with atomic_write(path, place=place) as temporary:
        temporary.write_bytes(wav_header(0, channels, sample_rate))
        yield lambda content: _append(path, temporary, content)
        with temporary.open("r+b") as file:
            num_samples = (file.seek(0, os.SEEK_END) - 44) // (2 * channels)
            file.seek(0)
            file.write(wav_header(num_samples, channels, sample_rate))


@contextmanager
def _sound_file(
    path: Path, channels: int, sample_rate: int, place: Place
) -> Iterator[Callable[[bytes], None]]:
    """Yield what appends samples to a file of the format that its suffix tells."""
    if path.suffix.lower() == ".wav":
        with _wav_file(path, channels, sample_rate, place) as write:
            yield write
        return
    kind, subtype = SOUND_FORMATS[path.suffix.lower()]
    with (
        atomic_write(path, place=place) as temporary,
        encoder(temporary, kind, subtype, channels, sample_rate) as encode,
    ):
        yield lambda content: encode(np.frombuffer(content, "<i2"))


def _append(path: Path, temporary: Path, content: bytes) -> None:
    with temporary.open("ab") as file:
        if file.tell() + len(content) > _MAX_BYTES:
            raise PplexError(
                f"cannot write {path}: a WAV file holds no more than 4 GB; split the "
                "recording"
            )
        file.write(content)


class SoundWriter:
    """Writes the sound of an answer as it is made; what fails shows at the end.

    ``num_samples`` counts those that were written.
    """

    def __init__(self, open_files: Callable[[], AbstractContextManager[Write]]) -> None:
        """``open_files`` is called when the first samples are there."""
        self._open_files = open_files
        self._files: ExitStack | None = None
        self._write: Write | None = None
        self._error: PplexError | None = None
        self.num_samples = 0

    def __call__(self, start: int, user: np.ndarray, agent: np.ndarray) -> None:
        """Write both sides (samples,) of a stretch; from 0 all begins anew."""
        if not start:
            self.abandon()
            self._error, self.num_samples = None, 0
        if self._error is not None:
            return
        try:
            if self._write is None:
                self._files = ExitStack()
                self._write = self._files.enter_context(self._open_files())
            self._write(user, agent)
        except (OSError, PplexError) as e:
            self._give_up(e)
        self.num_samples += len(agent)

    def finish(self) -> None:
        """Let the files be there."""
        if self._error is not None:
            raise self._error
        if self._files is not None:
            self._files.close()
            self._files = self._write = None

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._files is not None:
            self._give_up(PplexError("not written to its end"))

    def _give_up(self, error: Exception) -> None:
        files, self._files, self._write = self._files, None, None
        assert files is not None
        try:
            if not files.__exit__(type(error), error, error.__traceback__):
                raise error
        except PplexError as e:
            self._error = e
