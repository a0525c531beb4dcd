"""Rounding block by block in compiled code: MLX's numbers, to the bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import write_checkpoint
from small import SMALL
from test_convert import to

from pplex.checkpoint import blocks
from pplex.checkpoint.blocks import Stretch, open_rounder
from pplex.checkpoint.layouts import Quantization
from pplex.errors import PplexError
from pplex.quantization.quantize import quantize

DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
COLUMNS = 256


@pytest.fixture
def rounder():
    with open_rounder() as found:
        if found is None:
            pytest.skip("the library was not built here")
        yield found


def in_file(path, weight: mx.array, dtype: str) -> Stretch:
    """The weight in a file, behind a few other bytes."""
    values = weight.astype(DTYPES[dtype])
    raw = np.array(values.view(mx.uint16) if dtype == "BF16" else values)
    path.write_bytes(b"header" + raw.tobytes())
    return Stretch(path, 6, weight.size, dtype)


def weights(seed: int) -> mx.array:
    """Rows of many kinds: tiny, large, one-sided, equal, on half steps, zeros."""
    keys = mx.random.split(mx.random.key(seed), 3)
    w = mx.random.normal((64, COLUMNS), key=keys[0])
    w = w * mx.exp(3 * mx.random.normal((64, 1), key=keys[1]) - 3)
    w[:8] = mx.abs(w[:8])
    w[8:16] = mx.round(4 * w[8:16]) / 4
    drawn = mx.random.uniform(shape=(8, COLUMNS), key=keys[2])
    w[16:24] = mx.where(drawn < 0.9, 0, w[16:24])
    for row, value in enumerate((0.0, -0.0, 1.0, -1.0, 1e-8, -3e-7, 60000.0)):
        w[24 + row] = value
    w[32, 5] = -60000.0
    w[33] = mx.arange(COLUMNS) - 7.5
    return w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_codes_scales_and_biases_are_those_of_mlx(
    tmp_path, rounder, dtype, bits, group_size
):
    form = Quantization(bits, group_size)
    for seed in range(3):
        weight = weights(seed)
        stretch = in_file(tmp_path / "w", weight, dtype)
        found = rounder.quantize([stretch], weight.shape, form)
        expected = quantize(weight.astype(DTYPES[dtype]), form, refine=False)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(
                ours.view(np.uint8), np.array(theirs).view(np.uint8)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_float16_is_rounded_half_to_even(tmp_path, rounder, dtype):
    exact = np.arange(0, 0x7B00, 11, np.uint16).view(np.float16).astype(np.float32)
    between = (exact[:-1] + exact[1:]) / 2
    values = np.concatenate([exact, between, -exact, 1.0001 * between, [1e-30]])
    values = np.resize(values, (3, 4321)).astype(np.float32)
    stretch = in_file(tmp_path / "w", mx.array(values), dtype)
    expected = mx.array(values).astype(DTYPES[dtype]).astype(mx.float32)
    with np.errstate(over="ignore"):
        expected = np.array(expected).astype(np.float16)
    found = rounder.halve([stretch], values.shape)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0])
@pytest.mark.parametrize("row", [0, 63])
def test_a_value_that_does_not_fit_is_noticed(tmp_path, rounder, value, row):
    weight = 0.02 * mx.random.normal((64, COLUMNS), key=mx.random.key(1))
    weight[row, COLUMNS - 1] = value
    for dtype in ("BF16", "F32"):
        stretch = in_file(tmp_path / "w", weight, dtype)
        assert rounder.quantize([stretch], weight.shape, Quantization(4, 64)) is None
        assert rounder.halve([stretch], weight.shape) is None


def test_blocks_of_any_size_make_the_same_matrix(tmp_path, rounder, monkeypatch):
    """Shares of a matrix may lie in several places, in several types."""
    weight = weights(5)
    form = Quantization(5, 32)
    parts = [
        in_file(tmp_path / name, rows, dtype)
        for name, rows, dtype in (
            ("a", weight[:24], "F32"),
            ("b", weight[24:25], "BF16"),
            ("c", weight[25:], "F32"),
        )
    ]
    whole = rounder.quantize(parts, weight.shape, form)
    for size in (1, 5000):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        again = rounder.quantize(parts, weight.shape, form)
        for old, new in zip(whole, again, strict=True):
            np.testing.assert_array_equal(old, new)


def test_a_file_that_ends_too_soon_is_named(tmp_path, rounder):
    stretch = in_file(tmp_path / "w", weights(0), "F32")
    with (tmp_path / "w").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(PplexError, match=r"w has become shorter"):
        rounder.halve([stretch], (64, COLUMNS))


def test_without_the_library_conversions_are_the_same(tmp_path, rounder, monkeypatch):
    write_checkpoint(tmp_path / "m", SMALL)
    for bits in (4, 16):
        form = Quantization(4, 32) if bits == 4 else None
        with monkeypatch.context() as patch:
            to(tmp_path / "m", tmp_path / f"fast{bits}", form)
            patch.setattr(blocks, "find_extension", lambda name: None)
            to(tmp_path / "m", tmp_path / f"slow{bits}", form)
        for name in ("temporal", "depformer", "embeddings"):
            fast, slow = (
                (tmp_path / f"{kind}{bits}" / f"{name}.safetensors").read_bytes()
                for kind in ("fast", "slow")
            )
            assert fast == slow


@pytest.mark.parametrize("built", [True, False])
def test_no_number_is_quantized_silently(tmp_path, monkeypatch, built):
    write_checkpoint(tmp_path / "bad", SMALL)
    file = tmp_path / "bad" / "model.safetensors"
    arrays = dict(mx.load(str(file)))
    name = "transformer.layers.1.gating.linear_in.weight"
    arrays[name] = arrays[name] * float("nan")
    mx.save_safetensors(str(file), arrays)
    if not built:
        monkeypatch.setattr(blocks, "find_extension", lambda name: None)
    with pytest.raises(PplexError, match=r"1\.gating\.linear_in.* is no number"):
        to(tmp_path / "bad", tmp_path / "out", Quantization(4, 32))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
