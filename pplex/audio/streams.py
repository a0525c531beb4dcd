"""PCM in and out through pipes: WAV of unknown length, raw PCM, frame by frame.

What comes out is, sample for sample, what ``files`` makes of the same audio.
"""

from __future__ import annotations

import io
import math
import os
import queue
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import soundfile

from pplex.audio.files import (
    Channel,
    check_channel,
    first_unsound,
    make_resampler,
    pick,
    resampled_length,
)
from pplex.audio.levels import Levels
from pplex.audio.source import left_over, unfinished
from pplex.audio.wav import (
    SUBTYPES,
    WAV_MAGIC,
    Encoding,
    bytes_left_over,
    read_wav_header,
)
from pplex.errors import PplexError

NAME = "the input stream"

_READ_BYTES = 1 << 14
_MAX_WAITING = 1 << 10  # reads that wait to be answered: 16 MB at the most
# A live source begins with what a player sends ahead and what has waited in a pipe: at
# most so much, and within so long. Buffers behind may hold so much more.
_MAX_AHEAD_S = 10.0
_SETTLING_S = 1.0
_MAX_GAIN_S = 2.5
# For what may follow the samples: until the next byte, and in all.
_PATIENCE_S = 1.0
_DRAIN_S = 10.0
# How other files than WAV begin.
_OTHER_MAGIC = (b"fLaC", b"OggS", b"ID3", b"FORM", b"caf", b".snd", b"riff", b"NIST")


@dataclass(frozen=True)
class StreamFormat:
    """How samples lie in a stream; ``num_bytes`` of them, None where nobody knows.

    ``is_unfinished`` where a header should know and does not, ``is_bare`` where there
    is none.
    """

    encoding: Encoding
    rate: int
    channels: int
    num_bytes: int | None = None
    is_unfinished: bool = False
    is_bare: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return SUBTYPES[self.encoding][1] * self.channels

    def decode(self, content: bytes) -> np.ndarray:
        """Float32 (frames, channels) of whole samples."""
        pcm: np.ndarray = soundfile.read(
            io.BytesIO(content),
            dtype="float32",
            always_2d=True,
            format="RAW",
            subtype=SUBTYPES[self.encoding][0],
            endian="LITTLE",
            samplerate=self.rate,
            channels=self.channels,
        )[0]
        return pcm


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
        self._deadline: float | None = None
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

    def hurry(self) -> None:
        """From now on what does not come soon counts as the end."""
        self._deadline = time.perf_counter() + _DRAIN_S

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
        try:
            timeout = None
            if self._deadline is not None:
                timeout = min(_PATIENCE_S, max(0.0, self._deadline - start))
            content, self._arrived = self._waiting.get(timeout=timeout)
        except queue.Empty:
            content = b""
        self.waited_s += time.perf_counter() - start
        self._room.release()
        if self._error is not None and not content:
            reason = self._error.strerror or self._error
            raise PplexError(f"{NAME} cannot be read: {reason}")
        self._ended = not content
        return content, self._arrived

    def take_waiting(self) -> bytes:
        """What has come already."""
        parts = [self._left]
        self._left = b""
        while not self._ended and not self._waiting.empty():
            parts.append(self.read()[0])
        return b"".join(parts)

    def take(self, count: int) -> bytes:
        """``count`` bytes, fewer only where the stream ends."""
        parts: list[bytes] = []
        while count and (content := self.read()[0]):
            parts.append(content[:count])
            self._left = content[count:]
            count -= len(parts[-1])
        return b"".join(parts)

    def unread(self, content: bytes) -> None:
        """Put back what was taken last."""
        self._left = content + self._left

    def skip(self, count: int) -> int:
        """Pass over bytes; how many there were."""
        left = count
        while left and (content := self.take(min(left, _READ_BYTES))):
            left -= len(content)
        return count - left


def open_stream(feed: Feed, raw: StreamFormat | None = None) -> StreamFormat:
    """The format of a stream, which is left where its samples begin.

    It is WAV, or what ``raw`` says.
    """
    if raw is not None:  # no byte of it may have come yet
        return replace(raw, is_bare=True)
    start = feed.take(12)
    if not start:
        raise PplexError(f"{NAME} is empty; nothing was written to it")
    feed.unread(start)
    if not _is_wav(start):
        raise PplexError(
            f"{NAME} is not WAV; convert it on the way "
            "(ffmpeg -i INPUT -f wav -), or give --raw and --rate for bare samples"
        )
    header = read_wav_header(feed, NAME)
    if header.encoding is None:
        raise PplexError(
            f"{NAME} has samples of kind {header.tag} with {header.bits} bits; convert "
            "it on the way (ffmpeg -i INPUT -f wav -)"
        )
    layout = header.encoding, header.rate, header.channels
    return StreamFormat(*layout, header.num_bytes, header.is_unfinished)


def _is_wav(start: bytes) -> bool:
    return start[:4] in WAV_MAGIC and start[8:12] == b"WAVE"


def _check_bare(start: bytes) -> None:
    """Refuse a file whose header would be heard as samples."""
    if _is_wav(start):
        raise PplexError(f"{NAME} is WAV, no bare samples; leave --raw and --rate out")
    if start.startswith(_OTHER_MAGIC):
        raise PplexError(
            f"{NAME} is a file of some format, no bare samples; convert it on the way "
            "(ffmpeg -i INPUT -f wav -) and leave --raw and --rate out"
        )


