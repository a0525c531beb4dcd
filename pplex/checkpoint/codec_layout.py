"""The published layout of the codec's file, mapped to our names.

PyTorch's axes: convolutions (out, in, kernel), transposed ones (in, out, kernel).
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.checkpoint.layouts import check_floating, check_left, missing, wrong_shape
from pplex.errors import PplexError
from pplex.model.config import MimiConfig

Arrays = dict[str, mx.array]

# A code's table row is its sum over how often it was used, at least this often.
_USAGE_FLOOR = 1e-5

_OLD_NAMES = {
    "cluster_size": "cluster_usage",
    "embed_avg": "embedding_sum",
    "embed_sum": "embedding_sum",
}
_FLAGS = ("_codebook._initialized", "_codebook.inited")


def published_shapes(config: MimiConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file, by its published name."""
    s, t, q = config.seanet, config.transformer, config.quantizer
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.conv.conv.weight"] = (out, into, kernel)
        shapes[f"{name}.conv.conv.bias"] = (out,)

    def block(name: str, channels: int) -> None:
        hidden = channels // s.compress
        conv(f"{name}.block.1", hidden, channels, s.residual_kernel_size)
        conv(f"{name}.block.3", channels, hidden, 1)

    last = 3 * len(s.ratios) + 2
    channels = s.n_filters
    conv("encoder.model.0", channels, 1, s.kernel_size)
    for stage, ratio in enumerate(reversed(s.ratios)):
        block(f"encoder.model.{3 * stage + 1}", channels)
        conv(f"encoder.model.{3 * stage + 3}", 2 * channels, channels, 2 * ratio)
        channels *= 2
    conv(f"encoder.model.{last}", s.dimension, channels, s.last_kernel_size)
    conv("decoder.model.0", channels, s.dimension, s.kernel_size)
    for stage, ratio in enumerate(s.ratios):
        name = f"decoder.model.{3 * stage + 2}.convtr.convtr"
        shapes[f"{name}.weight"] = (channels, channels // 2, 2 * ratio)
        shapes[f"{name}.bias"] = (channels // 2,)
        channels //= 2
        block(f"decoder.model.{3 * stage + 3}", channels)
    conv(f"decoder.model.{last}", 1, channels, s.last_kernel_size)

    d = t.d_model
    for side in ("encoder_transformer", "decoder_transformer"):
        for idx in range(t.num_layers):
            name = f"{side}.transformer.layers.{idx}"
            shapes[f"{name}.self_attn.in_proj_weight"] = (3 * d, d)
            shapes[f"{name}.self_attn.out_proj.weight"] = (d, d)
            shapes[f"{name}.linear1.weight"] = (t.dim_feedforward, d)
            shapes[f"{name}.linear2.weight"] = (d, t.dim_feedforward)
            for vector in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
                shapes[f"{name}.{vector}"] = (d,)
            for vector in ("layer_scale_1.scale", "layer_scale_2.scale"):
                shapes[f"{name}.{vector}"] = (d,)
    shapes["downsample.conv.conv.conv.weight"] = (d, d, 4)
    shapes["upsample.convtr.convtr.convtr.weight"] = (d, 1, 4)
    for part, count in (("rvq_first", 1), ("rvq_rest", q.n_q - 1)):
        shapes[f"quantizer.{part}.input_proj.weight"] = (q.dimension, d, 1)
        shapes[f"quantizer.{part}.output_proj.weight"] = (d, q.dimension, 1)
        for idx in range(count):
            stem = f"quantizer.{part}.vq.layers.{idx}._codebook"
            shapes[f"{stem}.cluster_usage"] = (q.bins,)
            shapes[f"{stem}.embedding_sum"] = (q.bins, q.dimension)
    return shapes


def sanitize_codec(arrays: Arrays, config: MimiConfig, path: Path) -> Arrays:
    """Our weights from the tensors of the file ``path``: float32, channels last.

    A tensor that is missing, of another shape, not finite, or left over of a part that
    the codec has raises with its name.
    """
    left = {
        _new_name(name): array
        for name, array in arrays.items()
        if not name.endswith(_FLAGS)
    }
    published: Arrays = {}
    for name, shape in published_shapes(config).items():
        if name not in left:
            raise missing(path, name)
        array = left.pop(name)
        if tuple(array.shape) != shape:
            raise wrong_shape(path, name, array.shape, shape)
        check_floating(path, name, array)
        published[name] = array.astype(mx.float32)
    check_left(path, left, published)
    _check_finite(published, path)
    weights = {}
    for name, array in published.items():
        if "_codebook" not in name:
            ours = _our_name(name)
            weights[ours] = _our_axes(name, array)
    for part, ours, count in (
        ("rvq_first", "semantic", 1),
        ("rvq_rest", "acoustic", config.num_codebooks - 1),
    ):
        tables = []
        for idx in range(count):
            stem = f"quantizer.{part}.vq.layers.{idx}._codebook"
            usage = mx.maximum(published[f"{stem}.cluster_usage"], _USAGE_FLOOR)
            tables.append(published[f"{stem}.embedding_sum"] / usage[:, None])
        weights[f"quantizer.{ours}.codebooks"] = mx.stack(tables)
    return weights


def _new_name(name: str) -> str:
    return re.sub(
        r"(?<=_codebook\.)\w+$", lambda match: _OLD_NAMES.get(match[0], match[0]), name
    )


def _check_finite(arrays: Arrays, path: Path) -> None:
    """Refuse NaN and infinity: one makes noise or silence of all that it meets."""
    extremes = {n: mx.stack([a.min(), a.max()]) for n, a in arrays.items()}
    found = np.array(mx.stack(list(extremes.values())))
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        name = list(extremes)[bad[0]]
        raise PplexError(
            f"{path}: the tensor `{name}` holds numbers that are not finite; get the "
            "file again"
        )


def _our_name(name: str) -> str:
    for pattern, ours in (
        (r"(\.convtr|\.conv)+(?=\.(weight|bias)$)", ""),
        (r"\.block\.1\.", ".conv1."),
        (r"\.block\.3\.", ".conv2."),
        (r"transformer\.transformer", "transformer"),
        (r"in_proj_weight$", "in_proj.weight"),
        (r"\.scale$", ""),
        (r"rvq_first", "semantic"),
        (r"rvq_rest", "acoustic"),
    ):
        name = re.sub(pattern, ours, name)
    return name


def _our_axes(name: str, array: mx.array) -> mx.array:
    if name.startswith("upsample"):
        return array[:, 0].T
    if name.startswith("quantizer"):
        return array[..., 0]
    if name.endswith("convtr.weight"):
        # Rows for the current input, then for the previous one.
        now, before = mx.split(array.transpose(0, 2, 1), 2, axis=1)
        return mx.concatenate([w.reshape(w.shape[0], -1) for w in (now, before)])
    return array.transpose(0, 2, 1) if array.ndim == 3 else array
