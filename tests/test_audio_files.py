"""Reading any recording, writing 16-bit WAV, and what is refused."""

import errno
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pplex.audio import source
from pplex.audio.files import frames_of, read_pcm, to_pcm16
from pplex.audio.source import open_source
from pplex.errors import PplexError
from pplex.files import Together, atomic_write, put, put_new, write_text

DATA = Path(__file__).parent / "data"
RATE = 24_000


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, channels))
    return values.astype(np.float32)


def sine(samples: int, rate: int, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(samples) / rate)).astype(np.float32)


def refusal(path: Path, **options: object) -> str:
    """The sentence with which a file is refused; it names the file."""
    with pytest.raises(PplexError) as info:
        read_pcm(path, sample_rate=RATE, **options)
    message = str(info.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_samples_at_the_models_rate_come_back_bit_for_bit():
    path = DATA / "respond" / "voice_NATM0.wav"
    raw = np.frombuffer(path.read_bytes()[44:], "<i2")
    recording = read_pcm(path, sample_rate=RATE)
    assert recording.pcm.dtype == np.float32
    np.testing.assert_array_equal(recording.pcm, raw / np.float32(32768))
    assert (recording.source_rate, recording.source_channels) == (RATE, 1)
    assert (recording.source_frames, recording.channel) == (31357, 1)
    assert (recording.format, recording.subtype) == ("WAV", "PCM_16")


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_U8", 1e-2),
        ("a.wav", "PCM_24", 1e-6),
        ("a.wav", "FLOAT", 0),
        ("a.wav", "DOUBLE", 0),
        ("a.wav", "ULAW", 3e-2),
        ("a.flac", "PCM_24", 1e-6),
        ("a.aiff", "PCM_16", 1e-4),
        ("a.au", "PCM_16", 1e-4),
        ("a.caf", "PCM_16", 1e-4),
        ("a.w64", "PCM_16", 1e-4),
        ("a.rf64", "PCM_16", 1e-4),
        ("a.ogg", "VORBIS", 0.2),
    ],
)
def test_every_format_is_read_to_its_last_sample(tmp_path, name, subtype, tolerance):
    pcm = sine(5000, RATE)
    soundfile.write(tmp_path / name, pcm, RATE, subtype=subtype)
    recording = read_pcm(tmp_path / name, sample_rate=RATE)
    assert recording.pcm.shape == (5000,)
    assert recording.subtype == subtype
    np.testing.assert_allclose(recording.pcm, pcm, atol=tolerance)


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 22050, 44100, 48000, 192000])
@pytest.mark.parametrize("samples", [997, 44101])
def test_resampled_length_is_the_rounded_ratio(tmp_path, rate, samples):
    soundfile.write(tmp_path / "a.wav", sine(samples, rate, 40.0), rate)
    recording = read_pcm(tmp_path / "a.wav", sample_rate=RATE)
    assert len(recording.pcm) == int(np.floor(samples * RATE / rate + 0.5))
    assert recording.source_frames == samples


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampling_neither_delays_nor_scales(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(rate, rate), rate, subtype="FLOAT")
    pcm = read_pcm(tmp_path / "a.wav", sample_rate=RATE).pcm
    inner = slice(2000, -2000)
    np.testing.assert_allclose(pcm[inner], sine(RATE, RATE)[inner], atol=1e-3)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_resampling_keeps_tones_and_adds_nothing_down_to_100_db(tmp_path, rate):
    nyquist = min(rate, RATE) // 2
    kept = np.arange(50, int(0.9 * nyquist) + 1, 137)
    lost = np.arange(int(1.1 * nyquist), rate // 2, 411)  # empty where rate < RATE
    seconds = np.arange(3 * rate) / rate
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, len(kept) + len(lost))
    pcm = np.zeros(len(seconds))
    for hz, phase in zip([*kept, *lost], phases, strict=True):
        pcm += 0.01 * np.cos(2 * np.pi * hz * seconds + phase)
    soundfile.write(tmp_path / "a.wav", pcm, rate, subtype="DOUBLE")
    found = read_pcm(tmp_path / "a.wav", sample_rate=RATE).pcm
    # The second in the middle: every whole number of Hz has a bin of its own.
    spectrum = np.fft.rfft(found[RATE : 2 * RATE].astype(np.float64)) / (RATE / 2)
    wanted = np.zeros(len(spectrum), complex)
    wanted[kept] = 0.01 * np.exp(1j * phases[: len(kept)])
    gain_db = 20 * np.log10(np.abs(spectrum[kept]) / 0.01)
    np.testing.assert_allclose(gain_db, 0, atol=0.1)
    np.testing.assert_allclose(spectrum[kept], wanted[kept], atol=2e-5)
    others = np.delete(np.abs(spectrum), kept)
    assert 20 * np.log10(others.max() / 0.01) < -100


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_block_size_makes_no_difference(tmp_path, monkeypatch, rate):
    soundfile.write(tmp_path / "a.wav", noise(20_000, 3), rate, subtype="FLOAT")
    whole = read_pcm(tmp_path / "a.wav", sample_rate=RATE, channel="mix").pcm
    monkeypatch.setattr(source, "_BLOCK_SAMPLES", 3 * 777)
    blocks = read_pcm(tmp_path / "a.wav", sample_rate=RATE, channel="mix").pcm
    np.testing.assert_array_equal(whole, blocks)


