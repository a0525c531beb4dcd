"""In what form weights compute: what is asked for, what is faster, what fits."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from random_checkpoint import write_checkpoint
from small import SMALL

from pplex.batch.forecast import forecast
from pplex.batch.plan import OutputOptions, Selection
from pplex.batch.prepare import Batch
from pplex.checkpoint.hub import resolve
from pplex.conversation import compute as job
from pplex.conversation.compute import (
    FACTS,
    choose,
    dense_gb,
    is_quantized,
    load_as,
    loaded_gb,
)
from pplex.model.config import LmConfig
from pplex.model.sampling import GREEDY
from pplex.respond.request import Settings


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A checkpoint with weights of 4 bits."""
    folder = tmp_path_factory.mktemp("compute") / "packed"
    write_checkpoint(folder, SMALL, "mlx-split", bits=4, voice_frames=12)
    return folder


def on(monkeypatch, backend: str, free_gb: float | None = 1000.0) -> None:
    monkeypatch.setattr(job, "backend", lambda: backend)
    monkeypatch.setattr(job, "memory_gb", lambda: (free_gb, free_gb))


@pytest.mark.parametrize("many", [False, True])
def test_every_backend_has_a_fact(many):
    for backend in ("compiled", "cpu", "metal", "cuda"):
        assert FACTS[backend, many].reason
    assert job.backend() in ("compiled", "cpu")  # tests run on a CPU


def test_what_is_asked_for_is_done_whatever_is_faster(monkeypatch):
    for backend in ("compiled", "cpu", "metal", "cuda"):
        on(monkeypatch, backend, free_gb=0.0)
        for many in (False, True):
            assert choose("dense", SMALL.lm, many=many).dense
            assert not choose("quantized", SMALL.lm, many=many).dense


def test_cuda_writes_weights_out_for_batches_only(monkeypatch):
    on(monkeypatch, "cuda")
    assert choose("auto", LmConfig(), many=True).dense
    assert not choose("auto", LmConfig(), many=False).dense


@pytest.mark.parametrize(
    ("free_gb", "dense"), [(1000.0, True), (1.0, False), (None, False)]
)
def test_weights_are_written_out_only_where_memory_holds_them(
    monkeypatch, free_gb, dense
):
    on(monkeypatch, "cpu", free_gb)
    choice = choose("auto", LmConfig(), many=False)
    assert choice.dense == dense
    assert dense or "GB" in choice.reason


def test_the_7b_in_float32_takes_four_bytes_a_weight():
    # 7.4e9 weights that a frame reads, and the tables: see the checkpoint's sizes.
    assert 30 < dense_gb(LmConfig()) < 34


@pytest.mark.parametrize("form", ["quantized", "dense"])
@pytest.mark.parametrize(("bits", "layout"), [(4, "mlx-split"), (16, "pytorch")])
def test_what_a_model_takes_is_known_before_it_is_loaded(
    monkeypatch, tmp_path, bits, layout, form
):
    on(monkeypatch, "cpu")
    steps = SMALL.lm.num_codebooks  # those that are loaded
    write_checkpoint(tmp_path / "m", SMALL, layout, bits=bits, steps=steps)
    local = resolve(str(tmp_path / "m"), offline=True)
    model, choice = load_as(local, form, many=False)
    arrays = [array for _, array in tree_flatten(model.lm.parameters())]
    arrays += mx.load(str(local.folder.codec)).values()
    found = loaded_gb(local, SMALL.lm, dense=choice.dense)
    assert found == pytest.approx(sum(a.nbytes for a in arrays) / 1e9, rel=0.01)


def test_a_dry_run_counts_the_weights_in_the_form_asked_for(packed, data, tmp_path):
    batch = Batch(
        selection=Selection((data / "respond" / "user_c.wav",)),
        outdir=tmp_path / "out",
        outputs=OutputOptions(),
        settings=Settings(None, "Hi.", GREEDY, seed=0),
        model_name=str(packed),
        offline=True,
    )
    local = resolve(str(packed), offline=True)
    for form in ("quantized", "dense"):
        found = forecast(replace(batch, compute=form), progress=False).weights_gb
        assert found == loaded_gb(local, SMALL.lm, dense=form == "dense")


def test_stored_forms_are_told_apart(packed, tiny):
    assert is_quantized(resolve(str(packed), offline=True))
    assert not is_quantized(resolve(str(tiny), offline=True))


@pytest.mark.parametrize("form", ["quantized", "dense"])
def test_a_model_computes_in_the_form_asked_for(packed, form):
    model, choice = load_as(resolve(str(packed), offline=True), form, many=False)
    assert model.compute == form and str(choice) == f"{form}: as asked for"
    assert 4 in model.bits  # as the file has them


def test_a_model_without_packed_weights_is_dense(tiny):
    model, choice = load_as(resolve(str(tiny), offline=True), "quantized", many=False)
    assert model.compute == "dense" and choice.dense


def test_respond_says_what_it_chose(run, packed, data, tmp_path):
    call = data / "respond" / "user_c.wav"
    for form in ("dense", "quantized"):
        out, stats = tmp_path / f"{form}.wav", tmp_path / f"{form}.json"
        result = run(
            *("respond", call, "-o", out, "--stats", stats, "--model", packed),
            *("--compute", form, "-v", "--prompt", "Hi."),
        )
        assert result.exit_code == 0, result.stderr
        assert f"compute {form}: as asked for" in result.stderr
        assert json.loads(stats.read_text())["compute"] == form


def test_batch_says_what_it_chose(run, packed, data, tmp_path):
    call = data / "respond" / "user_c.wav"
    result = run(
        *("batch", call, "-o", tmp_path / "out", "--stats", "--model", packed),
        *("--compute", "dense", "-v", "--prompt", "Hi."),
    )
    assert result.exit_code == 0, result.stderr
    assert "compute dense: as asked for" in result.stderr
    stats = json.loads((tmp_path / "out" / "user_c.stats.json").read_text())
    assert stats["compute"] == "dense" and stats["step_ms_series"] is None
