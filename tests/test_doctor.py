"""``pplex doctor`` tells what runs here."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from random_checkpoint import write_checkpoint
from small import SMALL
from twins import REPOS, write_twin

from pplex.bench import doctor as job
from pplex.bench.random_model import random_lm
from pplex.checkpoint.download import Online
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.hub_cache import ModelEntry
from pplex.conversation.session import load
from pplex.engine.choose import KINDS, kind_here
from pplex.model.config import LmConfig, ModelConfig


@pytest.fixture(autouse=True)
def no_models(monkeypatch, tmp_path):
    """A cache of Hugging Face with nothing in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def small_machine(monkeypatch):
    """No long copies, and answers that take no time; what was estimated."""
    estimated = []

    def estimate(config: ModelConfig, bits: int) -> float:
        estimated.append((config, bits))
        return 0.04

    monkeypatch.setattr(job, "copy_bandwidth_gb_s", lambda: 50.0)
    monkeypatch.setattr(job, "loop_frame_s", lambda engine, start: 0.02)
    monkeypatch.setattr(job, "estimate_frame_s", estimate)
    return estimated


def entry(name: str, path: Path | None = None) -> ModelEntry:
    return ModelEntry(
        *(name, None, "", None, None, path, None, None), complete=path is not None
    )


def test_the_weights_of_the_7b_model_are_counted():
    tensors = random_lm(LmConfig(), 16)
    for name, size in (("c", 2), ("cpu", 4), ("cuda", 2), ("gpu", 2)):
        step = KINDS[name].cost(ModelConfig(), tensors).step
        assert 7.2e9 < step / size < 7.5e9


def test_doctor_prints_machine_and_models(run, small_machine):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "copied at 50.0 GB/s" in result.stdout and "8bit" in result.stdout
    assert f"engine {kind_here()} in " in result.stdout
    (mini,) = (line for line in result.stdout.splitlines() if line[:5] == "mini ")
    assert re.search(r"yes .* 15 s +0\.25  keeps up with a live stream$", mini)
    assert max(map(len, result.stdout.splitlines()[4:])) <= 80
    assert "test: the built-in model runs, real-time factor 0.250" in result.stdout


def test_doctor_prints_pure_json(run, small_machine):
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert found["is_well"] and found["network"] is None
    assert {m["name"] for m in found["models"]} >= {"8bit", "4bit", "bf16", "mini"}
    kind = kind_here()
    assert found["machine"]["engine"] == kind
    assert found["machine"]["form"] == str(KINDS[kind].one)
    assert found["machine"]["bandwidth_gb_s"] == 50.0


def test_published_models_are_estimated_in_their_bits(run, small_machine, monkeypatch):
    monkeypatch.setattr(job, "memory_gb", lambda: (1000.0, 900.0))
    found = json.loads(run("doctor", "--json").stdout)
    models = {model["name"]: model for model in found["models"]}
    for name in ("4bit", "8bit", "bf16"):
        model = models[name]
        assert model["real_time_factor"] == pytest.approx(0.04 * 12.5)
        assert not model["is_measured"] and not model["complete"] and model["fits"]
        assert model["verdict"] == (
            "not on this machine; it would run; real-time factor 0.50 (estimated from "
            "a short measurement): keeps up with a live stream, about 30 s for a "
            "minute of sound"
        )
    assert sorted(bits for _, bits in small_machine) == [4, 8, 16]
    assert {config for config, _ in small_machine} == {ModelConfig()}
    needs = [models[name]["need_gb"] for name in ("4bit", "8bit", "bf16")]
    assert needs == sorted(needs) and 4 < needs[0] < needs[2] < 40
    mini = models["mini"]
    assert mini["is_measured"] and mini["complete"] and mini["faults"] == []


def test_a_slow_model_is_said_to_be_one(run, small_machine, monkeypatch):
    monkeypatch.setattr(job, "estimate_frame_s", lambda config, bits: 0.08)
    monkeypatch.setattr(job, "memory_gb", lambda: (1000.0, 900.0))
    result = run("doctor", "--model", "4bit")
    assert re.search(r"4bit +no .* 60 s +1\.0  slower than real time\n", result.stdout)


def test_doctor_looks_at_the_models_that_are_named(run, small_machine, tiny):
    result = run("doctor", "--json", "--model", tiny, "-m", "mini")
    models = json.loads(result.stdout)["models"]
    assert [model["name"] for model in models] == [str(tiny), "mini"]
    assert models[0]["complete"] and models[0]["num_voices"] == 2
    ((config, bits),) = small_machine
    assert bits == 16
    assert config == resolve(str(tiny), offline=True).folder.read_config()
    text = run("doctor", "--model", tiny).stdout
    assert re.search(r"yes .* 30 s +0\.50\b", text) and str(tiny) in text
    assert "8bit" not in text


