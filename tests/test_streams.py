"""What comes through a pipe is what the same file gives, sample for sample."""

from __future__ import annotations

import errno
import io
import os
import struct
import tempfile
import threading
import time
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pplex.audio.files import frames_of, read_pcm, resampled_length
from pplex.audio.streams import Feed, StreamFormat, UserStream, open_stream, wav_header
from pplex.errors import PplexError

SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")


def feed_of(content: bytes, block: int = 1 << 16) -> Feed:
    """A feed that gets ``content`` through a pipe, ``block`` bytes at a time."""
    reader, writer = os.pipe()

    def push() -> None:
        with open(writer, "wb", buffering=0) as file:
            for start in range(0, len(content), block):
                file.write(content[start : start + block])

    threading.Thread(target=push, daemon=True).start()
    return Feed(reader)


def wav(
    pcm: np.ndarray, rate: int, subtype: str = "PCM_16", kind: str = "WAV"
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, pcm, rate, subtype=subtype, format=kind)
    return file.getvalue()


def stream(content: bytes, block: int = 1 << 16, channel=1, tail_s=0.0) -> np.ndarray:
    """All samples that count of a WAV stream."""
    feed = feed_of(content, block)
    user = UserStream(feed, open_stream(feed), channel)
    frames = list(user.frames(24000, 1920, tail_s))
    assert all(not frame.pcm[frame.num_samples :].any() for frame in frames)
    return np.concatenate([frame.pcm[: frame.num_samples] for frame in frames])


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000, 7919]),
    length=st.integers(1, 9000),
    channels=st.integers(1, 3),
    subtype=st.sampled_from(SUBTYPES),
    block=st.integers(1, 5000),
    kind=st.sampled_from(["WAV", "WAVEX", "RF64"]),
)
def test_a_stream_gives_the_samples_of_the_file(
    rate, length, channels, subtype, block, kind
):
    rng = np.random.default_rng(length)
    pcm = rng.uniform(-1, 1, (length, channels)).astype(np.float32)
    content = wav(pcm, rate, subtype, kind)
    if not resampled_length(length, rate, 24000):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.wav"
        path.write_bytes(content)
        expected = read_pcm(path, sample_rate=24000).pcm
    found = stream(content, max(block, len(content) // 200))
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_a_length_that_is_unknown_ends_with_the_stream(size):
    pcm = np.arange(5000, dtype=np.int16)
    header = bytearray(wav_header(None, 1, 24000))
    header[40:44] = struct.pack("<I", size)
    found = stream(bytes(header) + pcm.tobytes())
    assert np.array_equal(found, pcm / np.float32(32768))


def test_what_follows_the_samples_is_no_sound():
    content = (
        wav_header(3000, 1, 24000) + bytes(6000) + b"LIST\x04\0\0\0\xff\xff\xff\xff"
    )
    found = stream(content)
    assert len(found) == 3000 and not found.any()


def test_the_tail_follows_the_users_last_sample_without_a_gap():
    pcm = np.full(1000, 9000, np.int16)
    content = wav_header(None, 1, 24000) + pcm.tobytes()
    found = stream(content, tail_s=0.1)
    assert len(found) == 1000 + 2400
    assert found[:1000].all() and not found[1000:].any()


def test_the_header_is_that_of_the_standard_library():
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(2)
        out.setframerate(24000)
        out.writeframes(bytes(400))
    assert wav_header(100, 2, 24000) == file.getvalue()[:44]


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_samples_are_scaled_as_libsndfile_scales_them(subtype):
    pcm = np.random.default_rng(0).uniform(-1, 1, 1000)
    content = wav(pcm, 24000, subtype)
    expected, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    feed = feed_of(content)
    layout = open_stream(feed)
    found = layout.decode(feed.take(1000 * layout.block_bytes))[:, 0]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"ID3\x04" + bytes(100), "not WAV"),
        (b"RIFF\0\0\0\0WAVE", "ends before its samples"),
        (wav_header(0, 1, 24000), "no samples"),
        (wav_header(None, 1, 100) + bytes(10), "sample rate is 100"),
        (wav_header(None, 0, 24000) + bytes(10), "0 channels"),
        (b"RIFF\0\0\0\0WAVELIST\xff\xff\xff\x7f" + bytes(100), "before the samples"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "before their format"),
    ],
)
def test_what_is_no_stream_is_refused_in_a_sentence(content, reason):
    with pytest.raises(PplexError, match=reason):
        stream(content)


def test_a_first_sample_that_is_no_number_is_refused():
    pcm = np.full(3000, np.nan, np.float32)
    with pytest.raises(PplexError, match=r"at 0\.000 s that is NaN"):
        stream(wav(pcm, 24000, "FLOAT"))


def test_what_comes_before_a_sample_that_is_no_number_counts():
    pcm = np.full(3000, 0.5, np.float32)
    pcm[2400] = np.nan
    feed = feed_of(wav(pcm, 24000, "FLOAT"))
    user = UserStream(feed, open_stream(feed), 1)
    frames = list(user.frames(24000, 1920))
    assert [frame.num_samples for frame in frames] == [1920, 480]
    assert "at 0.100 s that is NaN" in user.fault


