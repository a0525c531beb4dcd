"""``pplex bench``: figures that fit together, models made in memory, pictures."""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pplex.bench import estimate, submit
from pplex.bench import run as job
from pplex.bench.compare import changes, differences, read_bench
from pplex.bench.parts import measure_parts, traffic
from pplex.bench.plot import plot_frames
from pplex.bench.random_model import (
    MEDIUM,
    SIZES,
    TINY,
    random_codec,
    random_lm,
    random_model,
    random_prompt,
)
from pplex.checkpoint.weights import make_lm
from pplex.conversation.scheduler import converse
from pplex.engine.c import binding, pace
from pplex.engine.choose import (
    KINDS,
    choose_form,
    cost_of,
    kind_here,
    machine,
    make_engine,
)
from pplex.engine.mlx.codec import MlxCodec
from pplex.errors import PplexError
from pplex.model.lm import Lm
from pplex.model.mimi import make_mimi
from pplex.model.sampling import SamplingConfig
from pplex.plots import thinned

AVAILABLE = [name for name, kind in KINDS.items() if kind.is_available()]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No long copies and few rounds."""
    monkeypatch.setattr(job, "copy_bandwidth_gb_s", lambda: 50.0)
    monkeypatch.setattr("pplex.bench.parts._ROUNDS", 2)


def plan(**changed) -> job.Plan:
    settings = {
        "model_name": "none",
        "random": "tiny",
        "bits": 4,
        "batch_sizes": (1, 3),
        "frames": 20,
    }
    return job.Plan(**(settings | changed))


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "copy_bandwidth_gb_s", lambda: 50.0)
        return job.bench(plan(), lambda _: None)


def test_every_frame_and_token_is_counted(found):
    one, three = found.runs
    assert (one.batch_size, one.recordings, one.frames) == (1, 1, 20)
    assert (three.batch_size, three.recordings, three.frames) == (3, 3, 60)
    assert three.tokens == 60 * (1 + 8)
    assert three.audio_s == pytest.approx(60 * 0.08)
    assert len(one.frame_ms_series) == len(three.frame_ms_series) == 20


def test_what_a_frame_takes_adds_up_to_the_wall_time(found):
    for run in found.runs:
        mean = run.wall_s * 1000 / 20
        assert run.frame_ms.mean == pytest.approx(mean)
        assert sum(asdict(run.loop_ms).values()) == pytest.approx(mean)
        assert np.mean(run.frame_ms_series) == pytest.approx(mean, abs=0.001)
        assert run.real_time_factor == pytest.approx(mean / 80)
        assert run.audio_s_per_s == pytest.approx(run.audio_s / run.wall_s)


def test_the_parts_that_are_timed_take_time(found):
    for run in found.runs:
        parts = asdict(run.parts_ms)
        assert parts["encode"] > 0 and parts["decode"] > 0
        assert all(value > 0 for value in parts.values())


def test_bandwidth_is_what_moved_over_the_time_it_took(found):
    for run in found.runs:
        moved = run.moved_mb
        total = moved.weights + moved.kv + moved.codec
        assert run.moved_gb_s == pytest.approx(total / run.frame_ms.mean)
        assert run.bandwidth_percent == pytest.approx(run.moved_gb_s / 50 * 100)


def test_late_frames_are_those_over_80_ms(found):
    for run in found.runs:
        late = sum(ms > 80 for ms in run.frame_ms_series)
        assert run.late_percent == pytest.approx(100 * late / 20)


def test_recordings_of_mixed_lengths_change_hands():
    (run,) = job.bench(plan(batch_sizes=(2,), lengths=(3, 12)), lambda _: None).runs
    assert run.recordings == 6 and 18 <= run.frames <= 72
    assert run.audio_s_per_s > 0
    assert run.frame_ms is None and run.parts_ms is None


def test_a_model_on_disk_is_measured_too(tiny):
    result = job.bench(
        plan(model_name=str(tiny), random=None, batch_sizes=(1,), frames=6),
        lambda _: None,
    )
    assert result.model == str(tiny) and result.runs[0].frames == 6


def test_too_little_memory_is_said(monkeypatch):
    def fail(*_):
        raise RuntimeError("[metal::malloc] Unable to allocate 9 bytes.")

    monkeypatch.setattr(job, "_run", fail)
    with pytest.raises(PplexError, match="batch size 1: give smaller ones"):
        job.bench(plan(), lambda _: None)


# Models made in memory


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_random_model_talks_in_finite_numbers(bits):
    engine = random_model("tiny", bits).engine
    start = engine.prefill(random_prompt(engine.config))
    frames = np.zeros((60, engine.config.frame_size), np.float32)  # past the window
    (reply,) = converse(engine, start, 0, [frames], SamplingConfig(), decode_frames=60)
    assert np.isfinite(reply.pcm).all() and reply.pcm.std() > 0
    assert len(set(reply.text.tolist())) > 5


def test_the_published_layers_are_quantized_and_no_others():
    lm = random_net(8)
    packed = {n for n, m in lm.named_modules() if isinstance(m, nn.QuantizedLinear)}
    layers = TINY.lm.num_layers + 8 * TINY.lm.depformer_num_layers
    assert len(packed) == 4 * layers + 1
    assert "depformer.input" in packed and "text_linear" not in packed
    assert all(lm_module.bits == 8 for lm_module in _quantized(lm))


def test_random_quantized_weights_have_the_deviation_of_a_trained_layer():
    for module in _quantized(random_net(4)):
        whole = mx.dequantize(
            module.weight, module.scales, module.biases, module.group_size, module.bits
        )
        width = whole.shape[1]
        assert float(whole.std()) == pytest.approx(width**-0.5, rel=0.1)
        assert abs(float(whole.mean())) < 0.1 * width**-0.5


def random_net(bits: int) -> Lm:
    return make_lm(TINY.lm, random_lm(TINY.lm, bits), mx.float32)


def _quantized(lm: nn.Module) -> list[nn.QuantizedLinear]:
    return [m for _, m in lm.named_modules() if isinstance(m, nn.QuantizedLinear)]


def test_a_dense_random_model_has_no_packed_weights():
    model = random_model("tiny", 4, "dense")
    assert model.bits == (4,) and model.engine.compute == "dense"
    written_out = random_lm(TINY.lm, 4).write_out()
    assert model.engine.cost() == cost_of(TINY, written_out)
    assert not _quantized(make_lm(TINY.lm, written_out, mx.float32))


def test_the_7b_has_the_published_sizes():
    lm = SIZES["7b"].lm
    assert (lm.dim, lm.num_layers, lm.depformer_dim, lm.depformer_num_layers) == (
        *(4096, 32),
        *(1024, 6),
    )
    assert (MEDIUM.lm.dim, MEDIUM.lm.num_layers, MEDIUM.lm.depformer_dim) == (
        *(512, 8),
        256,
    )


def test_a_model_that_memory_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr("pplex.bench.random_model.memory_gb", lambda: (9.0, 8.0))
    need = cost_of(SIZES["7b"], random_lm(SIZES["7b"].lm, 16)).held / 1e9
    assert 15 < need < 36  # 2 or 4 bytes a weight
    said = f"such a model takes {need:.0f} GB, and 8 GB"
    with pytest.raises(PplexError, match=said):
        random_model("7b", 16)


def test_codecs_that_take_many_recordings_are_timed_so():
    """The way of GPUs, here on the CPU."""
    mimi = make_mimi(TINY.mimi, random_codec(TINY.mimi))
    engine = random_model("tiny", 16).engine
    alone, grouped = (MlxCodec(mimi, on_gpu=on_gpu) for on_gpu in (False, True))
    alone.chunk_frames = grouped.chunk_frames = 32
    assert alone.group == 1 and grouped.group > 4
    engine.codec = alone
    apart = traffic(engine, rows=4, mean_position=10)
    engine.codec = grouped
    parts = measure_parts(engine, rows=4)
    assert parts.encode > 0 and parts.decode > 0
    together = traffic(engine, rows=4, mean_position=10)
    assert together.codec < apart.codec and together.kv == apart.kv
    # Weights once and not four times; what each keeps, in both directions, as before.
    cost = engine.cost()
    assert 32e6 * apart.codec == pytest.approx(4 * (cost.codec + 2 * cost.codec_state))
    assert 32e6 * together.codec == pytest.approx(cost.codec + 8 * cost.codec_state)


@pytest.mark.parametrize("kind", AVAILABLE)
def test_bytes_are_those_of_the_weights_a_frame_reads(kind):
    engine = KINDS[kind].make(TINY, random_lm(TINY.lm, 16), random_codec(TINY.mimi))
    moved = traffic(engine, rows=3, mean_position=10)
    tables = ("text_emb.weight", "audio_emb.weight")
    parameters = tree_flatten(random_net(16).parameters())
    read = sum(a.size for name, a in parameters if not name.endswith(tables))
    # MLX's products on a CPU are of float32; norms do not matter.
    size = 4 if kind == "cpu" else 2
    assert moved.weights == pytest.approx(size * read / 1e6, rel=0.01)
    # Keys and values, 2 layers, 64 wide, 10 positions, 3 rows.
    size = 4 if engine.dtype == "float32" else 2
    assert moved.kv == pytest.approx(2 * 2 * 64 * 10 * size * 3 / 1e6)
    assert moved.total == pytest.approx(moved.weights + moved.kv + moved.codec)
    beyond = traffic(engine, rows=1, mean_position=1000)
    assert beyond.kv == pytest.approx(2 * 2 * 64 * 49 * size / 1e6)


# What a model will take, from a part of it


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_small_model_is_estimated_by_running_it(bits):
    frame_s = estimate.estimate_frame_s(TINY, bits)
    assert 0 < frame_s < 1


@pytest.mark.parametrize("part", ["step", "encode", "decode"])
def test_the_loop_is_timed_from_end_to_end(monkeypatch, part):
    engine = random_model("tiny", 4).engine
    start, spent = engine.prefill(random_prompt(TINY)), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: spent[0])

    def slow(function, frames_of):
        def slowly(given, *args, **how):
            spent[0] += 0.002 * frames_of(given)
            return function(given, *args, **how)

        return slowly

    if part == "step":
        make_rows = engine.rows

        def rows(*args, **how):
            made = make_rows(*args, **how)
            made.step = slow(made.step, lambda user: 1)
            return made

        monkeypatch.setattr(engine, "rows", rows)
    else:
        frames_of = len if part == "encode" else lambda codes: codes.shape[1]
        codec = engine.codec
        monkeypatch.setattr(codec, part, slow(getattr(codec, part), frames_of))
    assert estimate.loop_frame_s(engine, start) == pytest.approx(0.002, rel=0.1)


def test_no_number_is_found_out(monkeypatch):
    engine = random_model("tiny", 4).engine
    decode = engine.codec.decode
    monkeypatch.setattr(engine.codec, "decode", lambda *args: np.nan * decode(*args))
    assert np.isnan(estimate.loop_frame_s(engine, engine.prefill(random_prompt(TINY))))


@pytest.fixture
def in_parts(monkeypatch):
    """No model is small, and no step's time is that of reading."""
    monkeypatch.setattr(estimate, "SMALL_BYTES", 0)
    for name, kind in KINDS.items():
        monkeypatch.setitem(KINDS, name, replace(kind, bytes_per_s=None))


