"""The codec's side of a conversation, beside the steps.

A track turns the user's sound into columns of the grid and the agent's columns into
sound, chunk by chunk as the steps go on. ``groups`` has those of many recordings that
are coded together, as GPUs like it.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pplex.audio.files import Sound, chunked
from pplex.conversation.answer import Answer, Kept, Timings, join
from pplex.conversation.quiet import Quiet
from pplex.conversation.script import Script, Speaker, last_cue
from pplex.conversation.state import Saving, one_by_one
from pplex.conversation.worker import begin, one_ahead
from pplex.engine.base import Arrays, Codec, Engine, Start
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
    what the agent is to say. With ``saves`` it can go on from where it ends. With
    ``more_takes`` the next one is another take: it hears the same ``sound``, whose
    codes are made once.
    """

    key: str
    sound: Sound
    start: Start
    seed: int
    until_quiet: bool = False
    write: WriteSound | None = None
    script: Script = ()
    saves: bool = False
    more_takes: bool = False

    def __post_init__(self) -> None:
        """ValueError for a recording without samples: it has no answer."""
        if not self.sound.num_samples:
            raise ValueError(f"recording {self.key!r} holds no samples")

    @property
    def is_streamed(self) -> bool:
        """Whether it cannot be coded in a group: states of its codec are wanted."""
        return self.saves or self.start.encoder is not None


_KEPT_FRAMES = 32  # decoded since the decoder was last kept, at most


