"""Long recordings are read as they are answered and written as they are: no copy stays.

What they give is what a recording in memory gives.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_batch import RATE, SETTINGS, contents, go, record

from pplex.audio.files import read_pcm
from pplex.batch import answering
from pplex.batch.plan import OutputOptions, Selection
from pplex.batch.prepare import Batch
from pplex.errors import PplexError
from pplex.respond import run as respond_run
from pplex.respond.outputs import SoundWriter, open_sink
from pplex.respond.request import Outputs, Request
from pplex.respond.run import Config, respond


class Quietly:
    """A report to nobody."""

    shows_bars = False

    def __getattr__(self, name: str):
        return lambda *args: None


@pytest.fixture
def calls(tmp_path) -> Path:
    """Three recordings, one of them resampled."""
    for idx, samples in enumerate((70000, 61000, 3000)):
        record(tmp_path / "in" / f"{idx}.wav", samples, idx)
    pcm = np.random.default_rng(5).uniform(-0.3, 0.3, 50000)
    soundfile.write(tmp_path / "in" / "1.wav", pcm, 16000)
    return tmp_path / "in"


@pytest.fixture
def batch(tmp_path, calls, tiny) -> Batch:
    return Batch(
        selection=Selection((calls,)),
        outdir=tmp_path / "out",
        outputs=OutputOptions(transcripts=("json",), tokens=True),
        settings=SETTINGS,
        model_name=str(tiny),
        offline=True,
        batch_size=2,
    )


@pytest.mark.parametrize("layout", ["stereo", "agent", "separate"])
def test_a_batch_of_long_recordings_gives_the_bytes_of_those_in_memory(
    batch, tmp_path, monkeypatch, layout
):
    outputs = OutputOptions(layout=layout, transcripts=("json",), tokens=True)
    go(batch, outputs=outputs)
    monkeypatch.setattr(respond_run, "MOST_KEPT", 0)
    summary, _ = go(batch, outputs=outputs, outdir=tmp_path / "long")
    assert (summary.done, summary.failed) == (3, {})
    assert contents(tmp_path / "long") == contents(batch.outdir)


@pytest.mark.parametrize("tail", [0.5, "auto"])
def test_respond_gives_a_long_recording_the_bytes_of_one_in_memory(
    calls, tiny, tmp_path, monkeypatch, tail
):

    for name, most in (("short", 1 << 23), ("long", 0)):
        monkeypatch.setattr(respond_run, "MOST_KEPT", most)
        outputs = Outputs(tmp_path / f"{name}.wav", "stereo")
        settings = replace(SETTINGS, tail=tail)
        request = Request(calls / "1.wav", outputs, settings)
        respond(request, Config(str(tiny), True, False), Quietly())
    written = (tmp_path / "long.wav").read_bytes()
    assert written == (tmp_path / "short.wav").read_bytes()
    assert soundfile.info(tmp_path / "long.wav").frames >= 75000


def test_of_a_long_recording_no_samples_stay_in_memory(calls):
    kept = read_pcm(calls / "1.wav", sample_rate=RATE, tail=100)
    read = read_pcm(calls / "1.wav", sample_rate=RATE, tail=100, most_kept=1000)
    assert read._kept is None and read.num_samples == 75100
    np.testing.assert_array_equal(read.pcm, kept.pcm)
    assert not kept.pcm[-100:].any()


def test_a_recording_that_changes_before_it_is_answered_fails_alone(
    calls, batch, tmp_path, monkeypatch
):
    go(batch)
    monkeypatch.setattr(respond_run, "MOST_KEPT", 0)
    read_request = answering.read_request

    def read_and_change(request, rate):
        read = read_request(request, rate)
        if request.source.name == "0.wav":
            record(request.source, 50000, 9)
        return read

    monkeypatch.setattr(answering, "read_request", read_and_change)
    summary, notes = go(batch, outdir=tmp_path / "long")
    assert summary.done == 2
    assert "has changed while it was read" in notes.errors["0.wav"]
    expected = {k: v for k, v in contents(batch.outdir).items() if k[0] != "0"}
    assert contents(tmp_path / "long") == expected


def test_sound_that_cannot_be_written_is_said_at_the_end_and_leaves_nothing(tmp_path):
    def open_files():
        return open_sink("stereo", {"audio": tmp_path / "o.wav"}, RATE)

    pcm = np.zeros(500, np.float32)
    writer = SoundWriter(open_files)
    writer(0, pcm, pcm)
    for path in tmp_path.iterdir():
        path.unlink()
        path.mkdir()
    writer(500, pcm, pcm)
    writer(1000, pcm, pcm)
    with pytest.raises(PplexError, match="cannot write"):
        writer.finish()
    assert not (tmp_path / "o.wav").exists()


def test_sound_that_is_made_again_begins_anew(tmp_path):
    def open_files():
        return open_sink("agent", {"audio": tmp_path / "o.wav"}, RATE)

    writer = SoundWriter(open_files)
    writer(0, np.zeros(500), np.full(500, 0.5))
    writer(0, np.zeros(300), np.full(300, 0.25))
    writer(300, np.zeros(40), np.full(40, 0.25))
    assert writer.num_samples == 340
    writer.finish()
    pcm, _ = soundfile.read(tmp_path / "o.wav")
    assert len(pcm) == 340 and (pcm < 0.3).all()
    assert os.listdir(tmp_path) == ["o.wav"]


def test_sound_that_is_given_up_leaves_nothing(tmp_path):
    def open_files():
        return open_sink("agent", {"audio": tmp_path / "o.wav"}, RATE)

    writer = SoundWriter(open_files)
    writer(0, np.zeros(500), np.zeros(500))
    writer.abandon()
    assert os.listdir(tmp_path) == []
