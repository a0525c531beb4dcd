"""Checking a model: what is whole passes, and every kind of damage is named."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from test_convert import to

from pplex.checkpoint.describe import describe
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.hub import LocalModel, locate, resolve
from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.verify import first_vector, verify
from pplex.checkpoint.voices import fits_first, read_voice_file, write_voice_file
from pplex.errors import PplexError
from pplex.model.config import LmConfig


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "m"
    to(tiny, folder, Quantization(4, 32))
    return folder


@pytest.fixture
def model(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "m")
    return tmp_path / "m"


def findings(folder, level=None, sums=None):
    found = verify(locate(str(folder)), sums, lambda more: None)
    return [f for f in found if level in (None, f.level)]


def faults(folder, sums=None):
    return {f.what for f in findings(folder, "fault", sums)}


def test_a_converted_model_passes(whole):
    assert {f.level for f in findings(whole)} == {"ok"}


def test_the_references_own_checkpoint_passes(tiny):
    """Its voices were saved by NVIDIA's code: the consistency tests hold."""
    assert {f.level for f in findings(tiny)} == {"ok", "note"}


def test_a_flipped_byte_is_found_by_its_file(model):
    for name in ("depformer.safetensors", "voices/NATF0.safetensors", "config.json"):
        path = model / name
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        assert name in faults(model)
        content[-3] ^= 1
        path.write_bytes(content)
    assert not faults(model)


def test_a_missing_voice_is_named(model):
    (model / "voices" / "NATM0.safetensors").unlink()
    texts = [f"{f.what} {f.text}" for f in findings(model, "fault")]
    assert any("voice NATM0, which config.json names, is missing" in t for t in texts)
    assert any("voices/NATM0.safetensors missing" in text for text in texts)


@pytest.mark.parametrize(
    "name", ["temporal.safetensors", "mimi.safetensors", "tokenizer_spm_32k_3.model"]
)
def test_a_truncated_file_is_named(model, name):
    path = model / name
    path.write_bytes(path.read_bytes()[:-5])
    found = [f for f in findings(model, "fault") if name in f"{f.what} {f.text}"]
    assert len(found) >= 1


def test_a_missing_file_and_a_missing_tensor_are_named(model):
    (model / "embeddings.safetensors").unlink()
    assert any("embeddings.safetensors missing" in f.text for f in findings(model))
    assert "embeddings.safetensors" in faults(model)


def test_a_tensor_of_another_shape_or_with_nan_is_named(model):
    path = model / "temporal.safetensors"
    arrays = dict(mx.load(str(path)))
    scales = "layers.1.gating.linear_in.scales"
    broken = np.array(arrays[scales])
    broken[3, 0] = np.nan
    mx.save_safetensors(str(path), arrays | {scales: mx.array(broken)})
    assert any(scales in f.text and "NaN" in f.text for f in findings(model, "fault"))
    mx.save_safetensors(str(path), arrays | {"out_norm.alpha": mx.zeros((1, 1, 3))})
    assert any("`out_norm.alpha`" in f.text for f in findings(model, "fault"))


def test_a_voice_of_another_model_draws_a_warning(model):
    path = model / "voices" / "NATF0.safetensors"
    voice = read_voice_file(path)
    write_voice_file(path, voice.embeddings + 1.0, voice.cache)
    ring = np.array(voice.cache)
    ring[10] = 5
    other = model / "voices" / "NATM0.safetensors"
    write_voice_file(other, voice.embeddings, ring)
    texts = {f.what: f.text for f in findings(model, "warning")}
    assert "first vector" in texts["NATF0.safetensors"]
    assert "sine codes" in texts["NATM0.safetensors"]


def test_the_first_vector_is_that_of_the_voices(tiny, whole):
    from pplex.checkpoint.config import load_config
    from pplex.checkpoint.source import Source
    from pplex.checkpoint.voices import find_voices

    lm = load_config(tiny / "config.json").lm
    voice = read_voice_file(find_voices(tiny)["NATF0"])
    first = first_vector(Source(CheckpointFolder(tiny), lm))
    # The tiny reference ran in float32, a published voice is rounded after each sum.
    assert fits_first(voice, first)
    np.testing.assert_allclose(first, voice.embeddings[0], atol=0.03)
    np.testing.assert_array_equal(
        first_vector(Source(CheckpointFolder(whole), lm)), first
    )


def test_a_list_from_elsewhere_can_be_checked_against(model, tmp_path):
    sums = tmp_path / "list.txt"
    sums.write_text("0" * 64 + "  config.json\n")
    assert faults(model, sums) == {"config.json"}
    sums.write_text("nonsense\n")
    with pytest.raises(PplexError, match="--sums .*list.txt, line 1: expected a SHA"):
        faults(model, sums)


def test_files_of_the_hugging_face_cache_are_checked_by_their_names(model, tmp_path):
    from pplex.checkpoint.hashes import sha256

    (model / "SHA256SUMS").unlink()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("temporal.safetensors", "mimi.safetensors"):
        blob = blobs / sha256(model / name)
        (model / name).rename(blob)
        (model / name).symlink_to(blob)
    assert not faults(model)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 64
    blob.write_bytes(content)
    assert faults(model) == {"mimi.safetensors"}


# What a model is made of


def test_the_figures_of_the_7b_are_those_of_the_specification(tmp_path):
    """Sizes of the published 4-bit files, from headers alone."""
    path = tmp_path / "m"
    path.mkdir()
    write_headers(path, LmConfig(), 4)
    info = describe(LocalModel("m", path, None, None))
    assert info.parameters == 8_371_408_896
    assert info.lm_bytes == pytest.approx(5.420e9, rel=1e-3)
    assert info.bytes_per_frame == pytest.approx(4.361e9, rel=1e-3)
    assert info.kv_bytes_per_frame == 524_288
    assert info.least_frame_ms(400.0) == pytest.approx(10.90, abs=0.01)
    assert info.least_frame_ms(400.0, 3000) == pytest.approx(10.90 + 3.93, abs=0.01)


def write_headers(folder, config, bits):
    """Files of the right header and length, with holes for values."""
    from pplex.checkpoint.layouts import published_matrices
    from pplex.checkpoint.safetensors import TensorSpec

    files: dict[str, list[TensorSpec]] = {}
    for matrix in published_matrices(config, 16, 16):
        named, specs = matrix.in_split_file(), files.setdefault(matrix.split_file, [])
        if len(matrix.shape) == 1 or matrix.split_file == "embeddings":
            specs.append(TensorSpec(named.name, "F16", matrix.shape))
            continue
        rows, columns = matrix.shape
        packed = (rows, columns * bits // 32)
        specs.append(TensorSpec(named.part("weight"), "U32", packed))
        for part in ("scales", "biases"):
            specs.append(TensorSpec(named.part(part), "F16", (rows, columns // 64)))
    for name, specs in files.items():
        header, offset = {}, 0
        for spec in specs:
            end = offset + spec.num_bytes
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        with (folder / f"{name}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)


def test_a_model_is_described_by_part(whole):
    info = describe(resolve(str(whole), offline=True))
    parts = {(part.part, part.form) for part in info.parts}
    assert ("temporal.gating.linear_in", "4/32") in parts
    assert ("audio_emb", "-") in parts
    assert sum(part.bytes for part in info.parts) == info.lm_bytes
    assert info.voices == ["NATF0", "NATM0"]
