"""Two agents that talk to each other.

A frame of one is the user's frame of the same number for the other. Its codes are there
a step before the other needs them: as the model hears a frame's semantic code after it
has made its own, each hears the other 80 ms late, and in the sound both are in time.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from pplex.conversation.answer import Answer, Kept
from pplex.conversation.scheduler import run
from pplex.conversation.script import Script
from pplex.conversation.tracks import StreamedTrack, UserSide, WriteSound
from pplex.conversation.worker import codec_worker
from pplex.engine.base import Engine, Start
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import user_rows


@dataclass(frozen=True)
class Side:
    """An agent of a dialogue, after its prompt; ``script`` is what it is to say."""

    start: Start
    seed: int
    script: Script = ()


@dataclass(frozen=True)
class Dialogue:
    """Two agents that talk for so many frames; ``key`` names it.

    ``write`` gets both sides of each stretch of the sound, left and right (samples,),
    after the number of samples before.
    """

    key: str
    sides: tuple[Side, Side]
    num_frames: int
    write: WriteSound


class _TalkTrack(StreamedTrack):
    """One agent, to whom another speaks."""

    def __init__(
        self, engine: Engine, side: Side, num_frames: int, worker: Executor | None
    ) -> None:
        size = engine.codec.chunk_frames
        super().__init__(
            engine,
            side.start,
            side.seed,
            UserSide(engine, side.start, ()),
            size,
            worker,
            num_frames,
            script=side.script,
        )
        # Columns that were said and not yet heard. PersonaPlex has one at the start.
        self._unheard = deque(self._said)

    def hear(self, other: _TalkTrack) -> None:
        """Have the other's frames be the user's."""
        self.columns = self._opened(self._asked(self._columns_of(other)))

    def _columns_of(self, other: _TalkTrack) -> Iterator[np.ndarray]:
        """The user's columns (codebooks,): the other's, delayed as its own are."""
        rows = user_rows(self._config)
        is_delayed = np.array(self._config.delays[rows]) > 0
        assert self.num_frames is not None
        for frame in range(self.num_frames):
            column = other._unheard.popleft()[1:]
            if not frame:  # what is delayed belongs to a frame before the first
                column = np.where(is_delayed, self.start.prompt.pending[rows], column)
            yield column

    @property
    def needs_last(self) -> bool:
        """Whether a step needs the last one's tokens: all that is heard."""
        return True

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame; the other may hear it."""
        self._unheard.append(column)
        super().push(column, seconds)

    def _take_user_codes(self, count: int) -> np.ndarray:
        """None: they are the other's."""
        return np.zeros((self._config.num_codebooks, 0), np.int32)

    def _counting(self, pcm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All of it; what was heard has no sound of its own."""
        return pcm, pcm[:0]


class _Pair:
    """The tracks of a dialogue, and what they have said."""

    def __init__(
        self,
        dialogue: Dialogue,
        engines: tuple[Engine, Engine],
        worker: Executor | None,
    ) -> None:
        self.dialogue = dialogue
        left, right = (
            _TalkTrack(engine, side, dialogue.num_frames, worker)
            for engine, side in zip(engines, dialogue.sides, strict=True)
        )
        left.hear(right)
        right.hear(left)
        self.tracks = left, right
        frame_size = engines[0].config.frame_size
        self._kept = Kept(frame_size), Kept(frame_size)
        self._pieces: tuple[deque[Answer], deque[Answer]] = deque(), deque()

    @property
    def is_complete(self) -> bool:
        """Whether both have said all."""
        return all(track.is_complete for track in self.tracks)

    def write(self) -> None:
        """Give the sound away as far as both sides have it."""
        for track, pieces in zip(self.tracks, self._pieces, strict=True):
            pieces.extend(track.pieces())
        while all(self._pieces):
            left, right = (pieces.popleft() for pieces in self._pieces)
            self.dialogue.write(self._kept[0].num_samples, left.pcm, right.pcm)
            self._kept[0].add(left)
            self._kept[1].add(right)

    def answers(self) -> tuple[Answer, Answer]:
        """What each side said and heard, after the last column."""
        for track, pieces in zip(self.tracks, self._pieces, strict=True):
            pieces.extend(track.rest())
        self.write()
        left, right = (kept.answer() for kept in self._kept)
        return replace(left, user=right.agent), replace(right, user=left.agent)


def converse_together(
    engines: tuple[Engine, Engine],
    dialogues: Iterable[Dialogue],
    sampling: SamplingConfig,
    *,
    batch_size: int,
) -> Iterator[tuple[Dialogue, tuple[Answer, Answer]]]:
    """Have agents talk, at most ``batch_size`` pairs at a time; both sides of each.

    ``engines`` are those of left and right, one twice if it is the same model; their
    codes must mean the same sound.
    """
    codec = engines[0].codec
    with codec_worker(codec, beside=2 * batch_size) as worker:
        pairs = (_Pair(dialogue, engines, worker) for dialogue in dialogues)
        if engines[0] is engines[1]:
            under_way: deque[_Pair] = deque()

            def tracks() -> Iterator[_TalkTrack]:
                for pair in pairs:
                    under_way.append(pair)
                    yield from pair.tracks

            for _ in run(engines[0], tracks(), sampling, capacity=2 * batch_size):
                yield from _done(under_way)
            return
        while group := deque(itertools.islice(pairs, batch_size)):
            # A Moshi hears a frame before it answers: what PersonaPlex says first is
            # there, and not the other way round.
            sides = sorted(
                (0, 1), key=lambda side: not engines[side].config.lm.is_moshi
            )
            steps = [
                run(
                    engines[side],
                    [pair.tracks[side] for pair in group],
                    sampling,
                    capacity=len(group),
                )
                for side in sides
            ]
            for _ in itertools.zip_longest(*steps):
                yield from _done(group)


def _done(pairs: deque[_Pair]) -> Iterator[tuple[Dialogue, tuple[Answer, Answer]]]:
    """Give away what ``pairs`` have said, and those that are done."""
    for pair in list(pairs):
        pair.write()
        if pair.is_complete:
            pairs.remove(pair)
            yield pair.dialogue, pair.answers()
