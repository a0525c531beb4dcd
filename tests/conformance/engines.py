"""Every engine that this machine has."""

from __future__ import annotations

from cases import Checkpoint
from small import SharedSteps

from pplex.engine.base import Engine, Logits, Rows, Start
from pplex.engine.choose import KINDS

__all__ = ["NAMES", "Engine", "Logits", "Rows", "Start", "make"]

RING = "ring"
NAMES = [name for name, kind in KINDS.items() if kind.is_available()]
NAMES += [RING] * KINDS["cpu"].is_available()


def make(name: str, checkpoint: Checkpoint) -> Engine:
    """The engine ``name`` (of ``NAMES``)."""
    make_it = SharedSteps if name == RING else KINDS[name].make
    return make_it(checkpoint.config, checkpoint.tensors(), checkpoint.codec())
