"""A small model with random weights, and conversations with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pplex.bench.random_model import TINY
from pplex.conversation.scheduler import converse as run
from pplex.engine.mlx.engine import MlxEngine
from pplex.model.sampling import GREEDY

FRAME = 1920
# Published checkpoints hold depformer steps that no conversation runs; so has this.
SMALL = replace(TINY, lm=replace(TINY.lm, dep_q=16))


class SharedSteps(MlxEngine):
    """MLX's engine on a CPU with rows that share each step, as on GPUs."""

    gpu_rows = 8

    def __init__(self, *tensors) -> None:
        super().__init__(*tensors, on_gpu=False)
        self._num_rows = self.gpu_rows


def speech(frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((frames, FRAME)).astype(np.float32)


def converse(engine, start, frames, sampling=GREEDY, seed=0, chunk=16):
    """Tokens (agent streams, frames), the user's codes and PCM of a conversation."""
    chunks = (frames[i : i + chunk] for i in range(0, len(frames), chunk))
    pieces = run(engine, start, seed, chunks, sampling, decode_frames=chunk)
    replies = list(pieces)
    return (
        np.concatenate([np.concatenate([r.text[None], r.agent]) for r in replies], 1),
        np.concatenate([r.user for r in replies], 1),
        np.concatenate([r.pcm for r in replies]),
    )