def test_channels_count_from_one_and_mix_averages(tmp_path):
    tracks = noise(1000, 8)
    soundfile.write(tmp_path / "a.wav", tracks, RATE, subtype="FLOAT")
    for channel in (1, 3, 8):
        recording = read_pcm(tmp_path / "a.wav", sample_rate=RATE, channel=channel)
        np.testing.assert_array_equal(recording.pcm, tracks[:, channel - 1])
    mix = read_pcm(tmp_path / "a.wav", sample_rate=RATE, channel="mix")
    np.testing.assert_allclose(mix.pcm, tracks.mean(axis=1), atol=1e-7)
    assert (mix.source_channels, mix.channel) == (8, "mix")


@pytest.mark.parametrize("channel", [0, -1])
def test_channels_below_one_are_refused(tmp_path, channel):
    with pytest.raises(PplexError, match="count from 1"):
        read_pcm(tmp_path / "a.wav", sample_rate=RATE, channel=channel)


def test_a_channel_that_is_not_there_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(100, 2), RATE)
    assert "2 channels" in refusal(tmp_path / "a.wav", channel=3)


def test_float_samples_beyond_one_pass_through(tmp_path):
    pcm = np.array([0.0, 2.5, -7.0, 1.0], np.float32)
    soundfile.write(tmp_path / "a.wav", pcm, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(
        read_pcm(tmp_path / "a.wav", sample_rate=RATE).pcm, pcm
    )


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.wav")
    assert "folder" in refusal(tmp_path)


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    def deny(name, flags):
        raise PermissionError(errno.EACCES, "Permission denied", name)

    soundfile.write(tmp_path / "a.wav", noise(100), RATE)
    monkeypatch.setattr(source, "open_without_waiting", deny)
    assert "permission" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"dear diary,\n" * 50, "not an audio file"),
        (b"RIFF", "not an audio file"),
        (bytes(1000), "not an audio file"),
    ],
)
def test_what_is_not_audio_is_refused(tmp_path, content, reason):
    (tmp_path / "a.wav").write_bytes(content)
    assert reason in refusal(tmp_path / "a.wav")


def test_raw_pcm_is_refused(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    assert "raw PCM" in refusal(tmp_path / "a.raw")


def test_a_pipe_is_refused_without_waiting(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.wav")
    assert "pipe" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["a.wav", "a.au", "a.aiff"])
def test_a_file_with_zero_samples_is_refused(tmp_path, name):
    soundfile.write(tmp_path / name, noise(0), RATE)
    assert "no samples" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (np.nan, "NaN"),
        (np.inf, "infinite"),
        (-np.inf, "infinite"),
        (-3e38, "e+38, where full scale is 1"),
    ],
)
@pytest.mark.parametrize("channel", [2, "mix"])
def test_values_that_are_no_numbers_are_refused_with_their_time(
    tmp_path, value, word, channel
):
    tracks = noise(48_000, 2)
    tracks[36_000, 1] = value
    soundfile.write(tmp_path / "a.wav", tracks, RATE, subtype="FLOAT")
    message = refusal(tmp_path / "a.wav", channel=channel)
    assert "1.500 s" in message
    assert word in message
    assert len(read_pcm(tmp_path / "a.wav", sample_rate=RATE, channel=1).pcm) == 48_000


@pytest.mark.parametrize(
    "name", ["a.wav", "a.rf64", "a.w64", "a.aiff", "a.au", "a.caf", "a.flac", "a.mp3"]
)
def test_a_truncated_file_is_refused(tmp_path, name):
    whole = tmp_path / f"whole-{name}"
    soundfile.write(whole, noise(30_000), RATE)
    content = whole.read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 6 // 10])
    message = refusal(tmp_path / name)
    assert any(word in message for word in ("truncated", "malformed"))


def test_a_wav_that_lacks_its_last_sample_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1000), RATE, subtype="PCM_16")
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:-2])
    assert "2 bytes" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_of_unknown_length_from_a_pipe_is_read_whole(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", noise(1000), RATE, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    assert content[36:40] == b"data"
    content[4:8] = content[40:44] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_pcm(tmp_path / "a.wav", sample_rate=RATE).pcm) == 1000


