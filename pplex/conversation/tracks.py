"""The codec's side of a conversation, beside the steps.

A track turns the user's sound into columns of the grid and the agent's columns into
sound: chunk by chunk as the steps go on, or whole, many recordings at a time, as GPUs
like it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pplex.audio.files import Sound, chunked, frames_of
from pplex.conversation.answer import Answer, Kept, Timings, join
from pplex.conversation.quiet import Quiet
from pplex.conversation.script import Script, Speaker, last_cue
from pplex.conversation.worker import one_ahead
from pplex.engine.base import Codec, Engine, Start
from pplex.errors import PplexError
from pplex.model.config import LmConfig, ModelConfig
from pplex.model.streams import TEXT_ROW, shift, unshift, user_rows

# Takes the number of samples before a stretch, and its sides: user, agent (samples,).
WriteSound = Callable[[int, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Conversation:
    """A recording to answer after a prompt; ``key`` names it.

    With ``until_quiet`` it is followed by silence for as long as ``Quiet`` says. Where
    the answer is made in stretches, ``write`` gets the sound of both sides of each
    (samples,), after the number of those before, and the answer has none. ``script`` is
    what the agent is to say.
    """

    key: str
    sound: Sound
    start: Start
    seed: int
    until_quiet: bool = False
    write: WriteSound | None = None
    script: Script = ()

    def __post_init__(self) -> None:
        """ValueError for a recording without samples: it has no answer."""
        if not self.sound.num_samples:
            raise ValueError(f"recording {self.key!r} holds no samples")


def cut(
    sound: Sound, config: ModelConfig, size: int, quiet: Quiet | None = None
) -> tuple[Iterator[np.ndarray], int]:
    """Chunks (frames, frame_size) of a recording, of ``size``; how many frames.

    They are made when asked for, and for ``quiet`` those of the longest tail follow.
    """
    num_samples, frame_size = sound.num_samples, config.frame_size
    num_frames = -(-num_samples // frame_size)
    if quiet is not None:
        quiet.begin(num_frames)
        num_frames = -(-quiet.length(num_samples) // frame_size)

    def blocks() -> Iterator[np.ndarray]:
        yield from sound.blocks()
        yield np.zeros(num_frames * frame_size - num_samples, np.float32)

    chunks = chunked(blocks(), size * frame_size)
    return (chunk.reshape(-1, frame_size) for chunk in chunks), num_frames


class Track:
    """One conversation: the user's columns that it asks for, the agent's it is given.

    ``num_frames`` is how many there will be, None for a live stream; ``script`` is what
    the agent is to say.
    """

    def __init__(
        self,
        config: LmConfig,
        start: Start,
        seed: int,
        num_frames: int | None,
        script: Script = (),
    ) -> None:
        self.start, self.seed, self.num_frames = start, seed, num_frames
        self.timings = Timings()
        self.columns: Iterator[np.ndarray] = iter(())  # (codebooks,) for each frame
        self._config, self._speaker = config, Speaker(script)
        # PersonaPlex's answer begins with the prompt's last frame.
        kept = 0 if config.is_moshi else config.lag
        said = start.prompt.columns[: config.num_agent_streams]
        self._said = list(said.T[len(said.T) - kept :])
        self._is_opening = config.is_moshi
        self._num_begun = self._num_known = len(self._said)

    def next_column(self) -> tuple[np.ndarray, int] | None:
        """The user's next column, and the agent's text beside it, if that is given."""
        column = next(self.columns, None)
        if column is None:
            return None
        text = self._speaker.text(self._num_begun)
        self._num_begun += 1
        return column, text

    @property
    def needs_last(self) -> bool:
        """Whether that text depends on the agent's last column."""
        return self._speaker.needs_last(self._num_begun)

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame, or one that comes before the first."""
        self._speaker.said(self._num_known, int(column[TEXT_ROW]))
        self._num_known += 1
        self._said.append(column)
        if self._is_opening:
            self._is_opening = False
        else:
            self.timings.steps.append(seconds)

    def _opened(
        self, columns: Iterator[np.ndarray], *, live: bool = False
    ) -> Iterator[np.ndarray]:
        """What comes before the user's ``columns``, where a step reads them.

        The first reads the prompt's last, so that there is an answer to each frame.
        """
        if live or self._config.is_moshi:
            yield self.start.prompt.columns[user_rows(self._config), -1]
        yield from columns

    def _user_columns(
        self,
        encoded: Iterator[np.ndarray],
        keep: Callable[[np.ndarray], object],
    ) -> Iterator[np.ndarray]:
        """Columns (codebooks,) of the user's codes, as they are ``encoded`` in chunks.

        ``keep`` is given each chunk (codebooks, frames).
        """
        rows = user_rows(self._config)
        delays, before = self._config.delays[rows], self.start.prompt.pending[rows]
        while True:
            start = time.perf_counter()
            codes = next(encoded, None)
            self.timings.encode_s += time.perf_counter() - start
            if codes is None:
                return
            keep(codes)
            columns = shift(codes, delays, before).T
            before = codes[:, -1]
            yield from columns

    @property
    def num_steps(self) -> int | None:
        """How many columns it asks for, if that is known."""
        return self.num_frames and self.num_frames + self._config.is_moshi

    @property
    def is_complete(self) -> bool:
        """Whether every frame has its column."""
        return len(self.timings.steps) == self.num_frames

    @property
    def _num_said(self) -> int:
        """Frames that are known whole."""
        return len(self._said) - self._config.lag

    def _frames(self, count: int | None = None) -> np.ndarray:
        """The agent's text and codes (agent streams, frames) of what was said.

        The first ``count`` frames, or all.
        """
        delays, lag = self._config.delays, self._config.lag
        said = self._said if count is None else self._said[: count + lag]
        agent = delays[: self._config.num_agent_streams]
        return unshift(np.stack(said, axis=1), agent, lag)


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
        quiet: Quiet | None = None,
        num_samples: int | None = None,
        script: Script = (),
    ) -> None:
        """``chunks`` are (frames, frame_size) PCM; pieces have ``decode_frames``.

        Of the sound ``num_samples`` count, or all, and those of the tail of ``quiet``.

        With a ``worker`` the next chunk is encoded in it before it is needed, and a
        piece is there only when the one after it begins to be decoded. ``quiet`` may
        end it before the ``chunks`` do; what was answered by then is left out.
        """
        super().__init__(engine.config.lm, start, seed, num_frames, script)
        self._codec = engine.codec
        self._quiet = quiet
        self._decode_frames = decode_frames
        self._num_asked = self._num_decoded = 0
        self._worker = worker
        by_frame = decode_frames == 1
        encoder = self._codec.make_state(start.encoder, by_frame=by_frame)
        encode = partial(self._codec.encode, state=encoder)
        self._num_samples, self._num_given = num_samples, 0
        self._heard: deque[np.ndarray] = deque()
        encoded = one_ahead(worker, encode, self._hearing(chunks))
        self._user_codes: list[np.ndarray] = []
        self._decoder = self._codec.make_state(start.decoder, by_frame=by_frame)
        self._decoding: _Decoding | None = None
        self._pieces: list[Answer] = []
        columns = self._user_columns(encoded, self._user_codes.append)
        self.columns = self._opened(self._asked(columns))

    @property
    def _is_over(self) -> bool:
        """Whether the agent has been quiet for long enough."""
        return self._quiet is not None and self._quiet.end is not None

    @property
    def is_complete(self) -> bool:
        """Whether every frame that there will be has its column."""
        count = len(self.timings.steps)
        is_last = self._is_over or count == self.num_frames
        return is_last and count == self._num_asked

    def _asked(self, columns: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        while not self._is_over and (column := next(columns, None)) is not None:
            self._num_asked += 1
            yield column

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame; after enough of them, decode."""
        super().push(column, seconds)
        if self._is_over:
            return
        if self._num_said >= self._decode_frames or self.is_complete:
            self._decode()
        if self._quiet is not None and self._quiet.may_end(len(self.timings.steps)):
            while not self._is_over and (count := self._num_said):
                self._decode(1 << (count.bit_length() - 1))
            self._take_decoded()

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
        self._finish()
        return self.pieces()

    def _finish(self) -> None:
        if self._num_said and not self._is_over:
            self._decode()
        self._take_decoded()
        if self._is_over:
            del self.timings.steps[self._num_decoded :]

    def _decode(self, count: int | None = None) -> None:
        """Begin to decode the frames that have come since, the first ``count`` or all.

        Unless they are the last, these are a power of two.
        """
        self._take_decoded()
        if self._is_over:
            return
        frames = self._frames(count)
        self._said = self._said[frames.shape[1] :]
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
        count = len(done.text)
        if self._quiet is not None:
            self._quiet.hear(done.text, pcm)
            if self._quiet.end is not None:
                count = self._quiet.end - self._num_decoded
                pcm = pcm[: len(pcm) // len(done.text) * count]
        self._num_decoded += count
        pcm, heard = self._counting(pcm)
        text, agent, user = done.text[:count], done.agent[:, :count], done.user
        piece = Answer(pcm, text, agent, user[:, :count], self.timings, heard)
        self._pieces.append(piece)

    def _hearing(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Keep the user's side until it is given away beside the agent's."""
        for chunk in chunks:
            self._heard.append(chunk.reshape(-1))
            yield chunk

    def _counting(self, pcm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of decoded PCM (samples,) what counts, and the user's side of it."""
        count = len(pcm)
        if self._num_samples is not None:
            length = self._num_samples
            if self._quiet is not None:
                length = self._quiet.length(length)
            count = min(count, length - self._num_given)
        self._num_given += count
        heard: list[np.ndarray] = []
        missing = count
        while missing:
            first = self._heard.popleft()
            heard.append(first[:missing])
            if len(first) > missing:
                self._heard.appendleft(first[missing:])
            missing -= len(heard[-1])
        return pcm[:count], np.concatenate([pcm[:0], *heard])

    def _take_user_codes(self, count: int) -> np.ndarray:
        codes = np.concatenate(self._user_codes, axis=1)
        self._user_codes[:] = [codes[:, count:]]
        return codes[:, :count]


class LiveTrack(Track):
    """A conversation coded frame by frame, each reply as soon as it can be known.

    What PersonaPlex says of a frame does not depend on the user's: it is there before
    that. Moshi hears the frame first.
    """

    def __init__(
        self,
        engine: Engine,
        start: Start,
        seed: int,
        frames: Iterable[np.ndarray],
        keep: Callable[[np.ndarray], object],
        script: Script,
    ) -> None:
        """``frames`` are (1, frame_size) PCM; ``keep`` gets the codes of each."""
        super().__init__(engine.config.lm, start, seed, None, script)
        self._codec = engine.codec
        encoder = self._codec.make_state(start.encoder, by_frame=True)
        encode = partial(self._codec.encode, state=encoder)
        self._decoder = self._codec.make_state(start.decoder, by_frame=True)
        columns = self._user_columns(map(encode, frames), keep)
        self.columns = self._opened(columns, live=True)

    def reply(self) -> Answer | None:
        """The reply to the next frame, without that; None where it must come first."""
        if not self._num_said:
            return None
        frames = self._frames()
        self._said = self._said[1:]
        start = time.perf_counter()
        pcm = self._codec.decode(frames[1:], self._decoder)
        self.timings.decode_s += time.perf_counter() - start
        return Answer(pcm, frames[0], frames[1:], frames[1:, :0], self.timings)


class RecordingTrack(StreamedTrack):
    """One recording of many, coded chunk by chunk."""

    def __init__(
        self, engine: Engine, conversation: Conversation, worker: Executor | None
    ) -> None:
        self.conversation, size = conversation, engine.codec.chunk_frames
        sound = conversation.sound
        quiet = None
        if conversation.until_quiet:
            quiet = Quiet(engine.config, last_cue(conversation.script))
        chunks, num_frames = cut(sound, engine.config, size, quiet)
        self._frame_size = engine.config.frame_size
        self._kept = Kept(self._frame_size)
        self._fault = ""
        super().__init__(
            engine,
            conversation.start,
            conversation.seed,
            self._readable(chunks, size, num_frames),
            size,
            worker,
            num_frames,
            quiet,
            sound.num_samples,
            conversation.script,
        )

    def _readable(
        self, chunks: Iterator[np.ndarray], size: int, num_frames: int
    ) -> Iterator[np.ndarray]:
        """``chunks``; silence in the place of those that can no longer be read.

        The others in the batch are not to end with this one.
        """
        done, frame_size = 0, self._frame_size
        try:
            for chunk in chunks:
                done += len(chunk)
                yield chunk
        except PplexError as e:
            self._fault = str(e)
            for first in range(done, num_frames, size):
                count = min(size, num_frames - first)
                yield np.zeros((count, frame_size), np.float32)

    def write(self) -> None:
        """Give away the sound of what is there, where that is wanted."""
        if (write := self.conversation.write) is None:
            return
        for piece in self.pieces():
            write(self._kept.num_samples, piece.heard, piece.pcm)
            self._kept.add(piece)

    def answer(self) -> Answer:
        """The whole answer, after the last column."""
        if self.conversation.write is None:
            answer = join([*self.pieces(), *self.rest()])
        else:
            self._finish()
            self.write()
            answer = self._kept.answer()
        return replace(answer, fault=self._fault)


class GroupedTrack(Track):
    """One recording of a group that was encoded whole: ``user`` (codebooks, frames)."""

    def __init__(
        self,
        config: LmConfig,
        conversation: Conversation,
        user: np.ndarray,
        encode_s: float,
    ) -> None:
        start, seed, script = conversation.start, conversation.seed, conversation.script
        super().__init__(config, start, seed, user.shape[1], script)
        self.conversation, self.user = conversation, user
        self.timings.encode_s = encode_s
        rows, pending = user_rows(config), start.prompt.pending
        columns = shift(user, config.delays[rows], pending[rows]).T
        self.columns = self._opened(iter(columns))

    def said(self) -> np.ndarray:
        """The agent's text and codes (agent streams, frames)."""
        return self._frames()


def encode_group(
    engine: Engine, conversations: Sequence[Conversation]
) -> list[GroupedTrack]:
    """Encode recordings together; their tracks, ready to start."""
    start = time.perf_counter()
    size = engine.config.frame_size
    frames = [frames_of(one.sound.pcm, size) for one in conversations]
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
        length = track.conversation.sound.num_samples
        answers.append(
            Answer(pcm[:length], frames[0], frames[1:], track.user, track.timings)
        )
    return answers


def _per_frame(start: float, num_frames: int) -> float:
    return (time.perf_counter() - start) / max(1, num_frames)
