"""The codec's side of a conversation, beside the steps.

A track turns the user's sound into columns of the grid and the agent's columns into
sound: chunk by chunk as the steps go on, or whole, many recordings at a time, as GPUs
like it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from pplex.audio.files import frames_of
from pplex.conversation.answer import Answer, Timings, join
from pplex.conversation.worker import one_ahead
from pplex.engine.base import Codec, Engine, Start
from pplex.model.config import LmConfig
from pplex.model.prompt import Prompt
from pplex.model.streams import shift, unshift, user_rows


@dataclass(frozen=True)
class Conversation:
    """A recording, float32 (samples,), to answer after a prompt; ``key`` names it."""

    key: str
    pcm: np.ndarray
    start: Start
    seed: int

    def __post_init__(self) -> None:
        """ValueError for a recording without samples: it has no answer."""
        if not len(self.pcm):
            raise ValueError(f"recording {self.key!r} holds no samples")


class Track:
    """One conversation: the user's columns that it asks for, the agent's it is given.

    ``num_frames`` is how many there will be, None for a live stream.
    """

    def __init__(
        self, config: LmConfig, start: Start, seed: int, num_frames: int | None
    ) -> None:
        self.start, self.seed, self.num_frames = start, seed, num_frames
        self.timings = Timings()
        self.columns: Iterator[np.ndarray] = iter(())  # (codebooks,) for each frame
        self._config = config
        self._said = [start.prompt.columns[: config.num_agent_streams, -1]]

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame."""
        self.timings.steps.append(seconds)
        self._said.append(column)

    @property
    def is_complete(self) -> bool:
        """Whether every frame has its column."""
        return len(self.timings.steps) == self.num_frames

    def _frames(self) -> np.ndarray:
        """The agent's text and codes (agent streams, frames) of what was said."""
        delays = self._config.delays[: self._config.num_agent_streams]
        return unshift(np.stack(self._said, axis=1), delays)


@dataclass(frozen=True)
class _Decoding:
    """A stretch whose PCM is under way: ``pcm`` waits for it, ``is_done`` does not."""

    pcm: Callable[[], np.ndarray]
    is_done: Callable[[], bool]
    text: np.ndarray
    agent: np.ndarray
    user: np.ndarray


