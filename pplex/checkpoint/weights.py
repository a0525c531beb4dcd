"""Load a checkpoint: tell its layout, check every tensor, build the model.

Quantized matrices stay quantized; everything else is cast to the compute type once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from pplex.checkpoint.layouts import (
    SPLIT_FILES,
    Arrays,
    Quantization,
    published_matrices,
    read_matrices,
    sliced_matrices,
)
from pplex.codec.mimi import Mimi
from pplex.config import LmConfig, MimiConfig
from pplex.errors import PplexError
from pplex.model.lm import Lm

USAGE_FLOOR = 1e-5


@dataclass(frozen=True)
class LoadedLm:
    """A language model, its layout's name, and the bits its linear layers have."""

    lm: Lm
    layout: str
    bits: tuple[int, ...]


def read_tensors(path: Path) -> Arrays:
    """The tensors of a safetensors file, read when they are first used."""
    if not path.is_file():
        raise PplexError(f"{path}: this file of the checkpoint is missing")
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
        steps = _count(arrays, r"linears\.(\d+)\.weight")
    elif "transformer.layers.0.self_attn.in_proj.weight" in arrays:
        layout, table = "mlx", sliced_matrices
        steps = _count(arrays, r"depformer\.slices\.(\d+)\.linear_in\.weight")
    else:
        raise PplexError(
            f"{path}: not a PersonaPlex or Moshi language model: it has no "
            "`transformer.layers.0.self_attn.in_proj` weight"
        )
    kept = _kept(path, steps, num_steps)
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
    steps = _count(files["embeddings"], r"linears\.(\d+)\.weight")
    kept = _kept(folder, steps, num_steps)
    matrices = list(published_matrices(config, steps, kept))
    weights: Arrays = {}
    quantized: dict[str, Quantization] = {}
    for name, arrays in files.items():
        own = [m.in_split_file() for m in matrices if m.split_file == name]
        part, kinds = read_matrices(arrays, own, folder / f"{name}.safetensors")
        weights |= part
        quantized |= kinds
    return weights, quantized, "mlx-split"


def _count(arrays: Arrays, pattern: str) -> int:
    """How many depformer steps a file has."""
    return sum(re.fullmatch(pattern, name) is not None for name in arrays)


def _kept(path: Path, steps: int, wanted: int) -> int:
    if steps < wanted:
        raise PplexError(
            f"{path}: the depformer has {steps} steps, {wanted} are needed"
        )
    return wanted


