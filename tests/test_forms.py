"""Which form a model computes in, and that it is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from small import SMALL

from pplex.bench.random_model import random_lm
from pplex.engine import choose as job
from pplex.engine.choose import KINDS, batch_size, choose_form, version_of
from pplex.model.config import ModelConfig


@pytest.fixture(params=["cuda", "gpu"])
def gpu(request, monkeypatch):
    """A GPU is what computes here."""
    for name, kind in KINDS.items():
        is_it = name == request.param
        found = replace(kind, is_available=lambda is_it=is_it: is_it)
        monkeypatch.setitem(KINDS, name, found)
    monkeypatch.setattr(job, "memory_gb", lambda: (1000.0, 1000.0))


@pytest.mark.parametrize("bits", [4, 16])
def test_on_a_gpu_one_conversation_is_computed_alone_unless_asked_otherwise(gpu, bits):
    def form(wanted, **how):
        return choose_form(wanted, SMALL, random_lm(SMALL.lm, bits), **how)

    assert form("auto", many=False).alone
    assert form("alone", many=True).alone
    assert not form("auto", many=True).alone
    for wanted in ("dense", "quantized"):
        assert not form(wanted, many=False).alone
        assert form(wanted, many=False, live=True).alone
    assert str(form("dense", many=False, live=True)).startswith("dense, alone: ")


def test_on_a_gpu_what_is_computed_alone_is_so_one_by_one(gpu):
    cost = job.cost_of(SMALL, random_lm(SMALL.lm, 16))
    assert batch_size(SMALL, replace(cost, alone=True), 100, 1e12) == 1
    assert batch_size(SMALL, cost, 100, 1e12) > 1


def test_one_conversation_on_a_gpu_has_no_groups_codec(gpu):
    tensors = random_lm(ModelConfig().lm, 4)
    group, alone = (job.cost_of(ModelConfig(), tensors, alone=a) for a in (False, True))
    assert alone == replace(group, codec_work=alone.codec_work, alone=True)
    assert 0 < alone.codec_work < group.codec_work / 10


def test_rows_that_share_their_prompts_need_no_memory_for_them(gpu):
    cost = job.cost_of(SMALL, random_lm(SMALL.lm, 16))
    free = 2 * cost.codec_work + 100 * 10 * cost.position
    cost = replace(cost, position=cost.codec_work // 1000)
    with_prompts = batch_size(SMALL, cost, 10, free, prompt_frames=10)
    shared = job.kind_here() == "cuda"
    assert (with_prompts == batch_size(SMALL, cost, 10, free)) == shared


@pytest.mark.parametrize("kind", ["c", "cpu"])
def test_on_a_cpu_rows_are_the_same_alone(monkeypatch, kind):
    for name, found in KINDS.items():
        found = replace(found, is_available=lambda is_it=name == kind: is_it)
        monkeypatch.setitem(KINDS, name, found)
    tensors = random_lm(SMALL.lm, 4)
    for many in (False, True):
        asked = choose_form("alone", SMALL, tensors, many=many)
        assert asked == choose_form("auto", SMALL, tensors, many=many)
        assert not asked.alone


def test_an_engines_version_names_it():
    names = "c", "mlx", "cuda"
    assert [version_of(name).split()[0] for name in names] == [*names]
    assert len({version_of(name).split()[1] for name in names}) == 3


def test_what_computed_stands_in_stats_and_manifest(run, tiny, data, tmp_path):
    call = data / "respond" / "user_c.wav"
    arguments = "batch", call, "-o", tmp_path, "--stats", "--model", tiny
    result = run(*arguments, "--prompt", "Hi.", "--compute", "alone")
    assert result.exit_code == 0, result.stderr
    stats = json.loads((tmp_path / "user_c.stats.json").read_text())
    (line,) = map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())
    keys = "device", "dtype", "compute", "kernels"
    assert line["computed"] == {key: stats[key] for key in keys}
    assert stats["kernels"] == version_of(stats["kernels"].split()[0])
