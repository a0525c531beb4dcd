"""How an answer ends: whether anything was said, and whether it was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pplex.conversation.quiet import is_quiet


@dataclass(frozen=True)
class Ending:
    """How many ``words`` the agent said, and whether it was ``cut_off`` at the end."""

    words: int
    cut_off: bool


def is_cut_off(pcm: np.ndarray, text_tokens: np.ndarray, frame_size: int) -> bool:
    """Whether the agent, pcm (samples,), still speaks in the last ``frame_size``.

    ``text_tokens`` (frames,) are its text ids, as far as they are known.
    """
    last = int(text_tokens[-1]) if len(text_tokens) else None
    return len(pcm) > 0 and not is_quiet(pcm[-frame_size:], last)


def advice(endings: Sequence[Ending]) -> list[str]:
    """What there is to say of some answers, and what helps; a line each."""
    silent = sum(not ending.words and not ending.cut_off for ending in endings)
    cut_off = sum(ending.cut_off for ending in endings)
    count = len(endings)
    lines = []
    if silent:
        of = f" in {silent} of {count} recordings" if count > 1 else ""
        lines.append(
            f"the agent said nothing{of}: a longer --tail gives it time to answer"
        )
    if cut_off:
        of = f" of {cut_off} of {count} recordings" if count > 1 else ""
        lines.append(
            f"the agent was cut off at the end{of}: --tail auto lets it finish"
        )
    return lines
