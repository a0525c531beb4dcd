"""What goes into answering many recordings, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pplex.conversation.prompt import Prefilled
from pplex.conversation.session import Timings


@dataclass(frozen=True)
class Item:
    """A recording to answer; ``key`` is the caller's, ``pcm`` float32 (samples,)."""

    key: object
    pcm: np.ndarray
    prefilled: Prefilled
    seed: int


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
