"""Recordings in and out: any file libsndfile reads, to mono at the model's rate.

NVIDIA's reference reads and writes with `sphn`; samples at 24 kHz and the rounding of
the 16-bit output are the same here. Its resampler is not followed: it delays the
signal and rounds the length up (see the project's notes on alignment).
"""

import os
import stat
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from pplex.audio.headers import missing_bytes
from pplex.errors import PplexError
from pplex.files import Place, atomic_write, put

Channel = int | Literal["mix"]

MIN_SOURCE_RATE = 1_000
MAX_SOURCE_RATE = 768_000

_BLOCK_SAMPLES = 1 << 19  # read at a time, all channels together: 2 MB
UNKNOWN_FRAMES = 1 << 62  # libsndfile's length when the header has none
_MAX_WAV_BYTES = (1 << 32) - 64


@dataclass(frozen=True)
class Recording:
    """One mono signal read from a file, and what the file was.

    `pcm` is float32 (samples,) at the model's rate; `source_frames` counts sample
    frames at `source_rate` before resampling; `format` and `subtype` are libsndfile's
    names, such as WAV and PCM_16.
    """

    pcm: np.ndarray
    source_rate: int
    source_channels: int
    source_frames: int
    channel: Channel
    format: str
    subtype: str


def read_pcm(path: Path, *, sample_rate: int, channel: Channel = 1) -> Recording:
    """Read one channel (from 1) or the average ("mix") of a recording.

    At `sample_rate` the samples come back unchanged. Any other rate is resampled with
    soxr's HQ setting, without delay, to `resampled_length` samples. Samples beyond
    [-1, 1] in float files pass through. Memory stays at a few copies of the result.
    """
    path = Path(path)
    if channel != "mix" and channel < 1:
        raise PplexError(f"there is no channel {channel}: channels count from 1")
    with open_recording(path, channel) as source:
        resample = _resampler(source.samplerate, sample_rate)
        parts = []
        frames = 0
        for block in _mono_blocks(path, source, channel):
            frames += len(block)
            parts.append(resample(block, False))
        parts.append(resample(np.zeros(0, np.float32), True))
        if not frames:
            raise PplexError(f"{path} holds no samples; give a recording with sound")
        pcm = _fit(parts, resampled_length(frames, source.samplerate, sample_rate))
        if not len(pcm):
            raise PplexError(
                f"{path} is too short: {frames} samples at {source.samplerate} Hz "
                f"make none at {sample_rate} Hz"
            )
        return Recording(
            pcm=pcm,
            source_rate=source.samplerate,
            source_channels=source.channels,
            source_frames=frames,
            channel=channel,
            format=source.format,
            subtype=source.subtype,
        )


def resampled_length(frames: int, source_rate: int, sample_rate: int) -> int:
    """Samples that `frames` at one rate become at another: rounded, halves up."""
    return (2 * frames * sample_rate + source_rate) // (2 * source_rate)


