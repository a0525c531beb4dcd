"""SIGINT, SIGTERM and SIGHUP: the frame is finished, files are whole or absent."""

from __future__ import annotations

import os
import signal
import time
from importlib.machinery import ExtensionFileLoader

import pytest
import soundfile
from piped import FRAME, RATE, noise, start

from pplex.audio.streams import wav_header
from pplex.cli.standard import stop_on_signals
from pplex.respond.stopping import Stop, Stopped

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
    CODES.append((signal.SIGHUP, 129))


@pytest.fixture(scope="module")
def model(small_folder):
    return ("--model", small_folder, "--offline", "--prompt", "")


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def size_of_part(folder) -> int:
    return max((p.stat().st_size for p in folder.glob(".*.tmp")), default=0)


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_a_stream_that_is_stopped_leaves_what_there_is(model, tmp_path, signum, code):
    out = tmp_path / "o.wav"
    process = start(
        "respond", "-", "-o", out, *model, "--transcript", tmp_path / "t.txt"
    )
    process.stdin.write(wav_header(None, 1, RATE) + bytes(2 * 3 * FRAME + 100))
    # Three frames are in the file, or in Python's buffer of 8 KB before it.
    wait_for(lambda: size_of_part(tmp_path) >= 16384)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"Traceback" not in err
    assert soundfile.info(out).frames == 3 * FRAME
    assert {p.name for p in tmp_path.iterdir()} == {"o.wav", "t.txt"}


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_a_recording_that_is_stopped_leaves_nothing(model, tmp_path, signum, code):
    call = tmp_path / "call.wav"
    soundfile.write(call, noise(RATE * 600), RATE)
    process = start("respond", call, "-o", tmp_path / "o.wav", *model, "--captions")
    # The agent speaks, or the time for it is long past.
    assert process.stderr.read(1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} == {"call.wav"}


def test_a_stream_that_is_stopped_before_its_first_frame_leaves_no_file(
    model, tmp_path
):
    process = start("respond", "-", "-o", tmp_path / "o.wav", *model)
    process.stdin.write(wav_header(None, 1, RATE))
    wait_for(lambda: list(tmp_path.glob(".*.tmp")))
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_before_the_program_is_loaded_ends_it_without_a_traceback(
    tmp_path, monkeypatch
):
    (tmp_path / "click.py").write_text("import signal; signal.raise_signal(2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    _, err = (process := start("--help")).communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, b"")


def test_an_interrupt_while_a_library_is_loaded_waits_until_it_is():
    """MLX aborts where what it calls in Python raises while it is imported."""

    def imported(self: ExtensionFileLoader) -> bool:
        signal.raise_signal(signal.SIGTERM)
        return True

    with stop_on_signals():
        assert imported(ExtensionFileLoader("mlx.core", "mlx/core.so"))
        with pytest.raises(Stopped):
            time.sleep(60)


def test_a_killed_stream_leaves_no_file_of_its_name(model, tmp_path):
    process = start("respond", "-", "-o", tmp_path / "o.wav", *model)
    process.stdin.write(wav_header(None, 1, RATE) + bytes(8 * FRAME))
    wait_for(lambda: list(tmp_path.glob(".*.tmp")))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "o.wav").exists()


def test_the_second_request_does_not_wait():
    stop, told = Stop(), []
    with stop.deferred(lambda: told.append(1)):
        stop.request(signal.SIGINT)
        assert told == [1]
        with pytest.raises(Stopped):
            stop.request(signal.SIGINT)
    with pytest.raises(Stopped):
        stop.check()
