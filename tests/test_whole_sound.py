"""Sound is answered whole or refused, and a file and a pipe agree on which."""

from __future__ import annotations

import io
import os
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pplex.audio.files import probe, read_pcm
from pplex.audio.streams import Feed, StreamFormat, UserStream, open_stream
from pplex.errors import PplexError

DATA = Path(__file__).parent / "data" / "sound"
RATE = 24_000
UNKNOWN = 0xFFFFFFFF

PCM = (8000 * np.sin(np.arange(9000) * 0.05)).astype("<i2")
BODY = PCM.tobytes()
FORMAT = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
FORMAT_8 = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, RATE, 1, 8)
BODY_8 = ((PCM >> 8) + 128).astype(np.uint8).tobytes()[:8999]


def chunk(name: bytes, content: bytes, size: int | None = None, pad=True) -> bytes:
    """A chunk, whose size may be a lie and whose padding may be missing."""
    size = len(content) if size is None else size
    padding = b"\0" * (len(content) & 1 & pad)
    return name + struct.pack("<I", size) + content + padding


def wav(*chunks: bytes, magic: bytes = b"RIFF", riff: int | None = None) -> bytes:
    content = b"WAVE" + b"".join(chunks)
    return magic + struct.pack("<I", len(content) if riff is None else riff) + content


def data(size: int | None = None, content: bytes = BODY) -> bytes:
    return chunk(b"data", content, size)


def ds64(size: int) -> bytes:
    return chunk(b"ds64", struct.pack("<QQQI", 0, size, 0, 0))


LIST = chunk(b"LIST", b"INFOISFT\x0e\0\0\0Lavf59.27.100\0")
BAD_LIST = b"INFOISFT\xff\xff\xff"

# What a WAV file is, its samples (0: it is refused), and what is said.
WAVS: dict[str, tuple[bytes, int, str]] = {
    "sizes 0": (wav(FORMAT, data(0), riff=0), 9000, "no length"),
    "sizes unknown": (wav(FORMAT, data(UNKNOWN), riff=UNKNOWN), 9000, ""),
    "sizes of sox": (wav(FORMAT, data(0x7FFFF000), riff=0x7FFFF024), 9000, ""),
    "sizes of lame": (wav(FORMAT, data(UNKNOWN - 36), riff=UNKNOWN), 9000, ""),
    "only RIFF's size 0": (wav(FORMAT, data(), riff=0), 9000, ""),
    "unknown, half a sample": (
        wav(FORMAT, chunk(b"data", BODY + b"\1", UNKNOWN, pad=False)),
        9000,
        "1 byte is left over",
    ),
    "too long": (wav(FORMAT, data(2 * len(BODY))), 0, "18000 bytes"),
    "a byte too long": (
        wav(FORMAT, chunk(b"data", BODY[:-1], len(BODY), pad=False)),
        0,
        "1 byte",
    ),
    "two formats": (wav(FORMAT, FORMAT_8, data()), 0, "two formats"),
    "a format twice": (wav(FORMAT, FORMAT, data()), 9000, ""),
    "too short": (wav(FORMAT, data(6000)), 3000, "12000 bytes are left over"),
    "too short, a LIST": (wav(FORMAT, data(6000), LIST), 3000, "12034 bytes"),
    "wrapped at 4 GB": (wav(FORMAT, data(2 * 100)), 100, "17800 bytes"),
    "an odd size": (wav(FORMAT_8, data(content=BODY_8), LIST), 8999, ""),
    "no padding": (wav(FORMAT_8, chunk(b"data", BODY_8, pad=False), LIST), 8999, ""),
    "an odd end": (wav(FORMAT_8, chunk(b"data", BODY_8, pad=False)), 8999, ""),
    "a malformed LIST before": (
        wav(FORMAT, chunk(b"LIST", BAD_LIST), data()),
        9000,
        "",
    ),
    "an empty LIST before": (wav(FORMAT, chunk(b"LIST", b""), data()), 9000, ""),
    "a LIST without padding": (
        wav(FORMAT, chunk(b"LIST", BAD_LIST, pad=False), data()),
        9000,
        "",
    ),
    "a LIST that is too long": (
        wav(FORMAT, chunk(b"LIST", b"INFO", 1 << 20), data()),
        0,
        "before its samples",
    ),
    "a malformed LIST behind": (
        wav(FORMAT, data(), chunk(b"LIST", BAD_LIST)),
        9000,
        "",
    ),
    "a LIST behind that is cut off": (
        wav(FORMAT, data(), chunk(b"LIST", b"INFO", 400)),
        9000,
        "12 bytes",
    ),
    "bytes behind": (wav(FORMAT, data()) + bytes(range(100, 200)), 9000, "100 bytes"),
    "a byte behind": (wav(FORMAT, data()) + b"\0", 9000, "1 byte is"),
    "no samples": (wav(FORMAT, data(0, b"")), 0, "no samples"),
    "no samples, then a LIST": (wav(FORMAT, data(0, b""), LIST), 0, "no samples"),
    "no samples, then a tag": (
        wav(FORMAT, data(0, b""), chunk(b"id3 ", bytes(10))),
        0,
        "no samples",
    ),
    "joined": (wav(FORMAT, data()) + wav(FORMAT, data()), 0, "second recording"),
    "samples twice": (wav(FORMAT, data(), data()), 0, "second recording"),
    "RF64 through a pipe": (
        wav(ds64(0), FORMAT, LIST, data(UNKNOWN), magic=b"RF64", riff=UNKNOWN),
        9000,
        "",
    ),
    "RF64": (wav(ds64(18000), FORMAT, data(UNKNOWN), magic=b"RF64"), 9000, ""),
    "RF64, too short": (
        wav(ds64(6000), FORMAT, data(UNKNOWN), magic=b"RF64"),
        3000,
        "12000 bytes",
    ),
    "RF64, too long": (
        wav(ds64(1 << 33), FORMAT, data(UNKNOWN), magic=b"RF64"),
        0,
        f"{(1 << 33) - 18000} bytes",
    ),
    "BW64": (
        wav(
            ds64(18000),
            FORMAT,
            chunk(b"chna", bytes(44)),
            data(UNKNOWN),
            chunk(b"axml", b"<x/>"),
            magic=b"BW64",
        ),
        9000,
        "",
    ),
    "BW64 with a plain size": (
        wav(ds64(18000), FORMAT, data(), magic=b"BW64"),
        9000,
        "",
    ),
}


