"""Tracks of recordings that are encoded and decoded together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from pplex.conversation.answer import Answer
from pplex.conversation.quiet import Quiet
from pplex.conversation.script import last_cue
from pplex.conversation.tracks import Conversation, Track
from pplex.conversation.worker import GroupWorker, Urgency, begin_late
from pplex.engine.base import Begun, Codec, Engine
from pplex.errors import PplexError
from pplex.model.config import ModelConfig
from pplex.model.streams import TEXT_ROW

_MOST_APART = 512  # frames by which one may be ahead of others it is decoded with
_UNTIL_NEXT = 8  # frames of a chunk that a group has read when the next begins


class _Encoding:
    """The users' sides of a group, encoded chunk by chunk, each before it is needed."""

    def __init__(
        self,
        codec: Codec,
        recordings: Sequence[tuple[np.ndarray, int]],
        frame_size: int,
        worker: GroupWorker | None,
    ) -> None:
        """``recordings`` are PCM (samples,) and how many frames, silence behind it."""
        self._codec, self._worker, self._frame_size = codec, worker, frame_size
        self._state, self._size = codec.make_state(), codec.chunk_frames
        self._sounds = [pcm for pcm, _ in recordings]
        self._lengths = [num_frames for _, num_frames in recordings]
        self._chunks: list[Future[list[np.ndarray]]] = []
        self._waited_s = 0.0
        self._begin(0)

    def _begin(self, idx: int) -> None:
        """Begin the chunk, unless somebody did."""
        first = idx * self._size
        if idx < len(self._chunks) or first >= max(self._lengths):
            return
        parts = [self._part(row, first) for row in range(len(self._lengths))]
        how = Urgency.SOON if idx else Urgency.NOW, self._codec.encode_next
        self._chunks.append(begin_late(self._worker, *how, parts, self._state))

    def _part(self, row: int, first: int) -> np.ndarray:
        """The next frames (frames, frame_size) of one of them."""
        size = self._frame_size
        num_frames = min(self._size, max(0, self._lengths[row] - first))
        pcm = self._sounds[row][first * size : (first + num_frames) * size]
        if missing := num_frames * size - len(pcm):
            pcm = np.pad(pcm, (0, missing))
        return pcm.reshape(num_frames, size)

    def codes(self, row: int) -> Iterator[np.ndarray]:
        """Codes (codebooks, frames) of one of them, in pieces."""
        for idx in range(-(-self._lengths[row] // self._size)):
            start = time.perf_counter()
            codes = self._chunks[idx].result()[row]
            self._waited_s += time.perf_counter() - start
            # Chunks that others need sooner have begun by then.
            yield codes[:, :_UNTIL_NEXT]
            self._begin(idx + 1)
            if codes.shape[1] > _UNTIL_NEXT:
                yield codes[:, _UNTIL_NEXT:]

    def share_s(self, row: int) -> float:
        """Its share of the time that was waited for."""
        return self._waited_s * self._lengths[row] / sum(self._lengths)


class GroupedTrack(Track):
    """One recording of a group that is encoded together.

    ``quiet`` may end it before its last frame; ``fault``: why it could not be read.
    """

    fault = ""

    def __init__(
        self,
        config: ModelConfig,
        conversation: Conversation,
        num_frames: int,
        quiet: Quiet | None,
        encoding: _Encoding,
        row: int,
    ) -> None:
        """Its codes are a ``row`` of ``encoding``."""
        start, seed, script = conversation.start, conversation.seed, conversation.script
        super().__init__(config.lm, start, seed, num_frames, script)
        self.conversation, self.quiet = conversation, quiet
        self._encoding, self._row = encoding, row
        self._user_codes: list[np.ndarray] = []
        self._num_judged = 0
        self._frame_size = config.frame_size
        columns = self._user_columns(encoding.codes(row), self._user_codes.append)
        self.columns = self._opened(columns)

    def make_room(self) -> np.ndarray:
        """Room for the sound (samples,) of all its frames."""
        assert self.num_frames is not None
        return np.empty(self.num_frames * self._frame_size, np.float32)

    @property
    def num_ready(self) -> int:
        """Frames that can be decoded."""
        return self._num_said

    @property
    def is_over(self) -> bool:
        """Whether the agent has been quiet for long enough."""
        return self.quiet is not None and self.quiet.end is not None

    @property
    def wants_sound(self) -> bool:
        """Whether it may be all, once its sound is known."""
        if self.is_over or self.quiet is None:
            return False
        return self.quiet.may_end(self._num_pushed) or self.is_complete

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame, or one that comes before the first."""
        if not self.is_over:  # else the step was under way by then
            super().push(column, seconds)

    def said(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The agent's text and codes (agent streams, frames)."""
        last = self.num_ready if last is None else min(last, self.num_ready)
        return self._frames(min(first, last), last)

    def answer(self, said: np.ndarray, pcm: np.ndarray) -> Answer | None:
        """The whole answer by what was ``said`` and its sound; None if it goes on."""
        num_samples, count = self.conversation.sound.num_samples, said.shape[1]
        if (quiet := self.quiet) is not None:
            new, size = self._num_judged, len(pcm) // count
            quiet.hear(said[TEXT_ROW, new:], pcm[new * size :])
            self._num_judged = count
            num_samples, count = quiet.length(num_samples), quiet.end or count
        if self.is_over:
            self.columns = iter(())
            del self.timings.steps[count:]
        elif not self.is_complete:
            return None
        self.timings.encode_s = self._encoding.share_s(self._row)
        user = np.concatenate(self._user_codes, axis=1)[:, :count]
        text, agent = said[0, :count], said[1:, :count]
        pcm = pcm[:num_samples]
        return Answer(pcm, text, agent, user, self.timings, fault=self.fault)


def encode_group(
    engine: Engine, conversations: Sequence[Conversation], worker: GroupWorker | None
) -> list[GroupedTrack]:
    """Begin to encode recordings together; their tracks, ready to start.

    With silence behind those that wait for quiet, for as long as that may take.
    """
    config, size = engine.config, engine.config.frame_size
    heard: dict[tuple[int, bool], tuple[np.ndarray, int]] = {}
    quiets: list[Quiet | None] = []
    faults: dict[tuple[int, bool], str] = {}
    for one in conversations:
        quiet, key = None, _heard(one)
        try:
            pcm = one.sound.pcm
        except PplexError as e:  # the others are not to end with it
            pcm, faults[key] = np.zeros(one.sound.num_samples, np.float32), str(e)
        num_samples = len(pcm)
        if one.until_quiet:
            quiet = Quiet(config, last_cue(one.script))
            quiet.begin(-(-num_samples // size))
            num_samples = quiet.length(num_samples)
        quiets.append(quiet)
        heard[key] = pcm, -(-num_samples // size)  # takes share theirs
    if not conversations:
        return []
    encoding = _Encoding(engine.codec, [*heard.values()], size, worker)
    places, tracks = {key: row for row, key in enumerate(heard)}, []
    for one, quiet in zip(conversations, quiets, strict=True):
        key = _heard(one)
        row, num_frames = places[key], heard[key][1]
        track = GroupedTrack(config, one, num_frames, quiet, encoding, row)
        track.fault = faults.get(key, "")
        tracks.append(track)
    return tracks


def _heard(one: Conversation) -> tuple[int, bool]:
    """What is alike of conversations that hear the same."""
    return id(one.sound), one.until_quiet


class Decoding:
    """What is said in conversations that began together, decoded as they go on.

    A chunk is decoded when all have come so far, or to their ends. It takes as long
    with few of them: so more may join until one is at its end, or far ahead.
    """

    def __init__(self, codec: Codec, worker: GroupWorker | None) -> None:
        self._codec, self._worker = codec, worker
        self._state, self._size = codec.make_state(), codec.chunk_frames
        self._tracks: list[GroupedTrack] = []
        self._left: dict[int, np.ndarray] = {}  # sound of those still to be answered
        self._num_begun = 0
        self._call: Future[None] | None = None
        self._is_open = True

    def add(self, track: GroupedTrack) -> bool:
        """Take one more that begins now, unless it is too late."""
        if not self._may_join():
            return False
        self._left[len(self._tracks)] = track.make_room()
        self._tracks.append(track)
        return True

    def _may_join(self) -> bool:
        if self._is_open and (
            len(self._tracks) == self._codec.group
            or any(t.num_ready >= _MOST_APART or t.is_complete for t in self._tracks)
        ):
            self.close()
        return self._is_open

    def close(self) -> None:
        """Take no more."""
        self._is_open = False

    @property
    def is_done(self) -> bool:
        """Whether all are answered."""
        return not self._left

    def go_on(self, *, wait: bool = False) -> Iterator[tuple[Conversation, Answer]]:
        """Begin the next chunk if there is one; answers whose sound is there.

        With ``wait`` what is under way is waited for.
        """
        if self._call is not None and (wait or self._call.done()):
            start = time.perf_counter()
            self._call.result()
            self._call = None
            share = (time.perf_counter() - start) / len(self._left)
            for row in list(self._left):
                track = self._tracks[row]
                track.timings.decode_s += share
                if track.is_complete and track.num_ready <= self._num_begun:
                    answer = track.answer(track.said(), self._left.pop(row))
                    assert answer is not None
                    yield track.conversation, answer
        if self._call is not None or self.is_done or self._may_join():
            return
        until = self._num_begun + self._size
        if all(each.num_ready >= until or each.is_complete for each in self._tracks):
            self._begin(until)

    def _begin(self, until: int) -> None:
        first, self._num_begun = self._num_begun, until
        parts = [each.said(first, until)[1:] for each in self._tracks]
        rooms = dict(self._left)
        how = Urgency.LATER, self._decode
        self._call = begin_late(self._worker, *how, parts, rooms, first)

    def _decode(
        self, parts: list[np.ndarray], rooms: dict[int, np.ndarray], first: int
    ) -> Callable[[], None]:
        wait = self._codec.decode_next(parts, self._state)

        def place() -> None:
            made = wait()
            for row, room in rooms.items():
                if count := parts[row].shape[1]:
                    start = first * (len(made[row]) // count)
                    room[start : start + len(made[row])] = made[row]

        return place


def decode_group(
    codec: Codec, tracks: Sequence[GroupedTrack], worker: GroupWorker | None
) -> list[tuple[Conversation, Answer]]:
    """Decode what was said in ``tracks`` together; answers of those that are over."""
    start = time.perf_counter()
    said = [track.said() for track in tracks]
    codes = [frames[1:] for frames in said]
    sounds = begin_late(worker, Urgency.NOW, _decode_whole, codec, codes).result()
    per_frame = (time.perf_counter() - start) / sum(frames.shape[1] for frames in said)
    answers = []
    for track, frames, pcm in zip(tracks, said, sounds, strict=True):
        track.timings.decode_s += per_frame * frames.shape[1]
        if (answer := track.answer(frames, pcm)) is not None:
            answers.append((track.conversation, answer))
    return answers


def _decode_whole(codec: Codec, said: Sequence[np.ndarray]) -> Begun:
    """PCM (samples,) of the codes (codebooks, frames) of a group."""
    state, size = codec.make_state(), codec.chunk_frames
    starts = range(0, max(codes.shape[1] for codes in said), size)
    parts = [
        codec.decode_next([codes[:, i : i + size] for codes in said], state)
        for i in starts
    ]
    return lambda: [
        np.concatenate(row) for row in zip(*[p() for p in parts], strict=True)
    ]