@dataclass(frozen=True)
class LiveFrame:
    """A frame of the user: PCM (frame_size,), of which ``num_samples`` count.

    ``arrived`` is when its last sample came, by ``time.perf_counter``; None for
    frames that nobody said, the tail, and where nobody asks.
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
        check_channel(NAME, stream.channels, channel)
        self._feed = feed
        self._channel = channel
        self.format = stream
        self.source_frames = 0
        self.num_samples = 0
        self.missing_bytes = 0
        self.skipped_s = 0.0
        self._rest = b""
        self._levels = Levels()
        self.fault = ""
        self._first_s = self._last_s = 0.0
        self._settled = math.inf, 0  # since when, and how many source frames before

    @property
    def pace(self) -> float | None:
        """Seconds of audio a second in which it came; about 1 for a live source.

        Counted from when frames are taken and what is sent ahead is there; None where
        nothing came since.
        """
        came_s, spent_s = self._since(*self._settled)
        return came_s / spent_s if spent_s > 0 else None

    @property
    def is_live(self) -> bool:
        """Whether it came about as fast as it is heard: then frames can be late."""
        came_s, spent_s = self._since(self._first_s, 0)
        settled_s, settling_s = self._since(*self._settled)
        is_near = came_s - spent_s < _MAX_AHEAD_S
        return is_near and settling_s > max(0.0, settled_s - _MAX_GAIN_S)

    def _since(self, time_s: float, source_frames: int) -> tuple[float, float]:
        """Seconds of audio that came since a time, after so many; and of the clock."""
        came = self.source_frames - source_frames
        return came / self.format.rate, self._last_s - time_s

    def pass_over(self) -> None:
        """Leave out what has come already, before any frame is asked for."""
        content, num_bytes = self._feed.take_waiting(), self.format.num_bytes
        if self.format.is_bare:
            _check_bare(content)
        if num_bytes is not None:
            content = content[:num_bytes]
            left = num_bytes - len(content)
            self.format = replace(self.format, num_bytes=left)
        size = self.format.block_bytes
        count = len(content) // size
        self._rest = content[count * size :]
        self.skipped_s = count / self.format.rate

    def warnings(self) -> list[str]:
        """What is odd about it, when it has ended.

        Whether anything follows the samples is waited for, but not long.
        """
        found = self._levels.warnings(NAME, self._channel)
        if self.format.is_unfinished:
            found.append(unfinished(NAME))
        count = len(self._rest)
        num_bytes = self.format.num_bytes
        if num_bytes is not None and not (self._feed.was_stopped or self.fault):
            self._feed.hurry()
            try:
                count += bytes_left_over(self._feed, num_bytes, NAME)
            except PplexError as e:
                self.fault = str(e)
        return found + [left_over(NAME, count)] * bool(count)

    def frames(
        self,
        sample_rate: int,
        frame_size: int,
        tail_s: float = 0.0,
        before: np.ndarray | None = None,
    ) -> Iterator[LiveFrame]:
        """Yield each frame as soon as its last sample is there, then the tail.

        The first begins with the samples ``before``, less than a frame. A feed that is
        stopped ends on a whole frame, without the tail.
        """
        rate = self.format.rate
        resample = make_resampler(rate, sample_rate)
        waiting = np.zeros(0, np.float32) if before is None else before
        early = len(waiting)
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
                needed = -(-(self.num_samples - early) * rate // sample_rate)
                while arrivals[0][0] < min(needed, self.source_frames):
                    arrivals.popleft()
                yield LiveFrame(frame, frame_size, arrivals[0][1])
        if self._feed.was_stopped:
            return
        length = resampled_length(self.source_frames, rate, sample_rate)
        if not length:
            if self.skipped_s and not self.source_frames:
                raise PplexError(
                    f"{NAME} ended before the model was ready: with --live all of it "
                    "is left out"
                )
            raise PplexError(
                f"{NAME} holds no samples"
                if not self.source_frames
                else f"{NAME} is too short: {self.source_frames} samples"
            )
        rest = resample(np.zeros(0, np.float32), True)
        length += early
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
        """The wanted channel, each sample sound, as it comes."""
        size = self.format.block_bytes
        left = self.format.num_bytes
        began = time.perf_counter()
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
            if self.format.is_bare and not self.source_frames:
                _check_bare(content)
            if left is not None:
                self._feed.unread(content[left:])
                content = content[:left]
                left -= len(content)
            content = self._rest + content
            whole = len(content) // size * size
            self._rest = content[whole:]
            if not whole:
                continue
            block = self.format.decode(content[:whole])
            mono = pick(block, self._channel)
            if found := first_unsound(mono):
                mono = mono[: found[0]]
                where = (self.source_frames + len(mono)) / self.format.rate
                self.fault = f"{NAME} has a sample at {where:.3f} s that is {found[1]}"
                if not self.source_frames + len(mono):
                    raise PplexError(self.fault)
            if len(mono):
                self._levels.add(block[: len(mono)], mono)
            if not self.source_frames:
                self._first_s = arrived
            self._last_s = arrived
            self.source_frames += len(mono)
            is_settled = arrived >= max(began, self._first_s + _SETTLING_S)
            if is_settled and math.isinf(self._settled[0]):
                self._settled = arrived, self.source_frames
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
