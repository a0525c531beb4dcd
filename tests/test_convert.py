"""Conversion: every layout to the split folder, streamed, whole or not at all."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import write_checkpoint
from small import SMALL, converse, speech
from test_layouts import as_sliced

from pplex.checkpoint.config import load_config
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.layouts import PARTS, Quantization, published_matrices
from pplex.checkpoint.safetensors import TensorSpec, read_specs, write_tensors
from pplex.checkpoint.source import Source
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.conversation.prompts import make_role
from pplex.conversation.session import load
from pplex.engine.choose import make_engine
from pplex.errors import PplexError
from pplex.quantization.convert import Conversion, convert
from pplex.quantization.quantize import pack, quantize, quantize_blocks
from pplex.quantization.recipe import (
    from_file,
    make_parts,
    mixed,
    num_bytes,
    part_of,
    recipe_bytes,
    uniform,
)

FORM = Quantization(4, 32)
MATRICES = list(published_matrices(SMALL.lm, 16, 16))


def to(folder, target, form, *, refine=False, recipe=None):
    """Convert the folder, uniformly unless a recipe says otherwise."""
    make = recipe or (lambda _, matrices: uniform(matrices, form))
    conversion = Conversion(make, "test", "by a test", refine)
    local = resolve(str(folder), offline=True)
    return convert(local, target, conversion, lambda total: None, lambda more: None)


def tokens(model) -> np.ndarray:
    role = make_role(model, None, "hello there")
    return converse(model.engine, model.engine.prefill(role.prompt), speech(12))[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One checkpoint for each layout, with their own random weights."""
    folder = tmp_path_factory.mktemp("sources")
    for layout in ("pytorch", "mlx", "mlx-split"):
        write_checkpoint(folder / layout, SMALL, layout)
    # A slice's own norms are copies of one another in files that anybody makes.
    arrays = mx.load(str(folder / "pytorch" / "model.safetensors"))
    mx.save_safetensors(str(folder / "mlx" / "model.safetensors"), as_sliced(arrays))
    write_checkpoint(folder / "eight", SMALL, "pytorch", steps=8)
    return folder


def quantized_in_memory(local, form):
    """The engine of a model whose layers MLX quantizes, with all else in 16 bits."""
    tensors = lm_tensors(local.folder, SMALL.lm)
    weights, forms = {}, {}
    for name, weight in tensors.weights.items():
        wide, module = weight.astype(mx.float32), name.removesuffix(".weight")
        if wide.ndim == 2 and ("layers." in module or module == "depformer.input"):
            parts = mx.quantize(wide, group_size=form.group_size, bits=form.bits)
            forms[module] = form
            weights |= {f"{module}.{n}": p for n, p in zip(PARTS, parts, strict=True)}
        else:
            weights[name] = wide
    stored = {
        name: w if w.dtype == mx.uint32 else w.astype(mx.float16)
        for name, w in weights.items()
    }
    codec = codec_tensors(local.folder, SMALL.mimi)
    return make_engine(SMALL, replace(tensors, weights=stored, forms=forms), codec)


@pytest.mark.parametrize("layout", ["pytorch", "mlx", "mlx-split", "eight"])
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_a_converted_model_says_what_one_quantized_in_memory_says(
    sources, tmp_path, layout, bits
):
    form = None if bits == 16 else Quantization(bits, 32)
    to(sources / layout, tmp_path / "out", form)
    model = load(resolve(str(sources / layout), offline=True))
    if form is not None:
        model.engine = quantized_in_memory(model.local, form)
    converted = load(resolve(str(tmp_path / "out"), offline=True))
    assert converted.layout == "mlx-split"
    assert converted.bits == (bits,)
    np.testing.assert_array_equal(tokens(converted), tokens(model))


def test_sixteen_bits_keep_every_weight(sources, tmp_path):
    to(sources / "pytorch", tmp_path / "out", None)
    before = Source(CheckpointFolder(sources / "pytorch"), SMALL.lm)
    after = Source(CheckpointFolder(tmp_path / "out"), SMALL.lm)
    for stored in before.matrices:
        for target in stored.matrix.targets:
            old = before.dense(target).astype(mx.float32)
            new = after.dense(target).astype(mx.float32)
            assert mx.abs(old - new).max().item() <= 2**-24  # float16's least step


