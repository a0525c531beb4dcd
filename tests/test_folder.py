"""Which file is what: the same for whoever asks, of a folder, a file or a list."""

from __future__ import annotations

import shutil

import mlx.core as mx
import pytest
from random_checkpoint import lm_arrays, write_checkpoint
from small import SMALL

from pplex.batch.describe import describe as describe_for_batch
from pplex.checkpoint.describe import describe
from pplex.checkpoint.hashes import model_identity
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.verify import verify
from pplex.checkpoint.weights import lm_tensors
from pplex.conversation.session import load
from pplex.engine.choose import cost_of
from pplex.quantization.convert import Conversion, convert
from pplex.quantization.recipe import uniform

CODEC = "tokenizer-e351c8d8-checkpoint125.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "m", SMALL)
    return tmp_path / "m"


def use_everywhere(path, tmp_path):
    """Everything that looks for a model's files takes this one; the loaded model."""
    local = resolve(str(path), offline=True)
    model = load(local)
    described = describe(local)
    assert described.layout == model.layout
    assert described.codec_bytes > 0
    levels = {f.what: f.level for f in verify(local, None, lambda more: None)}
    assert "fault" not in levels.values()
    assert cost_of(model.config, lm_tensors(local.folder, SMALL.lm)) == (
        model.engine.cost()
    )
    assert describe_for_batch(local).identity == model_identity(local)
    conversion = Conversion(lambda _, m: uniform(m, None), "test", "by a test")
    convert(local, tmp_path / "out", conversion, lambda all: None, lambda more: None)
    converted = load(resolve(str(tmp_path / "out"), offline=True))
    assert converted.voices.keys() == model.voices.keys()
    return model


def test_the_only_other_file_of_weights_is_used(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    model = use_everywhere(folder, tmp_path)
    assert model.layout == "pytorch"


def test_a_codec_of_any_published_name_is_used(folder, tmp_path):
    (folder / CODEC).rename(folder / "tokenizer-mimi.safetensors")
    use_everywhere(folder, tmp_path)


def test_a_file_given_as_the_model_is_the_one_used(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    shutil.copy(folder / "other.safetensors", folder / "more.safetensors")
    use_everywhere(folder / "other.safetensors", tmp_path)


def test_what_is_loaded_is_what_is_hashed(folder, tmp_path):
    """A folder with quantized weights means them to be run."""
    packed = lm_arrays(SMALL.lm, "pytorch", bits=8, group_size=32)["model"]
    mx.save_safetensors(str(folder / "model.q8.safetensors"), packed)
    model = use_everywhere(folder, tmp_path)
    assert model.bits == (8,)
    local = resolve(str(folder), offline=True)
    assert lm_tensors(local.folder, SMALL.lm).forms
    before = model_identity(local)
    (folder / "model.safetensors").write_bytes(b"never read")
    assert load(local).bits == (8,)
    assert model_identity(local) == before
    packed["out_norm.alpha"] = packed["out_norm.alpha"] + 1
    mx.save_safetensors(str(folder / "model.q8.safetensors"), packed)
    assert model_identity(local) != before


def test_a_plain_file_beside_a_quantized_one_is_not_quantized(folder):
    """Only the files that are loaded count."""
    packed = lm_arrays(SMALL.lm, "pytorch", bits=8, group_size=32)["model"]
    mx.save_safetensors(str(folder / "model.q8.safetensors"), packed)
    plain = resolve(str(folder / "model.safetensors"), offline=True)
    assert not lm_tensors(plain.folder, SMALL.lm).forms
