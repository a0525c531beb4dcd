"""Which parts of a model matter: what each costs when it alone is quantized.

The figures feed the recipe ``mixed`` of ``pplex models convert``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.layouts import Quantization, published_matrices
from pplex.conversation.session import load
from pplex.errors import PplexError
from pplex.files import write_text
from pplex.model.lm import Lm
from pplex.model.sampling import SamplingConfig
from pplex.quantization.compare import compare_lms, keep_logits, mean_kl
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
    yield from sensitivity(model.lm, scripts, FORM, settings.sampling)


def write_costs(path: Path, local: LocalModel, costs: dict[str, float]) -> None:
    """Write what was measured, for ``checkpoint.sensitivity.read_costs``."""
    record = {
        "model": local.name,
        "revision": local.revision,
        "bits": FORM.bits,
        "group_size": FORM.group_size,
        "parts": costs,
    }
    write_text(path, json.dumps(record, indent=1) + "\n")


def module_parts(lm: Lm) -> dict[str, list[str]]:
    """The modules of ours in each part of ``checkpoint.recipe``."""
    config, steps = lm.config, lm.config.num_codebooks
    parts: dict[str, dict[str, None]] = {}
    for matrix in published_matrices(config, steps, steps):
        part = part_of(matrix, config.num_layers, steps)
        for target in matrix.targets if part else ():
            assert target is not None
            module = re.sub(r"\[\d+\]$", "", target)
            parts.setdefault(part or "", {})[module] = None
    return {part: list(modules) for part, modules in parts.items()}


def sensitivity(
    lm: Lm, scripts: Sequence[Script], form: Quantization, sampling: SamplingConfig
) -> Iterator[tuple[str, float]]:
    """For each part, the mean divergence when its weights are rounded to ``form``.

    ``lm`` must not be quantized; it is as before when the iterator is done.
    """
    kept = [keep_logits(lm, script) for script in scripts]
    lm.native = None  # what is compiled has weights of its own
    weights = dict(tree_flatten(lm.parameters()))
    for part, modules in module_parts(lm).items():
        before = [(f"{name}.weight", weights[f"{name}.weight"]) for name in modules]
        lm.load_weights([(n, _rounded(w, form)) for n, w in before], strict=False)
        yield part, mean_kl(compare_lms(kept, lm, scripts, sampling))
        lm.load_weights(before, strict=False)
        lm.native = None


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