def by_file(path: Path) -> tuple[np.ndarray, str]:
    """Samples of a file, none where it is refused, and everything that is said."""
    try:
        recording = read_pcm(path, sample_rate=RATE)
    except PplexError as e:
        return np.zeros(0, np.float32), str(e)
    return recording.pcm, "\n".join(recording.warnings)


def by_pipe(content: bytes, raw: StreamFormat | None = None) -> tuple[np.ndarray, str]:
    """The same of a pipe, which is refused when it has ended."""
    reader, writer = os.pipe()

    def push() -> None:
        with open(writer, "wb", buffering=0) as file:
            for start in range(0, len(content), 5000):
                file.write(content[start : start + 5000])

    threading.Thread(target=push, daemon=True).start()
    feed = Feed(reader)
    try:
        user = UserStream(feed, open_stream(feed, raw), 1)
        frames = list(user.frames(RATE, 1920))
    except PplexError as e:
        return np.zeros(0, np.float32), str(e)
    said = user.warnings()
    if user.fault or user.missing_bytes:
        said = [user.fault, f"{user.missing_bytes} bytes"]
        frames = []
    pcm = [frame.pcm[: frame.num_samples] for frame in frames]
    return np.concatenate([np.zeros(0, np.float32), *pcm]), "\n".join(said)


@pytest.mark.parametrize("kind", WAVS)
def test_of_a_wav_file_and_pipe_say_and_take_the_same(tmp_path, kind):
    content, num_samples, said = WAVS[kind]
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    pcm, message = by_file(path)
    piped, piped_message = by_pipe(content)
    assert len(pcm) == num_samples
    assert re.search(said, message) if said else not message
    np.testing.assert_array_equal(piped, pcm)
    if num_samples:
        if num_samples != len(BODY_8):
            np.testing.assert_array_equal(pcm, PCM[: len(pcm)] / np.float32(32768))
        assert piped_message == message.replace(str(path), "the input stream")
    else:
        assert re.search(said, piped_message)