def test_a_step_that_reads_is_estimated_by_the_speed_of_reading(monkeypatch):
    speeds = {4: 1e9, 8: 2e9, 16: 4e9}
    kind = replace(KINDS[kind_here()], bytes_per_s=speeds.__getitem__)
    monkeypatch.setitem(KINDS, kind_here(), kind)
    monkeypatch.setattr(estimate, "SMALL_BYTES", 0)
    monkeypatch.setattr(estimate, "_codec_s", lambda _: (0.0, True))
    for bits in speeds:
        tensors = random_lm(TINY.lm, bits)
        dense = choose_form("auto", TINY, tensors, many=False).dense
        cost = cost_of(TINY, tensors.write_out() if dense else tensors)
        read = cost.step + cost.position * TINY.lm.window
        speed = speeds[16 if dense else bits]
        assert estimate.estimate_frame_s(TINY, bits) == pytest.approx(read / speed)


@pytest.mark.skipif(not binding.is_built(), reason="the compiled step is missing")
def test_the_speed_of_reading_is_measured(monkeypatch):
    monkeypatch.setattr(pace, "memory_gb", lambda: (1.0, 0.05))
    for bits in (4, 8, 16):
        assert 1e7 < pace.bytes_per_s.__wrapped__(bits) < 1e13


