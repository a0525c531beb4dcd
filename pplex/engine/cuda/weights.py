"""Matrices as the kernels take them: many of a kind in one array."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

DENSE = 16, 1  # the form of a matrix in bfloat16


def form_of(module: nn.Module) -> tuple[int, int] | None:
    """Bits and group size of a matrix, None where the kernel has no form for it."""
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        known = module.bits in (4, 8) and module.group_size >= 32
        known = known and module.scales.dtype == mx.bfloat16
        return (module.bits, module.group_size) if known else None
    return DENSE if module.weight.dtype == mx.bfloat16 else None


class WrittenOut(nn.QuantizedLinear):
    """Quantized, and multiplied with more than one row as what it stands for.

    MLX's kernel for packed weights takes the rows one by one, or 40 s to compile.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """``x`` (..., in) to (..., out)."""
        if x.size == x.shape[-1]:
            y: mx.array = super().__call__(x)
            return y
        weight = mx.dequantize(
            self.weight, self.scales, self.biases, self.group_size, self.bits
        )
        return x @ weight.T


def stack(modules: list[Any]) -> tuple[list[mx.array], int, int]:
    """The arrays of equal matrices, one after the other; bits and group size.

    The modules are given parts of the stacks, so that nothing is held twice.
    """
    form = form_of(modules[0])
    assert form is not None
    names = ["weight"] if form[0] == 16 else ["weight", "scales", "biases"]
    stacks = []
    for name in names:
        if len(modules) == 1:
            stacks.append(modules[0][name])
            continue
        whole = mx.concatenate([module[name] for module in modules])
        mx.eval(whole)
        rows = len(whole) // len(modules)
        for idx, module in enumerate(modules):
            module[name] = whole[idx * rows : (idx + 1) * rows]
        stacks.append(whole)
    mx.eval([module.parameters() for module in modules])
    return stacks, *form
