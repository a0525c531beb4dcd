"""Every engine there is here, behind the one interface that the tests know.

An adapter of what computes today: nothing else in this folder names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from cases import Checkpoint

from pplex.codec.codec import MlxCodec
from pplex.codec.native import NativeCodec
from pplex.conversation.generate import generate, make_sampler
from pplex.conversation.many import _join, _row_of
from pplex.conversation.prompt import LmState, Prefilled, Prompt
from pplex.layers.cache import RowCaches
from pplex.model.native import NativeCache, NativeLm, load_library
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import TEXT_ROW
from pplex.quantization.forced import _by_compiled_code, _by_mlx

NAMES = ["c", "mlx"]
STRETCH = 32  # positions whose logits are made at a time


def make(name: str, checkpoint: Checkpoint) -> Engine | None:
    """The engine ``name`` (of ``NAMES``); None where this machine has none."""
    if name == "c" and load_library() is None:
        return None
    return Engine(name, checkpoint)


@dataclass(frozen=True)
class Start:
    """A prompt that was read; rows begin after it."""

    prompt: Prompt
    memory: Prefilled


@dataclass(frozen=True)
class Logits:
    """Float32 text (frames, text_card) and agent (frames, codebooks, card)."""

    text: np.ndarray
    agent: np.ndarray


class Engine:
    """One loaded model: NumPy in, NumPy out."""

    dtype = "float32"

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        self.name = name
        self.config = checkpoint.config
        self.lm = checkpoint.lm()
        mimi, sizes = checkpoint.mimi(), self.config.mimi
        self.codec = NativeCodec(mimi, sizes) if name == "c" else MlxCodec(mimi)
        self.codec.chunk_frames, self.codec.group = 32, 1
        if name == "c":
            self.lm.native = NativeLm(self.lm, load_library())

    def embed(self, columns: np.ndarray) -> np.ndarray:
        """The model's inputs, float32 (t, dim), for columns (streams, t)."""
        return np.array(self.lm.embed(mx.array(columns[None]))[0])

    def prefill(self, prompt: Prompt) -> Start:
        """Read a prompt."""
        saved = 0 if prompt.embeddings is None else len(prompt.embeddings)
        inputs = self.embed(prompt.columns[:, saved:-1])
        if saved:
            inputs = np.concatenate([prompt.embeddings, inputs]).astype(np.float32)
        if self.name == "c":
            cache = self.lm.native.make_cache()
            self.lm.native.read(cache, inputs)
        else:
            cache = self.lm.make_cache()
            self.lm.temporal(mx.array(inputs[None]), cache)
        return Start(prompt, Prefilled(prompt, cache, self.lm))

    def rows(
        self, capacity: int, sampling: SamplingConfig, *, live: bool = False
    ) -> Rows:
        """Rows for ``capacity`` conversations at a time."""
        return Rows(self, capacity, sampling, live)

    def forced(self, start: Start, columns: np.ndarray) -> Iterator[Logits]:
        """Logits for each of columns (streams, t), given all before, in stretches."""
        cache = start.memory.cache.copy()
        grid = np.concatenate([start.prompt.columns[:, -1:], columns], axis=1).T
        agent = self.config.lm.num_agent_streams
        for first in range(0, columns.shape[1], STRETCH):
            inputs = grid[first : first + STRETCH + 1]
            inputs, targets = inputs[:-1], inputs[1:, TEXT_ROW:agent]
            if isinstance(cache, NativeCache):
                found = _by_compiled_code(self.lm, cache, inputs, targets)
            else:
                arrays = mx.array(inputs), mx.array(targets)
                found = _by_mlx(self.lm, cache, *arrays)
            yield Logits(*(np.array(logits) for logits in found))


@dataclass(frozen=True)
class Pending:
    """A step's columns."""

    columns: np.ndarray

    def tokens(self) -> np.ndarray:
        """The agent's columns int32 (capacity, agent streams)."""
        return self.columns


class Rows:
    """Conversations side by side, a place each."""

    def __init__(
        self, engine: Engine, capacity: int, sampling: SamplingConfig, live: bool
    ) -> None:
        self._lm, self._config = engine.lm, engine.config.lm
        self._sampler = make_sampler(self._config, sampling)
        self._live = live
        self._seats: list[LmState | None] = [None] * capacity

    def join(self, start: Start, seed: int, frames: int | None = None) -> int:
        """Begin a conversation after ``start``; its place."""
        state = start.memory.start(
            self._config, seed, num_frames=frames or 0, beside_others=True
        )
        if self._live and isinstance(state.cache, NativeCache):
            state.cache.reserve()
        place = self._seats.index(None)
        self._seats[place] = state
        return place

    def leave(self, row: int) -> None:
        """End the conversation of a place."""
        cache = self._seats[row].cache
        if isinstance(cache, NativeCache):
            cache.release()
        self._seats[row] = None

    def step(self, user: np.ndarray) -> Pending:
        """Advance every row by ``user`` (capacity, codebooks)."""
        taken = [idx for idx, state in enumerate(self._seats) if state]
        state = LmState(RowCaches([]), np.empty((0, 0)), None, [], [])
        _join(state, [self._seats[idx] for idx in taken])
        given = mx.array(user[taken])
        steps = generate(self._lm, state, [given], self._sampler, ahead=False)
        (step,) = steps
        columns = np.full((len(user), self._config.num_agent_streams), -7, np.int32)
        columns[taken] = step.column
        for row, idx in enumerate(taken):
            self._seats[idx] = _row_of(state, row)
        return Pending(columns)
