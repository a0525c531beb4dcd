"""What goes into answering many recordings, what has a row, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pplex.conversation.prompt import LmState, Prefilled
from pplex.conversation.session import Timings
from pplex.model.config import LmConfig


@dataclass(frozen=True)
class Item:
    """A recording to answer; ``key`` is the caller's, ``pcm`` float32 (samples,)."""

    key: object
    pcm: np.ndarray
    prefilled: Prefilled
    seed: int


class Row:
    """A recording that is to take a row of a batch, or has one.

    ``user_columns`` are the user's codes (codebooks,) for each of its steps.
    """

    def __init__(
        self, item: Item, num_frames: int, user_columns: Iterator[np.ndarray]
    ) -> None:
        self.item = item
        self.num_frames = num_frames
        self._user_columns = user_columns
        self._asked = 0

    @property
    def all_asked(self) -> bool:
        """Whether every frame of the user has gone into a step."""
        return self._asked == self.num_frames

    def next_column(self) -> np.ndarray:
        """The user's codes for the next step."""
        self._asked += 1
        return next(self._user_columns)

    def start(self, config: LmConfig) -> LmState:
        """The state of a row in which this recording starts."""
        return self.item.prefilled.start(
            config, self.item.seed, num_frames=self.num_frames, beside_others=True
        )


@dataclass(frozen=True)
class Result:
    """The agent's answer to an item.

    ``agent_pcm`` is as long as the item's PCM; ``text`` is (frames,), ``agent`` and
    ``user`` are (codebooks, frames). ``timings.steps`` is this row's share of each
    step.
    """

    key: object
    agent_pcm: np.ndarray
    text: np.ndarray
    agent: np.ndarray
    user: np.ndarray
    timings: Timings
