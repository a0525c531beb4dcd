"""What is said of a model before it is downloaded, and of one that is slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pplex.bench.estimate import best_model
from pplex.bench.random_model import random_lm, random_model, random_prompt
from pplex.checkpoint.known import PUBLISHED_BITS
from pplex.cli.progress import Progress
from pplex.conversation.session import warm_up
from pplex.engine.choose import KINDS, batch_size, cost_of, need_bytes
from pplex.errors import PplexError
from pplex.model.config import ModelConfig
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


def remember(monkeypatch, memory_gb: float | None, free_gb: float | None = None):
    sizes = memory_gb, memory_gb if free_gb is None else free_gb
    monkeypatch.setattr("pplex.engine.device.memory_gb", lambda: sizes)


@pytest.mark.parametrize("command", ["respond", "batch"])
def test_what_no_memory_holds_is_refused_before_its_download(
    run, monkeypatch, call, tmp_path, command
):
    remember(monkeypatch, 4.0)
    result = run(command, call, "-o", tmp_path / "out.wav", "--model", "8bit")
    assert result.exit_code == 1
    assert "8bit takes " in result.stderr and "this machine has 4.0 GB" in result.stderr
    assert "network" not in result.stderr and not (tmp_path / "out.wav").exists()


def test_nothing_is_said_of_a_download_for_a_name_that_is_wrong(run, tmp_path):
    result = run("respond", tmp_path / "none.wav", "-o", tmp_path / "out.wav")
    assert "none.wav does not exist" in result.stderr
    assert "will be downloaded" not in result.stderr


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


def on_a_mac(monkeypatch, total_gb: float, ms: dict[str, float]) -> float:
    """Metal, which has a part of memory, and milliseconds of a frame; that part."""
    for name, kind in KINDS.items():
        found = replace(kind, is_available=lambda is_it=name == "gpu": is_it)
        monkeypatch.setitem(KINDS, name, found)
    held_gb = total_gb * (2 / 3 if total_gb <= 36 else 3 / 4)
    remember(monkeypatch, total_gb, held_gb)
    factors = {name: each / 80 for name, each in ms.items()}
    monkeypatch.setattr("pplex.bench.estimate.estimate_published", factors.get)
    return held_gb


M2, M4, PRO, MAX = (
    dict(zip(("4bit", "8bit", "bf16"), ms, strict=True))
    for ms in ((67, 113, 190), (56, 94, 160), (28, 45, 75), (18, 27, 42))
)


@pytest.mark.parametrize(
    ("total_gb", "ms", "best", "with_bf16", "rows"),
    [
        (8, M2, "mini", "mini", 0),
        (16, M2, "4bit", "4bit", 7),
        (16, M4, "4bit", "4bit", 7),
        (24, M2, "4bit", "4bit", 16),
        (24, PRO, "8bit", "8bit", 10),
        (36, MAX, "8bit", "bf16", 24),
        (64, MAX, "8bit", "bf16", 65),
    ],
)
def test_auto_is_the_best_that_fits_and_keeps_up(
    monkeypatch, total_gb, ms, best, with_bf16, rows
):
    held_gb = on_a_mac(monkeypatch, total_gb, ms)
    assert best_model(offline=False).name == best
    assert best_model(offline=True).name == "mini"
    if best != "mini":
        config, bits = ModelConfig(), PUBLISHED_BITS[best]
        cost, minute = cost_of(config, random_lm(config.lm, bits)), 750
        free = 1e9 * held_gb - cost.held
        found = batch_size(config, cost, minute, free, prompt_frames=250)
        assert need_bytes(config, cost, minute + 250, found) < 1e9 * held_gb
        assert found == rows
    monkeypatch.setattr("pplex.bench.estimate.cached_snapshot", lambda *_: Path("."))
    assert best_model(offline=True).name == with_bf16


def test_what_auto_is_is_said_with_the_reasons(run, monkeypatch, call, tmp_path):
    on_a_mac(monkeypatch, 14, M4)
    line = "respond", call, "-o", tmp_path / "out.wav", "--model", "auto"
    assert "auto is 4bit: 6.2 GB" in run(*line, "--kv-bits", 8).stderr
    result = run(*line)
    assert result.stderr.startswith(
        "--model auto is 4bit: 7.0 GB of memory, about 42 s for a minute of sound; "
        "bf16 is not on this machine; 8bit takes 10.6 GB of memory, of 9.3\n"
    )
    assert "the network was asked" in result.stderr
    on_a_mac(monkeypatch, 16, dict.fromkeys(M4, 240))
    monkeypatch.setenv("PPLEX_MODEL", "auto")
    result = run("respond", call, "-o", tmp_path / "out.wav")
    assert result.exit_code == 0
    assert "4bit takes about 3 minutes for a minute of sound" in result.stderr


def test_what_would_be_swapped_is_said_before_its_download(
    run, monkeypatch, call, tmp_path
):
    on_a_mac(monkeypatch, 14, M4)
    result = run("respond", call, "-o", tmp_path / "out.wav", "--model", "8bit")
    assert (
        "warning: 8bit takes 10.6 GB of memory and this machine has 9.3 GB of 14.0"
        in result.stderr
    )
    assert "--model 4bit fits and takes 7.0 GB of memory, about 42 s" in result.stderr
    assert "the network was asked" in result.stderr


def test_nothing_is_foreseen_of_models_that_are_here(run, monkeypatch, call, tmp_path):
    remember(monkeypatch, 0.001)
    result = run("respond", call, "-o", tmp_path / "out.wav", "--model", "mini")
    assert result.exit_code == 0 and "takes" not in result.stderr


def test_the_list_says_how_long_what_fits_takes(run, monkeypatch):
    monkeypatch.setattr("pplex.engine.device.available_gb", lambda: 10.0)
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
