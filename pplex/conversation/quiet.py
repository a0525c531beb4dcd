"""When the agent is quiet, by its text and its sound, and a tail that ends with it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from pplex.model.config import TEXT_PAD, ModelConfig

# Seconds of silence after the user, or as many as the agent needs.
Tail = float | Literal["auto"]

_QUIET_DB = -45.0
_QUIET_S = 1.5
_MAX_TAIL_S = 30.0


def is_quiet(pcm: np.ndarray, text_id: int | None) -> bool:
    """Whether the agent is quiet in a frame: says no text, and makes no sound.

    That is a level (RMS) of ``pcm`` (samples,) below ``_QUIET_DB``, full scale being 0.
    """
    power = float((pcm.astype(np.float64) ** 2).mean())
    return power < 10 ** (_QUIET_DB / 10) and (text_id is None or text_id <= TEXT_PAD)


def longest(tail: Tail) -> float:
    """The most seconds that a tail takes."""
    return _MAX_TAIL_S if tail == "auto" else tail


class Quiet:
    """Waits for the agent to have been quiet for ``_QUIET_S`` after the user's end.

    ``end`` is the number of frames of the conversation, once that is known.
    """

    def __init__(self, config: ModelConfig, not_before: int = 0) -> None:
        self._frame_size, self._sample_rate = config.frame_size, config.sample_rate
        self._wanted = math.ceil(_QUIET_S * config.frame_rate)
        self._first: int | None = None
        self._not_before = not_before
        self._heard = self._quiet = 0
        self.end: int | None = None

    def length(self, num_samples: int) -> int:
        """How long the whole of a recording of ``num_samples`` is with its tail."""
        most = num_samples + round(_MAX_TAIL_S * self._sample_rate)
        return most if self.end is None else min(most, self.end * self._frame_size)

    def may_end(self, num_frames: int) -> bool:
        """Whether so many frames may be all, as far as is known of those heard."""
        if self._first is None:
            return False
        return num_frames >= max(self._first, self._heard - self._quiet) + self._wanted

    def begin(self, frame: int) -> None:
        """Frame number ``frame`` is the tail's first; only the first call counts."""
        if self._first is None:
            self._first = max(frame, self._not_before)

    def hear(self, text: np.ndarray, pcm: np.ndarray) -> None:
        """Take the agent's next frames: text ids (frames,), sound (samples,)."""
        for text_id, frame in zip(text, pcm.reshape(-1, self._frame_size), strict=True):
            counts = self._first is not None and self._heard >= self._first
            quiet = counts and is_quiet(frame, int(text_id))
            self._heard += 1
            self._quiet = self._quiet + 1 if quiet else 0
            if self._quiet == self._wanted and self.end is None:
                self.end = self._heard