def test_chunks_after_the_samples_are_no_truncation(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(999, 1), RATE, subtype="PCM_U8")
    content = (tmp_path / "a.wav").read_bytes() + b"LIST" + struct.pack("<I", 4) + b"x"
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_pcm(tmp_path / "a.wav", sample_rate=RATE).pcm) == 999


@pytest.mark.parametrize("rate", [1, 999, 800_000])
def test_absurd_sample_rates_are_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", noise(100), rate)
    assert f"{rate} Hz" in refusal(tmp_path / "a.wav")


def test_frames_are_padded_with_zeros_and_never_extra():
    assert frames_of(np.ones(8, np.float32), 4).shape == (2, 4)
    frames = frames_of(np.ones(9, np.float32), 4)
    np.testing.assert_array_equal(frames[2], [1, 0, 0, 0])
    assert frames.dtype == np.float32
    assert frames_of(np.zeros(0, np.float32), 4).shape == (0, 4)


def test_pcm16_clamps_scales_and_truncates_toward_zero():
    values = np.array([0, 1, -1, 2, -2, 0.9 / 32767, -0.9 / 32767, 0.5], np.float32)
    expected = [0, 32767, -32767, 32767, -32767, 0, 0, 16383]
    np.testing.assert_array_equal(to_pcm16(values), expected)


def test_an_output_that_fails_half_way_leaves_the_old_one(tmp_path):
    target = tmp_path / "o.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError):
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["o.json"]


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_write_one_name_the_first_wins(tmp_path, monkeypatch, links):
    """Also where a file cannot have two names."""
    path = tmp_path / "o.wav"

    def refuse(*args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr("pplex.files.os.link", refuse)
    with pytest.raises(PplexError, match="exists already"):
        with atomic_write(path, place=put_new) as late:
            late.write_bytes(b"late")
            with atomic_write(path, place=put_new) as early:
                early.write_bytes(b"early")
    assert path.read_bytes() == b"early"
    assert [p.name for p in tmp_path.iterdir()] == ["o.wav"]


@pytest.mark.parametrize("place", [put, put_new])
def test_files_of_one_run_get_their_names_together(tmp_path, place):
    """Where the second cannot have its name, the first has none either."""
    (tmp_path / "link.wav").symlink_to("o.wav")
    with pytest.raises(PplexError, match=r"t\.txt"), Together() as files:
        for name in ("link.wav", "t.txt"):
            write_text(tmp_path / name, "new", place=files)
            assert not (tmp_path / name).exists()
        (tmp_path / "t.txt").mkdir()
        files.name(place)
    assert {p.name for p in tmp_path.iterdir()} == {"link.wav", "t.txt"}
    (tmp_path / "t.txt").rmdir()
    with Together() as files:
        for name in ("link.wav", "t.txt"):
            write_text(tmp_path / name, "new", place=files)
        files.name(place)
        assert {p.name for p in tmp_path.iterdir()} == {"link.wav", "o.wav", "t.txt"}


def test_the_temporary_file_is_hidden_and_beside_the_output(tmp_path):
    with atomic_write(tmp_path / "o.json") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".o.json.pplex-")
        assert temporary.name.endswith(".tmp")
        assert not (tmp_path / "o.json").exists()
    assert (tmp_path / "o.json").read_text() == "new"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "permission"),
        (errno.EIO, "system says"),
    ],
)
def test_a_failing_disk_is_one_sentence(tmp_path, code, reason):
    with pytest.raises(PplexError, match=reason) as info:
        with atomic_write(tmp_path / "o.wav"):
            raise OSError(code, "what the system says")
    assert str(tmp_path / "o.wav") in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_outputs_in_missing_folders_on_folders_and_devices_are_refused(tmp_path):
    with pytest.raises(PplexError, match="does not exist"):
        write_text(tmp_path / "none" / "o.txt", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(PplexError, match="cannot write"):
        write_text(tmp_path / "file" / "o.txt", "x")
    with pytest.raises(PplexError, match="folder"):
        write_text(tmp_path, "x")
    with pytest.raises(PplexError, match="device"), atomic_write(Path("/dev/null")):
        pass


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new\n")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new\n"


def test_names_of_the_greatest_length_can_be_written(tmp_path):
    name = "n" * 250 + ".txt"
    write_text(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_of_16_bits_are_as_libsndfile_gives_them(tmp_path, channels):
    every = np.arange(-(1 << 15), 1 << 15).astype(np.int16)
    samples = np.stack([np.roll(every, idx) for idx in range(channels)], axis=1)
    soundfile.write(tmp_path / "in.wav", samples, 24000, subtype="PCM_16")
    with open_source(tmp_path / "in.wav") as source:
        found = np.concatenate(list(source.blocks()))
    expected = soundfile.read(tmp_path / "in.wav", dtype="float32", always_2d=True)[0]
    assert found.tobytes() == expected.tobytes()
