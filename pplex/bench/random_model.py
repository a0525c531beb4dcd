"""Models with random weights, built in memory: to measure speed without a download.

Sizes, types and quantized layers are those of a published model; what such a model
says means nothing. Weights are scaled so that every number stays finite.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.checkpoint.weights import LmTensors
from pplex.conversation.session import Model
from pplex.engine.choose import Compute, choose_form, cost_of, make_engine
from pplex.engine.device import memory_gb
from pplex.errors import PplexError
from pplex.model.config import (
    CodecTransformerConfig,
    LmConfig,
    MimiConfig,
    ModelConfig,
    QuantizerConfig,
    SeanetConfig,
)
from pplex.model.lm import Lm
from pplex.model.mimi import Mimi
from pplex.model.prompt import Prompt, make_prompt
from pplex.model.transformer import RmsNorm

TINY = ModelConfig(
    lm=LmConfig(
        dim=64,
        num_heads=2,
        num_layers=2,
        hidden_dim=128,
        context=50,
        text_card=120,
        card=64,
        depformer_dim=64,
        depformer_num_heads=2,
        depformer_num_layers=2,
        depformer_hidden_dim=64,
    ),
    mimi=MimiConfig(
        seanet=SeanetConfig(n_filters=2, dimension=32),
        transformer=CodecTransformerConfig(
            d_model=32, num_heads=2, num_layers=2, dim_feedforward=64, context=20
        ),
        quantizer=QuantizerConfig(dimension=8, n_q=8, bins=64),
    ),
    silence_codes=tuple(range(8)),
    sine_codes=tuple(range(8, 16)),
)
MEDIUM = ModelConfig(
    lm=LmConfig(
        dim=512,
        num_heads=8,
        num_layers=8,
        hidden_dim=1408,
        depformer_dim=256,
        depformer_num_heads=4,
        depformer_hidden_dim=704,
    )
)
SIZES = {"tiny": TINY, "medium": MEDIUM, "7b": ModelConfig()}

_GROUP_SIZE = 64
_DENSE_BITS = 16
# About what a published voice and role take, in frames and in text ids.
_VOICE_FRAMES = 50
_ROLE_IDS = 60


def random_model(
    size: str,
    bits: int,
    compute: Compute = "auto",
    *,
    kv_bits: int | None = None,
    many: bool = False,
) -> Model:
    """A model of ``size`` (a key of ``SIZES``), stored with ``bits`` (4, 8 or 16).

    It has no tokenizer and no voices: see ``random_prompt``.
    """
    start = time.perf_counter()
    config = SIZES[size].with_kv_bits(kv_bits)
    tensors = random_lm(config.lm, bits)
    form = choose_form(compute, config, tensors, many=many)
    if form.dense:
        tensors = tensors.write_out()
    _check_memory(config, tensors)
    name = f"random {size}"
    return Model(
        local=LocalModel(name, Path(name), None, None),
        config=config,
        engine=make_engine(
            config, tensors, random_codec(config.mimi), alone=form.alone
        ),
        tokenizer=cast(TextTokenizer, None),
        voices={},
        layout="random",
        bits=(bits,),
        form=form,
        load_s=time.perf_counter() - start,
    )


def random_lm(config: LmConfig, bits: int) -> LmTensors:
    """A language model as published with ``bits``; nothing is computed yet.

    Quantized are the layers that the published conversions quantize; the others are in
    float16 there, and everything in bfloat16 where nothing is quantized.
    """
    lm = Lm(config, config.num_codebooks)
    if bits < _DENSE_BITS:
        nn.quantize(lm, _GROUP_SIZE, bits, class_predicate=_is_quantized)
    dtype = mx.bfloat16 if bits == _DENSE_BITS else mx.float16
    keys = _Keys()
    weights, forms = {}, {}
    for path, module in lm.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            forms[path] = Quantization(bits, _GROUP_SIZE)
            for part, array in _quantized(module, keys.next()).items():
                weights[f"{path}.{part}"] = array
        elif isinstance(module, nn.Linear | nn.Embedding):
            scale = 0.3
            if isinstance(module, nn.Linear):
                scale = _gain(path) / math.sqrt(module.weight.shape[1])
            noise = _noise(module.weight.shape, keys.next())
            weights[f"{path}.weight"] = (scale * noise).astype(dtype)
        elif isinstance(module, RmsNorm):
            weights[f"{path}.weight"] = module.weight
    return LmTensors(weights, forms, "random", (bits,))


def _check_memory(config: ModelConfig, tensors: LmTensors) -> None:
    """Refuse what the system would end for want of memory."""
    need = cost_of(config, tensors).held / 1e9
    _, free = memory_gb()
    if free is not None and need > free:
        raise PplexError(
            f"such a model takes {need:.0f} GB, and {free:.0f} GB of memory are free: "
            "make a smaller one with --random, or give fewer --bits"
        )


def _is_quantized(path: str, module: nn.Module) -> bool:
    heads = path == "text_linear" or path.endswith(".head")
    return isinstance(module, nn.Linear) and not heads


def _gain(path: str) -> float:
    """Logits as far apart as a trained model's, so that drawing has a choice."""
    return {"text_linear": 6.0, "head": 3.0}.get(path.rsplit(".", 1)[-1], 1.0)


def _quantized(module: nn.QuantizedLinear, key: mx.array) -> dict[str, mx.array]:
    """Random words, with scales that give the values a deviation of 1/sqrt(width)."""
    rows, words = module.weight.shape
    levels = 1 << module.bits
    width = words * 32 // module.bits
    step = math.sqrt(12.0 / width) / levels
    # Keys are random words themselves, and made as fast as memory is written.
    count = -(-rows * words // 2)
    bits = mx.random.split(key, count).reshape(-1)[: rows * words]
    shape = module.scales.shape
    return {
        "weight": bits.reshape(rows, words),
        "scales": mx.full(shape, step, mx.float16),
        "biases": mx.full(shape, -step * (levels - 1) / 2, mx.float16),
    }


def random_codec(config: MimiConfig) -> dict[str, mx.array]:
    """A codec's tensors, float32."""
    keys = _Keys()
    weights: dict[str, mx.array] = dict(tree_flatten(Mimi(config).parameters()))
    for name, weight in weights.items():
        noise = _noise(weight.shape, keys.next())
        if "codebooks" in name:
            weight = noise
        elif weight.ndim > 1:
            weight = noise / math.sqrt(math.prod(weight.shape[1:]))
        weights[name] = weight
    return weights


def _noise(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """Uniform numbers of deviation 1: made in a fraction of the time of normal ones."""
    limit = math.sqrt(3.0)
    return mx.random.uniform(-limit, limit, shape, key=key)


class _Keys:
    """Keys for random numbers, the same ones every time."""

    def __init__(self) -> None:
        self._key = mx.random.key(0)

    def next(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key


def random_prompt(config: ModelConfig) -> Prompt:
    """A prompt about as long as published ones, of a voice and a role at random."""
    lm, rng = config.lm, np.random.default_rng(0)
    frames = min(_VOICE_FRAMES, lm.context // 4)
    ids = min(_ROLE_IDS, lm.context // 4)
    voice = rng.integers(0, lm.card, (lm.num_codebooks, frames), np.int32)
    text = rng.integers(4, lm.text_card, ids)
    return make_prompt(config, text.tolist(), voice_codes=voice)
