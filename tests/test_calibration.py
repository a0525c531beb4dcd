"""Conversations kept for a conversion, and matrices rounded by what they meet."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from test_convert import to

from pplex.checkpoint.hub import resolve
from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.source import Source, dequantize
from pplex.checkpoint.weights import lm_tensors, make_lm
from pplex.cli.main import cli
from pplex.errors import PplexError
from pplex.model.cache import KvCache
from pplex.quantization.activations import Activations
from pplex.quantization.calibration import read_calibration
from pplex.quantization.distillation import (
    check_memory,
    logits,
    make_batch,
    put,
    trainable_lm,
)
from pplex.quantization.products import product
from pplex.quantization.quantize import quantize
from pplex.quantization.rounding import round_by_inputs


@pytest.fixture(scope="module")
def kept(tiny, data, tmp_path_factory):
    """Two answers of the tiny model, of a second each."""
    folder = tmp_path_factory.mktemp("kept") / "kept"
    wav = data / "respond" / "user_c.wav"
    words = ("models", "calibrate", tiny, wav, "-o", folder, "-q")
    words += ("--minutes", "0.03", "--seconds", "1", "--prompt", "hello there")
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert (result.exit_code, result.output) == (0, f"{folder}\n")
    again = CliRunner().invoke(cli, [str(word) for word in words])
    assert (again.exit_code, "exists already" in again.output) == (1, True)
    return folder


@pytest.mark.parametrize("bits", [3, 4])
def test_outputs_change_less_than_by_rounding_values(bits):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(128, 128)) / 8 + np.eye(128)
    x = (rng.normal(size=(600, 128)) @ mixing).astype(np.float32)
    weight = mx.array(rng.normal(size=(48, 128)).astype(np.float32))
    form = Quantization(bits, 64)

    def error(parts):
        named = dict(zip(("weight", "scales", "biases"), parts, strict=True))
        return np.square(x @ np.array(dequantize(named, form) - weight).T).mean()

    plain, refined = (error(quantize(weight, form, refine=r)) for r in (False, True))
    assert error(round_by_inputs(weight, x.T @ x, form)) < 0.7 * min(plain, refined)


def test_inputs_that_are_always_zero_harm_nothing():
    weight = mx.array(np.random.default_rng(0).normal(size=(4, 64)), mx.float32)
    parts = round_by_inputs(weight, np.zeros((64, 64), np.float32), Quantization(4, 64))
    assert all(np.isfinite(np.array(part.astype(mx.float32))).all() for part in parts)


def test_of_very_many_conversations_some_are_looked_at(tiny, kept, monkeypatch):
    local = resolve(str(tiny), offline=True)
    config = local.folder.read_config().lm
    talks = read_calibration(kept, config)
    positions = sum(talk.columns.shape[1] for talk in talks)
    most = "pplex.quantization.activations._MOST_POSITIONS"

    def moment(some):
        return Activations(local.folder, config, some).moment(
            "layers.0.gating.linear_in"
        )

    monkeypatch.setattr(most, positions)
    whole, half = moment(talks), moment(talks[::2])
    monkeypatch.setattr(most, positions - 1)
    found = moment(talks)
    assert np.array_equal(found, half)
    assert not np.array_equal(found, whole)


def test_the_moments_are_those_of_the_specification(tiny, kept):
    """Layer by layer from the files, against the whole model at once."""
    local = resolve(str(tiny), offline=True)
    config = local.folder.read_config().lm
    talks = read_calibration(kept, config)
    assert len(talks) == 2 and talks[0].frames > 10
    found = Activations(local.folder, config, talks)
    last = config.num_layers - 1
    first = found.moment("layers.0.self_attn.in_proj")
    found.moment(f"layers.{last}.gating.linear_out")
    text = found.moment("text_linear")
    head = found.moment("depformer.steps.1.head")
    assert found.moment("depformer.audio_emb[3]") is None
    assert found.moment("depformer.steps.12.head") is None  # the user's
    lm = make_lm(config, lm_tensors(local.folder, config), mx.float32)
    expected = {"first": 0, "text": 0, "head": 0}
    seen = []
    step = lm.depformer.steps[1]
    step.head, inner = lambda x: seen.append(x) or inner(x), step.head
    for talk in talks:
        x = lm.embed(mx.array(talk.columns[None, :, :-1]))
        if len(talk.embeddings):
            rest = x[:, len(talk.embeddings) :]
            x = mx.concatenate([mx.array(talk.embeddings)[None], rest], axis=1)
        read = np.array(lm.layers[0].norm1(x)[0])
        hidden, _ = lm.head(lm.temporal(x, KvCache(config.num_layers, config.window)))
        hidden = hidden[0, -talk.frames :]
        given = talk.columns[: config.num_agent_streams, -talk.frames :].T
        lm.agent_logits(hidden, mx.array(given))
        for name, rows in (("first", read), ("text", hidden), ("head", seen[-1])):
            rows = np.array(rows)
            expected[name] = expected[name] + rows.T @ rows
    for name, moment in (("first", first), ("text", text), ("head", head)):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(moment, expected[name], atol=1e-4 * scale)


def test_a_calibrated_conversion_says_so_and_differs(run, tiny, kept, tmp_path):
    result = run(
        *("models", "convert", tiny, tmp_path / "m", "--bits", "4", "-q"),
        *("--calibration", kept),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"--calibration {kept}" in (tmp_path / "m" / "README.md").read_text()
    to(tiny, tmp_path / "plain", Quantization(4, 64))
    name = "temporal.safetensors"
    ours, plain = (mx.load(str(tmp_path / n / name)) for n in ("m", "plain"))
    assert {n: w.shape for n, w in ours.items()} == {
        n: w.shape for n, w in plain.items()
    }
    packed = [n for n, w in ours.items() if w.dtype == mx.uint32]
    assert packed and not any(mx.array_equal(ours[n], plain[n]) for n in packed)


def _logits(folder, talks):
    """Of the specification, whole conversations at once: text, then codebooks."""
    local = resolve(str(folder), offline=True)
    config = local.folder.read_config().lm
    lm = make_lm(config, lm_tensors(local.folder, config), mx.float32)
    for talk in talks:
        x = lm.embed(mx.array(talk.columns[None, :, :-1]))
        if len(talk.embeddings):
            rest = x[:, len(talk.embeddings) :]
            x = mx.concatenate([mx.array(talk.embeddings)[None], rest], axis=1)
        x = lm.temporal(x, KvCache(config.num_layers, config.window))
        hidden, text = lm.head(x[0, -talk.frames :])
        given = talk.columns[: config.num_agent_streams, -talk.frames :].T
        agent = lm.agent_logits(hidden, mx.array(given))
        yield text, *agent.swapaxes(0, 1)


def _divergence(ours, others):
    """The mean over conversations, streams and frames."""
    found = []
    for one, other in zip(ours, others, strict=True):
        for a, b in zip(one, other, strict=True):
            a, b = (np.array(x - mx.logsumexp(x, -1, keepdims=True)) for x in (a, b))
            found.append((np.exp(a) * (a - b)).sum(-1).mean())
    return np.mean(found)


def test_distilled_codes_choose_more_like_the_model(run, tiny, kept, tmp_path):
    config = resolve(str(tiny), offline=True).folder.read_config().lm
    talks = read_calibration(kept, config)
    ours = list(_logits(tiny, talks))
    batch = make_batch(talks, config)
    local = resolve(str(tiny), offline=True)
    source = Source(local.folder, config)
    modules = source.modules(config.num_codebooks)
    dense = {
        t: source.dense(t).astype(mx.float32) for ts in modules.values() for t in ts
    }
    lm = trainable_lm(config)
    put(lm, modules, dense)
    text, agent = logits(lm, batch)
    whole = [mx.concatenate(list(rows)) for rows in zip(*ours, strict=True)]
    for found, expected in zip([text, *agent], whole, strict=True):
        assert mx.allclose(found, expected, rtol=1e-3, atol=1e-3)
    words = ("models", "convert", tiny, tmp_path / "rounded", "--bits", "4", "-q")
    assert run(*words, "--calibration", kept).exit_code == 0
    words = ("models", "convert", tiny, tmp_path / "learned", "--bits", "4", "-q")
    result = run(*words, "--calibration", kept, "--distill", "20")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "--distill 20" in (tmp_path / "learned" / "README.md").read_text()
    rounded, learned = (
        _divergence(ours, _logits(tmp_path / name, talks))
        for name in ("rounded", "learned")
    )
    assert learned < 0.95 * rounded


def test_gradients_of_products_are_those_of_mlx():
    rng = np.random.default_rng(0)
    for shape, other in (((2, 3, 5), (7, 5)), ((2, 3, 5), (2, 7, 5))):
        x, y = (mx.array(rng.normal(size=s).astype(np.float32)) for s in (shape, other))

        def ours(x, y):
            return mx.sin(product(x, y)).sum()

        def theirs(x, y):
            return mx.sin(x @ y.swapaxes(-1, -2)).sum()

        pairs = zip(*(mx.grad(f, (0, 1))(x, y) for f in (ours, theirs)), strict=True)
        assert all(mx.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_gradients_that_fit_no_memory_are_refused(tiny):
    config = resolve(str(tiny), offline=True).folder.read_config().lm
    check_memory(config, 10**6, 300)
    with pytest.raises(PplexError, match="--distill takes about"):
        check_memory(config, 10**13, 300)


def test_distilling_wants_a_calibration_and_both_something_to_round(
    run, tiny, kept, tmp_path
):
    words = ("models", "convert", tiny, tmp_path / "m", "-q", "--bits")
    result = run(*words, "4", "--distill", "1")
    assert result.exit_code == 2 and "--calibration" in result.stderr
    for option in (("--calibration", kept), ("--refine",)):
        result = run(*words, "16", *option)
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"{option[0]} makes no difference" in result.stderr
        assert not (tmp_path / "m").exists()


def _longer(folder) -> None:
    record = json.loads((folder / "calibration.json").read_text())
    record["answers"][0]["frames"] = 9999
    (folder / "calibration.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda folder: (folder / "calibration.json").unlink(),
            "calibration.json cannot be read",
        ),
        (lambda folder: (folder / "tokens.safetensors").unlink(), "tokens.safetensors"),
        (_longer, "does not fit this model"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(run, tiny, kept, tmp_path, change, says):
    shutil.copytree(kept, tmp_path / "kept")
    change(tmp_path / "kept")
    result = run(
        *("models", "convert", tiny, tmp_path / "m", "--bits", "4", "-q"),
        *("--calibration", tmp_path / "kept"),
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "m").exists()