def test_what_comes_before_a_failing_read_counts(monkeypatch):
    content = wav(np.zeros(3000), 24000)
    parts = [content, OSError(errno.EIO, "Input/output error")]

    def read(fd: int, size: int) -> bytes:
        part = parts.pop(0)
        if isinstance(part, OSError):
            raise part
        return part

    monkeypatch.setattr("pplex.audio.streams.os.read", read)
    feed = Feed(0)
    stream_format = replace(open_stream(feed), num_bytes=None)
    user = UserStream(feed, stream_format, 1)
    assert sum(frame.num_samples for frame in user.frames(24000, 1920)) == 3000
    assert user.fault == "the input stream cannot be read: Input/output error"


def test_a_channel_that_is_not_there_is_refused():
    with pytest.raises(PplexError, match="channel 3 cannot be picked"):
        stream(wav(np.zeros((9, 2)), 24000), channel=3)


def test_a_stream_that_ends_early_says_how_much_is_missing():
    content = wav_header(5000, 1, 24000) + bytes(4000)
    feed = feed_of(content)
    user = UserStream(feed, open_stream(feed), 1)
    assert sum(frame.num_samples for frame in user.frames(24000, 1920)) == 2000
    assert user.missing_bytes == 6000


def test_a_stopped_feed_ends_on_a_whole_frame_without_the_tail():
    reader, writer = os.pipe()
    feed = Feed(reader)
    user = UserStream(feed, StreamFormat("s16le", 24000, 1), 1)
    frames = user.frames(24000, 1920, tail_s=1.0)
    os.write(writer, bytes(2 * 3000))
    assert next(frames).num_samples == 1920
    feed.stop()
    assert list(frames) == []
    os.close(writer)


def test_a_frame_comes_before_anything_of_the_next_one_is_there():
    reader, writer = os.pipe()
    user = UserStream(Feed(reader), StreamFormat("f32le", 24000, 1), 1)
    frames = user.frames(24000, 1920)
    for value in range(3):
        os.write(writer, np.full(1920, value, "<f4").tobytes())
        frame = next(frames)
        assert (frame.pcm == value).all() and frame.arrived is not None
    os.close(writer)
    assert list(frames) == []


class SteadyFeed(Feed):
    """Four seconds of silence, a millisecond at a time, whoever is reading."""

    def __init__(self, rate: int) -> None:
        self._stopped = False
        self._parts = [bytes(2 * (rate // 1000))] * 4000

    def read(self) -> tuple[bytes, float]:
        return (self._parts.pop() if self._parts else b""), 0.0


@pytest.mark.parametrize(
    ("rate", "most_ms"), [(8000, 80), (16000, 40), (24000, 0), (44100, 40), (48000, 40)]
)
def test_resampling_holds_a_frame_back_by_less_than_it_lasts(rate, most_ms):
    user = UserStream(SteadyFeed(rate), StreamFormat("s16le", rate, 1), 1)
    frames = user.frames(24000, 1920)
    late_ms = []
    for number in range(1, 40):
        next(frames)
        late_ms.append(1000 * user.source_frames / rate - 80 * number)
    assert 0 <= min(late_ms) and max(late_ms) <= most_ms
    assert sum(1 for _ in frames) > 8


class TimedFeed(Feed):
    """Silence, ``ahead_s`` of it at once, then ``pace`` seconds of it a second.

    It began ``since_s`` before anybody read.
    """

    def __init__(self, length_s: float, ahead_s: float, pace: float, since_s: float):
        self._stopped = False
        first = time.perf_counter() - since_s
        times = np.arange(0.02, length_s, 0.02)
        self._parts = [
            (bytes(2 * 480), first + max(0.0, came - ahead_s) / pace) for came in times
        ]

    def read(self) -> tuple[bytes, float]:
        return self._parts.pop(0) if self._parts else (b"", 0.0)


@pytest.mark.parametrize(
    ("length_s", "ahead_s", "pace", "since_s", "is_live"),
    [
        (20, 0.0, 1.0, 0.0, True),
        (10, 0.5, 1.0, 0.0, True),  # ffmpeg -re
        (10, 1.4, 1.0, 6.0, True),  # a microphone while the model was loaded
        (10, 0.0, 0.5, 0.0, True),  # it stalled
        (60, 0.0, 1.2, 0.0, False),
        (60, 30.0, 1.0, 0.0, False),
        (60, 60.0, 1.0, 2.0, False),  # a file
    ],
)
def test_a_live_source_may_send_a_little_ahead(
    length_s, ahead_s, pace, since_s, is_live
):
    feed = TimedFeed(length_s, ahead_s, pace, since_s)
    user = UserStream(feed, StreamFormat("s16le", 24000, 1), 1)
    assert sum(1 for _ in user.frames(24000, 1920)) == length_s * 12.5
    assert user.is_live == is_live
    if ahead_s < 5:
        assert user.pace == pytest.approx(pace)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 20000), frame_size=st.integers(1, 2000))
def test_frames_hold_all_samples_and_nothing_else(length, frame_size):
    pcm = np.arange(1, length + 1, dtype=np.float32)
    frames = frames_of(pcm, frame_size)
    flat = frames.reshape(-1)
    assert np.array_equal(flat[:length], pcm) and not flat[length:].any()
    assert len(flat) - length < frame_size