@pytest.mark.parametrize(
    ("factor", "said"),
    [(0.001, "1 s"), (0.5, "30 s"), (3.3, "3 minutes"), (240, "4 hours")],
)
def test_a_wait_is_said_in_words(factor, said):
    words = estimate.minute_in_words(factor)
    assert words == f"about {said} for a minute of sound"


def test_a_large_model_is_estimated_by_running_parts_of_it(in_parts, monkeypatch):
    made = []

    def make(config, *tensors, **how):
        made.append(config.lm.num_layers)
        return make_engine(config, *tensors, **how)

    monkeypatch.setattr(estimate, "make_engine", make)
    frame_s = estimate.estimate_frame_s(MEDIUM, 4)
    assert 0 < frame_s < 10
    assert made[:2] == [1, 3]  # of 8 layers


def test_nothing_is_estimated_where_memory_does_not_suffice(in_parts, monkeypatch):
    monkeypatch.setattr(estimate, "make_engine", None)
    monkeypatch.setattr(estimate, "memory_gb", lambda: (8.0, 1e-4))
    assert estimate.estimate_frame_s(MEDIUM, 4) is None


@pytest.mark.parametrize("is_concurrent", [False, True])
def test_what_takes_the_time_of_its_bytes_is_estimated_exactly(
    in_parts, monkeypatch, is_concurrent
):
    """Layers and a head of other sizes; the codec beside the steps, or after them."""

    def part(config, bits, dense):
        return cost_of(config, random_lm(config.lm, bits)).step

    monkeypatch.setattr(estimate, "_part", part)
    monkeypatch.setattr(
        estimate, "_steps", lambda parts: ([1e-9 * step for step in parts], parts)
    )
    monkeypatch.setattr(estimate, "_codec_s", lambda _: (0.01, is_concurrent))
    config = SIZES["7b"]
    tensors = random_lm(config.lm, 4)
    if choose_form("auto", config, tensors, many=False).dense:
        tensors = tensors.write_out()
    expected = 1e-9 * cost_of(config, tensors).step
    frame_s = estimate.estimate_frame_s(config, 4)
    assert frame_s == pytest.approx(expected + (0.0 if is_concurrent else 0.01))