@pytest.mark.parametrize(
    ("stored", "nearest"), [(3, 4), (4, 4), (6, 8), (8, 8), (16, 16)]
)
def test_a_model_is_estimated_in_bits_near_its_own(
    tmp_path, small_machine, stored, nearest
):
    write_checkpoint(tmp_path / "m", SMALL, "mlx-split", bits=stored, group_size=32)
    job.look_at_model(entry("m", tmp_path / "m"), job.look_at_machine(), None)
    assert small_machine == [(SMALL, nearest)]


def test_a_model_that_does_not_exist_is_named(run, small_machine, tmp_path):
    result = run("doctor", "--model", tmp_path / "none")
    assert result.exit_code == 1 and str(tmp_path / "none") in result.stderr


def test_a_built_in_model_that_does_not_run_is_at_fault(
    run, small_machine, monkeypatch
):
    monkeypatch.setattr(job, "loop_frame_s", lambda engine, start: float("nan"))
    result = run("doctor", "--model", "mini")
    assert result.exit_code == 1
    assert "test: the built-in model gave sound that is no finite" in result.stdout

    def fail(engine: object, start: object) -> float:
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(job, "loop_frame_s", fail)
    result = run("doctor", "--model", "mini", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and not found["runs"] and not found["is_well"]
    assert found["test_run"] == "the built-in model does not run: no memory"
    (mini,) = found["models"]
    assert not mini["is_measured"]


def test_what_a_model_needs_is_what_it_costs(tiny, small_machine):
    """And keys and values of a whole window."""
    machine = job.look_at_machine()
    need_gb = job.look_at_model(entry("m", tiny), machine, None).need_gb
    model = load(resolve(str(tiny), offline=True))
    cost, window = model.engine.cost(), model.config.lm.window
    assert need_gb == pytest.approx((cost.held + window * cost.position) / 1e9)
    for free_gb, fits in ((1.01 * need_gb, True), (0.99 * need_gb, False)):
        small = replace(machine, free_memory_gb=free_gb)
        found = job.look_at_model(entry("m", tiny), small, None)
        assert found.fits == fits
        assert (found.real_time_factor is not None) == fits
    unknown = replace(machine, free_memory_gb=None)
    assert job.look_at_model(entry("m", tiny), unknown, None).fits is None


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
    machine = job.look_at_machine()
    found = job.look_at_model(entry("x", tmp_path), machine, None)
    assert found.faults and found.verdict.startswith("at fault")
    assert found.real_time_factor is None and small_machine == []


def test_doctor_verifies_a_models_files(tiny, tmp_path, small_machine):
    """As ``pplex models verify`` does, but for values that were changed."""
    shutil.copytree(tiny, tmp_path / "m")
    machine, model = job.look_at_machine(), entry("m", tmp_path / "m")
    found = job.look_at_model(model, machine, None)
    assert found.faults == () and found.num_voices > 0
    tokenizer = next((tmp_path / "m").glob("*.model"))
    tokenizer.write_bytes(b"no tokenizer")
    (fault,) = job.look_at_model(model, machine, None).faults
    assert tokenizer.name in fault
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["lm"]["num_layers"] = 77
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    faults = job.look_at_model(model, machine, None).faults
    assert any("layers" in text for text in faults)


def test_a_named_7b_is_held_against_the_published_one(tmp_path, small_machine):
    """Zeros in the published form: a fault where the name says what it should be."""
    write_twin(tmp_path, REPOS["8bit"], ModelConfig(), sparse=True)
    machine = job.look_at_machine()
    named = replace(entry("8bit", tmp_path), repo=REPOS["8bit"].name)
    assert job.look_at_model(named, machine, None).published is None
    found = job.look_at_model(named, machine, None, closely=True)
    assert found.published is not None
    assert "this is not PersonaPlex as published" in found.published
    faults = {fault.partition(":")[0] for fault in found.faults}
    assert faults == {"tokenizer", "voice NATF2", "first input"}
    own = job.look_at_model(entry("own", tmp_path), machine, None, closely=True)
    assert (own.published, own.faults) == (found.published, ())


def test_a_model_too_large_for_the_memory_is_said(small_machine):
    machine = replace(job.look_at_machine(), free_memory_gb=3.0)
    found = job.look_at_model(entry("8bit"), machine, None)
    assert found.verdict.startswith("will not run: it needs about ")
    assert f"{found.need_gb:.0f} GB" in found.verdict and small_machine == []
