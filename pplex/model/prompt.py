"""Prompts: the forced frames that give the agent its voice and its role.

Follows ``LMGen.step_system_prompts`` of NVIDIA's PersonaPlex, ``models/lm.py``: voice,
half a second of silence, role, half a second of silence. Every target of these frames
is given, so they need one pass of the temporal transformer and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pplex.errors import PplexError
from pplex.model.config import TEXT_PAD, LmConfig, ModelConfig
from pplex.model.streams import NOT_FORCED, TEXT_ROW, agent_rows, user_rows

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
        return int(self.columns.shape[1])


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
        initial = initial_column(lm)
        for row, delay in enumerate(delays):
            grid[row, : delay + 1] = initial[row]
    return Prompt(embeddings, grid[:, :end], grid[:, end])


def no_prompt(lm: LmConfig) -> Prompt:
    """The start of a model that knows no prompts: the ids before the first frame.

    Of the next column they fill the delayed rows.
    """
    initial = initial_column(lm)
    pending = np.where(np.array(lm.delays) > 0, initial, NOT_FORCED).astype(np.int32)
    return Prompt(None, initial[:, None], pending)


def _role_frame(config: ModelConfig, text: int) -> np.ndarray:
    frame = np.empty(config.lm.num_streams, np.int32)
    frame[TEXT_ROW] = text
    frame[agent_rows(config.lm)] = config.silence_codes
    frame[user_rows(config.lm)] = config.sine_codes
    return frame


def initial_column(lm: LmConfig) -> np.ndarray:
    """The ids (streams,) before the first frame."""
    initial = np.full(lm.num_streams, lm.audio_initial, np.int32)
    initial[TEXT_ROW] = lm.text_initial
    return initial
