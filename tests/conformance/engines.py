"""Every engine that this machine has, on its CPU and its GPU."""

from __future__ import annotations

import functools

import mlx.core as mx
from cases import Checkpoint
from small import SharedSteps

from pplex.engine.base import Engine, Logits, Rows, Start
from pplex.engine.choose import KINDS
from pplex.engine.mlx.engine import MlxEngine

__all__ = ["AS_IF", "NAMES", "Engine", "Logits", "Rows", "Start", "compute_on", "make"]

CPU = [name for name, kind in KINDS.items() if kind.is_available()]
# MLX's own operations, whose rows share steps; and as on a GPU, of any maker, alone.
AS_IF = "gpu alone"
OURS = {
    "ring": SharedSteps,
    AS_IF: functools.partial(MlxEngine, on_gpu=True, alone=True),
}
GPU = [AS_IF]
if mx.is_available(mx.gpu):
    mx.set_default_device(mx.gpu)
    GPU += [name for name, kind in KINDS.items() if kind.is_available()]
    mx.set_default_device(mx.cpu)
NAMES = [*CPU, "ring", *GPU]


def compute_on(name: str) -> None:
    """Let MLX compute where the engine ``name`` belongs; if that is not here, as if."""
    is_here = mx.is_available(mx.gpu)
    mx.set_default_device(mx.gpu if name in GPU and is_here else mx.cpu)
    if name in GPU and not is_here:
        mx.disable_compile()  # it would have a C compiler called
    else:
        mx.enable_compile()


def make(name: str, checkpoint: Checkpoint) -> Engine:
    """The engine ``name`` (of ``NAMES``)."""
    compute_on(name)
    make_it = OURS.get(name) or KINDS[name].make
    return make_it(checkpoint.config, checkpoint.tensors(), checkpoint.codec())
