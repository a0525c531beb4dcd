"""Recordings in and out: any file libsndfile reads, to mono at the model's rate.

NVIDIA's reference reads and writes with `sphn`; samples at 24 kHz and the rounding of
the 16-bit output are the same here. Its resampler is not followed: it delays the
signal and rounds the length up (see the project's notes on alignment).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import soxr

from pplex.audio.levels import Channel as Channel
from pplex.audio.levels import Levels
from pplex.audio.source import SoundSource, open_source
from pplex.errors import PplexError
from pplex.units import counted

_ENCODED_SAMPLES = 1 << 13
# Above floats on the scale of 32-bit integers; what resampling adds up stays finite.
_MAX_SAMPLE = 1e12


class Sound(Protocol):
    """A mono signal that is in memory, or is read as it is needed."""

    @property
    def num_samples(self) -> int:
        """How many samples it has."""

    @property
    def pcm(self) -> np.ndarray:
        """All of them, float32 (samples,)."""

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield them, float32 (samples,) at a time."""


@dataclass(frozen=True)
class Samples:
    """A signal in memory: ``pcm``, float32 (samples,)."""

    pcm: np.ndarray

    @property
    def num_samples(self) -> int:
        """How many samples it has."""
        return len(self.pcm)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield them, float32 (samples,) at a time."""
        yield self.pcm


@dataclass(frozen=True)
class Part:
    """A stretch of a recording, in seconds; without ``duration_s`` to its end."""

    start_s: float = 0.0
    duration_s: float | None = None

    def of(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        """Yield what is in it of blocks of PCM, which are asked for to their end."""
        at, start = 0, round(self.start_s * rate)
        end = None if self.duration_s is None else start + round(self.duration_s * rate)
        for block in blocks:
            some = block[max(0, start - at) : None if end is None else max(0, end - at)]
            at += len(block)
            if len(some):
                yield some


WHOLE = Part()


@dataclass(frozen=True)
class Recording:
    """One mono signal of a file that was read to its end, and what the file was.

    ``num_samples`` are at the model's rate, ``tail`` samples of silence at the end
    among them; they are of ``part`` alone. ``source_frames`` counts sample frames at
    ``source_rate`` before resampling, of the whole file; ``format`` and ``subtype``
    are libsndfile's names, such as WAV and PCM_16. ``warnings`` say in a sentence each
    what is odd about it.
    """

    path: Path
    num_samples: int
    sample_rate: int
    source_rate: int
    source_channels: int
    source_frames: int
    channel: Channel
    format: str
    subtype: str
    warnings: tuple[str, ...]
    tail: int = 0
    part: Part = WHOLE
    _kept: np.ndarray | None = field(default=None, repr=False)

    @property
    def pcm(self) -> np.ndarray:
        """All samples, float32 (samples,)."""
        if self._kept is not None:
            return self._kept
        return np.concatenate(list(self.blocks()))

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all samples, float32 (samples,) at a time.

        What was too long to be kept is read again from the file.
        """
        if self._kept is not None:
            yield self._kept
            return
        done = 0
        with open_source(self.path) as source:
            read = _samples(source, self.path, self.sample_rate, self.channel)
            for block in self.part.of(read, self.sample_rate):
                done += len(block)
                yield block
        if done != self.num_samples - self.tail:
            raise PplexError(f"{self.path} has changed while it was read; try again")
        yield np.zeros(self.tail, np.float32)


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    rate: int
    channels: int
    duration_s: float


def read_pcm(
    path: Path,
    *,
    sample_rate: int,
    channel: Channel = 1,
    tail: int = 0,
    most_kept: int | None = None,
    part: Part = WHOLE,
) -> Recording:
    """Read one channel (from 1) or the average ("mix") of a recording, to its end.

    At `sample_rate` the samples come back unchanged. Any other rate is resampled with
    soxr's HQ setting, without delay, to `resampled_length` samples. Samples beyond
    [-1, 1] in float files pass through, but not what `first_unsound` finds. Of these
    `part` is taken, and `tail` samples of silence follow. If there are more than
    `most_kept` samples none stay in memory.
    """
    path = Path(path)
    if channel != "mix" and channel < 1:
        raise PplexError(f"there is no channel {channel}: channels count from 1")
    levels = Levels()
    parts: list[np.ndarray] = []
    num_samples = 0
    with open_source(path) as source:
        read = _samples(source, path, sample_rate, channel, levels)
        for block in part.of(read, sample_rate):
            num_samples += len(block)
            parts.append(block)
            if most_kept is not None and num_samples > most_kept:
                parts.clear()
    if not num_samples:
        seconds = source.num_frames / source.rate
        raise PplexError(
            f"{path} is {seconds:.2f} s long: nothing of it lies in the part that "
            f"begins at {part.start_s:g} s; choose another --start or --duration"
        )
    is_kept = most_kept is None or num_samples <= most_kept
    parts.append(np.zeros(tail, np.float32))
    return Recording(
        path=path,
        num_samples=num_samples + tail,
        sample_rate=sample_rate,
        source_rate=source.rate,
        source_channels=source.channels,
        source_frames=source.num_frames,
        channel=channel,
        format=source.format,
        subtype=source.subtype,
        warnings=(*source.warnings, *levels.warnings(str(path), channel)),
        tail=tail,
        part=part,
        _kept=np.concatenate(parts) if is_kept else None,
    )


