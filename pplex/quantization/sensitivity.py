"""Which parts of a model matter: what each costs when it alone is quantized.

The figures feed the recipe ``mixed`` of ``pplex models convert``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.layouts import Quantization, published_matrices
from pplex.checkpoint.weights import LmTensors, codec_tensors, lm_tensors
from pplex.conversation.session import load
from pplex.engine.base import Engine
from pplex.engine.choose import make_engine
from pplex.errors import PplexError
from pplex.files import write_text
from pplex.model.config import LmConfig
from pplex.model.sampling import SamplingConfig
from pplex.quantization.compare import compare, keep_logits, mean_kl
from pplex.quantization.compare_models import Settings, make_scripts, read_users
from pplex.quantization.forced import Script
from pplex.quantization.quantize import quantize
from pplex.quantization.recipe import part_of

FORM = Quantization(4, 64)


def measure(
    local: LocalModel, recordings: Sequence[Path], settings: Settings
) -> Iterator[tuple[str, float]]:
    """``sensitivity`` of a model on disk, on what it makes of the recordings."""
    model = load(local)
    if model.bits != (16,) and model.bits != (32,):
        raise PplexError(
            f"{local.path} is quantized already, to {model.bits} bits; give the "
            "model in 16 bits"
        )
    users = read_users(recordings, model.config, settings.seconds)
    scripts = make_scripts(model, users, settings)
    tensors = lm_tensors(local.folder, model.config.lm)
    codec = codec_tensors(local.folder, model.config.mimi)
    yield from sensitivity(
        model.engine, tensors, codec, scripts, FORM, settings.sampling
    )


def write_costs(path: Path, local: LocalModel, costs: dict[str, float]) -> None:
    """Write what was measured, for ``costs.read_costs``."""
    record = {
        "model": local.name,
        "revision": local.revision,
        "bits": FORM.bits,
        "group_size": FORM.group_size,
        "parts": costs,
    }
    write_text(path, json.dumps(record, indent=1) + "\n")


def module_parts(config: LmConfig) -> dict[str, list[str]]:
    """The modules of ours in each part of ``quantization.recipe``."""
    steps = config.num_codebooks
    parts: dict[str, dict[str, None]] = {}
    for matrix in published_matrices(config, steps, steps):
        part = part_of(matrix, config.num_layers, steps)
        for target in matrix.targets if part else ():
            assert target is not None
            module = re.sub(r"\[\d+\]$", "", target)
            parts.setdefault(part or "", {})[module] = None
    return {part: list(modules) for part, modules in parts.items()}


def sensitivity(
    engine: Engine,
    tensors: LmTensors,
    codec: Mapping[str, mx.array],
    scripts: Sequence[Script],
    form: Quantization,
    sampling: SamplingConfig,
) -> Iterator[tuple[str, float]]:
    """For each part, the mean divergence when its weights are rounded to ``form``.

    ``engine`` runs the model of these ``tensors``, none of them quantized; the rounded
    ones are run by engines of its kind.
    """
    kept = [keep_logits(engine, script) for script in scripts]
    for part, modules in module_parts(engine.config.lm).items():
        weights = dict(tensors.weights)
        for name in modules:
            weights[f"{name}.weight"] = _rounded(weights[f"{name}.weight"], form)
        rounded = make_engine(engine.config, replace(tensors, weights=weights), codec)
        yield part, mean_kl(compare(kept, rounded, scripts, sampling))


def _rounded(weight: mx.array, form: Quantization) -> mx.array:
    groups = [g for g in (128, 64, 32) if g <= form.group_size]
    size = next((g for g in groups if weight.shape[1] % g == 0), None)
    if size is None:
        return weight
    form = Quantization(form.bits, size)
    packed, scales, biases = quantize(weight, form, refine=False)
    dense = mx.dequantize(
        packed,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=size,
        bits=form.bits,
    )
    return dense.astype(weight.dtype)
