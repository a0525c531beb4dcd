"""What is written of an answer: sound, transcript and tokens, each whole or not at all.

Sound may also go out while it is made: to WAV files or to stdout, frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from pplex.audio.files import to_pcm16, write_wav
from pplex.audio.streams import wav_header
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.conversation.answer import Answer
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
from pplex.respond.request import Layout, Request
from pplex.respond.transcript import Word, words, write_transcript

# Takes both sides of a stretch: user and agent (samples,).
Write = Callable[[np.ndarray, np.ndarray], None]

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
    user_pcm: np.ndarray,
    reply: Answer,
    voice: str,
    *,
    place: Place = put,
) -> None:
    """Write everything but the stats, sound first; ``place`` as ``atomic_write``.

    ``user_pcm`` is as long as the ``pcm`` of ``reply``, the whole answer.
    """
    outputs, rate = request.outputs, model.config.sample_rate
    if not is_descriptor(outputs.audio):  # else it was written as it was made
        tracks = {"user": user_pcm, "agent": reply.pcm, "audio": reply.pcm}
        if outputs.layout == "stereo":
            tracks["audio"] = np.stack([user_pcm, reply.pcm], axis=1)
        for what, path in outputs.files().items():
            if what in tracks:
                write_wav(path, tracks[what], rate, place=place)
    write_words(model, request, reply.text, len(user_pcm) / rate, voice, place)
    if outputs.tokens is not None:
        write_tokens(outputs.tokens, reply.user, reply.agent, reply.text, place)


def spoken_words(model: Described, text_tokens: np.ndarray) -> list[Word]:
    """The words of ``text_tokens`` (frames,)."""
    return words(text_tokens, model.tokenizer.piece, model.config.frame_rate)


def write_words(
    model: Described,
    request: Request,
    text_tokens: np.ndarray,
    duration_s: float,
    voice: str,
    place: Place = put,
) -> None:
    """Write the transcript of ``text_tokens`` (frames,), if one is wanted."""
    path, settings = request.outputs.transcript, request.settings
    if path is None:
        return
    spoken = spoken_words(model, text_tokens)
    if is_pipe(path):
        write_text(path, " ".join(word.text for word in spoken) + "\n")
        return
    metadata = {
        "model": model.local.name,
        "revision": model.local.revision,
        "voice": voice,
        "prompt": settings.text,
        "seed": settings.seed,
    }
    write_transcript(path, spoken, duration_s, metadata, place)


def write_tokens(
    path: Path,
    user: np.ndarray,
    agent: np.ndarray,
    text: np.ndarray,
    place: Place = put,
) -> None:
    """Write token arrays as .npz."""
    with (
        atomic_write(path, place=place) as temporary,
        temporary.open("wb") as file,
    ):
        np.savez_compressed(
            file,
            user=user.astype(np.int32),
            agent=agent.astype(np.int32),
            text=text.astype(np.int32),
        )


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
            yield lambda user, agent: write(_pcm(layout, user, agent))
            return
        names = ("user", "agent") if layout == "separate" else ("audio",)
        tracks = {
            name: stack.enter_context(
                _wav_file(files[name], channels, sample_rate, place)
            )
            for name in names
        }

        def write_files(user: np.ndarray, agent: np.ndarray) -> None:
            if layout == "separate":
                tracks["user"](_pcm("agent", user, user))
                tracks["agent"](_pcm("agent", user, agent))
            else:
                tracks["audio"](_pcm(layout, user, agent))

        yield write_files


def _pcm(layout: Layout, user: np.ndarray, agent: np.ndarray) -> bytes:
    sides = np.stack([user, agent], axis=1) if layout == "stereo" else agent
    return to_pcm16(sides).astype("<i2").tobytes()


@contextmanager
def _wav_file(
    path: Path, channels: int, sample_rate: int, place: Place
) -> Iterator[Callable[[bytes], None]]:
    """Yield what appends samples to a WAV file, whose header is written last."""
    with (
        atomic_write(path, place=place) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(wav_header(0, channels, sample_rate))
        yield lambda content: _append(path, file, content)
        num_samples = (file.tell() - 44) // (2 * channels)
        file.seek(0)
        file.write(wav_header(num_samples, channels, sample_rate))


def _append(path: Path, file: IO[bytes], content: bytes) -> None:
    if file.tell() + len(content) > _MAX_BYTES:
        raise PplexError(f"cannot write {path}: a WAV file holds no more than 4 GB")
    file.write(content)
