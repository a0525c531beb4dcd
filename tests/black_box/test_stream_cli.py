"""``pplex respond`` between two programs, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import time

import numpy as np
import pytest
import soundfile
from piped import FRAME, HEADER, RATE, noise, pipe, read_exactly, samples, start

from pplex.audio.streams import wav_header


@pytest.fixture(scope="module")
def model(small_folder):
    return ("--model", small_folder, "--offline", "--prompt", "")


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Two and a half seconds at 16 kHz: resampling, and a ragged last frame."""
    path = tmp_path_factory.mktemp("call") / "call.wav"
    soundfile.write(path, noise(40000), 16000)
    return path


@pytest.fixture(scope="module")
def offline(call, model):
    """The file that the offline run of ``call`` writes."""
    out = call.with_name("offline.wav")
    code, _, err = pipe(b"", "respond", call, "-o", out, *model, "-q")
    assert code == 0, err
    return out


def test_a_pipe_gives_the_bytes_of_the_offline_run(call, model, offline):
    content = call.read_bytes()
    code, out, err = pipe(content, "respond", "-", "-o", "-", *model, "-q")
    assert (code, err) == (0, "")
    assert out[:HEADER] == wav_header(None, 2, RATE)
    assert out[HEADER:] == samples(offline)


def test_stdin_to_a_file_gives_the_offline_file(call, model, offline, tmp_path):
    line = ("respond", "-", "-o", tmp_path / "o.wav", *model)
    side = ("--stats", tmp_path / "s.json", "--tokens", tmp_path / "t.npz")
    code, out, err = pipe(call.read_bytes(), *line, *side)
    assert code == 0 and out == b"", err
    assert (tmp_path / "o.wav").read_bytes() == offline.read_bytes()
    stats = json.loads((tmp_path / "s.json").read_text())
    assert stats["audio_s"] == 2.5 and stats["frames"] == 32
    with np.load(tmp_path / "t.npz") as tokens:
        assert tokens["user"].shape == tokens["agent"].shape == (8, 32)
        assert tokens["text"].shape == (32,)


def test_a_file_to_stdout_gives_the_offline_file(call, model, offline):
    code, out, _ = pipe(b"", "respond", call, "-o", "-", *model, "-q")
    assert code == 0 and out == offline.read_bytes()


def test_separate_sides_and_a_tail_are_the_offline_ones(call, model, tmp_path):
    options = ("--layout", "separate", "--tail", "0.3", "-q", *model)
    (tmp_path / "a").mkdir()
    pipe(b"", "respond", call, "-o", tmp_path / "a" / "x.wav", *options)
    line = ("respond", "-", "-o", tmp_path / "x.wav", *options)
    assert pipe(call.read_bytes(), *line)[0] == 0
    for side in ("user", "agent"):
        name = f"x.{side}.wav"
        expected = (tmp_path / "a" / name).read_bytes()
        assert (tmp_path / name).read_bytes() == expected


@pytest.mark.parametrize("encoding", ["s16le", "f32le"])
def test_one_frame_in_one_frame_out(model, encoding):
    line = ("respond", "-", "-o", "-", "--layout", "agent", "-q", *model)
    pcm = noise(5, FRAME)
    if encoding == "s16le":
        pcm = (pcm * 32767).astype("<i2")
    with start(*line, "--raw", encoding, "--rate", RATE) as process:
        assert len(read_exactly(process.stdout, HEADER)) == HEADER
        for frame in pcm:
            process.stdin.write(frame.tobytes())
            assert len(read_exactly(process.stdout, 2 * FRAME)) == 2 * FRAME
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(60) == 0


def test_a_player_has_each_reply_before_its_frame_and_never_many_to_catch_up_with(
    model, tmp_path
):
    """And what came before the model was ready is not heard, to the sample."""
    stats, heard = tmp_path / "s.json", np.pad(noise(24 * FRAME), (1, 0)).tobytes()
    options = ("--layout", "agent", "-q", "--raw", "f32le", "--rate", RATE, *model)
    _, expected, _ = pipe(heard, "respond", "-", "-o", "-", *options)
    line = ("respond", "-", "-o", "-", *options, "--live", "--stats", stats)
    with start(*line) as process:
        process.stdin.write(noise(3, FRAME).tobytes() + heard[:3])
        out = read_exactly(process.stdout, HEADER + 2 * FRAME)
        for end in range(4 * FRAME, 5 * 4 * FRAME, 4 * FRAME):
            process.stdin.write(heard[max(3, end - 4 * FRAME) : end])
            out += read_exactly(process.stdout, 2 * FRAME)
        assert out == expected[: len(out)]
        process.stdin.write(heard[end:])  # and nobody plays the replies
        process.stdin.close()
        assert process.wait(60) == 0
        rest = process.stdout.read()
    found = json.loads(stats.read_text())
    assert found["skipped_s"] == 3 * 0.08 and found["frames"] == 25
    assert found["left_out_frames"] >= 17
    assert len(rest) == 2 * FRAME * (26 - 5 - found["left_out_frames"])


