"""Make checkpoints with random weights, in any published layout and size.

Tests use it for small models; run as a script it writes a whole one, by default the
7B's sizes at 4 bits:

    python tests/random_checkpoint.py FOLDER --layout mlx-split --bits 4
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from pplex.checkpoint.codec_layout import published_shapes
from pplex.checkpoint.config import load_config
from pplex.checkpoint.folder import SPLIT_PARTS
from pplex.checkpoint.layouts import Matrix, published_matrices, sliced_matrices
from pplex.model.config import LmConfig, MimiConfig, ModelConfig

Arrays = dict[str, mx.array]


def lm_arrays(
    config: LmConfig,
    layout: str,
    *,
    bits: int = 16,
    group_size: int = 64,
    steps: int | None = None,
    dtype: mx.Dtype = mx.bfloat16,
) -> dict[str, Arrays]:
    """Tensors of a language model by file name (without suffix).

    ``layout`` is pytorch, mlx or mlx-split. As published, the split layout quantizes
    the temporal transformer and the depformer, the other one every matrix.
    """
    steps = config.dep_q if steps is None else steps
    table = sliced_matrices if layout == "mlx" else published_matrices
    files: dict[str, Arrays] = {}
    for matrix in table(config, steps, steps):
        file = matrix.split_file if layout == "mlx-split" else "model"
        quantize = bits < 16 and len(matrix.shape) == 2 and file != "embeddings"
        named = matrix.in_split_file() if layout == "mlx-split" else matrix
        arrays = files.setdefault(file, {})
        weight = _random(matrix).astype(dtype)
        if not quantize:
            arrays[named.name] = weight
        else:
            parts = mx.quantize(weight, group_size=group_size, bits=bits)
            for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
                arrays[named.part(part)] = array
        mx.eval(arrays)
    return files


def _random(matrix: Matrix) -> mx.array:
    if len(matrix.shape) == 1:
        alpha = 1 + 0.2 * mx.random.normal(matrix.shape)
        return alpha if matrix.name.endswith(".weight") else alpha[None, None]
    rows, columns = matrix.shape
    name = matrix.name
    if "emb" in name:
        scale = 0.3
    elif "linears" in name or "linear_out.weight" in name and "slices" in name:
        scale = 3.0 / columns**0.5
    elif "text_linear" in name:
        scale = 6.0 / columns**0.5
    else:
        scale = 1.0 / columns**0.5
    return scale * mx.random.normal((rows, columns))


def mimi_arrays(config: MimiConfig) -> Arrays:
    """Tensors of a codec with random weights, under the published names."""
    arrays: Arrays = {}
    for name, shape in published_shapes(config).items():
        noise = mx.random.normal(shape)
        if "cluster_usage" in name:
            array = mx.random.uniform(0.5, 2.0, shape)
        elif "layer_scale" in name:
            array = 0.4 + 0.1 * noise
        elif "norm" in name and name.endswith("weight"):
            array = 1 + 0.1 * noise
        elif len(shape) == 1:
            array = 0.1 * noise
        elif "embedding_sum" in name:
            array = noise
        elif "convtr" in name:
            array = noise / (2 * (shape[0] if shape[1] > 1 else 1)) ** 0.5
        else:
            array = noise / math.prod(shape[1:]) ** 0.5
        arrays[name] = array
    for name in list(arrays):
        if name.endswith("cluster_usage"):
            flag = name.replace("cluster_usage", "_initialized")
            arrays[flag] = mx.ones((1,))
    return arrays


def tokenizer_bytes(num_pieces: int) -> bytes:
    """A SentencePiece unigram model whose pieces mean nothing."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(content)) + content

    special = {0: ("<unk>", 2), 1: ("<s>", 3), 2: ("</s>", 3), 3: ("<pad>", 4)}
    model = b""
    for idx in range(num_pieces):
        text, kind = special.get(idx, (_piece(idx - 4), 1))
        score = bytes([2 << 3 | 5]) + struct.pack("<f", -float(idx))
        piece = field(1, text.encode()) + score
        if kind != 1:  # what a piece is unless it says so
            piece += bytes([3 << 3]) + _varint(kind)
        model += field(1, piece)
    return model


def _piece(idx: int) -> str:
    if idx < 95:  # every printable ASCII character, so that any prompt has ids
        return chr(32 + idx) if idx else "\u2581"
    letters = ""
    while True:
        idx, letter = divmod(idx, 26)
        letters = chr(97 + letter) + letters
        if not idx:
            return f"\u2581{letters}"


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def config_json(config: ModelConfig) -> dict:
    """``config.json`` in the nested form of NVIDIA's constructor arguments."""
    lm, mimi = asdict(config.lm), asdict(config.mimi)
    # The inverse of hidden = 2 * int(scale * dim) // 3.
    lm["hidden_scale"] = 1.5 * lm.pop("hidden_dim") / lm["dim"]
    lm["depformer_dim_feedforward"] = 3 * lm.pop("depformer_hidden_dim") // 2
    return {
        "lm": lm,
        "mimi": mimi,
        "silence_codes": config.silence_codes,
        "sine_codes": config.sine_codes,
    }


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    layout: str = "pytorch",
    *,
    bits: int = 16,
    group_size: int = 64,
    steps: int | None = None,
    voice_frames: int = 20,
    seed: int = 0,
) -> None:
    """Write a whole checkpoint folder."""
    mx.random.seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lm = config.lm
    files = lm_arrays(lm, layout, bits=bits, group_size=group_size, steps=steps)
    assert set(files) in ({"model"}, set(SPLIT_PARTS))
    for name, arrays in files.items():
        mx.save_safetensors(str(folder / f"{name}.safetensors"), arrays)
    split = layout == "mlx-split"
    codec = "mimi" if split else "tokenizer-e351c8d8-checkpoint125"
    mx.save_safetensors(str(folder / f"{codec}.safetensors"), mimi_arrays(config.mimi))
    (folder / "tokenizer_spm_32k_3.model").write_bytes(tokenizer_bytes(lm.text_card))
    (folder / "config.json").write_text(json.dumps(config_json(config), indent=1))
    voices = folder / "voices"
    voices.mkdir(exist_ok=True)
    ring = mx.random.randint(0, lm.card, (1, lm.num_streams, 4))
    ring[:, 0] = 3
    voice = {
        "embeddings": mx.random.normal((voice_frames, 1, 1, lm.dim)),
        "cache": ring.astype(mx.float32),
    }
    mx.save_safetensors(str(voices / "NATF2.safetensors"), voice)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", default="mlx-split")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--config", type=Path, help="config.json; default: the 7B")
    args = parser.parse_args()
    config = load_config(args.config) if args.config else ModelConfig()
    write_checkpoint(
        args.folder, config, args.layout, bits=args.bits, group_size=args.group_size
    )


if __name__ == "__main__":
    main()
