"""Where sound goes while it is made: WAV files or stdout, frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np

from pplex.audio.files import to_pcm16
from pplex.audio.streams import wav_header
from pplex.errors import PplexError
from pplex.files import PIPE, atomic_write, write_stdout

Layout = Literal["stereo", "agent", "separate"]
# Takes both sides of a stretch: user and agent (samples,).
Write = Callable[[np.ndarray, np.ndarray], None]

_MAX_BYTES = (1 << 32) - 64  # of a WAV file's samples


@contextmanager
def open_sink(
    layout: Layout,
    files: dict[str, Path],
    sample_rate: int,
    num_samples: int | None = None,
    *,
    replace: bool = True,
) -> Iterator[Write]:
    """Yield what writes both sides, 16 bits a sample, to the audio of ``files``.

    Files appear whole when the body is done, or not at all. Stdout gets each stretch
    at once; ``num_samples`` is the length its header names, None for an unknown one.
    ``replace`` is that of ``atomic_write``.
    """
    channels = 2 if layout == "stereo" else 1
    with ExitStack() as stack:
        if files.get("audio") == PIPE:
            write_stdout(wav_header(num_samples, channels, sample_rate))
            write = write_stdout
            yield lambda user, agent: write(_pcm(layout, user, agent))
            return
        names = ("user", "agent") if layout == "separate" else ("audio",)
        tracks = {
            name: stack.enter_context(
                _wav_file(files[name], channels, sample_rate, replace)
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
    path: Path, channels: int, sample_rate: int, replace: bool
) -> Iterator[Callable[[bytes], None]]:
    """Yield what appends samples to a WAV file, whose header is written last."""
    with (
        atomic_write(path, replace=replace) as temporary,
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
