"""Recordings whose codec work is done many at a time, as GPUs like it.

A chunk of sixteen recordings takes an H200 little longer than a chunk of one. So a
group is encoded whole before its rows start, and decoded whole when its rows are done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pplex.audio.files import frames_of
from pplex.codec.codec import MlxCodec
from pplex.conversation.generate import Step
from pplex.conversation.results import Item, Result, Row
from pplex.conversation.session import Model, Timings
from pplex.model.streams import shift, unshift, user_rows


class GroupedRow(Row):
    """One recording under way, its user's codes (codebooks, frames) known."""

    def __init__(self, model: Model, item: Item, user: np.ndarray) -> None:
        config, prompt = model.config.lm, item.prefilled.prompt
        rows = user_rows(config)
        delays, before = config.delays[rows], prompt.pending[rows]
        super().__init__(item, user.shape[1], iter(shift(user, delays, before).T))
        self.user = user
        self.timings = Timings()
        self._config = config
        self._columns = [prompt.columns[: config.num_agent_streams, -1]]

    def push(self, step: Step, idx: int) -> bool:
        """Add the agent's column, row ``idx`` of ``step``; whether it was the last."""
        self.timings.steps.append(step.seconds)
        self._columns.append(step.column[idx])
        return len(self._columns) > self.num_frames

    def answer(self) -> np.ndarray:
        """The agent's text and codes (agent streams, frames)."""
        delays = self._config.delays[: self._config.num_agent_streams]
        return unshift(np.stack(self._columns, axis=1), delays)


def encode_group(model: Model, items: Sequence[Item]) -> list[GroupedRow]:
    """Encode the recordings of ``items`` together; their rows, ready to start."""
    start = time.perf_counter()
    frames = [frames_of(item.pcm, model.config.frame_size) for item in items]
    assert isinstance(model.codec, MlxCodec)
    codes = model.codec.encode_many(frames)
    rows = [
        GroupedRow(model, item, user) for item, user in zip(items, codes, strict=True)
    ]
    per_frame = (time.perf_counter() - start) / max(1, sum(map(len, frames)))
    for row in rows:
        row.timings.encode_s = per_frame * row.num_frames
    return rows


def decode_group(model: Model, rows: Sequence[GroupedRow]) -> list[Result]:
    """Decode the answers of ``rows`` together."""
    start = time.perf_counter()
    assert isinstance(model.codec, MlxCodec)
    answers = [row.answer() for row in rows]
    pcm = model.codec.decode_many([answer[1:] for answer in answers])
    total = max(1, sum(row.num_frames for row in rows))
    per_frame = (time.perf_counter() - start) / total
    results = []
    for row, answer, agent_pcm in zip(rows, answers, pcm, strict=True):
        row.timings.decode_s = per_frame * row.num_frames
        results.append(
            Result(
                key=row.item.key,
                agent_pcm=agent_pcm[: len(row.item.pcm)],
                text=answer[0],
                agent=answer[1:],
                user=row.user,
                timings=row.timings,
            )
        )
    return results