def test_norms_that_differ_between_slices_are_refused(tmp_path):
    """The split layout has one norm for all steps."""
    write_checkpoint(tmp_path / "m", SMALL, "mlx")  # random ones for every slice
    with pytest.raises(PplexError, match=r"depformer\.layers\.0\.norm1\.alpha"):
        to(tmp_path / "m", tmp_path / "out", None)


def test_what_has_the_form_already_is_not_quantized_again(tmp_path):
    write_checkpoint(tmp_path / "q", SMALL, "pytorch", bits=4, group_size=32)
    to(tmp_path / "q", tmp_path / "out", Quantization(4, 32))
    before = Source(CheckpointFolder(tmp_path / "q"), SMALL.lm)
    after = Source(CheckpointFolder(tmp_path / "out"), SMALL.lm)
    for target in ("layers.1.gating.linear_out", "depformer.steps.9.layers.0.in_proj"):
        old, new = before.parts(target), after.parts(target)
        for part in ("weight", "scales", "biases"):
            assert mx.array_equal(old[part], new[part]).item()


def test_sizes_and_constants_survive(sources, tmp_path):
    to(sources / "eight", tmp_path / "out", Quantization(8, 64))
    assert load_config(tmp_path / "out" / "config.json") == SMALL
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["depformer"]["num_steps"] == 8
    assert raw["voices"] == ["NATF2"]
    assert raw["quantization"]["bits"] == 8


def test_the_folder_has_the_announced_size_a_card_and_hashes(sources, tmp_path):
    done = to(sources / "mlx", tmp_path / "out", Quantization(4, 64))
    written = sum(
        spec.num_bytes
        for name in ("temporal", "depformer", "embeddings")
        for spec in read_specs(tmp_path / "out" / f"{name}.safetensors").values()
    )
    assert written == done.lm_bytes
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by a test" in card and "| temporal | 4/64 | 8 |" in card
    listed = {
        line.split("  ")[1]
        for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    }
    present = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert listed == present - {"SHA256SUMS"}


def test_torch_voices_become_the_same_voices(tiny, tmp_path):
    from pplex.checkpoint.voices import find_voices, read_voice_file

    to(tiny, tmp_path / "out", None)
    for name, path in find_voices(tiny).items():
        old = read_voice_file(path)
        new = read_voice_file(tmp_path / "out" / "voices" / f"{name}.safetensors")
        np.testing.assert_array_equal(new.embeddings, old.embeddings)
        np.testing.assert_array_equal(new.cache, old.cache)


def test_a_folder_that_exists_is_not_touched(sources, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(PplexError, match="exists already"):
        to(sources / "mlx", tmp_path / "out", None)
    assert not list((tmp_path / "out").iterdir())


def test_nothing_is_left_of_a_conversion_that_fails(sources, tmp_path):
    bad = tmp_path / "bad"
    write_checkpoint(bad, SMALL)
    arrays = dict(mx.load(str(bad / "model.safetensors")))
    arrays["linears.3.weight"] = arrays["linears.3.weight"] * float("nan")
    mx.save_safetensors(str(bad / "model.safetensors"), arrays)
    with pytest.raises(PplexError, match=r"`linears\.3\.weight` is no number"):
        to(bad, tmp_path / "out", None)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0])
def test_no_value_is_rounded_silently_to_what_it_is_not(tmp_path, bits, value):
    write_checkpoint(tmp_path / "bad", SMALL)
    file = tmp_path / "bad" / "model.safetensors"
    arrays = {n: a.astype(mx.float32) for n, a in mx.load(str(file)).items()}
    name = "transformer.layers.1.gating.linear_in.weight"
    arrays[name][-1, 5] = value
    mx.save_safetensors(str(file), arrays)
    what = "is too large for 16 bits" if np.isfinite(value) else "is no number"
    with pytest.raises(PplexError, match=rf"1\.gating\.linear_in.* {what}"):
        to(tmp_path / "bad", tmp_path / "out", None if bits == 16 else FORM)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("layout", ["pytorch", "mlx", "mlx-split"])
def test_progress_is_told_in_bytes_of_the_source(sources, tmp_path, layout):
    totals, steps = [], []
    conversion = Conversion(lambda _, m: uniform(m, FORM), "test", "by a test")
    local = resolve(str(sources / layout), offline=True)
    done = convert(local, tmp_path / "out", conversion, totals.append, steps.append)
    assert totals == [done.source_lm_bytes] == [sum(steps)]
    assert max(steps) < done.source_lm_bytes / 4