def probe(path: Path, channel: Channel = 1) -> Header:
    """Read a recording's header, refusing what can be seen to be wrong with it."""
    with open_source(Path(path)) as source:
        check_channel(str(path), source.channels, channel)
        return Header(source.rate, source.channels, source.num_frames / source.rate)


def chunked(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cut PCM that comes in blocks into (size,), the last one shorter."""
    waiting = np.zeros(0, np.float32)
    for block in blocks:
        waiting = np.concatenate([waiting, block]) if len(waiting) else block
        whole = len(waiting) - len(waiting) % size
        yield from (waiting[i : i + size] for i in range(0, whole, size))
        waiting = waiting[whole:]
    if len(waiting):
        yield waiting


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


@contextmanager
def encoder(
    path: Path, kind: str, subtype: str, channels: int, sample_rate: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield what appends int16 samples, channels in turn, to a file at ``path``.

    ``kind`` and ``subtype`` are libsndfile's names of its format.
    """
    with soundfile.SoundFile(
        path, "w", sample_rate, channels, subtype, format=kind
    ) as file:

        def encode(samples: np.ndarray) -> None:
            pcm = samples.reshape(-1, channels)
            if kind != "FLAC":  # libsndfile's MP3 makes noise of stereo integers
                pcm = pcm.astype(np.float32) / 32768
            # libvorbis takes its stack from the length of what it is given.
            for start in range(0, len(pcm), _ENCODED_SAMPLES):
                file.write(pcm[start : start + _ENCODED_SAMPLES])

        yield encode


def check_channel(name: str, channels: int, channel: Channel) -> None:
    """Refuse a channel that ``name`` does not have."""
    if channel != "mix" and channel > channels:
        raise PplexError(
            f"{name} has {counted(channels, 'channel')}; channel {channel} cannot be "
            "picked"
        )


def _samples(
    source: SoundSource,
    path: Path,
    sample_rate: int,
    channel: Channel,
    levels: Levels | None = None,
) -> Iterator[np.ndarray]:
    """Yield float32 (samples,) blocks of the wanted channel at ``sample_rate``."""
    check_channel(str(path), source.channels, channel)
    resample = make_resampler(source.rate, sample_rate)
    frames = done = 0
    for block in source.blocks():
        mono = pick(block, channel)
        if found := first_unsound(mono):
            first, what = found
            raise PplexError(
                f"{path} has a sample at {(frames + first) / source.rate:.3f} s that "
                f"is {what}; export the recording again"
            )
        if levels is not None:
            levels.add(block, mono)
        frames += len(block)
        pcm = resample(mono, False)
        done += len(pcm)
        yield pcm
    if not frames:
        raise PplexError(f"{path} holds no samples; give a recording with sound")
    length = resampled_length(frames, source.rate, sample_rate)
    if not length:
        raise PplexError(
            f"{path} is too short: {frames} samples at {source.rate} Hz make none at "
            f"{sample_rate} Hz"
        )
    # soxr may round a half the other way.
    rest = resample(np.zeros(0, np.float32), True)[: length - done]
    yield np.pad(rest, (0, length - done - len(rest)))


def first_unsound(mono: np.ndarray) -> tuple[int, str] | None:
    """The first sample that is no sound, and what it is: NaN, infinite, 1e+30."""
    with np.errstate(invalid="ignore"):
        is_sound = np.abs(mono) <= _MAX_SAMPLE
    if is_sound.all():
        return None
    first = int(np.argmin(is_sound))
    value = float(mono[first])
    if not np.isfinite(value):
        return first, "NaN" if np.isnan(value) else "infinite"
    return first, f"{value:.0e}, where full scale is 1"


def pick(block: np.ndarray, channel: Channel) -> np.ndarray:
    if channel != "mix":
        return np.ascontiguousarray(block[:, channel - 1])
    if block.shape[1] == 1:
        return block[:, 0]
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = block.mean(axis=1, dtype=np.float64)
        return mean.astype(np.float32)


def make_resampler(
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