@pytest.mark.parametrize(
    ("name", "num_frames"),
    [
        ("no_xing.mp3", 127 * 576),
        ("vbr_no_xing.mp3", 86 * 576),
        ("mp3_in_wav.wav", 127 * 576),
        ("streamed.flac", 15435),
    ],
)
def test_what_has_no_length_is_decoded_to_its_end(name, num_frames, capfd):
    recording = read_pcm(DATA / name, sample_rate=RATE)
    assert recording.source_frames == num_frames
    assert recording.num_samples == len(recording.pcm)
    assert recording.warnings == ()
    assert probe(DATA / name).duration_s == num_frames / recording.source_rate
    assert capfd.readouterr().err == ""


def test_mp3_in_wav_has_the_samples_of_the_mp3():
    plain, packed = (
        read_pcm(DATA / name, sample_rate=RATE).pcm
        for name in ("no_xing.mp3", "mp3_in_wav.wav")
    )
    np.testing.assert_array_equal(packed, plain)


def test_a_streamed_flac_has_the_samples_of_one_with_a_length(tmp_path):
    pcm = PCM / np.float32(32768)
    soundfile.write(tmp_path / "a.flac", pcm, RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "streamed.flac").write_bytes(content)
    found, said = by_file(tmp_path / "streamed.flac")
    assert said == ""
    np.testing.assert_array_equal(found, pcm)


def encoded(kind: str, subtype: str, pcm: np.ndarray = PCM) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, pcm, RATE, format=kind, subtype=subtype)
    return file.getvalue()


KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "IMA_ADPCM"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("NIST", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
@pytest.mark.parametrize(
    "cut",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:-7],
        lambda content: content[7:],
        lambda content: content[len(content) // 3 :],
    ],
    ids=["half", "a byte", "seven bytes", "its first bytes", "a third"],
)
def test_a_recording_that_lacks_a_part_is_refused(tmp_path, kind, subtype, cut):
    content = encoded(kind, subtype)
    (tmp_path / "whole").write_bytes(content)
    assert len(by_file(tmp_path / "whole")[0]) >= len(PCM)
    (tmp_path / "a").write_bytes(cut(content))
    pcm, said = by_file(tmp_path / "a")
    assert not len(pcm), said


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_recordings_that_were_joined_are_refused(tmp_path, kind, subtype):
    path = tmp_path / "a"
    path.write_bytes(encoded(kind, subtype) + encoded(kind, subtype, PCM[:4000]))
    pcm, said = by_file(path)
    assert not len(pcm)
    assert "second recording" in said or kind == "AIFF"  # libsndfile's own words
    assert str(path) in said


def test_joined_mp3_is_refused_without_a_line_of_the_library(capfd):
    pcm, said = by_file(DATA / "joined.mp3")
    assert not len(pcm) and "second recording" in said
    assert capfd.readouterr().err == ""


def test_joined_mp3_without_lengths_is_read_whole(tmp_path):
    content = (DATA / "no_xing.mp3").read_bytes() + b"TAG" + bytes(125)
    (tmp_path / "a.mp3").write_bytes(2 * content)
    assert len(by_file(tmp_path / "a.mp3")[0]) == 2 * 127 * 576


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_bytes_at_the_end_that_belong_to_nothing_are_counted(tmp_path, kind, subtype):
    content = encoded(kind, subtype)
    (tmp_path / "a").write_bytes(content + bytes(range(30, 90)))
    (tmp_path / "b").write_bytes(content)
    pcm, said = by_file(tmp_path / "a")
    assert said == f"{tmp_path / 'a'}: 60 bytes are left over behind its sound"
    np.testing.assert_array_equal(pcm, by_file(tmp_path / "b")[0])


