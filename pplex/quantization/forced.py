"""One conversation forced through a model: its logits for tokens that are given.

A model answers a recording once, with sampling as usual; the grid of tokens that comes
of it is then fed to any model with the same streams, and what that model would have
said at every frame can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pplex.audio.files import Samples
from pplex.conversation.answer import Answer, join
from pplex.conversation.scheduler import converse
from pplex.conversation.tracks import cut
from pplex.engine.base import FORCED_FRAMES, Engine, Logits
from pplex.model.config import LmConfig
from pplex.model.prompt import Prompt
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import shift, user_rows


@dataclass(frozen=True)
class Script:
    """A prompt and the columns (streams, frames) of the conversation after it."""

    prompt: Prompt
    columns: np.ndarray

    @property
    def num_frames(self) -> int:
        """Frames that are compared: the first is given in part by the prompt."""
        return self.columns.shape[1] - 1


def answer_whole(
    engine: Engine, prompt: Prompt, pcm: np.ndarray, sampling: SamplingConfig, seed: int
) -> Answer:
    """A model's answer to the user's ``pcm`` (samples,)."""
    start, size = engine.prefill(prompt), engine.codec.chunk_frames
    chunks, _ = cut(Samples(pcm), start, engine.config, size)
    pieces = converse(
        engine,
        start,
        seed,
        chunks,
        sampling,
        decode_frames=size,
        num_samples=len(pcm),
    )
    return join(list(pieces))


def write_script(
    engine: Engine, prompt: Prompt, pcm: np.ndarray, sampling: SamplingConfig, seed: int
) -> tuple[Script, list[float]]:
    """Let a model answer the user's ``pcm`` (samples,) and keep the whole grid.

    Also the seconds that each frame took.
    """
    answer = answer_whole(engine, prompt, pcm, sampling, seed)
    said = np.concatenate([answer.text[None], answer.agent])
    script = script_of(engine.config.lm, prompt, said, answer.user)
    return script, answer.timings.steps


def script_of(
    config: LmConfig, prompt: Prompt, said: np.ndarray, user: np.ndarray
) -> Script:
    """The grid of what was ``said`` (agent streams, frames) to a ``user``'s codes.

    What PersonaPlex said in a frame lies in the column before the user's, so the last
    column is not known whole and left out.
    """
    rows = user_rows(config)
    agent = slice(config.num_agent_streams)
    if config.is_moshi:
        said = shift(said, config.delays[agent], prompt.pending[agent])
    else:
        said = shift(said, config.delays[agent], prompt.columns[agent, -1])
        said = said[:, config.lag :]
    user = shift(user, config.delays[rows], prompt.pending[rows])[:, : said.shape[1]]
    return Script(prompt, np.concatenate([said, user]))


def forced_logits(
    engine: Engine, script: Script
) -> Iterator[tuple[Logits, np.ndarray]]:
    """The logits of every frame of ``script`` but the first, in stretches.

    Beside the script's tokens (frames, agent streams) for them. The same stretches
    every time, whatever the model.
    """
    start = engine.prefill(script.prompt)
    targets = script.columns[: engine.config.lm.num_agent_streams].T
    for idx, logits in enumerate(engine.forced(start, script.columns)):
        first, skip = idx * FORCED_FRAMES, 0 if idx else 1
        last = first + len(logits.text)
        yield (
            Logits(logits.text[skip:], logits.agent[skip:]),
            targets[first + skip : last],
        )