@pytest.mark.parametrize("layout", ["pytorch", "mlx-split"])
def test_blocks_of_any_size_make_the_same_matrix(tmp_path, layout):
    bits = 4 if layout == "mlx-split" else 16
    write_checkpoint(tmp_path / "m", SMALL, layout, bits=bits, group_size=32)
    source = Source(CheckpointFolder(tmp_path / "m"), SMALL.lm)
    for target in ("layers.1.self_attn.in_proj", "depformer.steps.3.head", "out_norm"):
        whole = source.dense(target)
        for size in (1, 1000, 1 << 30):
            blocks = list(source.blocks(target, size))
            assert mx.array_equal(mx.concatenate(blocks), whole).item()
            assert blocks[0].dtype == whole.dtype


def test_a_file_that_becomes_shorter_is_named(tmp_path):
    write_checkpoint(tmp_path / "m", SMALL)
    source = Source(CheckpointFolder(tmp_path / "m"), SMALL.lm)
    with (tmp_path / "m" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(PplexError, match=r"model\.safetensors .* become shorter"):
        list(source.blocks("layers.1.self_attn.in_proj", 1 << 30))


def test_no_more_than_a_matrix_is_held(tmp_path):
    """The peak stays far below the model's size."""
    deep = replace(SMALL, lm=replace(SMALL.lm, num_layers=60))
    write_checkpoint(tmp_path / "m", deep)
    specs = read_specs(tmp_path / "m" / "model.safetensors").values()
    total = sum(spec.num_bytes for spec in specs)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    to(tmp_path / "m", tmp_path / "out", Quantization(4, 32))
    used = mx.get_peak_memory() - before
    assert used < total / 3


# Quantizing


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packed_codes_are_what_mlx_unpacks(bits, group_size):
    codes = mx.random.randint(0, 2**bits, (3, 256)).astype(mx.uint32)
    scales = mx.ones((3, 256 // group_size))
    found = mx.dequantize(
        pack(codes, bits), scales, 0 * scales, group_size=group_size, bits=bits
    )
    np.testing.assert_array_equal(np.array(found), np.array(codes))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_matrix_in_blocks_is_what_mlx_makes_of_the_whole(bits, group_size):
    weight = 0.02 * mx.random.normal((50, 256), key=mx.random.key(bits))
    form = Quantization(bits, group_size)
    blocks = [weight[:20], weight[20:21], weight[21:]]
    found = quantize_blocks(iter(blocks), form, refine=False)
    expected = mx.quantize(weight, group_size=group_size, bits=bits)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs if theirs.dtype == mx.uint32 else theirs.astype(mx.float16)
        assert mx.array_equal(ours, theirs).item()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_refined_scales_leave_less_error(bits):
    weight = 0.02 * mx.random.normal((64, 256), key=mx.random.key(3))
    weight[3] = 0.0  # a row of zeros stays one
    form = Quantization(bits, 64)

    def restored(refine):
        packed, scales, biases = quantize(weight, form, refine)
        assert scales.dtype == biases.dtype == mx.float16
        wide = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(packed, *wide, group_size=64, bits=bits)

    plain, refined = restored(False), restored(True)
    assert mx.array_equal(refined[3], weight[3]).item()

    def error(values):
        return mx.square(values - weight).sum().item()

    assert error(refined) < 0.95 * error(plain)


# Recipes


def test_a_recipe_file_names_matrices_by_pattern(tmp_path):
    path = tmp_path / "recipe.json"
    rules = {
        "transformer.layers.0.*": 8,
        "transformer.*.linear_out.weight": {"bits": 6, "group_size": 32},
        "emb.*": 8,
    }
    path.write_text(json.dumps(rules))
    recipe = from_file(path, MATRICES, Quantization(4, 64))
    assert recipe["transformer.layers.0.gating.linear_out.weight"].bits == 8
    assert recipe["transformer.layers.1.gating.linear_out.weight"] == Quantization(
        6, 32
    )
    assert recipe["transformer.layers.1.gating.linear_in.weight"] == Quantization(4, 64)
    assert recipe["emb.7.weight"] == Quantization(8, 64)
    assert recipe["text_emb.weight"] is None
    assert recipe["out_norm.alpha"] is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "expected an object"),
        ("{", "not readable as JSON"),
        ('{"emb.*": 7}', r"'emb\.\*' asks for 7 bits"),
        ('{"emb.*": {"bits": 4, "group_size": 48}}', "groups of 48"),
        ('{"nothing.*": 4}', r"'nothing\.\*' fits no matrix"),
        ('{"emb.*": 4, "emb.1.*": 8}', r"'emb\.1\.\*' fits no matrix"),
    ],
)
def test_a_recipe_file_that_means_nothing_is_refused(tmp_path, content, says):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(PplexError, match=says) as caught:
        from_file(path, MATRICES, None)
    assert "recipe.json" in str(caught.value)


