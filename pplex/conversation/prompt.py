"""Prompts: the forced frames that give the agent its voice and its role.

Follows ``LMGen.step_system_prompts`` of NVIDIA's PersonaPlex, ``models/lm.py``: voice,
half a second of silence, role, half a second of silence. Every target of these frames
is given, so they need one pass of the temporal transformer and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pplex.errors import PplexError
from pplex.layers.cache import Cache, KvCache
from pplex.layers.device import on_cpu
from pplex.model.config import TEXT_PAD, LmConfig, ModelConfig
from pplex.model.depformer import NOT_FORCED
from pplex.model.frame_kernel import FrameCache, frame_kernel
from pplex.model.lm import Lm
from pplex.model.native import NativeCache, native_lm
from pplex.model.streams import TEXT_ROW, agent_rows, user_rows

SILENCE_S = 0.5


@dataclass(frozen=True)
class Prompt:
    """The grid of tokens before the conversation.

    ``embeddings`` (positions, dim) replace the first columns where the voice is a saved
    one; ``columns`` (streams, frames) are the tokens; ``pending`` (streams,) is what is
    already given of the first column of the conversation, ``NOT_FORCED`` elsewhere.
    """

    embeddings: np.ndarray | None
    columns: np.ndarray
    pending: np.ndarray

    @property
    def num_frames(self) -> int:
        """Columns before the conversation."""
        return self.columns.shape[1]


def make_prompt(
    config: ModelConfig,
    text_ids: Sequence[int],
    *,
    voice_codes: np.ndarray | None = None,
    saved_voice: tuple[np.ndarray, np.ndarray] | None = None,
) -> Prompt:
    """Lay out a prompt from a voice and the ids of a role.

    The voice is either ``voice_codes`` (codebooks, frames) or ``saved_voice``:
    embeddings (positions, dim) and the last columns of the grid (streams, ring).
    """
    lm = config.lm
    if len(text_ids) > lm.context:
        raise PplexError(
            f"the role prompt has {len(text_ids)} tokens, more than the "
            f"{lm.context} frames the model remembers; shorten it"
        )
    roles = [_role_frame(config, TEXT_PAD)] * int(SILENCE_S * config.frame_rate)
    roles += [_role_frame(config, token) for token in text_ids]
    roles += [_role_frame(config, TEXT_PAD)] * int(SILENCE_S * config.frame_rate)
    frames = np.stack(roles, axis=1)

    delays = np.array(lm.delays)
    if saved_voice is None:
        assert voice_codes is not None
        voice = np.repeat(
            _role_frame(config, TEXT_PAD)[:, None], voice_codes.shape[1], axis=1
        )
        voice[agent_rows(lm)] = voice_codes
        frames = np.concatenate([voice, frames], axis=1)
        embeddings, first = None, 0
    else:
        embeddings, ring = saved_voice
        first = len(embeddings) + 1

    end = first + frames.shape[1]
    grid = np.full((lm.num_streams, end + 1), NOT_FORCED, np.int32)
    if saved_voice is not None:
        grid[:, first - 1] = ring[:, (first - 1) % ring.shape[1]]
        delayed = delays > 0
        grid[delayed, first] = ring[delayed, first % ring.shape[1]]
    for row, delay in enumerate(delays):
        grid[row, first + delay : end + delay] = frames[row]
    if first == 0:
        initial = np.full(lm.num_streams, lm.audio_initial, np.int32)
        initial[TEXT_ROW] = lm.text_initial
        for row, delay in enumerate(delays):
            grid[row, : delay + 1] = initial[row]
    return Prompt(embeddings, grid[:, :end], grid[:, end])


def _role_frame(config: ModelConfig, text: int) -> np.ndarray:
    frame = np.empty(config.lm.num_streams, np.int32)
    frame[TEXT_ROW] = text
    frame[agent_rows(config.lm)] = config.silence_codes
    frame[user_rows(config.lm)] = config.sine_codes
    return frame


@dataclass
class LmState:
    """Where conversations stand, a row each.

    ``column`` (rows, streams) is the next input, ``pending`` (rows, agent streams) what
    is given of the column after it, or None: NumPy's where compiled code makes the
    steps. ``seeds`` and ``frames`` hold a row's seed and how many frames it has had.
    """

    cache: Cache | NativeCache | FrameCache
    column: mx.array | np.ndarray
    pending: mx.array | np.ndarray | None
    seeds: list[int]
    frames: list[int]

    def advance(self, column: mx.array | np.ndarray) -> None:
        """Take ``column`` as the next input: every row has had a frame more."""
        self.column, self.pending = column, None
        self.frames = [number + 1 for number in self.frames]


@dataclass(frozen=True)
class Prefilled:
    """A prompt and what ``lm`` keeps of it; start rows from it."""

    prompt: Prompt
    cache: KvCache | NativeCache
    lm: Lm

    def start(
        self,
        config: LmConfig,
        seed: int,
        *,
        num_frames: int = 0,
        beside_others: bool = False,
    ) -> LmState:
        """The state of a new conversation of one row, of ``num_frames`` if known.

        With ``beside_others`` it can be joined to the rows of a batch. On a GPU these
        read its cache, which stays the prompt's own.
        """
        column = self.prompt.columns[None, :, -1]
        pending = self.prompt.pending[None, : config.num_agent_streams]
        if isinstance(self.cache, NativeCache):
            cache = self.cache.copy(room=num_frames)
            return LmState(cache, column, pending, [seed], [0])
        column, pending = mx.array(column), mx.array(pending)
        if not beside_others and frame_kernel(self.lm):
            return LmState(FrameCache(self.cache), column, pending, [seed], [0])
        cache = self.cache.copy() if on_cpu() or not beside_others else self.cache
        return LmState(cache, column, pending, [seed], [0])


def prefill(lm: Lm, prompt: Prompt) -> Prefilled:
    """Run a prompt through the temporal transformer in one pass, and evaluate it.

    By compiled code if that makes the steps; no frame of it is sampled.
    """
    saved = 0 if prompt.embeddings is None else len(prompt.embeddings)
    inputs = lm.embed(mx.array(prompt.columns[None, :, saved:-1]))
    if prompt.embeddings is not None:
        embeddings = mx.array(prompt.embeddings[None]).astype(inputs.dtype)
        inputs = mx.concatenate([embeddings, inputs], axis=1)
    if native := native_lm(lm):
        made = native.make_cache()
        native.read(made, np.array(inputs[0]))
        return Prefilled(prompt, made, lm)
    cache = lm.make_cache()
    lm.temporal(inputs, cache)
    mx.eval(cache.arrays())
    return Prefilled(prompt, cache, lm)