def test_a_file_is_no_microphone(call, model):
    line = ("respond", "-", "-o", "-", *model, "-q", "--live")
    code, _, err = pipe(call.read_bytes(), *line)
    assert code == 1 and "ended before the model was ready" in err


def test_waiting_for_the_input_counts_as_reading_and_nothing_else(model, tmp_path):
    stats = tmp_path / "s.json"
    line = ("respond", "-", "-o", "-", "-q", "--stats", stats, *model)
    with start(*line, "--raw", "f32le", "--rate", RATE) as process:
        read_exactly(process.stdout, HEADER)
        for frame in noise(3, FRAME):
            process.stdin.write(frame.tobytes())
            read_exactly(process.stdout, 4 * FRAME)
            time.sleep(0.5)
        process.communicate(timeout=60)
    spent = json.loads(stats.read_text())
    parts = "load", "read", "prefill", "warm_up", "encode", "steps", "decode", "write"
    each = [spent[f"{part}_s"] for part in (*parts, "other")]
    assert sum(each) == pytest.approx(spent["total_s"])
    assert min(each) >= 0
    assert spent["read_s"] >= 1


def test_words_go_to_stdout_where_asked(call, model, tmp_path):
    line = ("respond", "-", "-o", tmp_path / "o.wav", *model, "-q")
    code, out, err = pipe(call.read_bytes(), *line, "--transcript", "-")
    assert code == 0 and err == ""
    assert out.endswith(b"\n")


def test_stats_go_to_a_descriptor(call, model, tmp_path):
    reader, writer = os.pipe()
    process = start(
        *("respond", call, "-o", tmp_path / "o.wav", *model, "-q"),
        *("--stats", f"/dev/fd/{writer}"),
        pass_fds=(writer,),
    )
    process.communicate(timeout=60)
    os.close(writer)
    with open(reader) as file:
        assert json.load(file)["audio_s"] == 2.5


def test_a_reader_that_leaves_ends_the_program_quietly(call, model):
    with start("respond", "-", "-o", "-", *model) as process:
        process.stdin.write(wav_header(None, 1, RATE))
        process.stdin.write(bytes(2 * FRAME))
        read_exactly(process.stdout, 100)
        process.stdout.close()
        with pytest.raises(BrokenPipeError):
            while True:
                process.stdin.write(bytes(2 * FRAME))
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_a_stream_cut_short_is_answered_and_reported(model, tmp_path):
    content = wav_header(RATE, 1, RATE) + bytes(20000)
    code, _, err = pipe(content, "respond", "-", "-o", tmp_path / "o.wav", *model, "-q")
    assert code == 1 and "ended 28000 bytes before" in err
    assert soundfile.info(tmp_path / "o.wav").frames == 10000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(call, model):
    with open("/dev/full", "wb") as full:
        process = start(
            "respond",
            call,
            "-o",
            "-",
            *model,
            "-q",
            stdin=subprocess.DEVNULL,
            stdout=full,
        )
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.decode().strip() == (
        "Error: cannot write stdout: the disk is full; free some space and try again"
    )


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (("-", "-o", "-", "--layout", "separate"), 1, "do not fit on stdout"),
        (("-", "-o", "-", "--stats", "-"), 1, "only one output fits on stdout"),
        (("-", "-o", "-", "--raw", "s16le"), 2, "--raw and --rate go together"),
        (("a.wav", "-o", "-", "--raw", "s16le", "--rate", "24000"), 2, "give - as"),
        (("a.wav", "-o", "-", "--live"), 2, "give - as"),
        (("-", "-o", "out.aac"), 1, "end its name in .wav"),
        (("-", "-o", "-"), 1, "is empty"),
    ],
)
def test_what_pipes_cannot_do_is_refused(args, code, reason):
    found, out, err = pipe(b"", "respond", *args, "--model", "mini")
    assert (found, out) == (code, b"") and reason in err


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
@pytest.mark.parametrize(
    "line",
    [("respond", "call", "-o"), ("talk", "-o"), ("voices", "make", "call")],
    ids=lambda line: line[0],
)
def test_no_sound_goes_to_a_terminal(line, name, call):
    args = [call if word == "call" else word for word in line]
    terminal, shown = os.openpty()
    process = start(*args, name, "--model", "mini", stdout=shown)
    _, err = process.communicate(timeout=60)
    os.close(shown)
    os.close(terminal)
    assert process.returncode == 1 and b"is a terminal: pipe it into" in err
