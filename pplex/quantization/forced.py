"""One conversation forced through a model: its logits for tokens that are given.

A model answers a recording once, with sampling as usual; the grid of tokens that comes
of it is then fed to any model with the same streams, and what that model would have
said at every frame can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pplex.audio.files import frames_of
from pplex.conversation.prompt import Prompt, prefill
from pplex.conversation.session import Conversation, Model
from pplex.layers.cache import KvCache
from pplex.model.lm import Lm
from pplex.model.native import NativeCache, native_lm
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import TEXT_ROW, shift, user_rows

CHUNK_FRAMES = 32


@dataclass(frozen=True)
class Script:
    """A prompt and the columns (streams, frames) of the conversation after it."""

    prompt: Prompt
    columns: np.ndarray

    @property
    def num_frames(self) -> int:
        """Frames that are compared: the first is given in part by the prompt."""
        return self.columns.shape[1] - 1


@dataclass(frozen=True)
class Logits:
    """Text (frames, text_card) and agent (frames, codebooks, card) of a stretch.

    ``targets`` (frames, agent streams) are the script's tokens for it.
    """

    text: mx.array
    agent: mx.array
    targets: mx.array


def write_script(
    model: Model, prompt: Prompt, pcm: np.ndarray, sampling: SamplingConfig, seed: int
) -> tuple[Script, list[float]]:
    """Let ``model`` answer the user's ``pcm`` (samples,) and keep the whole grid.

    Also the seconds that each frame took.
    """
    config = model.config.lm
    frames = frames_of(pcm, model.config.frame_size)
    conversation = Conversation(model, prefill(model.lm, prompt), sampling, seed)
    chunks = (frames[i : i + CHUNK_FRAMES] for i in range(0, len(frames), CHUNK_FRAMES))
    replies = list(conversation.run(chunks, decode_frames=CHUNK_FRAMES))
    user = np.concatenate([reply.user for reply in replies], axis=1)
    text = np.concatenate([reply.text for reply in replies])
    agent = np.concatenate([reply.agent for reply in replies], axis=1)
    # Back to columns: what was said in a frame lies in the column before the user's,
    # so the last column is not known whole.
    rows = user_rows(config)
    said = np.concatenate([text[None], agent])
    first = prompt.columns[: config.num_agent_streams, -1]
    said = shift(said, config.delays[: config.num_agent_streams], first)[:, 1:]
    user = shift(user, config.delays[rows], prompt.pending[rows])[:, : said.shape[1]]
    return Script(prompt, np.concatenate([said, user])), conversation.timings.steps


def forced_logits(lm: Lm, script: Script) -> Iterator[Logits]:
    """The logits of ``lm`` for every frame of ``script`` but the first, in stretches.

    The same stretches every time, whatever the model.
    """
    cache = prefill(lm, script.prompt).cache
    grid = np.concatenate([script.prompt.columns[:, -1:], script.columns], axis=1)
    for start in range(0, script.columns.shape[1], CHUNK_FRAMES):
        end = min(start + CHUNK_FRAMES, script.columns.shape[1])
        columns = grid[:, start:end].T
        targets = grid[: lm.config.num_agent_streams, start + 1 : end + 1].T
        if isinstance(cache, NativeCache):
            text, agent = _by_compiled_code(lm, cache, columns, targets)
        else:
            text, agent = _by_mlx(lm, cache, mx.array(columns), mx.array(targets))
        skip = 1 if start == 0 else 0
        yield Logits(text[skip:], agent[skip:], mx.array(targets[skip:]))


def _by_compiled_code(
    lm: Lm, cache: NativeCache, columns: np.ndarray, targets: np.ndarray
) -> tuple[mx.array, mx.array]:
    """Text and agent logits of the positions ``columns`` (t, streams)."""
    config, native = lm.config, native_lm(lm)
    assert native is not None
    logits = native.force(cache, columns, targets)
    text, agent = np.split(logits, [config.text_card], axis=1)
    return mx.array(text), mx.array(agent.reshape(len(agent), -1, config.card))


def _by_mlx(
    lm: Lm, cache: KvCache, columns: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array]:
    """Text and agent logits of the positions ``columns`` (t, streams)."""
    x = lm.temporal(lm.embed(columns.T[None]), cache)
    hidden, text = lm.head(x[0])
    heads: list[mx.array] = []

    def keep(logits: mx.array, _: int) -> mx.array:
        heads.append(logits.astype(mx.float32))
        return mx.zeros((logits.shape[0],), mx.int32)

    lm.depformer(hidden, targets[:, TEXT_ROW], keep, targets[:, 1:])
    text, agent = text.astype(mx.float32), mx.stack(heads, axis=1)
    mx.eval(text, agent, cache.arrays())
    return text, agent