def frames_of(pcm: np.ndarray, frame_size: int) -> np.ndarray:
    """Cut PCM (samples,) into (frames, frame_size), the last one padded with zeros.

    A view of ``pcm`` where nothing is to be padded.
    """
    num_frames = -(-len(pcm) // frame_size)
    if len(pcm) == num_frames * frame_size:
        return pcm.reshape(num_frames, frame_size)
    padded = np.zeros(num_frames * frame_size, dtype=pcm.dtype)
    padded[: len(pcm)] = pcm
    return padded.reshape(num_frames, frame_size)


def to_pcm16(pcm: np.ndarray) -> np.ndarray:
    """Turn float PCM of any shape into int16: clamp, times 32767, toward zero."""
    scaled: np.ndarray = np.clip(pcm, -1.0, 1.0) * np.float32(32767)
    return scaled.astype(np.int16)


def write_wav(
    path: Path, tracks: np.ndarray, sample_rate: int, *, place: Place = put
) -> None:
    """Write float32 (samples,) or (samples, channels) as 16-bit WAV, atomically.

    ``place`` is that of ``atomic_write``.
    """
    path = Path(path)
    tracks = tracks if tracks.ndim == 2 else tracks[:, None]
    num_samples, num_channels = tracks.shape
    if tracks.size * 2 > _MAX_WAV_BYTES:
        raise PplexError(
            f"cannot write {path}: {num_samples} samples of {num_channels} channels "
            "do not fit in a WAV file (4 GB); split the recording"
        )
    step = max(1, _BLOCK_SAMPLES // num_channels)
    with (
        atomic_write(path, place=place) as temporary,
        temporary.open("wb") as file,
    ):
        with wave.open(file, "wb") as out:
            out.setnchannels(num_channels)
            out.setsampwidth(2)
            out.setframerate(sample_rate)
            out.setnframes(num_samples)
            for start in range(0, num_samples, step):
                block = to_pcm16(tracks[start : start + step])
                out.writeframesraw(block.astype("<i2").tobytes())


@contextmanager
def open_recording(path: Path, channel: Channel) -> Iterator[soundfile.SoundFile]:
    """Open a recording that has `channel`, or refuse it by what its header says."""
    _check_file(path)
    try:
        source = soundfile.SoundFile(str(path))
    except soundfile.LibsndfileError as e:
        raise PplexError(
            f"{path} is not an audio file that can be read ({e.error_string}); "
            "give a WAV, FLAC, OGG or other recording"
        ) from e
    with source:
        _check_header(path, source, channel)
        yield source


def _check_file(path: Path) -> None:
    """Refuse, with its own sentence each, what libsndfile would only call bad."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):
                file.read(1)  # a disk that fails shows here
    except FileNotFoundError as e:
        raise PplexError(f"{path} does not exist; check the name") from e
    except IsADirectoryError as e:
        raise PplexError(f"{path} is a folder; give one recording in it") from e
    except PermissionError as e:
        raise PplexError(
            f"{path} cannot be read: no permission; change its rights or copy it"
        ) from e
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e
    if not stat.S_ISREG(status.st_mode):
        raise PplexError(f"{path} is a device or pipe; give an ordinary file")
    if status.st_size == 0:
        raise PplexError(f"{path} is empty (0 bytes); give a recording with sound")
    if path.suffix.lower() == ".raw":
        raise PplexError(
            f"{path} is raw PCM, whose rate and format are unknown; convert it to WAV"
        )


def _open_without_waiting(name: str, flags: int) -> int:
    """Open a file; a named pipe that nobody writes to does not block the program."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _check_header(path: Path, source: soundfile.SoundFile, channel: Channel) -> None:
    """Refuse rates out of range, a channel that is not there, and a file cut short."""
    rate, channels = source.samplerate, source.channels
    if not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
        raise PplexError(
            f"{path} says its sample rate is {rate} Hz; "
            f"{MIN_SOURCE_RATE} to {MAX_SOURCE_RATE} Hz can be read"
        )
    if channel != "mix" and channel > channels:
        has = "1 channel" if channels == 1 else f"{channels} channels"
        raise PplexError(f"{path} has {has}; channel {channel} cannot be picked")
    missing = missing_bytes(path)
    if missing:
        raise PplexError(
            f"{path} is truncated: {missing} bytes that its header promises are "
            "missing; copy or record it again"
        )


def _mono_blocks(
    path: Path, source: soundfile.SoundFile, channel: Channel
) -> Iterator[np.ndarray]:
    """Yield float32 (frames,) blocks of the wanted channel, each sample finite."""
    promised = source.frames
    rate = source.samplerate
    size = max(1, _BLOCK_SAMPLES // source.channels)
    done = 0
    while True:
        try:
            block = source.read(size, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as e:
            raise PplexError(
                f"{path} is damaged or truncated: it cannot be decoded beyond "
                f"{done / rate:.2f} s ({e.error_string})"
            ) from e
        if not len(block):
            break
        mono = _pick(block, channel)
        finite = np.isfinite(mono)
        if not finite.all():
            first = int(np.argmin(finite))
            kind = "NaN" if np.isnan(mono[first]) else "infinite"
            raise PplexError(
                f"{path} has a sample that is {kind} at {(done + first) / rate:.3f} s; "
                "export the recording again"
            )
        done += len(block)
        yield mono
    if done < promised < UNKNOWN_FRAMES:
        raise PplexError(
            f"{path} is truncated: it promises {promised} samples a channel and holds "
            f"{done}; copy or record it again"
        )


def _pick(block: np.ndarray, channel: Channel) -> np.ndarray:
    if channel != "mix":
        return np.ascontiguousarray(block[:, channel - 1])
    if block.shape[1] == 1:
        return block[:, 0]
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = block.mean(axis=1, dtype=np.float64)
        return mean.astype(np.float32)


def _resampler(
    source_rate: int, sample_rate: int
) -> Callable[[np.ndarray, bool], np.ndarray]:
    """Make a function from a block, and whether it is the last, to resampled PCM.

    HQ, which is exact to 20 bits: VHQ holds back up to twice as much of a stream.
    """
    if source_rate == sample_rate:
        return lambda block, last: block
    stream = soxr.ResampleStream(source_rate, sample_rate, 1, quality="HQ")
    resample: Callable[[np.ndarray, bool], np.ndarray] = stream.resample_chunk
    return resample


def _fit(parts: list[np.ndarray], length: int) -> np.ndarray:
    """Join parts to exactly `length` samples; soxr may round a half the other way."""
    pcm = np.concatenate(parts)
    return pcm[:length] if len(pcm) >= length else np.pad(pcm, (0, length - len(pcm)))
