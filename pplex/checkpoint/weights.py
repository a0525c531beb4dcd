"""Load a checkpoint: every tensor by our names, and the networks made of them.

Quantized matrices stay quantized; everything else is cast to the compute type once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize

from pplex.checkpoint.codec_layout import sanitize_codec
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.layouts import PARTS, Quantization
from pplex.checkpoint.safetensors import load_tensors
from pplex.checkpoint.source import Source, dequantize
from pplex.errors import PplexError
from pplex.model.config import LmConfig, MimiConfig
from pplex.model.lm import Lm

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class LmTensors:
    """A language model's tensors, read from its files when they are evaluated.

    ``weights`` have the names of ``Lm``'s parameters: a module named in ``forms`` is
    quantized, its ``weight`` are packed codes uint32, with ``scales`` and ``biases``
    beside it. ``bits`` are those of the transformers' matrices.
    """

    weights: Arrays
    forms: dict[str, Quantization]
    layout: str
    bits: tuple[int, ...]

    def write_out(self, names: Collection[str] | None = None) -> LmTensors:
        """The same with quantized matrices, all or those, as what they stand for."""
        weights, forms = dict(self.weights), dict(self.forms)
        for name in list(forms) if names is None else names:
            parts = {part: weights.pop(f"{name}.{part}") for part in PARTS}
            weights[f"{name}.weight"] = dequantize(parts, forms.pop(name))
        return replace(self, weights=weights, forms=forms)

    def cast(self, dtype: mx.Dtype) -> LmTensors:
        """The same with every floating tensor in ``dtype``, norms in float32."""
        weights = {
            name: w
            if w.dtype == mx.uint32
            else w.astype(mx.float32 if "norm" in name else dtype)
            for name, w in self.weights.items()
        }
        return replace(self, weights=weights)


def lm_tensors(
    folder: CheckpointFolder, config: LmConfig, num_steps: int | None = None
) -> LmTensors:
    """The language model's tensors, checked against the sizes of ``config``.

    Only the depformer steps of the agent's codebooks are kept unless ``num_steps``
    asks for more.
    """
    source = Source(folder, config)
    weights: Arrays = {}
    forms: dict[str, Quantization] = {}
    bits = set()
    steps = config.num_codebooks if num_steps is None else num_steps
    for name, targets in source.modules(steps).items():
        form, *others = {source.form(target) for target in targets}
        if others:
            raise PplexError(
                f"{source.files[0]}: the parts of `{name}` are quantized in different "
                "ways, which is not supported"
            )
        shares = [source.parts(target) for target in targets]
        for part, array in shares[0].items():
            whole = [share[part] for share in shares]
            joined = array if len(whole) == 1 else mx.concatenate(whole)
            weights[f"{name}.{part}"] = joined
        if form is not None:
            forms[name] = form
        weight = weights[f"{name}.weight"]
        if "layers." in name and weight.ndim == 2:
            # Not quantized: what the file holds.
            bits.add(form.bits if form else 8 * weight.dtype.size)
    return LmTensors(weights, forms, source.layout, tuple(sorted(bits)))


def codec_tensors(folder: CheckpointFolder, config: MimiConfig) -> Arrays:
    """The codec's tensors, with the names of ``Mimi``'s parameters, in float32."""
    path = folder.codec
    return sanitize_codec(load_tensors(path), config, path)


def make_lm(config: LmConfig, tensors: LmTensors, dtype: mx.Dtype) -> Lm:
    """The specification with these weights, computing in ``dtype``; they are emptied.

    What is not in that type is not held twice.
    """
    heads = sum(name.endswith(".head.weight") for name in tensors.weights)
    lm = Lm(config, heads)
    fill(lm, tensors, dtype)
    return lm


def fill(module: Module, tensors: LmTensors, dtype: mx.Dtype, prefix: str = "") -> None:
    """Give ``module`` its tensors, whose names begin with ``prefix``: they are taken.

    They must be all of its parameters.
    """

    def form(name: str, _: Module) -> bool | dict[str, int]:
        found = tensors.forms.get(prefix + name)
        return asdict(found) if found else False

    quantize(module, class_predicate=form)
    names = [name for name in tensors.weights if name.startswith(prefix)]
    taken = {name: tensors.weights.pop(name) for name in names}
    weights = replace(tensors, weights=taken).cast(dtype).weights
    taken.clear()
    named = [(name.removeprefix(prefix), weight) for name, weight in weights.items()]
    module.load_weights(named, strict=True)
    named.clear()
    weights.clear()
    mx.eval(module.parameters())
