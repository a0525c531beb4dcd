"""PCM in and out through pipes: WAV of unknown length, raw PCM, frame by frame.

What comes out is, sample for sample, what ``files`` makes of the same audio.
"""

from __future__ import annotations

import math
import os
import queue
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pplex.audio.files import (
    MAX_SOURCE_RATE,
    MIN_SOURCE_RATE,
    Channel,
    _pick,
    _resampler,
    resampled_length,
)
from pplex.audio.headers import _UNKNOWN_SIZES
from pplex.errors import PplexError

Encoding = Literal["u8", "s16le", "s24le", "s32le", "f32le", "f64le"]

MAX_CHANNELS = 64
MAX_HEADER_BYTES = 1 << 24  # what may come before the samples: tags, cover pictures

_READ_BYTES = 1 << 14
_MAX_WAITING = 1 << 10  # reads that wait to be answered: 16 MB at the most
_WIDTHS: dict[Encoding, int] = {
    "u8": 1,
    "s16le": 2,
    "s24le": 3,
    "s32le": 4,
    "f32le": 4,
    "f64le": 8,
}
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


@dataclass(frozen=True)
class StreamFormat:
    """How samples lie in a stream; ``num_bytes`` of them, None where nobody knows."""

    encoding: Encoding
    rate: int
    channels: int
    num_bytes: int | None = None

    @property
    def block_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return _WIDTHS[self.encoding] * self.channels


class Feed:
    """Reads a file descriptor in a thread of its own and notes when bytes came.

    At most 16 MB wait to be taken; beyond that whoever writes has to wait.
    """

    def __init__(self, fd: int) -> None:
        """Start to read."""
        self._fd = fd
        self._waiting: queue.SimpleQueue[tuple[bytes, float]] = queue.SimpleQueue()
        self._room = threading.Semaphore(_MAX_WAITING)
        self._error: OSError | None = None
        self._left = b""
        self._arrived = 0.0
        self._stopped = self._ended = False
        self.waited_s = 0.0
        threading.Thread(target=self._run, name="stdin", daemon=True).start()

    def _run(self) -> None:
        while not self._stopped:
            try:
                content = os.read(self._fd, _READ_BYTES)
            except OSError as e:
                self._error, content = e, b""
            self._waiting.put((content, time.perf_counter()))
            if not content:
                return
            self._room.acquire()

    def stop(self) -> None:
        """End the feed at once; safe to call from a signal handler."""
        self._stopped = True
        self._waiting.put((b"", time.perf_counter()))

    @property
    def was_stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopped

    def read(self) -> tuple[bytes, float]:
        """Bytes and when they came, as soon as there are any; empty at the end."""
        if self._stopped:
            return b"", time.perf_counter()
        if self._left:
            content, self._left = self._left, b""
            return content, self._arrived
        if self._ended:
            return b"", self._arrived
        start = time.perf_counter()
        content, self._arrived = self._waiting.get()
        self.waited_s += time.perf_counter() - start
        self._room.release()
        if self._error is not None and not content:
            reason = self._error.strerror or self._error
            raise PplexError(f"the input stream cannot be read: {reason}")
        self._ended = not content
        return content, self._arrived

    def take(self, count: int) -> bytes:
        """``count`` bytes, fewer only where the stream ends."""
        parts: list[bytes] = []
        while count and (content := self.read()[0]):
            parts.append(content[:count])
            self._left = content[count:]
            count -= len(parts[-1])
        return b"".join(parts)

    def skip(self, count: int) -> None:
        """Pass over ``count`` bytes."""
        while count and (content := self.take(min(count, _READ_BYTES))):
            count -= len(content)


def read_header(feed: Feed) -> StreamFormat:
    """The format of a WAV stream, which is left where its samples begin."""
    start = feed.take(12)
    if not start:
        raise PplexError("the input stream is empty; nothing was written to it")
    if start[:4] not in (b"RIFF", b"RF64", b"BW64") or start[8:] != b"WAVE":
        raise PplexError(
            "the input stream is not WAV; convert it on the way "
            "(ffmpeg -i INPUT -f wav -), or give --raw and --rate for bare samples"
        )
    found: StreamFormat | None = None
    long_size: int | None = None
    left = MAX_HEADER_BYTES
    while True:
        name, size = struct.unpack("<4sI", _whole(feed, 8))
        if name == b"data":
            if found is None:
                raise _bad_header("its samples come before their format")
            known = long_size if size == 0xFFFFFFFF else int(size)
            unknown = size in _UNKNOWN_SIZES and long_size is None
            return StreamFormat(
                found.encoding, found.rate, found.channels, None if unknown else known
            )
        left -= 8 + size
        if left < 0:
            raise _bad_header(f"{size} bytes of {name!r} before the samples")
        if name == b"fmt ":
            found = _parse_format(_whole(feed, min(size, 64)))
            feed.skip(max(0, size - 64) + (size & 1))
        elif name == b"ds64" and size >= 16:
            long_size = int(struct.unpack("<8xQ", _whole(feed, 16))[0])
            long_size = long_size if 0 < long_size < 1 << 62 else None
            feed.skip(size - 16 + (size & 1))
        else:
            feed.skip(size + (size & 1))


