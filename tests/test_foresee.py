"""What is said of a model before it is downloaded, and of one that is slow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pplex.bench.random_model import random_model, random_prompt
from pplex.cli.progress import Progress
from pplex.conversation.session import warm_up
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No model is on this machine, and none can be had."""

    def download(*_: object) -> Path:
        raise PplexError("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("pplex.checkpoint.hub.download", download)
    hours = {"4bit": 240.0, "8bit": 240.0, "bf16": 240.0}
    monkeypatch.setattr("pplex.bench.estimate.estimate_published", hours.get)


@pytest.fixture
def call(data) -> Path:
    return data / "respond" / "user_c.wav"


def remember(monkeypatch, memory_gb: float | None) -> None:
    monkeypatch.setattr("pplex.cli.foresee.machine_memory_gb", lambda: memory_gb)


@pytest.mark.parametrize("command", ["respond", "batch"])
def test_what_no_memory_holds_is_refused_before_its_download(
    run, monkeypatch, call, tmp_path, command
):
    remember(monkeypatch, 4.0)
    result = run(command, call, "-o", tmp_path / "out.wav", "--model", "8bit")
    assert result.exit_code == 1
    assert "8bit takes " in result.stderr and "this machine has 4 GB" in result.stderr
    assert "network" not in result.stderr and not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("memory_gb", [1000.0, None])
def test_how_long_it_will_take_is_said_before_the_download(
    run, monkeypatch, call, tmp_path, memory_gb
):
    remember(monkeypatch, memory_gb)
    result = run("respond", call, "-o", tmp_path / "out.wav", "--model", "4bit")
    assert result.exit_code == 1 and "the network was asked" in result.stderr
    said = "4bit will be downloaded, 5.8 GB; this machine takes about 4 hours for a"
    assert said in result.stderr


def test_a_model_may_be_pulled_for_another_machine(run, monkeypatch):
    remember(monkeypatch, 4.0)
    result = run("models", "pull", "bf16")
    assert "warning: bf16 takes " in result.stderr
    assert "the network was asked" in result.stderr


def test_nothing_is_foreseen_of_models_that_are_here(run, monkeypatch, call, tmp_path):
    remember(monkeypatch, 0.001)
    result = run("respond", call, "-o", tmp_path / "out.wav", "--model", "mini")
    assert result.exit_code == 0 and "takes" not in result.stderr


def test_the_list_says_how_long_what_fits_takes(run, monkeypatch):
    monkeypatch.setattr("pplex.cli.models.machine_memory_gb", lambda: 10.0)
    first, *_ = run("models", "list").stdout.split("\n\n")
    lines = {line.split()[0]: line for line in first.splitlines()}
    assert lines["4bit"].endswith("  4 hours")
    assert lines["8bit"].endswith("no    -") and lines["mini"].endswith("yes   -")


def test_a_machine_slower_than_the_sound_is_said_to_be(capsys):
    progress = Progress(0, channel_chosen=True)
    progress.expecting(0.9)
    assert capsys.readouterr().err == ""
    progress.expecting(3.3)
    said = "this machine takes about 3 minutes for a minute of sound\n"
    assert capsys.readouterr().err == said


def test_warming_up_tells_the_time_of_a_frame_that_follows():
    model = random_model("tiny", 16)
    start = model.engine.prefill(random_prompt(model.config))
    seconds = warm_up(model.engine, start, SamplingConfig())
    assert model.engine.is_async == (seconds is None)
    assert seconds is None or 0 < seconds < 10
    assert np.isfinite(seconds or 0.0)
