"""``pplex doctor`` tells what runs here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pplex.bench import doctor as job
from pplex.checkpoint.download import Online
from pplex.checkpoint.hub_cache import ModelEntry
from pplex.model.config import LmConfig


@pytest.fixture
def small_machine(monkeypatch):
    """Products of small matrices, and no built-in model to answer with."""
    monkeypatch.setattr(job, "_SIDE", 64)
    monkeypatch.setattr(job, "try_model", lambda: (0.25, "fine"))


def test_the_weights_of_the_7b_model_are_counted():
    assert 7.2e9 < job.weights_per_frame(LmConfig()) < 7.5e9


def test_doctor_prints_machine_and_models(run, small_machine):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "GB/s" in result.stdout and "8bit" in result.stdout
    assert "real-time factor 0.25 (measured): keeps up" in result.stdout


def test_doctor_prints_pure_json(run, small_machine):
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert found["is_well"] and found["network"] is None
    assert {m["name"] for m in found["models"]} >= {"8bit", "4bit", "bf16", "mini"}
    assert set(found["machine"]["ns_per_weight"]) == {"4", "8", "16"}


def test_doctor_goes_online_only_when_asked(run, small_machine, monkeypatch):
    asked = []

    def look() -> Online:
        asked.append(1)
        return Online(False, None, "no route")

    monkeypatch.setattr("pplex.checkpoint.download.check_network", look)
    run("doctor")
    assert not asked
    assert "not reachable, no login (no route)" in run("doctor", "--network").stdout


def test_a_broken_model_is_at_fault(tmp_path, small_machine):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    machine = job.look_at_machine("none")
    entry = ModelEntry(
        name="x",
        repo=None,
        description="",
        download_gb=None,
        memory_gb=None,
        path=Path(tmp_path),
        revision=None,
        size_bytes=64,
        complete=True,
    )
    found = job.look_at_model(entry, machine, None)
    assert found.faults and found.verdict.startswith("at fault")


def test_doctor_verifies_a_models_files(tiny, tmp_path, small_machine):
    """As ``pplex models verify`` does, but for values that were changed."""
    shutil.copytree(tiny, tmp_path / "m")
    machine = job.look_at_machine("none")
    entry = ModelEntry(
        "m", None, "", None, None, tmp_path / "m", None, None, complete=True
    )
    found = job.look_at_model(entry, machine, None)
    assert found.faults == () and found.num_voices > 0
    tokenizer = next((tmp_path / "m").glob("*.model"))
    tokenizer.write_bytes(b"no tokenizer")
    (fault,) = job.look_at_model(entry, machine, None).faults
    assert tokenizer.name in fault
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["lm"]["num_layers"] = 77
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    faults = job.look_at_model(entry, machine, None).faults
    assert any("layers" in text for text in faults)


def test_a_model_too_large_for_the_memory_is_said(small_machine):
    machine = job.look_at_machine("none")
    entry = ModelEntry("8bit", None, "", 9.8, 1e6, None, None, None, False)
    assert job.look_at_model(entry, machine, None).verdict.startswith("will not run")