def test_tables_that_are_one_when_run_must_have_one_form(sources, tmp_path):
    recipe = uniform(MATRICES, None) | {"emb.3.weight": Quantization(4, 64)}
    with pytest.raises(PplexError, match=r"`emb\.0\.weight` and `emb\.3\.weight`"):
        to(sources / "pytorch", tmp_path / "out", None, recipe=lambda s, m: recipe)
    assert not (tmp_path / "out").exists()


def parts_of(costs):
    return make_parts(MATRICES, 2, 8, lambda part: costs.get(part, 0.0))


def test_mixed_stays_within_the_size_and_favours_what_costs_most():
    budget = recipe_bytes(MATRICES, uniform(MATRICES, Quantization(4, 64)))
    parts, rest = parts_of({"temporal.first.in_proj": 10.0, "temporal.last.in_proj": 1})
    recipe = mixed(parts, rest, budget)
    assert recipe_bytes(MATRICES, recipe) <= budget
    first = recipe["transformer.layers.0.self_attn.in_proj_weight"]
    unused = recipe["depformer.layers.0.gating.9.linear_in.weight"]
    assert first is None or first.bits >= 8
    assert unused == Quantization(2, 64)


def test_mixed_grows_with_the_size_and_refuses_one_too_small():
    costs = {part.name: 1.0 for part in parts_of({})[0]}
    parts, rest = parts_of(costs)
    sizes = [recipe_bytes(MATRICES, mixed(parts, rest, n)) for n in (410e3, 600e3, 9e9)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == sum(num_bytes(m, None) for m in MATRICES)
    with pytest.raises(PplexError, match="--max-size"):
        mixed(parts, rest, 10_000)


def test_every_part_of_the_mixed_recipe_loads(sources, tmp_path):
    """Modules of ours that join several matrices need them in one form."""
    costs = {part.name: 1.0 + i for i, part in enumerate(parts_of({})[0])}
    parts, rest = parts_of(costs)
    recipe = mixed(parts, rest, 600_000)
    assert len(set(recipe.values())) > 2
    to(sources / "pytorch", tmp_path / "out", None, recipe=lambda s, m: recipe)
    model = load(resolve(str(tmp_path / "out"), offline=True))
    assert tokens(model).shape == (9, 12)


def test_parts_tell_used_from_unused_steps():
    names = {m.name: part_of(m, 2, 8) for m in MATRICES}
    assert names["linears.8.weight"] == "depformer.unused.linears"
    assert names["linears.0.weight"] == "linears.first"
    assert names["depformer_emb.6.weight"] == "depformer_emb"
    assert names["depformer_emb.7.weight"] == "depformer.unused.depformer_emb"
    gating = "depformer.layers.1.gating.{}.linear_out.weight"
    assert names[gating.format(7)] == "depformer.others.linear_out"
    assert names[gating.format(8)] == "depformer.unused.linear_out"
    assert names["out_norm.alpha"] is None


# Files of tensors


def test_tensors_are_written_as_mlx_reads_them(tmp_path):
    arrays = {
        "a": mx.random.normal((3, 5)).astype(mx.bfloat16),
        "b": mx.random.normal((7,)).astype(mx.float16),
        "c": mx.array([[1, 2], [3, 4]], mx.uint32),
        "d": mx.random.normal((2, 1, 3)),
    }
    kinds = dict(zip(arrays, ("BF16", "F16", "U32", "F32"), strict=True))
    specs = [TensorSpec(n, kinds[n], tuple(a.shape)) for n, a in arrays.items()]
    path = tmp_path / "t.safetensors"
    write_tensors(path, specs, (arrays[spec.name] for spec in specs))
    found = mx.load(str(path))
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert mx.array_equal(found[name], array).item()
    assert list(read_specs(path).values()) == specs


def test_a_tensor_that_is_not_as_announced_leaves_no_file(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match="announced"):
        write_tensors(path, [TensorSpec("a", "F32", (2,))], [mx.zeros((3,))])
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((100,))})
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x", whole[:20], b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(PplexError, match=re.escape(str(path))):
            read_specs(path)