def _whole(feed: Feed, count: int) -> bytes:
    content = feed.take(count)
    if len(content) < count:
        raise _bad_header("it ends before its samples")
    return content


def _bad_header(why: str) -> PplexError:
    return PplexError(f"the input stream is not a WAV stream that can be read: {why}")


def _parse_format(content: bytes) -> StreamFormat:
    if len(content) < 16:
        raise _bad_header("its format has too few bytes")
    tag, channels, rate, _, align, bits = struct.unpack("<HHIIHH", content[:16])
    if tag == _EXTENSIBLE and len(content) >= 26:
        tag = struct.unpack("<H", content[24:26])[0]
    names: dict[tuple[int, int], Encoding] = {
        (_PCM, 8): "u8",
        (_PCM, 16): "s16le",
        (_PCM, 24): "s24le",
        (_PCM, 32): "s32le",
        (_FLOAT, 32): "f32le",
        (_FLOAT, 64): "f64le",
    }
    encoding = names.get((tag, bits))
    if encoding is None:
        raise _bad_header(
            f"samples of kind {tag} with {bits} bits; convert it on the way "
            "(ffmpeg -i INPUT -f wav -)"
        )
    found = StreamFormat(encoding, rate, channels)
    check_format(found)
    if align != found.block_bytes:
        raise _bad_header(f"{align} bytes a sample where {found.block_bytes} are")
    return found


def check_format(stream: StreamFormat) -> None:
    """Refuse rates and numbers of channels that cannot be read."""
    if not MIN_SOURCE_RATE <= stream.rate <= MAX_SOURCE_RATE:
        raise PplexError(
            f"the input stream's sample rate is {stream.rate} Hz; "
            f"{MIN_SOURCE_RATE} to {MAX_SOURCE_RATE} Hz can be read"
        )
    if not 1 <= stream.channels <= MAX_CHANNELS:
        raise _bad_header(f"{stream.channels} channels; 1 to {MAX_CHANNELS} can be")