@pytest.mark.parametrize(
    "tag",
    [
        b"TAG" + bytes(125),
        b"APETAGEX" + struct.pack("<IIII", 2000, 37, 1, 0xA0000000) + bytes(8 + 37),
        b"ID3\x04\0\0\0\0\1\0" + bytes(128),
    ],
    ids=["ID3v1", "APE", "ID3v2"],
)
def test_tags_of_mp3_are_no_sound_and_no_fault(tmp_path, tag):
    content = (DATA / "no_xing.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(content + tag)
    pcm, said = by_file(tmp_path / "a.mp3")
    assert said == "" and len(pcm) == 127 * 576


def test_a_cover_picture_before_the_sound_is_no_length(tmp_path):
    """libsndfile would guess the length from the size of all."""
    tag = b"ID3\x04\0\0" + bytes([0, 6, 0, 0]) + bytes(6 << 14)
    (tmp_path / "a.mp3").write_bytes(tag + (DATA / "vbr_no_xing.mp3").read_bytes())
    assert len(by_file(tmp_path / "a.mp3")[0]) == 86 * 576


def vbri(num_frames: int) -> bytes:
    """A frame of 24 kHz and 32 kbit/s that holds Fraunhofer's count of frames."""
    head = bytes([0xFF, 0xF3, 0x44, 0xC4])
    counts = struct.pack(">4sHHHII", b"VBRI", 1, 0, 75, 96 * num_frames, num_frames)
    return (head.ljust(36, b"\0") + counts).ljust(96, b"\0")


def test_a_vbri_frame_promises_a_length(tmp_path):
    frames = (DATA / "no_xing.mp3").read_bytes()
    assert len(frames) == 127 * 96 + 45  # a tag, then frames
    path = tmp_path / "a.mp3"
    path.write_bytes(vbri(127) + frames[45:])
    assert len(by_file(path)[0]) >= 127 * 576
    path.write_bytes(vbri(127) + frames[45 : -3 * 96])
    assert "127 frames and 124" in by_file(path)[1]


def test_an_mp3_that_was_cut_between_frames_says_that_its_start_is_missing(tmp_path):
    frames = (DATA / "vbr_no_xing.mp3").read_bytes()
    starts = [m.start() for m in re.finditer(b"\xff\xf3", frames)]
    said = []
    for start in starts[10:20]:
        (tmp_path / "a.mp3").write_bytes(frames[start:])
        said.append(by_file(tmp_path / "a.mp3")[1])
    assert any("start may be cut off" in message for message in said)


def ogg_pages(content: bytes) -> list[bytes]:
    pages = []
    while content:
        count = content[26]
        length = 27 + count + sum(content[27 : 27 + count])
        pages.append(content[:length])
        content = content[length:]
    return pages


@pytest.mark.parametrize("missing", [-1, 3])
def test_an_ogg_file_that_lacks_a_page_is_refused(tmp_path, missing):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40000)
    pages = ogg_pages(encoded("OGG", "VORBIS", noise))
    assert len(pages) == 5
    del pages[missing]
    (tmp_path / "a.ogg").write_bytes(b"".join(pages))
    pcm, said = by_file(tmp_path / "a.ogg")
    assert not len(pcm) and "missing" in said


def patched(content: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    start = content.index(mark) + offset
    return content[:start] + value + content[start + len(value) :]


AU, AIFF = encoded("AU", "PCM_16"), encoded("AIFF", "PCM_16")
W64, CAF = encoded("W64", "PCM_16"), encoded("CAF", "PCM_16")
SPHERE, FLAC = encoded("NIST", "PCM_16"), encoded("FLAC", "PCM_16")


@pytest.mark.parametrize(
    ("content", "num_samples", "said"),
    [
        (patched(AU, b".snd", 8, struct.pack(">I", UNKNOWN)), 9000, "no length"),
        (patched(AU, b".snd", 8, struct.pack(">I", 6000)), 3000, "12000 bytes"),
        (patched(AU, b".snd", 8, struct.pack(">I", 20000)), 0, "2000 bytes"),
        (patched(AU, b".snd", 8, bytes(4)), 0, "no samples"),
        (patched(AIFF, b"SSND", 4, struct.pack(">I", 6008)), 3000, "12000 bytes"),
        (patched(AIFF, b"SSND", 4, struct.pack(">I", 0x7F000008)), 9000, "no length"),
        (patched(W64, b"data", 16, struct.pack("<Q", 6024)), 3000, "12000 bytes"),
        (patched(W64, b"data", 16, bytes(8)), 9000, "no length"),
        (patched(W64, b"data", 16, struct.pack("<Q", 1 << 40)), 0, "truncated"),
        (patched(CAF, b"data", 4, struct.pack(">Q", 1 << 40)), 0, "can be read"),
        (SPHERE.replace(b"-i 9000", b"-i 3000"), 3000, "12000 bytes"),
        (SPHERE.replace(b"-i 9000", b"-i 9999"), 0, "1998 bytes"),
        (patched(FLAC, b"fLaC", 22, struct.pack(">I", 3000)), 9000, "3000 samples"),
        (patched(FLAC, b"fLaC", 22, struct.pack(">I", 9999)), 0, "holds 9000"),
        (encoded("VOC", "PCM_16"), 0, "ffmpeg -i"),
    ],
)
def test_other_headers_are_held_against_the_bytes_that_are_there(
    tmp_path, content, num_samples, said
):
    (tmp_path / "a").write_bytes(content)
    pcm, message = by_file(tmp_path / "a")
    assert len(pcm) == num_samples
    np.testing.assert_array_equal(pcm, PCM[:num_samples] / np.float32(32768))
    assert said in message


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\0\x20ftypM4A \0\0\2\0M4A mp42isom" + bytes(100),
        b"\x1a\x45\xdf\xa3\x01\0\0\0\0\0\0\x1fwebm" + bytes(100),
    ],
    ids=["m4a", "webm"],
)
def test_what_is_no_audio_names_the_line_that_converts_it(tmp_path, content):
    (tmp_path / "a.m4a").write_bytes(content)
    for _, said in (by_file(tmp_path / "a.m4a"), by_pipe(content)):
        assert "ffmpeg -i" in said


