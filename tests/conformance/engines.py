"""Every engine that this machine has."""

from __future__ import annotations

from cases import Checkpoint

from pplex.engine.base import Engine, Logits, Rows, Start
from pplex.engine.choose import KINDS
from pplex.engine.mlx.engine import MlxEngine, MlxRows
from pplex.model.sampling import Sampler, SamplingConfig

__all__ = ["NAMES", "Engine", "Logits", "Rows", "Start", "make"]

RING = "ring"
NAMES = [name for name, kind in KINDS.items() if kind.is_available()]
NAMES += [RING] * KINDS["cpu"].is_available()


def make(name: str, checkpoint: Checkpoint) -> Engine:
    """The engine ``name`` (of ``NAMES``)."""
    make_it = RingEngine if name == RING else KINDS[name].make
    return make_it(checkpoint.config, checkpoint.tensors(), checkpoint.codec())


class RingEngine(MlxEngine):
    """MLX's engine on a CPU with rows that share each step, as on GPUs."""

    def __init__(self, *tensors) -> None:
        super().__init__(*tensors, on_gpu=False)

    def rows(
        self, capacity: int, sampling: SamplingConfig, *, live: bool = False
    ) -> Rows:
        """Places for ``capacity`` conversations."""
        frame = self.make_frame(Sampler.of(self.config.lm, sampling))
        return MlxRows(self, capacity, sampling, frame)
