"""Which engine runs here, in what form weights compute, and what a model takes."""

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
from pplex.bench.random_model import random_codec, random_lm
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.conversation.session import load
from pplex.engine import choose as job
from pplex.engine.base import Cost
from pplex.engine.c.engine import CEngine
from pplex.engine.choose import KINDS, batch_size, choose_form, cost_of, make_engine
from pplex.engine.mlx.engine import MlxEngine
from pplex.model.config import ModelConfig
from pplex.model.sampling import GREEDY
from pplex.respond.request import Settings

AVAILABLE = [name for name, kind in KINDS.items() if kind.is_available()]
PUBLISHED = ModelConfig()


AT_8 = ", keys and values at 8 bits"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A checkpoint with weights of 4 bits."""
    folder = tmp_path_factory.mktemp("compute") / "packed"
    write_checkpoint(folder, SMALL, "mlx-split", bits=4, voice_frames=12)
    return folder


def on(monkeypatch, kind: str, free_gb: float | None = 1000.0) -> None:
    """Let ``kind`` be the best engine here."""
    for name in KINDS:
        found = replace(KINDS[name], is_available=lambda is_it=name == kind: is_it)
        monkeypatch.setitem(KINDS, name, found)
    monkeypatch.setattr(job, "memory_gb", lambda: (free_gb, free_gb))


def test_a_fact_is_recorded_of_every_kind_of_engine():
    assert list(KINDS) == ["c", "cpu", "cuda", "gpu"]
    for kind in KINDS.values():
        assert kind.one.reason and kind.many.reason


def test_the_first_engine_that_is_available_is_made(monkeypatch):
    assert job.kind_here() == AVAILABLE[0] in ("c", "cpu")  # tests run on a CPU
    for name, engine in (("c", CEngine), ("cpu", MlxEngine)):
        if name not in AVAILABLE:
            continue
        on(monkeypatch, name)
        assert job.kind_here() == name
        made = make_engine(SMALL, random_lm(SMALL.lm, 4), random_codec(SMALL.mimi))
        assert type(made) is engine


def test_without_our_libraries_mlx_runs_the_model(monkeypatch):
    monkeypatch.setattr("pplex.engine.c.binding.is_built", lambda: False)
    assert job.kind_here() == "cpu"


def test_what_is_asked_for_is_done_whatever_is_faster(monkeypatch):
    tensors = random_lm(SMALL.lm, 4)
    for kind in KINDS:
        on(monkeypatch, kind, free_gb=0.0)
        for many in (False, True):
            assert choose_form("dense", SMALL, tensors, many=many).dense
            assert not choose_form("quantized", SMALL, tensors, many=many).dense


def test_cuda_writes_weights_out_for_batches_only(monkeypatch):
    on(monkeypatch, "cuda")
    tensors = random_lm(PUBLISHED.lm, 4)
    assert choose_form("auto", PUBLISHED, tensors, many=True).dense
    assert not choose_form("auto", PUBLISHED, tensors, many=False).dense


@pytest.mark.parametrize(
    ("free_gb", "dense"), [(1000.0, True), (1.0, False), (None, False)]
)
def test_weights_are_written_out_only_where_memory_holds_them(
    monkeypatch, free_gb, dense
):
    on(monkeypatch, "cpu", free_gb)
    choice = choose_form("auto", PUBLISHED, random_lm(PUBLISHED.lm, 4), many=False)
    assert choice.dense == dense
    assert dense or "GB" in choice.reason


def test_weights_written_out_have_half_of_the_free_memory(monkeypatch):
    tensors = random_lm(PUBLISHED.lm, 4)
    need = KINDS["cpu"].cost(PUBLISHED, tensors.write_out()).held / 1e9
    for free_gb, dense in ((2.01 * need, True), (1.99 * need, False)):
        on(monkeypatch, "cpu", free_gb)
        assert choose_form("auto", PUBLISHED, tensors, many=False).dense == dense


def test_the_7b_in_float32_takes_four_bytes_a_weight(monkeypatch):
    # 7.4e9 weights that a frame reads, and the tables: see the checkpoint's sizes.
    on(monkeypatch, "cpu")
    assert 30 < cost_of(PUBLISHED, random_lm(PUBLISHED.lm, 4).write_out()).held / 1e9
    assert cost_of(PUBLISHED, random_lm(PUBLISHED.lm, 4).write_out()).held / 1e9 < 34


@pytest.mark.parametrize("kind", AVAILABLE)
@pytest.mark.parametrize("form", ["quantized", "dense"])
@pytest.mark.parametrize(
    ("bits", "layout"),
    [
        *((4, "mlx-split"), (8, "mlx-split"), (16, "mlx-split")),
        *((4, "mlx"), (16, "mlx"), (4, "pytorch"), (16, "pytorch")),
    ],
)
def test_what_a_model_takes_is_known_before_it_is_loaded(
    monkeypatch, tmp_path, bits, layout, form, kind
):
    on(monkeypatch, kind)
    write_checkpoint(tmp_path / "m", SMALL, layout, bits=bits, group_size=32)
    folder = resolve(str(tmp_path / "m"), offline=True).folder
    tensors, codec = lm_tensors(folder, SMALL.lm), codec_tensors(folder, SMALL.mimi)
    if choose_form(form, SMALL, tensors, many=False).dense:
        tensors = tensors.write_out()
    found = cost_of(SMALL, tensors)
    in_files = sum(w.nbytes for w in tensors.weights.values() if w.ndim == 2)
    engine = make_engine(SMALL, tensors, codec)
    assert engine.compute == (form if bits < 16 else "dense")
    assert engine.cost() == found
    assert found.codec == sum(array.nbytes for array in codec.values())
    # Keys and values of 2 layers, 64 wide.
    assert found.position == 2 * 2 * 64 * (4 if engine.dtype == "float32" else 2)
    assert found.codec + found.step < found.held < found.codec + 3 * in_files


def test_sixteen_bits_stay_sixteen_bits_of_either_kind(monkeypatch, tmp_path):
    if "c" not in AVAILABLE:
        pytest.skip("the compiled step is missing")
    on(monkeypatch, "c")
    write_checkpoint(tmp_path / "m", SMALL, "mlx-split")
    folder = resolve(str(tmp_path / "m"), offline=True).folder
    costs = []
    for dtype in (mx.bfloat16, mx.float16):
        tensors = lm_tensors(folder, SMALL.lm).cast(dtype)
        costs.append(cost_of(SMALL, tensors))
        engine = make_engine(SMALL, tensors, codec_tensors(folder, SMALL.mimi))
        assert engine.cost() == costs[0]
    assert costs[1] == costs[0]


@pytest.mark.parametrize("form", ["quantized", "dense"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_is_said_of_mlx_is_what_its_arrays_hold(monkeypatch, tmp_path, bits, form):
    on(monkeypatch, "cpu")
    write_checkpoint(tmp_path / "m", SMALL, "mlx-split", bits=bits)
    model = load(resolve(str(tmp_path / "m"), offline=True), compute=form)
    arrays = dict(tree_flatten(model.engine.lm.parameters()))
    codec = codec_tensors(model.local.folder, SMALL.mimi).values()
    held = sum(array.nbytes for array in [*arrays.values(), *codec])
    tables = [array for name, array in arrays.items() if "_emb." in name]
    norms = [array for name, array in arrays.items() if "norm" in name]
    cost = model.engine.cost()
    assert cost.held == held - sum(a.nbytes for a in norms)
    assert cost.step == cost.held - cost.codec - sum(a.nbytes for a in tables)


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
    found = {}
    for form in ("quantized", "dense"):
        said = forecast(replace(batch, compute=form), progress=False)
        cost = load(local, compute=form, many=True).engine.cost()
        assert said.weights_gb == cost.held / 1e9
        found[form] = said.weights_gb
    assert found["quantized"] < found["dense"]


def test_stored_forms_are_told_apart(packed, tiny):
    for path, is_quantized in ((packed, True), (tiny, False)):
        folder = resolve(str(path), offline=True).folder
        tensors = lm_tensors(folder, folder.read_config().lm)
        assert bool(tensors.forms) == is_quantized


@pytest.mark.parametrize("form", ["quantized", "dense"])
def test_a_model_computes_in_the_form_asked_for(packed, form):
    model = load(resolve(str(packed), offline=True), compute=form)
    assert model.engine.compute == form
    assert str(model.form) == f"{form}: as asked for"
    assert 4 in model.bits  # as the file has them


def test_a_model_without_packed_weights_is_dense(tiny):
    model = load(resolve(str(tiny), offline=True), compute="quantized")
    assert model.engine.compute == "dense" and model.form.dense
    assert str(model.form) == "dense: no weights are stored quantized"


COST = Cost(
    step=4 << 20,
    position=1 << 16,
    codec=0,
    codec_state=0,
    codec_work=10**9,
    held=4 << 20,
)


def test_rows_on_a_cpu_are_as_many_as_its_cache_has_room_for(monkeypatch):
    on(monkeypatch, "c")
    sizes = [batch_size(PUBLISHED, COST, n, 1e12) for n in (10, 250, 750, 3000)]
    assert sizes == [8, 6, 4, 4]  # 96 MB of keys and values, a vector's rows at least
    takes = [batch_size(PUBLISHED, COST, n, 1e12, takes=True) for n in (10, 400, 3000)]
    assert takes == [16, 10, 4]  # 256 MB
    # Where a step reads more weights than that, as many as those.
    heavy = replace(COST, step=12 * 750 << 16)
    assert batch_size(PUBLISHED, heavy, 750, 1e12) == 12
    assert batch_size(PUBLISHED, replace(COST, step=1 << 40), 750, 1e12) == 16


def test_rows_of_mlx_on_a_cpu_share_nothing(monkeypatch):
    on(monkeypatch, "cpu")
    assert batch_size(PUBLISHED, COST, 10, 1e12) == 1


@pytest.mark.parametrize("kind", ["cuda", "gpu"])
def test_rows_on_a_gpu_are_as_many_as_memory_holds(monkeypatch, kind):
    # A tenth stays free, and the codec computes beside the rows.
    on(monkeypatch, kind, free_gb=(20 * 96 * (1 << 16) / 1e9 + 1) / 0.9 + 0.001)
    assert batch_size(PUBLISHED, COST, 96) == 20
    # A ring has places for 32 frames more each time.
    assert batch_size(PUBLISHED, COST, 97) == (15 if kind == "cuda" else 19)
    assert batch_size(PUBLISHED, COST, 100, 1e15) == 256
    assert batch_size(PUBLISHED, COST, 100, 0.0) == 1
    # What has left the window takes nothing.
    on(monkeypatch, kind, free_gb=10.0)
    full = batch_size(PUBLISHED, COST, PUBLISHED.lm.window)
    assert full == batch_size(PUBLISHED, COST, 10**6) > 1
    on(monkeypatch, kind, free_gb=None)
    assert batch_size(PUBLISHED, COST, 100) == 1


def test_respond_says_what_it_chose(run, packed, data, tmp_path):
    call = data / "respond" / "user_c.wav"
    for form, kept in ("dense", ""), ("quantized", AT_8):
        out, stats = tmp_path / f"{form}.wav", tmp_path / f"{form}.json"
        result = run(
            *("respond", call, "-o", out, "--stats", stats, "--model", packed),
            *("--compute", form, "-v", "--prompt", "Hi."),
            *(("--kv-bits", 8) if kept else ()),
        )
        assert result.exit_code == 0, result.stderr
        assert f"compute {form}: as asked for" in result.stderr
        assert json.loads(stats.read_text())["compute"] == form + kept


def test_batch_says_what_it_chose(run, packed, data, tmp_path):
    call = data / "respond" / "user_c.wav"
    result = run(
        *("batch", call, "-o", tmp_path / "out", "--stats", "--model", packed),
        *("--compute", "dense", "-v", "--prompt", "Hi.", "--kv-bits", 8),
    )
    assert result.exit_code == 0, result.stderr
    assert "compute dense: as asked for" in result.stderr
    stats = json.loads((tmp_path / "out" / "user_c.stats.json").read_text())
    assert stats["compute"] == "dense" + AT_8 and stats["step_ms_series"] is None
    (line,) = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[-1:]
    assert json.loads(line)["computed"]["compute"] == stats["compute"]


@pytest.mark.parametrize(("free_gb", "said"), [(1e-4, True), (1000.0, False)])
def test_a_batch_says_that_the_usual_form_does_not_fit(
    run, packed, data, tmp_path, monkeypatch, free_gb, said
):
    on(monkeypatch, "cpu", free_gb)
    call = data / "respond" / "user_c.wav"
    result = run("batch", call, "-o", tmp_path, "--model", packed, "--prompt", "Hi.")
    assert result.exit_code == 0, result.stderr
    assert ("computed quantized: written out they take" in result.stderr) == said