def test_telephone_samples_are_the_same_through_file_and_pipe(tmp_path):
    for subtype in ("ULAW", "ALAW"):
        content = encoded("WAV", subtype)
        (tmp_path / "a.wav").write_bytes(content)
        pcm, said = by_file(tmp_path / "a.wav")
        piped, _ = by_pipe(content)
        assert said == "" and len(pcm) == 9000
        np.testing.assert_array_equal(piped, pcm)


def test_a_file_given_as_bare_samples_is_refused():
    raw = StreamFormat("s16le", RATE, 1)
    assert "leave --raw" in by_pipe(wav(FORMAT, data()), raw)[1]
    assert "ffmpeg" in by_pipe(FLAC, raw)[1]
    pcm, said = by_pipe(BODY, raw)
    assert len(pcm) == 9000 and said == ""


def test_bare_samples_that_end_within_one_are_counted():
    said = by_pipe(BODY + b"\1", StreamFormat("s16le", RATE, 1))[1]
    assert said == "the input stream: 1 byte is left over behind its sound"


@pytest.mark.parametrize("make", [os.mkfifo], ids=["FIFO"])
def test_a_pipe_by_name_is_sent_to_stdin(tmp_path, make: Callable[[Path], None]):
    make(tmp_path / "a.wav")
    assert "INPUT - is stdin" in by_file(tmp_path / "a.wav")[1]


def stereo(left: np.ndarray, right: np.ndarray) -> bytes:
    return encoded("WAV", "FLOAT", np.stack([left, right], axis=1))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (stereo(np.zeros(5000), PCM[:5000] / 32768), "silent; --channel 2 picks"),
        (encoded("WAV", "PCM_16", 0 * PCM), "channel 1 is silent"),
        (encoded("WAV", "FLOAT", np.full(5000, 0.4)), "silent"),
        (encoded("WAV", "FLOAT", PCM / 65536 + 0.3), r"DC offset of \+0\.30"),
        (encoded("WAV", "FLOAT", PCM / 65536 - 0.2), r"DC offset of -0\.20"),
        (stereo(PCM[:5000] / 32768, np.zeros(5000)), ""),
    ],
)
def test_silence_and_a_large_offset_are_said(tmp_path, content, said):
    (tmp_path / "a.wav").write_bytes(content)
    for _, message in (by_file(tmp_path / "a.wav"), by_pipe(content)):
        assert re.search(said, message) if said else not message


def test_a_library_that_complains_is_named(tmp_path, capfd):
    content = bytearray((DATA / "no_xing.mp3").read_bytes())
    for start in range(45 + 30 * 96, 45 + 40 * 96, 96):
        content[start + 4 : start + 24] = b"\xff" * 20
    (tmp_path / "a.mp3").write_bytes(content)
    said = by_file(tmp_path / "a.mp3")[1]
    assert "MPEG decoder complained" in said and "libmpg123" not in said
    assert capfd.readouterr().err == ""


def test_what_others_write_while_a_library_is_kept_quiet_gets_through(capfd):
    from pplex.audio.stderr import decoder_lines

    with decoder_lines() as faults:
        os.write(2, b"Note: Trying to resync...\na line of ours\n")
        os.write(2, b"[src/libmpg123/layer3.c:do_layer3():1774] error: too large\n")
    assert capfd.readouterr().err == "a line of ours\n"
    assert faults == ["too large"]