# The command


def test_the_command_prints_a_table_and_writes_json(run, tmp_path):
    path, plot = tmp_path / "a.json", tmp_path / "a.svg"
    result = run(
        *("bench", "--random", "tiny", "--batch-size", "2,1", "--frames", 10),
        *("--json", path, "--plot", plot),
    )
    assert result.exit_code == 0, result.stderr
    assert re.search(r"batch 1 +batch 2\n", result.stdout)
    for said in ("ms a frame, p50", "GB/s reached", "real-time factor", "Left out"):
        assert said in result.stdout
    content = json.loads(path.read_text())
    assert content["schema"] == 1 and content["model"] == "random tiny"
    assert content["compute"] in result.stdout and content["peak_process_gb"] > 0
    assert [r["batch_size"] for r in content["runs"]] == [1, 2]
    picture = plot.read_text()
    for said in ("audio (s)", "time a frame took (ms)", "1 at a time", "2 at a time"):
        assert f">{said}</text>" in picture
    assert f">random tiny on {content['device']}</text>" in picture
    again = run(
        *("bench", "--random", "tiny", "--bits", 8, "--frames", 10, "-q"),
        *("--compare", path),
    )
    assert again.exit_code == 0 and again.stderr == ""
    assert "not the same: bits: [4] then, [8] now" in again.stdout
    assert re.search(r"batch 1, frame p50 +ms", again.stdout)
    assert "batch 2, frame" not in again.stdout