def cut(
    sound: Sound,
    start: Start,
    config: ModelConfig,
    size: int,
    quiet: Quiet | None = None,
    saving: Saving | None = None,
) -> tuple[Iterator[np.ndarray], int]:
    """Chunks (frames, frame_size) of a recording, of ``size``; how many frames.

    They are made when asked for, after what ``start`` has left over, and for ``quiet``
    those of the longest tail follow. Where it is saved, a chunk ends.
    """
    num_samples, frame_size = len(start.rest) + sound.num_samples, config.frame_size
    num_frames, whole = -(-num_samples // frame_size), num_samples // frame_size
    if quiet is not None:
        quiet.begin(num_frames)
        num_frames = -(-quiet.length(num_samples) // frame_size)
    elif saving is not None:
        saving.at, saving.num_rest = whole, num_samples % frame_size

    def blocks() -> Iterator[np.ndarray]:
        yield start.rest
        yield from sound.blocks()
        yield np.zeros(num_frames * frame_size - num_samples, np.float32)

    pieces = chunked(blocks(), size * frame_size)
    chunks = (chunk.reshape(-1, frame_size) for chunk in pieces)
    return chunks if saving is None else one_by_one(chunks, whole), num_frames


class Track:
    """One conversation: the user's columns that it asks for, the agent's it is given.

    ``num_frames`` is how many there will be, None for a live stream; ``script`` is what
    the agent is to say. While ``is_to_save`` its row is wanted before the next step, as
    it was ``steps_ahead`` before.
    """

    is_to_save = False

    def __init__(
        self,
        config: LmConfig,
        start: Start,
        seed: int,
        num_frames: int | None,
        script: Script = (),
    ) -> None:
        self.start, self.seed, self.num_frames = start, seed, num_frames
        self.timings, self._num_pushed = Timings(), 0
        self.columns: Iterator[np.ndarray] = iter(())  # (codebooks,) for each frame
        self._config, self._speaker = config, Speaker(script)
        # PersonaPlex's answer begins with the prompt's last frame; one that goes on,
        # with the last column.
        self._is_opening = config.is_moshi and not start.steps
        kept = 0 if self._is_opening else config.lag
        said = start.prompt.columns[: config.num_agent_streams]
        self._said = list(said.T[len(said.T) - kept :])
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
        """Whether what comes next depends on the agent's last column."""
        return self._speaker.needs_last(self._num_begun)

    def save_row(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what ``Rows.save`` gives, which was wanted."""
        raise NotImplementedError

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame, or one that comes before the first."""
        self._speaker.said(self._num_known, int(column[TEXT_ROW]))
        self._num_known += 1
        self._said.append(column)
        if self._is_opening:
            self._is_opening = False
        else:
            self.timings.steps.append(seconds)
            self._num_pushed += 1

    def _opened(
        self, columns: Iterator[np.ndarray], *, live: bool = False
    ) -> Iterator[np.ndarray]:
        """What comes before the user's ``columns``, where a step reads them.

        The first reads the prompt's last, so that there is an answer to each frame.
        """
        if self._is_opening or (live and not self._config.is_moshi):
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
        return self.num_frames and self.num_frames + self._is_opening

    @property
    def steps_ahead(self) -> int:
        """How many steps its row has made after where it is saved."""
        return 0

    @property
    def is_complete(self) -> bool:
        """Whether every frame has its column."""
        return self._num_pushed == self.num_frames

    @property
    def _num_said(self) -> int:
        """Frames that are known whole."""
        return len(self._said) - self._config.lag

    def _frames(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The agent's text and codes (agent streams, frames) of what was said."""
        delays, lag = self._config.delays, self._config.lag
        agent = delays[: self._config.num_agent_streams]
        said = self._said[first : None if last is None else last + lag]
        return unshift(np.stack(said, axis=1), agent, lag)


@dataclass(frozen=True)
class Decoder:
    """A decoder's state; takes with the same ``name`` have the same, bit for bit."""

    state: Any
    name: bytes = b""


_Decoded = tuple[np.ndarray, Decoder]  # PCM (samples,), the decoder after it


@dataclass(frozen=True)
class _Decoding:
    """A stretch whose PCM is under way."""

    call: Future[_Decoded]
    text: np.ndarray
    agent: np.ndarray
    user: np.ndarray


class UserSide:
    """The user's side of a conversation, or of several takes of one, coded by chunks.

    Where ``saving`` says, ``saved`` gets what goes on from there.
    """

    def __init__(
        self,
        engine: Engine,
        start: Start,
        chunks: Iterable[np.ndarray],
        *,
        worker: Executor | None = None,
        saving: Saving | None = None,
    ) -> None:
        """``chunks`` are (frames, frame_size) PCM.

        With a ``worker`` the next one is encoded in it before it is needed.
        """
        self._codec, self._saving = engine.codec, saving
        self._encoder = self._codec.make_state(start.encoder)
        self._last = start.prompt.pending[user_rows(engine.config.lm)]
        self._num_encoded = 0
        self.saved: dict[str, Arrays] = {}
        self._coded = one_ahead(worker, self._encode, chunks)

    def listen(self, *, more: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks (samples,) and their codes (codebooks, frames), from the first on.

        With ``more``, they are kept for somebody else who listens.
        """
        if not more:
            return self._coded
        heard, self._coded = itertools.tee(self._coded)
        return heard

    def _encode(self, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._saving is not None and self._saving.at == self._num_encoded:
            self.save(chunk)
        codes = self._codec.encode(chunk, self._encoder)
        self._last = codes[:, -1]
        self._num_encoded += len(chunk)
        return chunk.reshape(-1), codes

    def save(self, following: np.ndarray | None = None) -> None:
        """Save it before a chunk, or at the end; only the first time counts."""
        if self._saving is None or self.saved:
            return
        user = {"tokens": np.array(self._last, np.int32)}
        if following is not None and self._saving.num_rest:
            rest = following.reshape(-1)[: self._saving.num_rest]
            user["rest"] = np.array(rest, np.float32)
        self.saved = {"encoder": self._codec.save(self._encoder), "user": user}


class Alike:
    """What takes of a recording say alike, decoded once for all of them.

    Sound depends on its codes and on the decoder before them, which forgets: takes that
    were silent for a while come to the same one again, whatever they said until then.
    """

    MOST = 24  # stretches, of which each has a decoder

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._calls: dict[tuple[bytes, bytes], Future[_Decoded]] = {}

    def decode(
        self, codes: np.ndarray, before: Decoder, worker: Executor | None
    ) -> Future[_Decoded]:
        """Decode codes (codebooks, frames), if they are not known; ``before`` stays."""
        key = before.name, codes.tobytes()
        call = self._calls.pop(key, None)
        if call is None:
            call = begin(worker, self._decode, codes, before)
            if len(self._calls) == self.MOST:  # what nobody said for longest is dropped
                del self._calls[next(iter(self._calls))]
        self._calls[key] = call
        return call

    def _decode(self, codes: np.ndarray, before: Decoder) -> _Decoded:
        state = self._codec.make_state(self._codec.save(before.state))
        pcm = self._codec.decode(codes, state)
        name = hashlib.sha256()
        for array in self._codec.save(state).values():
            name.update(array.tobytes())
        return pcm, Decoder(state, name.digest())


class StreamedTrack(Track):
    """A conversation coded chunk by chunk while it goes on."""

    def __init__(
        self,
        engine: Engine,
        start: Start,
        seed: int,
        user: UserSide,
        decode_frames: int,
        worker: Executor | None = None,
        num_frames: int | None = None,
        quiet: Quiet | None = None,
        num_samples: int | None = None,
        script: Script = (),
        saving: Saving | None = None,
        more_takes: bool = False,
        alike: Alike | None = None,
    ) -> None:
        """Pieces have ``decode_frames``.

        Of the ``user``'s sound ``num_samples`` count, or all, and those of the tail of
        ``quiet``. With ``more_takes`` others will hear it, who share ``alike``.

        With a ``worker`` a piece is there only when the one after it begins to be
        decoded. ``quiet`` may end it before the sound does; what was answered by then
        is left out. It is saved where ``saving`` says; where that is its end by
        ``quiet``, nothing may run ahead.

        What ``start`` has left over was answered before, and is left out, too.
        """
        super().__init__(engine.config.lm, start, seed, num_frames, script)
        self._codec = engine.codec
        self._quiet = quiet
        self._decode_frames = decode_frames
        self._num_asked = self._num_decoded = 0
        self._saving, self._waits = saving, saving is not None and quiet is not None
        self._worker = worker
        self._num_again, self._num_given = len(start.rest), 0
        self._num_samples = num_samples
        if num_samples is not None:
            self._num_samples = num_samples + self._num_again
        self._heard: deque[np.ndarray] = deque()
        self._user = user
        encoded = self._hearing(user.listen(more=more_takes))
        self._user_codes: list[np.ndarray] = []
        self._decoder = Decoder(self._codec.make_state(start.decoder))
        self._alike = alike
        self._decoding: _Decoding | None = None
        self._pieces: list[Answer] = []
        columns = self._user_columns(encoded, self._user_codes.append)
        self.columns = self._opened(self._asked(columns))

    @property
    def needs_last(self) -> bool:
        """Whether what comes next depends on the agent's last column."""
        return self._waits or super().needs_last

    @property
    def _is_over(self) -> bool:
        """Whether the agent has been quiet for long enough."""
        return self._quiet is not None and self._quiet.end is not None

    @property
    def is_complete(self) -> bool:
        """Whether every frame that there will be has its column."""
        is_last = self._is_over or self._num_pushed == self.num_frames
        return is_last and self._num_pushed == self._num_asked

    def _asked(self, columns: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        while not self._is_over and (column := next(columns, None)) is not None:
            self.is_to_save = self._wants_row and self._is_at(self._num_asked)
            self._num_asked += 1
            yield column
        self.is_to_save = self._wants_row

    @property
    def _wants_row(self) -> bool:
        """Whether it is to be saved, and its row was not yet."""
        return self._saving is not None and not self._saving.has("row")

    def _is_at(self, frame: int) -> bool:
        """Whether it is known that it is to be saved before ``frame``."""
        return self._saving is not None and self._saving.at == frame

    def save_row(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what ``Rows.save`` gives, which was wanted."""
        assert self._saving is not None
        self.is_to_save = False
        self._saving.add("row", arrays)
        self._save_decoder()

    def _save_decoder(self) -> None:
        """Save the agent's side if it has come so far, with all frames decoded."""
        saving = self._saving
        if saving is None or not self._is_at(self._num_pushed):
            return
        if not saving.has("decoder"):
            if self._num_said:
                self._decode()
            self._take_decoded()
            saving.add("decoder", self._codec.save(self._decoder.state))

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame; after enough of them, decode."""
        super().push(column, seconds)
        if self._is_over:
            return
        if self._num_said >= self._decode_frames or self.is_complete:
            self._decode()
        self._save_decoder()
        if self._quiet is not None and self._quiet.may_end(len(self.timings.steps)):
            if self._num_said:
                self._decode()
            self._take_decoded()
        if self._saving is not None and self._wants_row:
            if self._is_over:
                self._saving.at = self._num_pushed
            self.is_to_save = self._is_at(self._num_pushed)

    def pieces(self) -> Iterator[Answer]:
        """The stretches that are there and were not taken yet."""
        while self._pieces:
            yield self._pieces.pop(0)

    @property
    def is_decoded(self) -> bool:
        """Whether nothing that has begun must be waited for."""
        return self._decoding is None or self._decoding.call.done()

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
        if self._saving is not None:
            if self._saving.at is None:
                self._saving.at = self._num_pushed
            self._save_decoder()
            self._user.save()
            for part, arrays in self._user.saved.items():
                self._saving.add(part, arrays)

    def _decode(self) -> None:
        """Begin to decode the frames that have come since."""
        self._take_decoded()
        if self._is_over:
            return
        frames = self._frames()
        self._said = self._said[frames.shape[1] :]
        text, agent = frames[0], frames[1:]
        start = time.perf_counter()
        if self._alike is None:
            call = begin(self._worker, self._decode_alone, agent)
        else:
            call = self._alike.decode(agent, self._decoder, self._worker)
        self.timings.decode_s += time.perf_counter() - start  # without a worker, all
        user = self._take_user_codes(len(text))
        self._decoding = _Decoding(call, text, agent, user)
        if self._worker is None:
            self._take_decoded()

    def _decode_alone(self, codes: np.ndarray) -> _Decoded:
        return self._codec.decode(codes, self._decoder.state), self._decoder

    def _take_decoded(self) -> None:
        """Wait for what is under way."""
        if self._decoding is None:
            return
        done, self._decoding = self._decoding, None
        start = time.perf_counter()
        pcm, self._decoder = done.call.result()
        self.timings.decode_s += time.perf_counter() - start
        count = len(done.text)
        if self._quiet is not None:
            self._quiet.hear(done.text, pcm)
            if self._quiet.end is not None:
                count = self._quiet.end - self._num_decoded
                pcm = pcm[: len(pcm) // len(done.text) * count]
        self._num_decoded += count
        pcm, heard = self._counting(pcm)
        # A frame that is heard again, with what it lacked, was answered.
        again, first = self._num_again, min(1, self._num_again)
        self._num_again = 0
        text, agent, user = (
            a[..., first:count] for a in (done.text, done.agent, done.user)
        )
        piece = Answer(pcm[again:], text, agent, user, self.timings, heard[again:])
        self._pieces.append(piece)

    def _hearing(
        self, coded: Iterator[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[np.ndarray]:
        """The codes; the sound is kept until it is given away beside the agent's."""
        for pcm, codes in coded:
            self._heard.append(pcm)
            yield codes

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
        user: UserSide,
        keep: Callable[[np.ndarray], object],
        script: Script,
        saving: Saving | None = None,
    ) -> None:
        """``user`` comes by frames; ``keep`` gets the codes of each.

        It is saved where ``saving`` says, which may be before what was made ahead.
        """
        super().__init__(engine.config.lm, start, seed, None, script)
        self._codec, self._user, self._saving = engine.codec, user, saving
        self._decoder = self._codec.make_state(start.decoder)
        # The decoder as it was, and the codes (codebooks, 1) that came since.
        kept = {} if saving is None else self._codec.save(self._decoder)
        self._kept: tuple[dict[str, np.ndarray], list[np.ndarray]] = kept, []
        self._num_heard = self._num_replied = self._num_made = 0
        # The last columns of either side.
        last = start.prompt.columns[:, -1]
        self._made = deque([last[: self._config.num_agent_streams]], maxlen=2)
        self._read = deque([last[user_rows(self._config)]], maxlen=2)
        coded = (codes for _, codes in user.listen())
        columns = self._noted(self._user_columns(coded, keep))
        self.columns = self._opened(columns, live=True)

    def _noted(self, columns: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for column in columns:
            self._read.append(column)
            if self._saving is not None and self._saving.at == self._num_heard:
                self.is_to_save = True
            self._num_heard += 1
            yield column
        self._save_here()

    def _save_here(self) -> None:
        """Let it be saved after what was heard, if it is to be, and was not yet."""
        if self._saving is not None and not self._saving.arrays:
            self._saving.at = self._num_heard
            self.is_to_save = True

    def end(self) -> None:
        """Hear no more than what was replied to."""
        if self._saving is not None and self._num_heard < self._num_replied:
            next(self.columns, None)
        self._save_here()
        self.columns = iter(())

    def push(self, column: np.ndarray, seconds: float) -> None:
        """Add the agent's column of a frame, or one that comes before the first."""
        super().push(column, seconds)
        self._made.append(column)
        self._num_made += 1

    def reply(self) -> Answer | None:
        """The reply to the next frame, without that; None where it must come first."""
        if not self._num_said:
            return None
        frames = self._frames()
        self._said = self._said[1:]
        start = time.perf_counter()
        if self._saving is not None:
            if len(self._kept[1]) == _KEPT_FRAMES:
                self._kept = self._codec.save(self._decoder), []
            self._kept[1].append(frames[1:])
        pcm = self._codec.decode(frames[1:], self._decoder)
        self._num_replied += 1
        self.timings.decode_s += time.perf_counter() - start
        return Answer(pcm, frames[0], frames[1:], frames[1:, :0], self.timings)

    @property
    def steps_ahead(self) -> int:
        """How many steps its row has made after where it is saved."""
        assert self._saving is not None and self._saving.at is not None
        return 0 if self._config.is_moshi else self._num_made - self._saving.at

    def save_row(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what ``Rows.save`` gives, which was wanted."""
        saving, ahead = self._saving, self.steps_ahead
        assert saving is not None and saving.at is not None
        self.is_to_save = False
        if not self._config.is_moshi:
            # The user's part of a column is given when it is read.
            read = self._read[-1 - (self._num_heard - saving.at)]
            arrays["column"] = np.concatenate([self._made[-1 - ahead], read])
            if not saving.at:
                pending = self.start.prompt.pending
                arrays["given"] = pending[: self._config.num_agent_streams]
        saving.add("row", arrays)
        before, codes = self._kept
        decoder = self._codec.make_state(before)
        for frame in codes[: len(codes) - (self._num_replied - saving.at)]:
            self._codec.decode(frame, decoder)
        saving.add("decoder", self._codec.save(decoder))
        self._user.save()
        for part, saved in self._user.saved.items():
            saving.add(part, saved)


class RecordedSide(UserSide):
    """The user's side in a recording of many; ``fault``: why it could not be read on.

    Silence takes the place of what can no longer be read: the others in the batch are
    not to end with this one.
    """

    fault = ""

    def __init__(
        self,
        engine: Engine,
        start: Start,
        chunks: Iterator[np.ndarray],
        num_frames: int,
        worker: Executor | None,
        saving: Saving | None,
    ) -> None:
        """``chunks`` have ``num_frames`` in all."""
        size = engine.codec.chunk_frames, engine.config.frame_size
        readable = self._readable(chunks, num_frames, *size)
        super().__init__(engine, start, readable, worker=worker, saving=saving)
        self.alike = Alike(engine.codec)

    def _readable(
        self, chunks: Iterator[np.ndarray], num_frames: int, size: int, frame_size: int
    ) -> Iterator[np.ndarray]:
        done = 0
        try:
            for chunk in chunks:
                done += len(chunk)
                yield chunk
        except PplexError as e:
            self.fault = str(e)
            for first in range(done, num_frames, size):
                count = min(size, num_frames - first)
                yield np.zeros((count, frame_size), np.float32)


class RecordingTrack(StreamedTrack):
    """One recording of many, coded chunk by chunk."""

    side: RecordedSide

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        worker: Executor | None,
        before: RecordingTrack | None = None,
    ) -> None:
        """If the one ``before`` is another take of the recording, its codes are used.

        But not where each is saved at an end of its own.
        """
        self.conversation, size = conversation, engine.codec.chunk_frames
        sound, start = conversation.sound, conversation.start
        quiet = None
        if conversation.until_quiet:
            quiet = Quiet(engine.config, last_cue(conversation.script))
        saving = Saving() if conversation.saves else None
        chunks, num_frames = cut(sound, start, engine.config, size, quiet, saving)
        self._kept = Kept(engine.config.frame_size)
        worker = None if saving is not None and quiet is not None else worker
        is_take = conversation.more_takes
        if before is not None and before.is_take_of(sound, start):
            self.side, is_take = before.side, True
        else:
            self.side = RecordedSide(engine, start, chunks, num_frames, worker, saving)
        super().__init__(
            engine,
            start,
            conversation.seed,
            self.side,
            size,
            worker,
            num_frames,
            quiet,
            sound.num_samples,
            conversation.script,
            saving,
            conversation.more_takes,
            self.side.alike if is_take else None,
        )

    def is_take_of(self, sound: Sound, start: Start) -> bool:
        """Whether another conversation with ``sound`` hears what this one does."""
        own = self.conversation
        return own.sound is sound and own.start is start and not self._waits

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
        saved = self._saving.arrays if self._saving else None
        return replace(answer, fault=self.side.fault, saved=saved)
