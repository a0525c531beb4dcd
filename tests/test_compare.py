"""Comparing two models on the same tokens."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_convert import to

from pplex.audio.files import read_pcm
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.cli.models_compare import _echo
from pplex.conversation.prompts import make_role
from pplex.conversation.session import load
from pplex.engine.base import Logits
from pplex.engine.choose import KINDS, make_engine
from pplex.errors import PplexError
from pplex.model.sampling import GREEDY, SamplingConfig
from pplex.quantization import sensitivity as sensitivity_job
from pplex.quantization.compare import Tally, compare, keep_logits, mean_kl
from pplex.quantization.compare_models import Settings, compare_models
from pplex.quantization.costs import mixed_recipe, read_costs
from pplex.quantization.forced import write_script
from pplex.quantization.plot import plot_divergence
from pplex.quantization.recipe import recipe_bytes, uniform
from pplex.quantization.sensitivity import (
    FORM,
    measure,
    module_parts,
    sensitivity,
    write_costs,
)

SAMPLES = Path(__file__).parents[1] / "samples"
SETTINGS = Settings(None, "hello", seed=1, seconds=2.4, sampling=SamplingConfig())


@pytest.fixture(scope="module")
def script(tiny_model, data):
    role = make_role(tiny_model, None, "hello there")
    pcm = read_pcm(data / "respond" / "user_a.wav", sample_rate=24000).pcm
    return write_script(tiny_model.engine, role.prompt, pcm, GREEDY, 0)[0]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """The tiny model at 4 and 8 bits."""
    folder = tmp_path_factory.mktemp("made")
    for bits in (4, 8):
        to(tiny, folder / f"{bits}", Quantization(bits, 32))
    return folder


def test_the_card_says_what_a_conversion_costs_early_and_late(
    run, tiny, tmp_path, capsys
):
    """By half minutes; together they are what is found of the whole."""
    wav = tmp_path / "long.wav"
    soundfile.write(wav, np.random.default_rng(0).normal(size=33 * 24000) / 20, 24000)
    words = ("models", "convert", tiny, tmp_path / "m", "--bits", "4", "-q")
    result = run(*words, "--measure", wav)
    assert (result.exit_code, result.stderr) == (0, "")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "agent, from 31 s on" in card
    settings = replace(SETTINGS, seconds=33)
    models = (resolve(str(folder), offline=True) for folder in (tiny, tmp_path / "m"))
    found = compare_models(*models, [wav], settings)
    assert f" {found.frames} frames" in card
    first, last = found.depths
    # The first column is given in part by the prompt.
    assert (first.start_s, first.frames, last.start_s) == (0, 383, 30.72)
    kls, weights = zip(*((d.mean_kl, d.frames) for d in found.depths), strict=True)
    assert sum(weights) == found.frames and kls[0] != kls[1]
    assert np.average(kls, weights=weights) == pytest.approx(found.mean_kl)
    _echo(found)
    assert re.search(r"^31 s +\d+ ", capsys.readouterr().out, re.MULTILINE)


def test_right_replies_of_both_models_are_counted(run, tmp_path):
    """`mini` says of the sky what README says; what it does not say is not right."""
    table = tmp_path / "replies.csv"
    sky, silence = (SAMPLES / name for name in ("teacher_sky.wav", "silence.wav"))
    table.write_text(
        "input,reply\n"
        f"{sky},because air scatters blue light\n{sky},Air scatters red light.\n"
        f"{sky},\n{silence},\n"
    )
    command = ("models", "compare", "mini", "mini", "--replies", table)
    result = run(*command, "--seconds", "0.8", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["replies"]
    assert found == {"asked": 4, "right_a": 2, "right_b": 2}
    table.write_text(f"input,reply\n{silence},\n")
    result = run(*command)
    assert result.exit_code == 1 and "has no replies" in result.stderr


def heads(kept):
    """Text (frames, text_card) and agent (frames, codebooks, card) logits."""
    return (
        np.concatenate([part.text for part in kept]),
        np.concatenate([part.agent for part in kept]),
    )


def test_a_model_would_say_what_it_said(tiny_model, script):
    """Greedy tokens are the likeliest ones at every frame of the forced grid."""
    text, agent = heads(keep_logits(tiny_model.engine, script))
    np.testing.assert_array_equal(text.argmax(-1), script.columns[0, 1:])
    np.testing.assert_array_equal(agent.argmax(-1).T, script.columns[1:9, 1:])


@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_code_is_forced_to_the_logits_of_mlx(script, made, bits):
    if not all(KINDS[name].is_available() for name in ("c", "cpu")):
        pytest.skip("the compiled step is not for this device, or missing")
    folder = resolve(str(made / f"{bits}"), offline=True).folder
    config = folder.read_config()
    runs = []
    for name in ("c", "cpu"):
        tensors = lm_tensors(folder, config.lm)
        codec = codec_tensors(folder, config.mimi)
        engine = KINDS[name].make(config, tensors, codec)
        runs.append(heads(keep_logits(engine, script)))
    for ours, theirs in zip(*runs, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_a_model_is_no_distance_from_itself(tiny_model, script):
    engine = tiny_model.engine
    kept = keep_logits(engine, script)
    for stream in compare([kept], engine, [script], SamplingConfig()):
        assert (stream.kl, stream.top1, stream.differ) == (0.0, 1.0, 0.0)
        assert stream.perplexity_a == stream.perplexity_b


def test_fewer_bits_are_further_away(tiny, tiny_model, script, made):
    kept = [keep_logits(tiny_model.engine, script)]
    distances = []
    for bits in (8, 4):
        other = load(resolve(str(made / f"{bits}"), offline=True)).engine
        distances.append(mean_kl(compare(kept, other, [script], SamplingConfig())))
    assert 0 < distances[0] < distances[1] / 10


def test_the_figures_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(5, 1 + 8, 7)).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, 7, (5, 9))
    tally = Tally(SamplingConfig(temp=0.8, top_k=3, text_temp=1.0, text_top_k=0))
    ours, other = (Logits(x[:, 0], x[:, 1:]) for x in (a, b))
    tally.add(ours, other, targets)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    chosen = np.take_along_axis(q, targets[..., None], -1)[..., 0]

    def drawn(x, temp, k):
        kept = np.where(x >= np.sort(x, -1)[..., -k, None], np.exp(x / temp), 0)
        return kept / kept.sum(-1, keepdims=True)

    for idx, figures in enumerate(tally.figures()):
        kl = (p[:, idx] * np.log(p[:, idx] / q[:, idx])).sum(-1).mean()
        top1 = (a[:, idx].argmax(-1) == b[:, idx].argmax(-1)).mean()
        temp, k = (0.8, 3) if idx else (1.0, 7)
        apart = np.abs(drawn(a[:, idx], temp, k) - drawn(b[:, idx], temp, k))
        assert figures.stream == (f"agent {idx}" if idx else "text")
        assert figures.kl == pytest.approx(kl, rel=1e-4)
        assert figures.top1 == pytest.approx(top1)
        assert figures.differ == pytest.approx(apart.sum(-1).mean() / 2, rel=1e-4)
        nll = -np.log(chosen[:, idx]).mean()
        assert figures.perplexity_b == pytest.approx(math.exp(nll), rel=1e-4)


def test_two_folders_are_compared_with_size_and_speed(tiny, made, data, tmp_path):
    models = [resolve(str(path), offline=True) for path in (tiny, made / "4")]
    found = compare_models(*models, [data / "respond" / "user_c.wav"], SETTINGS)
    assert found.b.lm_bytes < found.a.lm_bytes
    assert found.b.bytes_per_frame < found.a.bytes_per_frame
    assert found.a.ms_per_frame > 0 and found.b.ms_per_frame > 0
    assert (found.a.bits, found.b.bits) == ((16,), (4,))
    assert [s.stream for s in found.streams] == ["text"] + [
        f"agent {idx}" for idx in range(1, 9)
    ]
    plot_divergence(tmp_path / "kl.svg", found)
    drawn = list(ElementTree.parse(tmp_path / "kl.svg").iter())
    bars = [one for one in drawn if one.get("id") in {s.stream for s in found.streams}]
    assert len(bars) == 9
    said = {one.text for one in drawn if one.tag.endswith("}text")}
    assert {"stream", "text", "8"} <= said
    (axis,) = (one for one in said if one.startswith("KL divergence"))
    power = re.fullmatch(r"KL divergence, (?:(1e-\d+) )?nats a frame", axis)
    scale = float(power[1] or 1)
    shown = {float(one) * scale for one in said if re.fullmatch(r"[\d.]+", one)}
    assert any(abs(kl / found.streams[0].kl - 1) < 0.05 for kl in shown)


def test_without_recordings_the_user_is_silent(tiny, made):
    models = [resolve(str(path), offline=True) for path in (tiny, made / "8")]
    found = compare_models(*models, [], SETTINGS)
    assert found.recordings == []
    assert found.frames == 30 - 2


def test_models_of_different_tokens_are_refused(tiny, tmp_path):
    from random_checkpoint import write_checkpoint
    from small import SMALL

    write_checkpoint(tmp_path / "m", SMALL)
    models = [resolve(str(path), offline=True) for path in (tiny, tmp_path / "m")]
    with pytest.raises(PplexError, match="120 text tokens, the first model has 512"):
        compare_models(*models, [], replace(SETTINGS, seconds=0.4))


def test_mixed_halves_the_divergence_at_the_size_of_four_bits(tiny, tiny_model, script):
    """With costs measured on the model itself."""
    costs = dict(measure(resolve(str(tiny), offline=True), [], SETTINGS))
    assert all(cost > 0 for cost in costs.values())

    def made_by(recipe_of, folder):
        to(tiny, folder, None, recipe=recipe_of)
        other = load(resolve(str(folder), offline=True)).engine
        return mean_kl(compare(kept, other, [script], SamplingConfig()))

    import tempfile
    from pathlib import Path

    kept = [keep_logits(tiny_model.engine, script)]
    form = Quantization(4, 64)
    with tempfile.TemporaryDirectory() as folder:
        plain = made_by(lambda _, m: uniform(m, form), Path(folder) / "uniform")
        sizes = []

        def mixed(source, matrices):
            recipe = mixed_recipe(source.config, matrices, form, None, costs)
            sizes.append(recipe_bytes(matrices, recipe))
            sizes.append(recipe_bytes(matrices, uniform(matrices, form)))
            return recipe

        better = made_by(mixed, Path(folder) / "mixed")
    assert sizes[0] <= sizes[1]
    assert better < plain / 2


def test_every_matrix_is_in_one_part(tiny_model, tiny):
    folder, config = resolve(str(tiny), offline=True).folder, tiny_model.config.lm
    modules = [m for part in module_parts(config).values() for m in part]
    matrices = {
        name.removesuffix(".weight")
        for name, weight in lm_tensors(folder, config).weights.items()
        if weight.ndim == 2
    }
    assert sorted(modules) == sorted(matrices)


@pytest.fixture
def parts_of(tiny, tiny_model, script):
    """What ``sensitivity`` says of the tiny model, by the engine it is given."""
    folder, config = resolve(str(tiny), offline=True).folder, tiny_model.config

    def measured(engine):
        tensors = lm_tensors(folder, config.lm)
        codec = codec_tensors(folder, config.mimi)
        return dict(
            sensitivity(engine, tensors, codec, [script], FORM, SamplingConfig())
        )

    return measured


def test_a_part_that_loses_nothing_costs_nothing(tiny_model, parts_of, monkeypatch):
    """Exactly: the whole model and its parts are computed in one way."""
    monkeypatch.setattr(sensitivity_job, "_rounded", lambda weight, form: weight)
    costs = parts_of(tiny_model.engine)
    assert set(costs) == set(module_parts(tiny_model.config.lm))
    assert set(costs.values()) == {0.0}


def test_parts_are_run_by_engines_of_the_whole_models_kind(
    tiny_model, parts_of, monkeypatch
):
    made = []

    def make(*args):
        made.append(make_engine(*args))
        return made[-1]

    monkeypatch.setattr(sensitivity_job, "make_engine", make)
    parts_of(tiny_model.engine)
    engine = tiny_model.engine
    assert len(made) == len(module_parts(tiny_model.config.lm))
    assert {(type(e), e.dtype, e.compute) for e in made} == {
        (type(engine), engine.dtype, engine.compute)
    }


def test_costs_are_read_back_and_nonsense_is_refused(tiny, tmp_path):
    path = tmp_path / "parts.json"
    write_costs(path, resolve(str(tiny), offline=True), {"emb": 0.5})
    assert read_costs(path) == {"emb": 0.5}
    assert len(read_costs(None)) > 20
    for content in ("{}", '{"parts": {}}', '{"parts": {"a": -1}}', "x"):
        path.write_text(content)
        with pytest.raises(PplexError, match=r"parts\.json"):
            read_costs(path)


def test_a_quantized_model_cannot_be_measured(made):
    with pytest.raises(PplexError, match="quantized already"):
        next(measure(resolve(str(made / "4"), offline=True), [], SETTINGS))