class StreamedTrack(Track):
    """A conversation coded chunk by chunk while it goes on."""

    def __init__(
        self,
        engine: Engine,
        start: Start,
        seed: int,
        chunks: Iterable[np.ndarray],
        decode_frames: int,
        worker: Executor | None = None,
        num_frames: int | None = None,
    ) -> None:
        """``chunks`` are (frames, frame_size) PCM; pieces have ``decode_frames``.

        With a ``worker`` the next chunk is encoded in it before it is needed, and a
        piece is there only when the one after it begins to be decoded.
        """
        super().__init__(engine.config.lm, start, seed, num_frames)
        self._codec = engine.codec
        self._decode_frames = decode_frames
        self._worker = worker
        encode = partial(self._codec.encode, state=self._codec.make_state())
        self._encoded = one_ahead(worker, encode, chunks)
        self._user_codes: list[np.ndarray] = []
        self._decoder = self._codec.make_state()
        self._decoding: _Decoding | None = None
        self._pieces: list[Answer] = []
        self.columns = self._user_columns(start.prompt)

    def _user_columns(self, prompt: Prompt) -> Iterator[np.ndarray]:
        rows = user_rows(self._config)
        delays, before = self._config.delays[rows], prompt.pending[rows]
        while True:
            start = time.perf_counter()
            codes = next(self._encoded, None)
            self.timings.encode_s += time.perf_counter() - start
            if codes is None:
                return
            columns = shift(codes, delays, before).T
            before = codes[:, -1]
            self._user_codes.append(codes)
            yield from columns

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame; after enough of them, decode."""
        super().push(column, seconds)
        if len(self._said) > self._decode_frames or self.is_complete:
            self._decode()

    def pieces(self) -> Iterator[Answer]:
        """The stretches that are there and were not taken yet."""
        while self._pieces:
            yield self._pieces.pop(0)

    @property
    def is_decoded(self) -> bool:
        """Whether nothing that has begun must be waited for."""
        return self._decoding is None or self._decoding.is_done()

    def rest(self) -> Iterator[Answer]:
        """The stretches still to come, after the last column."""
        if len(self._said) > 1:
            self._decode()
        self._take_decoded()
        return self.pieces()

    def _decode(self) -> None:
        """Begin to decode the frames that have come since."""
        self._take_decoded()
        frames = self._frames()
        self._said = self._said[-1:]
        text, agent = frames[0], frames[1:]
        pcm = partial(self._codec.decode, agent, self._decoder)
        user = self._take_user_codes(len(text))
        if self._worker is None:
            self._decoding = _Decoding(pcm, bool, text, agent, user)
            self._take_decoded()
        else:
            call = self._worker.submit(pcm)
            self._decoding = _Decoding(call.result, call.done, text, agent, user)

    def _take_decoded(self) -> None:
        """Wait for what is under way."""
        if self._decoding is None:
            return
        done, self._decoding = self._decoding, None
        start = time.perf_counter()
        pcm = done.pcm()
        self.timings.decode_s += time.perf_counter() - start
        piece = Answer(pcm, done.text, done.agent, done.user, self.timings)
        self._pieces.append(piece)

    def _take_user_codes(self, count: int) -> np.ndarray:
        codes = np.concatenate(self._user_codes, axis=1)
        self._user_codes = [codes[:, count:]]
        return codes[:, :count]


class RecordingTrack(StreamedTrack):
    """One recording of many, coded chunk by chunk."""

    def __init__(
        self, engine: Engine, conversation: Conversation, worker: Executor | None
    ) -> None:
        frames, size = _frames_of(engine, conversation), engine.codec.chunk_frames
        chunks = (frames[i : i + size] for i in range(0, len(frames), size))
        self.conversation = conversation
        super().__init__(
            engine,
            conversation.start,
            conversation.seed,
            chunks,
            size,
            worker,
            len(frames),
        )

    def answer(self) -> Answer:
        """The whole answer, after the last column."""
        return join([*self.pieces(), *self.rest()], len(self.conversation.pcm))


class GroupedTrack(Track):
    """One recording of a group that was encoded whole: ``user`` (codebooks, frames)."""

    def __init__(
        self,
        config: LmConfig,
        conversation: Conversation,
        user: np.ndarray,
        encode_s: float,
    ) -> None:
        super().__init__(config, conversation.start, conversation.seed, user.shape[1])
        self.conversation, self.user = conversation, user
        self.timings.encode_s = encode_s
        rows, pending = user_rows(config), conversation.start.prompt.pending
        self.columns = iter(shift(user, config.delays[rows], pending[rows]).T)

    def said(self) -> np.ndarray:
        """The agent's text and codes (agent streams, frames)."""
        return self._frames()


def encode_group(
    engine: Engine, conversations: Sequence[Conversation]
) -> list[GroupedTrack]:
    """Encode recordings together; their tracks, ready to start."""
    start = time.perf_counter()
    frames = [_frames_of(engine, one) for one in conversations]
    codes = engine.codec.encode_many(frames)
    per_frame = _per_frame(start, sum(map(len, frames)))
    return [
        GroupedTrack(engine.config.lm, one, user, per_frame * user.shape[1])
        for one, user in zip(conversations, codes, strict=True)
    ]


def decode_group(codec: Codec, tracks: Sequence[GroupedTrack]) -> list[Answer]:
    """Decode what was said in ``tracks`` together."""
    start = time.perf_counter()
    said = [track.said() for track in tracks]
    sounds = codec.decode_many([frames[1:] for frames in said])
    per_frame = _per_frame(start, sum(frames.shape[1] for frames in said))
    answers = []
    for track, frames, pcm in zip(tracks, said, sounds, strict=True):
        track.timings.decode_s = per_frame * frames.shape[1]
        length = len(track.conversation.pcm)
        answers.append(
            Answer(pcm[:length], frames[0], frames[1:], track.user, track.timings)
        )
    return answers


def _per_frame(start: float, num_frames: int) -> float:
    return (time.perf_counter() - start) / max(1, num_frames)


def _frames_of(engine: Engine, conversation: Conversation) -> np.ndarray:
    return frames_of(conversation.pcm, engine.config.frame_size)
