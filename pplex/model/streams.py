"""The grid of token streams: which row is whose, and how rows are shifted.

A column of the grid holds one token of each stream. A token of frame ``f`` lies in
column ``f + delay`` of its row. Follows ``LMGen`` of NVIDIA's PersonaPlex,
``models/lm.py``.
"""

from __future__ import annotations

import numpy as np

from pplex.model.config import LmConfig

TEXT_ROW = 0
NOT_FORCED = -2  # of a token that is for the model to choose
INSTEAD = -3  # and less: see below


def instead(idx: int) -> int:
    """How a text id is given for the case that the model says something.

    That is, anything but padding and its end.
    """
    return INSTEAD - idx


def agent_rows(config: LmConfig) -> slice:
    """Rows of the agent's codebooks."""
    return slice(1, 1 + config.num_codebooks)


def user_rows(config: LmConfig) -> slice:
    """Rows of the user's codebooks."""
    return slice(1 + config.num_codebooks, 1 + 2 * config.num_codebooks)


def shift(codes: np.ndarray, delays: tuple[int, ...], before: np.ndarray) -> np.ndarray:
    """Delay the rows of ``codes`` (rows, frames): row ``r`` by ``delays[r]`` columns.

    ``before`` (rows,) fills the columns that a delay of one leaves open.
    """
    out = np.array(codes)
    for row, delay in enumerate(delays):
        if delay:
            out[row, 1:] = codes[row, :-1]
            out[row, :1] = before[row]
    return out


def unshift(columns: np.ndarray, delays: tuple[int, ...], lag: int) -> np.ndarray:
    """Undo ``shift``: columns (rows, frames + lag) to codes (rows, frames)."""
    frames = columns.shape[1] - lag
    return np.stack(
        [columns[row, d : d + frames] for row, d in enumerate(delays)], axis=0
    )
