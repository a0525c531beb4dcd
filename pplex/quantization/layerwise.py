"""The specification, a layer in memory at a time: what it makes of a few columns.

In float32 whatever the device, so that two machines can be compared, and in the memory
of one layer, so that a machine can look at a model that it could not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.source import Source
from pplex.checkpoint.verify import input_vectors
from pplex.checkpoint.weights import fill, lm_tensors
from pplex.model.cache import KvCache
from pplex.model.config import LmConfig
from pplex.model.lm import Lm
from pplex.model.transformer import TemporalLayer, run_layers


@dataclass(frozen=True)
class States:
    """What columns become: (1 + layers, t, dim) from the sum of the tables on.

    ``hidden`` (t, dim) is after the last norm, ``text`` (t, text_card) its logits.
    """

    layers: np.ndarray
    hidden: np.ndarray
    text: np.ndarray


def run_apart(
    folder: CheckpointFolder, config: LmConfig, grids: Sequence[np.ndarray]
) -> tuple[list[States], Lm]:
    """Run ``grids`` (streams, t), each from an empty cache.

    Also what lies behind the layers: a model without layers and tables.
    """
    source = Source(folder, config)
    rows = [input_vectors(source, grid, mx.float32) for grid in grids]
    tensors = lm_tensors(folder, config)
    for table in ("text_emb", "audio_emb"):
        for name in [n for n in tensors.weights if n.startswith(f"{table}.")]:
            del tensors.weights[name]
    states = [[x] for x in rows]
    for idx in range(config.num_layers):
        layer = TemporalLayer(config.dim, config.num_heads, config.hidden_dim)
        fill(layer, tensors, mx.float32, f"layers.{idx}.")
        for row in states:
            cache = KvCache(1, config.window)
            x = mx.array(row[-1])[None]
            row.append(np.array(run_layers([layer], x, cache, config.max_period)[0]))
        del layer
        mx.clear_cache()
    heads = sum(name.endswith(".head.weight") for name in tensors.weights)
    ends = Lm(replace(config, num_layers=0), heads)
    ends.pop("text_emb")
    ends.pop("audio_emb")
    fill(ends, tensors, mx.float32)
    found = []
    for row in states:
        hidden, text = ends.head(mx.array(row[-1]))
        found.append(States(np.stack(row), np.array(hidden), np.array(text)))
    return found, ends