def sanitize_mimi(arrays: Arrays, config: MimiConfig, path: Path) -> Arrays:
    """Our weights of the codec from the published names; float32, channels last."""
    left = dict(arrays)
    width = config.seanet.dimension
    weights: Arrays = {}

    def take(name: str, *aliases: str) -> mx.array:
        for candidate in (name, *aliases):
            if candidate in left:
                return left.pop(candidate).astype(mx.float32)
        raise PplexError(f"{path}: the tensor `{name}` is missing; get the file again")

    def conv(theirs: str, ours: str, bias: bool = True) -> None:
        weights[f"{ours}.weight"] = take(f"{theirs}.weight").transpose(0, 2, 1)
        if bias:
            weights[f"{ours}.bias"] = take(f"{theirs}.bias")

    def conv_transpose(theirs: str, ours: str) -> None:
        # (in, out, 2 stride) to rows for the current, then for the previous input.
        weight = take(f"{theirs}.weight")
        _, _, kernel = _three_axes(weight, f"{theirs}.weight", path)
        now, before = mx.split(weight.transpose(0, 2, 1), [kernel // 2], axis=1)
        rows = [w.reshape(w.shape[0], -1) for w in (now, before)]
        weights[f"{ours}.weight"] = mx.concatenate(rows)
        weights[f"{ours}.bias"] = take(f"{theirs}.bias")

    def block(side: str, idx: int) -> None:
        theirs, ours = f"{side}.model.{idx}.block", f"{side}.model.{idx}"
        conv(f"{theirs}.1.conv.conv", f"{ours}.conv1")
        conv(f"{theirs}.3.conv.conv", f"{ours}.conv2")

    stages = len(config.seanet.ratios)
    last = 3 * stages + 2
    for side in ("encoder", "decoder"):
        for idx in (0, last):
            conv(f"{side}.model.{idx}.conv.conv", f"{side}.model.{idx}")
    for stage in range(stages):
        block("encoder", 3 * stage + 1)
        name = f"encoder.model.{3 * stage + 3}"
        conv(f"{name}.conv.conv", name)
        name = f"decoder.model.{3 * stage + 2}"
        conv_transpose(f"{name}.convtr.convtr", name)
        block("decoder", 3 * stage + 3)

    for side in ("encoder_transformer", "decoder_transformer"):
        for layer in range(config.transformer.num_layers):
            theirs = f"{side}.transformer.layers.{layer}"
            ours = f"{side}.layers.{layer}"
            weights[f"{ours}.self_attn.in_proj.weight"] = take(
                f"{theirs}.self_attn.in_proj_weight"
            )
            for name in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"):
                weights[f"{ours}.{name}.weight"] = take(f"{theirs}.{name}.weight")
            for name in ("norm1", "norm2"):
                weights[f"{ours}.{name}.bias"] = take(f"{theirs}.{name}.bias")
            for name in ("layer_scale_1", "layer_scale_2"):
                weights[f"{ours}.{name}"] = take(f"{theirs}.{name}.scale")
    conv("downsample.conv.conv.conv", "downsample", bias=False)
    upsample = take("upsample.convtr.convtr.convtr.weight")
    _three_axes(upsample, "upsample.convtr.convtr.convtr.weight", path)
    weights["upsample.weight"] = upsample[:, 0].transpose(1, 0)

    used = {"rvq_first": 1, "rvq_rest": config.num_codebooks - 1}
    present = {"rvq_first": 1, "rvq_rest": config.quantizer.n_q - 1}
    for theirs, ours in (("rvq_first", "semantic"), ("rvq_rest", "acoustic")):
        for name in ("input_proj", "output_proj"):
            key = f"quantizer.{theirs}.{name}.weight"
            weight = take(key)
            _three_axes(weight, key, path)
            weights[f"quantizer.{ours}.{name}.weight"] = weight[..., 0]
        tables = []
        for idx in range(present[theirs]):
            stem = f"quantizer.{theirs}.vq.layers.{idx}._codebook"
            for flag in ("_initialized", "inited"):
                left.pop(f"{stem}.{flag}", None)
            total = take(
                f"{stem}.embedding_sum", f"{stem}.embed_avg", f"{stem}.embed_sum"
            )
            usage = take(f"{stem}.cluster_usage", f"{stem}.cluster_size")
            shape = (config.quantizer.bins, config.quantizer.dimension)
            if tuple(total.shape) != shape or tuple(usage.shape) != shape[:1]:
                raise PplexError(
                    f"{path}: the tensor `{stem}.embedding_sum` has shape "
                    f"{list(total.shape)}, expected {list(shape)}"
                )
            if idx < used[theirs]:
                tables.append(total / mx.maximum(usage, USAGE_FLOOR)[:, None])
        weights[f"quantizer.{ours}.codebooks"] = mx.stack(tables)
    if left:
        raise PplexError(
            f"{path}: has the tensor `{sorted(left)[0]}`, which a codec of width "
            f"{width} and {config.quantizer.n_q} codebooks does not have"
        )
    return weights


def _three_axes(array: mx.array, name: str, path: Path) -> tuple[int, int, int]:
    if array.ndim != 3:
        raise PplexError(
            f"{path}: the tensor `{name}` has shape {list(array.shape)}, expected "
            "three axes"
        )
    return array.shape


def load_mimi(path: Path, config: MimiConfig) -> Mimi:
    """The codec of a safetensors file, in float32."""
    mimi = Mimi(config)
    weights = sanitize_mimi(read_tensors(path), config, path)
    assign(mimi, weights, path)
    return mimi


def assign(module: nn.Module, weights: Arrays, path: Path) -> None:
    """Put ``weights`` into ``module``; a shape that does not fit raises by name."""
    try:
        module.load_weights(list(weights.items()), strict=True)
        mx.eval(module.parameters())
    except (ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise PplexError(f"{path}: does not fit its config.json ({reason})") from e


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
    path: Path, config: LmConfig, dtype: mx.Dtype, num_steps: int | None = None
) -> LoadedLm:
    """The language model in the folder or file ``path``, computing in ``dtype``.

    Only the depformer steps of the agent's codebooks are kept unless ``num_steps``
    asks for more.
    """
    steps = config.num_codebooks if num_steps is None else num_steps
    weights, stored, layout = read_lm(path, config, steps)
    lm = Lm(config, steps)
    quantize_as_stored(lm, stored)
    assign(lm, cast(weights, dtype), path)
    return LoadedLm(lm, layout, tuple(sorted({kind.bits for kind in stored.values()})))
