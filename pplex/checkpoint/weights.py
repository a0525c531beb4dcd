"""Load a checkpoint: tell its layout, check every tensor, build the model.

Quantized matrices stay quantized; everything else is cast to the compute type once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from pplex.checkpoint.codec_layout import sanitize_codec
from pplex.checkpoint.layouts import (
    SPLIT_FILES,
    Arrays,
    Quantization,
    published_matrices,
    read_matrices,
    sliced_matrices,
)
from pplex.checkpoint.tensor_file import read_specs
from pplex.codec.mimi import Mimi
from pplex.errors import PplexError
from pplex.model.config import LmConfig, MimiConfig
from pplex.model.lm import Lm


@dataclass(frozen=True)
class LoadedLm:
    """A language model, its layout's name, the bits of its transformers' weights."""

    lm: Lm
    layout: str
    bits: tuple[int, ...]


def read_tensors(path: Path) -> Arrays:
    """The tensors of a safetensors file, read when they are first used."""
    if not path.is_file():
        raise PplexError(f"{path}: this file of the checkpoint is missing")
    read_specs(path)  # MLX believes what a header says of sizes
    try:
        arrays = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise PplexError(f"{path}: not a whole safetensors file ({reason})") from e
    assert isinstance(arrays, dict)
    return arrays


def read_lm(
    path: Path, config: LmConfig, num_steps: int
) -> tuple[Arrays, dict[str, Quantization], str]:
    """Our weights of the language model in the folder or file ``path``.

    ``num_steps`` depformer steps are kept. Returns the weights, how the quantized
    modules are stored, and the name of the layout.
    """
    if path.is_dir() and (path / "temporal.safetensors").is_file():
        return _read_split(path, config, num_steps)
    if path.is_dir():
        path = find_lm_file(path)
    arrays = read_tensors(path)
    if "transformer.layers.0.self_attn.in_proj_weight" in arrays:
        layout, table = "pytorch", published_matrices
        steps = _count(arrays, _STEPS)
    elif "transformer.layers.0.self_attn.in_proj.weight" in arrays:
        layout, table = "mlx", sliced_matrices
        steps = _count(arrays, _SLICES)
    else:
        raise PplexError(
            f"{path}: not a PersonaPlex or Moshi language model: it has no "
            "`transformer.layers.0.self_attn.in_proj` weight"
        )
    kept = _kept(path, steps, num_steps, config)
    weights, quantized = read_matrices(arrays, list(table(config, steps, kept)), path)
    return weights, quantized, layout


def find_lm_file(folder: Path) -> Path:
    """The single file of a folder that holds the language model."""
    for pattern in (
        "model.safetensors",
        "model.q8.safetensors",
        "model.q4.safetensors",
    ):
        if (folder / pattern).is_file():
            return folder / pattern
    raise PplexError(
        f"{folder}: no model here: expected temporal.safetensors, model.safetensors, "
        "model.q8.safetensors or model.q4.safetensors"
    )


def _read_split(
    folder: Path, config: LmConfig, num_steps: int
) -> tuple[Arrays, dict[str, Quantization], str]:
    files = {name: read_tensors(folder / f"{name}.safetensors") for name in SPLIT_FILES}
    steps = max(_count(arrays, _STEPS) for arrays in files.values())
    kept = _kept(folder, steps, num_steps, config)
    matrices = list(published_matrices(config, steps, kept))
    weights: Arrays = {}
    quantized: dict[str, Quantization] = {}
    for name, arrays in files.items():
        own = [m.in_split_file() for m in matrices if m.split_file == name]
        part, kinds = read_matrices(arrays, own, folder / f"{name}.safetensors")
        weights |= part
        quantized |= kinds
    return weights, quantized, "mlx-split"


_STEPS = r"(?:linears|depformer_in)\.(\d+)\."
_SLICES = r"depformer\.slices\.(\d+)\."


def _count(arrays: Arrays, pattern: str) -> int:
    """How many depformer steps a file has: one more than the last it names."""
    found = (re.match(pattern, name) for name in arrays)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _kept(path: Path, steps: int, wanted: int, config: LmConfig) -> int:
    if not wanted <= steps <= config.n_q:
        raise PplexError(
            f"{path}: the depformer has {steps} steps, {wanted} to {config.n_q} are "
            "expected"
        )
    return wanted


def load_mimi(path: Path, config: MimiConfig) -> Mimi:
    """The codec of a safetensors file, in float32."""
    mimi = Mimi(config)
    weights = sanitize_codec(read_tensors(path), config, path)
    assign(mimi, weights, path)
    return mimi


def assign(module: nn.Module, weights: Arrays, path: Path) -> None:
    """Put ``weights``, whose shapes are checked, into ``module`` and read them."""
    module.load_weights(list(weights.items()), strict=True)
    try:
        mx.eval(module.parameters())
    except RuntimeError as e:  # the file ends before its tensors do
        reason = str(e).splitlines()[0]
        raise PplexError(f"{path}: cannot be read whole ({reason})") from e


def quantize_as_stored(module: nn.Module, stored: dict[str, Quantization]) -> None:
    """Replace the modules named in ``stored`` by quantized ones of that form."""

    def form(name: str, _: nn.Module) -> bool | dict[str, int]:
        kind = stored.get(name)
        if kind is None:
            return False
        return {"bits": kind.bits, "group_size": kind.group_size}

    nn.quantize(module, class_predicate=form)


def cast(weights: Arrays, dtype: mx.Dtype) -> Arrays:
    """``weights`` with every floating tensor in ``dtype``, norms in float32."""
    return {
        name: w
        if w.dtype == mx.uint32
        else w.astype(mx.float32 if "norm" in name else dtype)
        for name, w in weights.items()
    }


def load_lm(
    path: Path,
    config: LmConfig,
    dtype: mx.Dtype,
    num_steps: int | None = None,
    *,
    dense: bool = False,
) -> LoadedLm:
    """The language model in the folder or file ``path``, computing in ``dtype``.

    Only the depformer steps of the agent's codebooks are kept unless ``num_steps``
    asks for more. With ``dense``, quantized matrices are written out in ``dtype``.
    """
    steps = config.num_codebooks if num_steps is None else num_steps
    weights, stored, layout = read_lm(path, config, steps)
    bits = {
        stored[module].bits
        if (module := name.removesuffix(".weight")) in stored
        # Not quantized: what the file holds.
        else 8 * weight.dtype.size
        for name, weight in weights.items()
        if "layers." in name and name.endswith(".weight") and weight.ndim == 2
    }
    if dense:
        weights, stored = write_out(weights, stored), {}
    lm = Lm(config, steps)
    quantize_as_stored(lm, stored)
    assign(lm, cast(weights, dtype), path)
    return LoadedLm(lm, layout, tuple(sorted(bits)))


def write_out(weights: Arrays, stored: dict[str, Quantization]) -> Arrays:
    """``weights`` with every quantized matrix as the values it stands for."""
    whole = dict(weights)
    for name, kind in stored.items():
        packed, scales, biases = (
            whole.pop(f"{name}.{part}") for part in ("weight", "scales", "biases")
        )
        # In float32: a product of 16-bit numbers would be rounded to 16 bits.
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        whole[f"{name}.weight"] = mx.dequantize(
            packed, scales, biases, kind.group_size, kind.bits
        )
    return whole
