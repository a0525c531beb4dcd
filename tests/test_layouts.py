"""Checkpoint layouts: each is read exactly, and what does not fit is named."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from random_checkpoint import config_json, lm_arrays, write_checkpoint
from small import SMALL, converse, speech

from pplex.checkpoint.config import load_config
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.weights import LmTensors, codec_tensors, lm_tensors, make_lm
from pplex.conversation.prompts import make_role
from pplex.conversation.session import load
from pplex.errors import PplexError
from pplex.model.config import ModelConfig
from pplex.model.lm import Lm
from pplex.model.mimi import Mimi, make_mimi

LAYOUTS = ["pytorch", "mlx", "mlx-split"]


def dequantized(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same tensors with every quantized matrix written out in float32."""
    out = {}
    for name, array in arrays.items():
        if name.endswith(("scales", "biases")):
            continue
        scales = arrays.get(re.sub("weight$", "scales", name))
        if scales is None or not name.endswith("weight"):
            out[name] = array
            continue
        biases = arrays[re.sub("weight$", "biases", name)]
        bits = 32 * array.shape[1] // (scales.shape[1] * 32)
        group_size = 32
        out[name] = mx.dequantize(
            array,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size,
            bits,
        )
    return out


def save(folder: Path, files: dict[str, dict[str, mx.array]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, arrays in files.items():
        mx.save_safetensors(str(folder / f"{name}.safetensors"), arrays)
    return folder


def tensors_at(path: Path, steps: int | None = None) -> LmTensors:
    """The tensors of the language model at ``path``, a folder or a file."""
    return lm_tensors(CheckpointFolder(path), SMALL.lm, steps)


def logits(path: Path, steps: int = 8) -> list[np.ndarray]:
    """What the language model at ``path`` computes for a few fixed tokens."""
    lm = make_lm(SMALL.lm, tensors_at(path, steps), mx.float32)
    tokens = mx.random.randint(0, 60, (1, 17, 12), key=mx.random.key(2))
    hidden, text = lm.head(lm.temporal(lm.embed(tokens), lm.make_cache()))
    heads: list[mx.array] = []

    def first(step_logits, _):
        heads.append(step_logits)
        return mx.zeros((12,), mx.int32) + 5

    lm.depformer(hidden[0], tokens[0, 0], first)
    return [np.array(a) for a in (hidden, text, *heads)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_files_compute_what_their_written_out_weights_do(
    tmp_path, layout, bits
):
    mx.random.seed(1)
    files = lm_arrays(SMALL.lm, layout, bits=bits, group_size=32)
    whole = {name: dequantized(arrays) for name, arrays in files.items()}
    assert bits in tensors_at(save(tmp_path / "q", files)).bits
    for found, expected in zip(
        logits(tmp_path / "q"), logits(save(tmp_path / "w", whole)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("steps", [8, 16])
def test_tensors_have_the_names_and_shapes_of_the_networks(tmp_path, layout, steps):
    write_checkpoint(tmp_path / "m", SMALL, layout)
    folder = CheckpointFolder(tmp_path / "m")
    found = lm_tensors(folder, SMALL.lm, steps)
    assert (found.forms, found.bits) == ({}, (16,))
    networks = (
        (found.weights, Lm(SMALL.lm, steps)),
        (codec_tensors(folder, SMALL.mimi), Mimi(SMALL.mimi)),
    )
    for weights, network in networks:
        expected = {n: a.shape for n, a in tree_flatten(network.parameters())}
        assert {name: array.shape for name, array in weights.items()} == expected


def test_quantized_tensors_have_a_form_until_they_are_written_out(tmp_path):
    write_checkpoint(tmp_path / "m", SMALL, "mlx-split", bits=4, group_size=32)
    found = lm_tensors(CheckpointFolder(tmp_path / "m"), SMALL.lm)
    name = "layers.1.gating.linear_in"
    assert found.forms[name] == Quantization(4, 32)
    assert "text_linear" not in found.forms
    half = found.cast(mx.bfloat16).weights
    assert half[f"{name}.weight"].dtype == mx.uint32
    assert half[f"{name}.scales"].dtype == half["text_emb.weight"].dtype == mx.bfloat16
    assert half["layers.0.norm1.weight"].dtype == mx.float32
    whole = found.write_out()
    assert whole.forms == {} and whole.bits == found.bits == (4,)
    assert f"{name}.scales" not in whole.weights
    shape = (2 * SMALL.lm.hidden_dim, SMALL.lm.dim)
    assert whole.weights[f"{name}.weight"].shape == shape


def test_a_config_says_what_keys_and_values_take_and_how_long_a_frame_lasts():
    config = ModelConfig()
    assert config.frame_s == 0.08
    assert config.kv_bytes(2) == 2 * 32 * 4096 * 2
    # At 8 bits also a scale of 4 bytes for each of 32 heads.
    assert config.with_kv_bits(8).kv_bytes(2) == 2 * 32 * (4096 + 32 * 4)
    narrow = replace(config, lm=replace(config.lm, num_heads=256))
    with pytest.raises(PplexError, match="16 numbers wide.*--kv-bits"):
        narrow.with_kv_bits(8)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_weights_written_out_at_loading_compute_the_same(tmp_path, dtype):
    files = lm_arrays(SMALL.lm, "mlx-split", bits=4, group_size=32, dtype=dtype)
    folder = save(tmp_path / "q", files)
    packed = make_lm(SMALL.lm, tensors_at(folder), mx.float32)
    dense = make_lm(SMALL.lm, tensors_at(folder).write_out(), mx.float32)
    tokens = mx.random.randint(0, 60, (1, 17, 12), key=mx.random.key(2))
    outputs = [
        np.array(lm.temporal(lm.embed(tokens), lm.make_cache()))
        for lm in (packed, dense)
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4)


def as_sliced(arrays: dict[str, mx.array], steps: int = 16) -> dict[str, mx.array]:
    """NVIDIA's names turned into those of moshi_mlx, as the published table says."""
    out = {}
    for name, array in arrays.items():
        squeezed = array.reshape(-1) if name.endswith("alpha") else array
        if match := re.fullmatch(r"emb\.(\d+)\.weight", name):
            out[f"audio_embs.{match[1]}.weight"] = array
        elif match := re.fullmatch(r"depformer_in\.(\d+)\.weight", name):
            out[f"depformer.slices.{match[1]}.linear_in.weight"] = array
        elif match := re.fullmatch(r"linears\.(\d+)\.weight", name):
            out[f"depformer.slices.{match[1]}.linear_out.weight"] = array
        elif match := re.fullmatch(r"depformer_emb\.(\d+)\.weight", name):
            out[f"depformer.slices.{int(match[1]) + 1}.emb.weight"] = array
        elif name == "depformer_text_emb.weight":
            out["depformer.slices.0.emb.weight"] = array
        elif match := re.fullmatch(r"depformer\.(layers\.\d+)\.(norm\d)\.alpha", name):
            for step in range(steps):
                stem = f"depformer.slices.{step}.transformer.{match[1]}.{match[2]}"
                out[f"{stem}.weight"] = squeezed
        elif match := re.fullmatch(
            r"depformer\.(layers\.\d+)\.self_attn\.(in|out)_proj[._]weight", name
        ):
            for step, rows in enumerate(mx.split(array, steps)):
                stem = f"depformer.slices.{step}.transformer.{match[1]}.self_attn"
                out[f"{stem}.{match[2]}_proj.weight"] = rows
        elif match := re.fullmatch(
            r"depformer\.(layers\.\d+)\.gating\.(\d+)\.(linear_\w+)\.weight", name
        ):
            stem = f"depformer.slices.{match[2]}.transformer.{match[1]}.gating"
            out[f"{stem}.{match[3]}.weight"] = array
        else:
            renamed = name.replace("in_proj_weight", "in_proj.weight")
            out[renamed.replace("alpha", "weight")] = squeezed
    return out


def as_split(arrays: dict[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """NVIDIA's names turned into the three files of the split folders."""
    files: dict[str, dict[str, mx.array]] = {
        "temporal": {},
        "depformer": {},
        "embeddings": {},
    }
    for name, array in arrays.items():
        if name.startswith("transformer."):
            files["temporal"][name.removeprefix("transformer.")] = array
        elif name == "out_norm.alpha":
            files["temporal"][name] = array
        elif name.startswith("depformer."):
            files["depformer"][name.removeprefix("depformer.")] = array
        elif name.startswith("depformer_in."):
            files["depformer"][name] = array
        else:
            files["embeddings"][name] = array
    return files


@pytest.fixture(scope="module")
def published() -> dict[str, mx.array]:
    mx.random.seed(4)
    return lm_arrays(SMALL.lm, "pytorch")["model"]


def test_one_model_in_every_layout_computes_the_same(tmp_path, published):
    plain = logits(save(tmp_path / "a", {"model": published}), steps=16)
    sliced = save(tmp_path / "c", {"model": as_sliced(published)})
    split = save(tmp_path / "b", as_split(published))
    for other in (sliced, split, sliced / "model.safetensors"):
        for found, expected in zip(logits(other, steps=16), plain, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_file_of_eight_steps_answers_like_one_of_sixteen(tmp_path, published):
    eight = {}
    for name, array in published.items():
        match = re.match(r"(linears|depformer_in|depformer_emb)\.(\d+)", name)
        match = match or re.match(r"(depformer\.layers\.\d+\.gating)\.(\d+)", name)
        limit = 7 if name.startswith("depformer_emb") else 8
        if match and int(match[2]) >= limit:
            continue
        if name.startswith("depformer.layers") and "self_attn" in name:
            array = array[: array.shape[0] // 2]
        eight[name] = array
    assert len(eight) < len(published)
    found = logits(save(tmp_path / "eight", {"model": eight}))
    expected = logits(save(tmp_path / "sixteen", {"model": published}))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layout", ["pytorch", "mlx-split"])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_table_for_the_last_steps_token_is_left_out(tmp_path, layout, bits):
    """NVIDIA's loader takes files of eight steps only with one: nothing reads it."""
    mx.random.seed(7)
    files = lm_arrays(SMALL.lm, layout, bits=bits, group_size=32, steps=8)
    expected = logits(save(tmp_path / "m", files))
    holder = files["embeddings" if layout == "mlx-split" else "model"]
    parts = [n for n in holder if n.startswith("depformer_emb.6.")]
    holder |= {n.replace(".6.", ".7."): holder[n] for n in parts}
    for found, one in zip(logits(save(tmp_path / "m", files)), expected, strict=True):
        np.testing.assert_array_equal(found, one)
    holder |= {n.replace(".6.", ".8."): holder[n] for n in parts}
    with pytest.raises(PplexError, match=r"`depformer_emb\.8\."):
        logits(save(tmp_path / "m", files))


def test_too_few_depformer_steps_are_refused(tmp_path, published):
    late = re.compile(r"(linears|depformer_in)\.(7|8|9|1\d)\.")
    few = {n: a for n, a in published.items() if not late.match(n)}
    with pytest.raises(PplexError, match="7 steps, 8 to 16 are"):
        logits(save(tmp_path / "few", {"model": few}))


BREAKS = {
    "missing": lambda a, n: a.pop(n),
    "wrong shape": lambda a, n: a.update({n: mx.zeros((3, 5))}),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize(
    "name",
    [
        "text_emb.weight",
        "emb.15.weight",
        "transformer.layers.1.gating.linear_in.weight",
        "transformer.layers.0.norm2.alpha",
        "out_norm.alpha",
        "depformer.layers.1.self_attn.in_proj_weight",
        "depformer.layers.0.gating.15.linear_out.weight",
        "linears.3.weight",
    ],
)
def test_a_tensor_that_does_not_fit_stops_the_load_by_its_name(
    tmp_path, published, how, name
):
    broken = dict(published)
    BREAKS[how](broken, name)
    with pytest.raises(PplexError, match=re.escape(f"`{name}`")) as caught:
        logits(save(tmp_path / "m", {"model": broken}))
    assert "model.safetensors" in str(caught.value)


def test_an_extra_tensor_stops_the_load_by_its_name(tmp_path, published):
    more = published | {"transformer.layers.2.norm1.alpha": mx.ones((1, 1, 64))}
    with pytest.raises(PplexError, match=r"`transformer\.layers\.2\.norm1\.alpha`"):
        logits(save(tmp_path / "m", {"model": more}))


def test_what_a_fine_tuning_adds_is_left_out(tmp_path, published):
    more = {
        "condition_provider.conditioners.description.embed.weight": mx.ones((3, 4)),
        "extra_heads.0.weight": mx.ones((2, 64)),
    }
    found = logits(save(tmp_path / "more", {"model": published | more}))
    expected = logits(save(tmp_path / "m", {"model": published}))
    np.testing.assert_array_equal(np.array(found[0]), np.array(expected[0]))


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_a_quantized_matrix_without_a_part_stops_the_load(tmp_path, part):
    files = lm_arrays(SMALL.lm, "mlx-split", bits=4, group_size=32)
    files["depformer"].pop(f"layers.0.self_attn.in_proj_{part}")
    with pytest.raises(
        PplexError, match=r"layers\.0\.self_attn\.in_proj_(weight|biases)"
    ):
        logits(save(tmp_path / "q", files))


def test_partly_quantized_folders_load(tmp_path):
    """Earlier published conversions left the depformer in 16 bits."""
    mx.random.seed(9)
    files = lm_arrays(SMALL.lm, "mlx-split", bits=8, group_size=32)
    mx.random.seed(9)
    dense = lm_arrays(SMALL.lm, "mlx-split")
    found = tensors_at(save(tmp_path / "p", files | {"depformer": dense["depformer"]}))
    assert found.bits == (8, 16)
    make_lm(SMALL.lm, found, mx.float32)


def test_codec_tensors_that_do_not_fit_are_named(tmp_path):
    folder = tmp_path / "m"
    write_checkpoint(folder, SMALL)
    path = next(folder.glob("tokenizer-*.safetensors"))
    whole = mx.load(str(path))
    cases = {
        "encoder.model.0.conv.conv.weight": None,
        "decoder.model.5.convtr.convtr.weight": mx.zeros((8, 4, 3)),
        "encoder_transformer.transformer.layers.1.linear1.weight": mx.zeros((2, 2)),
        "quantizer.rvq_rest.vq.layers.3._codebook.embedding_sum": mx.zeros((64, 9)),
        "downsample.conv.conv.conv.weight": mx.zeros((32, 32)),
        "decoder.model.15.conv.conv.bias": mx.zeros((1,)),
    }
    for name, array in cases.items():
        broken = dict(whole)
        if array is None:
            del broken[name]
        else:
            broken[name] = array
        mx.save_safetensors(str(path), broken)
        with pytest.raises(PplexError, match=re.escape(f"`{name}`")) as caught:
            load(resolve(str(folder), offline=True))
        assert path.name in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "encoder.model.0.conv.conv.bias",
        "decoder_transformer.transformer.layers.1.layer_scale_2.scale",
        "upsample.convtr.convtr.convtr.weight",
        "quantizer.rvq_first.vq.layers.0._codebook.embedding_sum",
        "quantizer.rvq_rest.vq.layers.6._codebook.cluster_usage",
    ],
)
def test_codec_tensors_that_are_not_finite_are_named(tmp_path, name, value):
    write_checkpoint(tmp_path / "m", SMALL)
    path = next((tmp_path / "m").glob("tokenizer-*.safetensors"))
    arrays = mx.load(str(path))
    flat = np.array(arrays[name]).reshape(-1)
    flat[-1] = value
    arrays[name] = mx.array(flat).reshape(arrays[name].shape)
    mx.save_safetensors(str(path), arrays)
    with pytest.raises(PplexError, match=f"`{re.escape(name)}` holds .* not finite"):
        load(resolve(str(tmp_path / "m"), offline=True))


def test_older_codebook_names_are_read(tmp_path):
    folder = tmp_path / "m"
    write_checkpoint(folder, SMALL)
    path = next(folder.glob("tokenizer-*.safetensors"))

    def codebooks() -> np.ndarray:
        tensors = codec_tensors(CheckpointFolder(folder), SMALL.mimi)
        return np.array(make_mimi(SMALL.mimi, tensors).quantizer.acoustic.codebooks)

    before = codebooks()
    renamed = {
        name.replace("_initialized", "inited")
        .replace("cluster_usage", "cluster_size")
        .replace("embedding_sum", "embed_avg"): array
        for name, array in mx.load(str(path)).items()
    }
    mx.save_safetensors(str(path), renamed)
    np.testing.assert_array_equal(codebooks(), before)


def test_a_truncated_weights_file_is_refused(tmp_path):
    folder = tmp_path / "m"
    write_checkpoint(folder, SMALL)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(PplexError, match="model.safetensors"):
            load(resolve(str(folder), offline=True))


def test_a_flat_config_gives_the_sizes(tmp_path):
    """As Kyutai's and the reinforced models', with keys for other programs."""
    write_checkpoint(tmp_path / "m", SMALL)
    nested = load_config(tmp_path / "m" / "config.json")
    raw = config_json(SMALL)
    flat = raw["lm"] | {
        **{key: raw[key] for key in ("mimi", "silence_codes", "sine_codes")},
        "causal": True,
        "norm": "rms_norm_f32",
        "model_type": "moshi",
        "mimi_name": "codec.safetensors",
        "cross_attention": False,
        "lora": False,
    }
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    assert load_config(tmp_path / "flat.json").lm == nested.lm == SMALL.lm
    del flat["depformer_dim_feedforward"], flat["hidden_scale"]
    flat |= {"depformer_dim_feedforward": None, "hidden_scale": 6.0}
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    lm = load_config(tmp_path / "flat.json").lm
    assert lm.hidden_dim == 2 * (6 * lm.dim) // 3
    assert lm.depformer_hidden_dim == 2 * (6 * lm.depformer_dim) // 3
    flat["gating"] = "none"
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    with pytest.raises(PplexError, match="gating"):
        load_config(tmp_path / "flat.json")
    (tmp_path / "flat.json").write_text('{"model_type": "personaplex", "version": "1"}')
    assert load_config(tmp_path / "flat.json") == ModelConfig()


UNREASONABLE = [
    *[("lm.num_layers", value) for value in (16777215, 0, -1, True, "8", None, [])],
    *[("lm.n_q", value) for value in (16777214, 2.0)],
    *[("lm.context", value) for value in (16777215, 10**4000)],
    *[("lm.hidden_scale", value) for value in (10**4000, 0, -1, float("inf"), "x")],
    *[("lm.dim_feedforward", value) for value in (10**4000, True, [])],
    *[("lm.max_period", value) for value in (5e-324, True, 0, -1, 1, 1e300, "x")],
    ("lm.max_period", float("nan")),
    *[("lm.delays", value) for value in ([10**4000], [0] * 70000, [-1], "0", [True])],
    *[("mimi.frame_rate", value) for value in (5e-324, 1e300, True, 10**4000)],
    *[("mimi.transformer.max_period", value) for value in (5e-324, True)],
    *[("mimi.transformer.context", value) for value in (16777215, 1)],
    *[("mimi.transformer.num_layers", value) for value in (16777215, 0)],
    *[("mimi.quantizer.n_q", value) for value in (16777215, 1)],
    *[("mimi.seanet.ratios", value) for value in ([0, 1], [1 << 40], [2] * 3000)],
    ("mimi.sample_rate", 10**4000),
    ("mimi.encoder_frame_rate", 10**4000),
    ("lm.gating", "x" * 10000),
]


@pytest.mark.parametrize(("place", "value"), UNREASONABLE, ids=lambda x: repr(x)[:30])
def test_numbers_that_no_model_has_are_refused_before_anything_is_built(
    tmp_path, place, value
):
    raw = config_json(SMALL)
    *outer, key = place.split(".")
    section = raw
    for name in outer:
        section = section[name]
    section[key] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(PplexError) as caught:
        load_config(path)
    assert key in str(caught.value) or "a frame" in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_pipe_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(PplexError, match="pipe"):
        load_config(tmp_path / "config.json")


def test_config_keys_are_checked_by_name(tmp_path):
    folder = tmp_path / "m"
    write_checkpoint(folder, SMALL)
    good = config_json(SMALL)
    path = folder / "config.json"
    bad = {
        "lm.dim": good | {"lm": good["lm"] | {"dim": "wide"}},
        "lm.gating": good | {"lm": good["lm"] | {"gating": "relu"}},
        "mimi.seanet.norm": good
        | {"mimi": good["mimi"] | {"seanet": good["mimi"]["seanet"] | {"norm": "x"}}},
        "silence_codes": good | {"silence_codes": [1, 2]},
    }
    for name, content in bad.items():
        path.write_text(json.dumps(content))
        with pytest.raises(PplexError, match=re.escape(name)) as caught:
            load(resolve(str(folder), offline=True))
        assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "delays", [[0, 0] + [2] * 15, [0, 0, 1, 1, 1, 1, 1, 1, 3] * 2, [1] * 17, [0] * 16]
)
def test_delays_that_are_not_supported_are_refused_with_what_is(tmp_path, delays):
    raw = config_json(SMALL)
    raw["lm"]["delays"] = delays[:17]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(PplexError, match=r"`lm.delays` .*(0 and 1, and 0|17 entries)"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversation_runs_from_every_layout(tmp_path, layout):
    write_checkpoint(tmp_path / "m", SMALL, layout, bits=8, group_size=32)
    model = load(resolve(str(tmp_path / "m"), offline=True))
    assert model.layout == layout
    role = make_role(model, None, "hello")
    start = model.engine.prefill(role.prompt)
    tokens, user, pcm = converse(model.engine, start, speech(3))
    assert tokens.shape == (9, 3)
    assert user.shape == (8, 3)
    assert np.isfinite(pcm).all() and pcm.shape == (3 * 1920,)