def words(value: object) -> list[str]:
    """Every word of every text in JSON."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [word for part in parts for word in words(part)]
    return value.split() if isinstance(value, str) else []


def test_a_machine_is_measured_case_by_case_for_an_issue(run, tmp_path, monkeypatch):
    cases = [submit.Case("tiny", 4, 1), submit.Case("tiny", 4, 5000)]  # too many rows
    monkeypatch.setattr(submit, "_cases", lambda free_gb, notes: cases)
    monkeypatch.setattr(submit, "LIVE_S", 1)
    result = run("bench", "--submit", tmp_path / "mac.json")
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "mac.json").read_text())
    assert content["format"] == "pplex-bench-1" and content["machine"] == machine()
    one, many = content["cases"]
    assert one["frame_ms"]["mean"] > 0 and one["peak_memory_gb"] > 0
    assert one["live_ms"]["p95"] > 0 and many["live_ms"] is None
    assert many["frame_ms"] is None and many["fault"].startswith("exit 2: Error:")
    assert many["fault"] in result.stdout
    assert not {str(tmp_path), str(Path.home()), platform.node()} & set(words(content))
    assert run("bench", "--submit", "-", "--random", "tiny").exit_code == 2


@pytest.mark.parametrize(
    ("free_gb", "kept"),
    [(4.0, []), (7.0, [(4, 1)]), (16.0, [(4, 1), (8, 1), (4, 8), (8, 8)])],
)
def test_a_machine_that_is_too_small_is_measured_with_what_fits(
    monkeypatch, free_gb, kept
):
    monkeypatch.setattr(submit, "estimate_frame_s", lambda *_: 0.08)
    monkeypatch.setattr(submit, "cost_of", KINDS["gpu"].cost)
    notes: list[str] = []
    cases = submit._cases(free_gb, notes)
    assert {case.model for case in cases} == {"7b" if kept else "medium"}
    assert [(case.bits, case.rows) for case in cases if case.model == "7b"] == kept
    assert len(notes) == 4 - len(kept) + (not kept)


def test_a_machine_that_is_too_slow_is_measured_with_a_smaller_model(monkeypatch):
    monkeypatch.setattr(submit, "estimate_frame_s", lambda *_: 2.0)
    notes: list[str] = []
    assert {case.model for case in submit._cases(100.0, notes)} == {"medium"}
    assert "takes about 2.0 s" in notes[0] and "smaller" in notes[1]


def test_the_form_that_was_asked_for_is_measured(run):
    for form in ("dense", "quantized"):
        args = ("--random", "tiny", "--frames", 3, "--compute", form, "--json", "-")
        result = run("bench", *args)
        assert json.loads(result.stdout)["compute"] == form
        assert f"compute {form}: as asked for" in result.stderr


def test_json_on_stdout_is_nothing_but_json(run):
    result = run("bench", "--random", "tiny", "--frames", 5, "--json", "-")
    assert json.loads(result.stdout)["frames"] == 5


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--bits", 4), "--bits is for --random"),
        (("--random", "tiny", "--model", "mini"), "exclude each other"),
        (("--random", "tiny", "--batch-size", "1,x"), "not a list of numbers"),
        (("--random", "tiny", "--batch-size", "0"), "not a list of numbers"),
        (("--random", "tiny", "--lengths", "9-3"), "not MIN-MAX"),
        (("--random", "tiny", "--lengths", "3-9", "--frames", 5), "excludes"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, args, said):
    result = run("bench", *args)
    assert result.exit_code == 2 and said in result.stderr


def test_bad_files_are_refused_before_anything_is_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "bench", None)
    (tmp_path / "a.json").write_text('{"runs": 3}')
    (tmp_path / "b.json").write_text('{"schema": 99, "runs": []}')
    for args, said in (
        (("--compare", tmp_path / "none.json"), "No such file"),
        (("--compare", tmp_path / "a.json"), "not a file of `pplex bench --json`"),
        (("--compare", tmp_path / "b.json"), "schema is 99"),
        (("--plot", tmp_path / "a.gif"), "end its name in .png, .svg or .pdf"),
    ):
        result = run("bench", "--random", "tiny", *args)
        assert result.exit_code == 1 and said in result.stderr, result.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("bench", "--random", "tiny", "--plot", tmp_path / "a.svg")
    assert result.exit_code == 1 and "pip install 'pplex[plots]'" in result.stderr
    assert not (tmp_path / "a.svg").exists()


# Comparing and drawing


def test_changes_are_ratios_of_now_to_then(tmp_path):
    def content(p50: float, size: int, device: str) -> dict:
        runs = [{"batch_size": size, "frame_ms": {"p50": p50}, "audio_s_per_s": None}]
        return {"schema": 1, "device": device, "runs": runs}

    path = tmp_path / "a.json"
    path.write_text(json.dumps(content(10.0, 1, "gpu")))
    before = read_bench(path, schema=1)
    (change,) = changes(before, content(4.0, 1, "cpu"))
    assert (change.figure, change.before, change.now) == ("frame p50", 10.0, 4.0)
    assert change.ratio == pytest.approx(0.4)
    assert differences(before, content(4.0, 1, "cpu")) == ["device: gpu then, cpu now"]
    assert changes(before, content(4.0, 8, "gpu")) == []


def test_a_late_frame_lies_above_the_line_of_80_ms(tmp_path):
    path = tmp_path / "a.svg"
    plot_frames(path, "<title> $1$", {"a": [20.0, 160.0, 20.0]}, frame_rate=12.5)
    picture = path.read_text()
    assert "&lt;title&gt; $1$" in picture
    heights, limit = points(picture, "a"), points(picture, "limit")
    assert heights[1] < limit[0] == limit[1] < heights[0] == heights[2]
    assert "80 ms, a frame's length" in picture


def points(picture: str, gid: str) -> list[float]:
    """How far from the top the points of a line are."""
    path = re.search(rf'<g id="{gid}">\s*<path d="([^"]+)"', picture)[1]
    return [float(point.split()[1]) for point in re.split("[ML] ", path) if point]


def test_of_a_long_run_no_late_frame_is_lost(tmp_path):
    steps = [10.0] * 5000
    steps[3333] = 500.0
    frames, slowest = thinned(steps)
    assert len(frames) <= 1500 and max(slowest) == 500.0
    assert abs(frames[slowest.argmax()] - 3333) < 5
    plot_frames(tmp_path / "a.png", "", {"a": steps}, 12.5)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
