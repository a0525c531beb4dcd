"""What a model's matrices are multiplied with, a layer in memory at a time.

The sum over positions of the outer product of an input with itself says how much a
change of a matrix's row changes its outputs: all that rounding needs to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx import nn

from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.source import Source
from pplex.checkpoint.verify import input_vectors
from pplex.checkpoint.weights import LmTensors, fill, lm_tensors
from pplex.model.cache import KvCache
from pplex.model.config import LmConfig
from pplex.model.depformer import Depformer, DepformerLayer, StepCache
from pplex.model.embedding import embed
from pplex.model.transformer import RmsNorm, TemporalLayer, run_layers
from pplex.quantization.calibration import Conversation
from pplex.quantization.products import product

Moments = dict[str, np.ndarray]

# More did not round better; what a layer makes of all of them is in memory.
_MOST_POSITIONS = 65536


class Activations:
    """Second moments of inputs by module, of conversations forced through a model.

    They must be asked for in the order of the split layout's files: what lies before
    the layer that was asked for last is forgotten. Of very many conversations some are
    taken.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: LmConfig,
        conversations: Sequence[Conversation],
    ) -> None:
        """Nothing is computed until it is asked for."""
        positions = sum(c.columns.shape[1] for c in conversations)
        some = conversations[:: -(-positions // _MOST_POSITIONS)]
        self._config = config
        self._stages = _stages(folder, config, some)
        self._now: Moments = {}
        self._hidden: Moments = {}

    def moment(self, target: str) -> np.ndarray | None:
        """That (columns, columns) of our module ``target``; None for a table.

        And for depformer steps that no conversation runs.
        """
        name = target.split("[")[0]
        if name.endswith("_emb"):
            return None
        if name.startswith("depformer.steps."):
            step = int(name.split(".")[2])
            if step >= self._config.num_codebooks:
                return None
        while name not in self._now | self._hidden:
            self._now = next(self._stages)
            if "text_linear" in self._now:
                self._hidden = self._now
        return (self._now | self._hidden)[name]


def _stages(
    folder: CheckpointFolder, config: LmConfig, conversations: Sequence[Conversation]
) -> Iterator[Moments]:
    """The moments of each temporal layer, of what follows them, of the depformer's."""
    tensors = lm_tensors(folder, config).write_out()
    states = _inputs(folder, config, conversations)
    for idx in range(config.num_layers):
        layer = TemporalLayer(config.dim, config.num_heads, config.hidden_dim)
        fill(layer, tensors, mx.float32, f"layers.{idx}.")
        taps = _tap(layer, f"layers.{idx}.")
        for number, x in enumerate(states):
            cache = KvCache(1, config.window)
            y = run_layers([layer], x[None], cache, config.max_period)[0]
            mx.eval(y)
            states[number] = y
        del layer
        yield _taken(taps)
    norm = RmsNorm(config.dim)
    fill(norm, tensors, mx.float32, "out_norm.")
    # A depformer runs in conversations, not in prompts, and so do the heads.
    hidden = [norm(x[-c.frames :]) for x, c in zip(states, conversations, strict=True)]
    states.clear()
    moment = _total(hidden)
    yield {"text_linear": moment, "depformer.input": moment}
    yield from _depformer_stages(config, tensors, hidden, conversations)


def _inputs(
    folder: CheckpointFolder, config: LmConfig, conversations: Sequence[Conversation]
) -> list[mx.array]:
    """What the first layer reads (positions, dim) of each but for its last column."""
    grids = [c.columns[:, :-1] for c in conversations]
    source = Source(folder, config)
    whole = input_vectors(source, np.concatenate(grids, axis=1), mx.float32)
    ends = np.cumsum([grid.shape[1] for grid in grids])
    rows = np.split(whole, ends[:-1])
    for row, conversation in zip(rows, conversations, strict=True):
        if saved := len(conversation.embeddings):
            row[:saved] = conversation.embeddings
    return [mx.array(row) for row in rows]


def _depformer_stages(
    config: LmConfig,
    tensors: LmTensors,
    hidden: list[mx.array],
    conversations: Sequence[Conversation],
) -> Iterator[Moments]:
    """Each layer of all steps, then the heads."""
    steps = config.num_codebooks
    # All but the layers: what they read.
    weights = {n: w for n, w in tensors.weights.items() if ".layers." not in n}
    ends = Depformer(replace(config, depformer_num_layers=0), steps)
    fill(ends, replace(tensors, weights=weights), mx.float32, "depformer.")
    states = []
    for x, conversation in zip(hidden, conversations, strict=True):
        given = mx.array(conversation.columns[:, -conversation.frames :].T)
        rows = [embed(ends.text_emb, given[:, 0])]
        for step in range(1, steps):
            offset = (step - 1) * (config.card + 1)
            rows.append(embed(ends.audio_emb, given[:, step], offset))
        inputs = product(x, ends.input.weight).reshape(len(x), steps, -1)
        states.append([inputs[:, step] + row for step, row in enumerate(rows)])
        mx.eval(states[-1])
    del ends
    hidden.clear()
    for number in range(config.depformer_num_layers):
        layers: list[DepformerLayer] = []
        taps: dict[str, _Tap] = {}
        for step in range(steps):
            layer = DepformerLayer(config.depformer_dim, config.depformer_hidden_dim)
            prefix = f"depformer.steps.{step}.layers.{number}."
            fill(layer, tensors, mx.float32, prefix)
            taps |= _tap(layer, prefix)
            layers.append(layer)
        for rows in states:
            past = StepCache(config, steps)
            for step, layer in enumerate(layers):
                x = rows[step]
                qkv = layer.in_proj(layer.norm1(x))
                y = past.attend(number, qkv, step)
                rows[step] = layer.finish(x, y)
            mx.eval(rows)
        yield _taken(taps)
    yield {
        f"depformer.steps.{step}.head": _total([rows[step] for rows in states])
        for step in range(steps)
    }


class _Tap(nn.Module):
    """A linear module that adds up the second moments of what it is given."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.moment = mx.zeros((linear.weight.shape[1],) * 2)

    def __call__(self, x: mx.array) -> mx.array:
        self.moment = self.moment + _moment(x.reshape(-1, x.shape[-1]))
        mx.eval(self.moment)  # and let go of what it was made of
        return product(x, self.weight)


def _tap(layer: nn.Module, prefix: str) -> dict[str, _Tap]:
    """Replace a layer's linear modules, and what they are replaced by."""
    taps = {}
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            taps[prefix + name] = _Tap(linear)
            parent = layer
            *path, last = name.split(".")
            for part in path:
                parent = parent[part]
            parent[last] = taps[prefix + name]
    return taps


def _taken(taps: dict[str, _Tap]) -> Moments:
    mx.clear_cache()
    return {name: np.array(tap.moment) for name, tap in taps.items()}


def _total(parts: Sequence[mx.array]) -> np.ndarray:
    """The moment of rows that come in parts."""
    total = mx.zeros((parts[0].shape[-1],) * 2)
    for part in parts:
        total = total + _moment(part)
        mx.eval(total)
    return np.array(total)


def _moment(rows: mx.array) -> mx.array:
    """``rows.T @ rows``."""
    return product(rows.T, rows.T)