def decode_pcm(content: bytes, encoding: Encoding) -> np.ndarray:
    """Float32 samples of bytes, scaled as libsndfile scales them."""
    if encoding == "f32le":
        return np.frombuffer(content, "<f4").astype(np.float32)
    if encoding == "f64le":
        with np.errstate(over="ignore"):
            return np.frombuffer(content, "<f8").astype(np.float32)
    pcm: np.ndarray
    if encoding == "u8":
        pcm = (np.frombuffer(content, np.uint8) - np.float32(128)) / np.float32(128)
        return pcm
    if encoding == "s24le":
        padded = np.zeros((len(content) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        # In the upper bytes of 32 bits: exact in float32, being a multiple of 2^8.
        pcm = padded.view("<i4")[:, 0].astype(np.float32) / np.float32(1 << 31)
        return pcm
    whole = np.frombuffer(content, "<i2" if encoding == "s16le" else "<i4")
    pcm = whole.astype(np.float32) / np.float32(1 << (8 * whole.itemsize - 1))
    return pcm


@dataclass(frozen=True)
class LiveFrame:
    """A frame of the user: PCM (frame_size,), of which ``num_samples`` count.

    ``arrived`` is when its last sample came, by ``time.perf_counter``; None for
    frames that nobody said: the tail.
    """

    pcm: np.ndarray
    num_samples: int
    arrived: float | None


class UserStream:
    """The user's side of a stream, cut into frames at the model's rate.

    ``fault`` says what ended a stream whose first samples were good, and
    ``missing_bytes`` how many its header had promised beyond its end.
    """

    def __init__(self, feed: Feed, stream: StreamFormat, channel: Channel) -> None:
        """Samples follow in ``feed``, laid out as ``stream`` says."""
        if channel != "mix" and channel > stream.channels:
            has = "1 channel" if stream.channels == 1 else f"{stream.channels} channels"
            raise PplexError(
                f"the input stream has {has}; channel {channel} cannot be picked"
            )
        self._feed = feed
        self._channel = channel
        self.format = stream
        self.source_frames = 0
        self.num_samples = 0
        self.missing_bytes = 0
        self.fault = ""
        self.first_s = self.last_s = 0.0

    @property
    def pace(self) -> float:
        """Seconds of audio a second in which it came; about 1 for a live source."""
        spent = self.last_s - self.first_s
        return self.source_frames / self.format.rate / spent if spent > 0 else math.inf

    def frames(
        self, sample_rate: int, frame_size: int, tail_s: float = 0.0
    ) -> Iterator[LiveFrame]:
        """Yield each frame as soon as its last sample is there, then the tail.

        A feed that is stopped ends on a whole frame, without the tail.
        """
        rate = self.format.rate
        resample = _resampler(rate, sample_rate)
        waiting = np.zeros(0, np.float32)
        arrivals: deque[tuple[int, float]] = deque()
        for pcm, arrived in self._mono():
            arrivals.append((self.source_frames, arrived))
            waiting = np.concatenate([waiting, resample(pcm, False)])
            while len(waiting) >= frame_size:
                if self._feed.was_stopped:
                    return
                frame, waiting = waiting[:frame_size], waiting[frame_size:]
                self.num_samples += frame_size
                # The source's samples that the frame is made of.
                needed = -(-self.num_samples * rate // sample_rate)
                while arrivals[0][0] < min(needed, self.source_frames):
                    arrivals.popleft()
                yield LiveFrame(frame, frame_size, arrivals[0][1])
        if self._feed.was_stopped:
            return
        length = resampled_length(self.source_frames, rate, sample_rate)
        if not length:
            raise PplexError(
                "the input stream holds no samples"
                if not self.source_frames
                else f"the input stream is too short: {self.source_frames} samples"
            )
        rest = resample(np.zeros(0, np.float32), True)
        waiting = np.concatenate([waiting, rest])[: length - self.num_samples]
        ended = time.perf_counter()
        end = length + round(tail_s * sample_rate)
        while self.num_samples < end and not self._feed.was_stopped:
            part, waiting = waiting[:frame_size], waiting[frame_size:]
            frame = np.zeros(frame_size, np.float32)
            frame[: len(part)] = part
            num_samples = min(end - self.num_samples, frame_size)
            self.num_samples += num_samples
            yield LiveFrame(frame, num_samples, ended if len(part) else None)

    def _mono(self) -> Iterator[tuple[np.ndarray, float]]:
        """The wanted channel, each sample finite, as it comes."""
        size = self.format.block_bytes
        left = self.format.num_bytes
        rest = b""
        while left is None or left > 0:
            try:
                content, arrived = self._feed.read()
            except PplexError as e:
                if not self.source_frames:
                    raise
                self.fault = str(e)
                return
            if not content:
                break
            content = content if left is None else content[:left]
            left = None if left is None else left - len(content)
            content = rest + content
            whole = len(content) // size * size
            rest = content[whole:]
            if not whole:
                continue
            block = decode_pcm(content[:whole], self.format.encoding)
            mono = _pick(block.reshape(-1, self.format.channels), self._channel)
            finite = np.isfinite(mono)
            if not finite.all():
                mono = mono[: int(np.argmin(finite))]
                where = (self.source_frames + len(mono)) / self.format.rate
                self.fault = (
                    "the input stream has a sample that is no finite number at "
                    f"{where:.3f} s"
                )
                if not self.source_frames + len(mono):
                    raise PplexError(self.fault)
            if not self.source_frames:
                self.first_s = arrived
            self.last_s = arrived
            self.source_frames += len(mono)
            yield mono, arrived
            if self.fault:
                return
        if not self._feed.was_stopped:
            self.missing_bytes = left or 0


def wav_header(num_samples: int | None, channels: int, sample_rate: int) -> bytes:
    """The header of 16-bit WAV; without a length, as ffmpeg writes it to a pipe."""
    size = None if num_samples is None else 2 * channels * num_samples
    if size is None or size + 36 > 0xFFFFFFFF:
        riff = data = 0xFFFFFFFF
    else:
        riff, data = size + 36, size
    layout = (1, channels, sample_rate, 2 * channels * sample_rate, 2 * channels, 16)
    start = struct.pack("<4sI4s4sI", b"RIFF", riff, b"WAVE", b"fmt ", 16)
    return start + struct.pack("<HHIIHH4sI", *layout, b"data", data)
