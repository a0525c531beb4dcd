"""The one loop: join, step, leave, for a stream, a recording, or many at once.

A place is taken by the next recording as soon as the one before has no more to say.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from pplex.audio.streams import LiveFrame
from pplex.conversation.answer import Answer
from pplex.conversation.groups import (
    Decoding,
    GroupedTrack,
    decode_group,
    encode_group,
)
from pplex.conversation.quiet import Quiet
from pplex.conversation.script import Script
from pplex.conversation.state import Saving
from pplex.conversation.tracks import (
    Conversation,
    LiveTrack,
    RecordingTrack,
    StreamedTrack,
    Track,
    UserSide,
)
from pplex.conversation.worker import GroupWorker, codec_worker, group_worker
from pplex.engine.base import Engine, Pending, Start
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import NOT_FORCED

# Steps that a recording which may have ended waits for others to be decoded with it.
_MOST_WAITED = 8

AnyTrack = TypeVar("AnyTrack", bound=Track)
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Step(Generic[AnyTrack]):
    """A step that has begun, and who has which place in it."""

    pending: Pending
    seated: list[tuple[int, AnyTrack]]

    def finish(self, start: float) -> list[AnyTrack]:
        """Wait for it, give each track its column; the tracks."""
        tokens = self.pending.tokens()
        share = (time.perf_counter() - start) / len(self.seated)
        for place, track in self.seated:
            track.push(tokens[place], share)
        return [track for _, track in self.seated]


def run(
    engine: Engine,
    tracks: Iterable[AnyTrack],
    sampling: SamplingConfig,
    *,
    capacity: int,
    live: bool = False,
) -> Iterator[list[AnyTrack]]:
    """Step ``tracks`` to their ends, at most ``capacity`` at a time.

    Yields after each step the tracks that it gave a column. The next step is already
    under way then, where the engine can do that and no track needs the last one's
    tokens for it; but not with ``live``.
    """
    rows = engine.rows(capacity, sampling, live=live)
    coming = iter(tracks)
    seated: dict[int, AnyTrack] = {}
    user = np.zeros((capacity, engine.config.lm.num_codebooks), np.int32)
    text = np.full(capacity, NOT_FORCED, np.int32)
    waiting: _Step[AnyTrack] | None = None

    def save(those: Iterable[tuple[int, AnyTrack]]) -> None:
        for place, track in those:
            if track.is_to_save:
                track.save_row(rows.save(place, track.steps_ahead))

    def finish(step: _Step[AnyTrack]) -> list[AnyTrack]:
        stepped = step.finish(start)
        save(step.seated)
        return stepped

    while True:
        if waiting is not None and any(track.needs_last for track in seated.values()):
            start = time.perf_counter()
            yield finish(waiting)
            waiting = None
        for place, track in list(seated.items()):
            column = track.next_column()
            save([(place, track)])
            if column is None:
                rows.leave(place)
                del seated[place]
                text[place] = NOT_FORCED
            else:
                user[place], text[place] = column
        while len(seated) < capacity and (new := next(coming, None)) is not None:
            column = new.next_column()
            if column is not None:
                place = rows.join(new.start, new.seed, new.num_steps)
                seated[place] = new
                user[place], text[place] = column
                save([(place, new)])
        if not seated:
            break
        start = time.perf_counter()
        is_forced = bool((text != NOT_FORCED).any())
        pending = rows.step(user, text if is_forced else None)
        step = _Step(pending, list(seated.items()))
        if live or not engine.is_async:
            yield finish(step)
            continue
        before, waiting = waiting, step
        if before is not None:
            yield finish(before)
    if waiting is not None:
        yield waiting.finish(time.perf_counter())


def converse(
    engine: Engine,
    start: Start,
    seed: int,
    chunks: Iterable[np.ndarray],
    sampling: SamplingConfig,
    *,
    decode_frames: int,
    quiet: Quiet | None = None,
    num_samples: int | None = None,
    num_frames: int | None = None,
    script: Script = (),
    saving: Saving | None = None,
) -> Iterator[Answer]:
    """One conversation: a piece for each ``decode_frames`` frames, the last shorter.

    ``chunks`` are (frames, frame_size) PCM of the user. Where it ends before they do
    ``quiet`` says. Of the sound ``num_samples`` count, or all, and those of that tail.
    ``num_frames`` is how many the chunks have, None where nobody knows; ``script`` is
    what the agent is to say. It is saved where ``saving`` says.
    """
    in_step = saving is not None and quiet is not None
    with codec_worker(engine.codec, beside=0 if in_step else 1) as worker:
        user = UserSide(engine, start, chunks, worker=worker, saving=saving)
        track = StreamedTrack(
            engine,
            start,
            seed,
            user,
            decode_frames,
            worker,
            num_frames,
            quiet=quiet,
            num_samples=num_samples,
            script=script,
            saving=saving,
        )
        for _ in run(engine, [track], sampling, capacity=1):
            yield from track.pieces()
        yield from track.rest()


def converse_live(
    engine: Engine,
    start: Start,
    seed: int,
    frames: Iterable[LiveFrame],
    sampling: SamplingConfig,
    *,
    quiet: Quiet | None = None,
    keep: Callable[[np.ndarray], object] = lambda codes: None,
    made: Callable[[Answer], object] | None = None,
    script: Script = (),
    saving: Saving | None = None,
) -> Iterator[tuple[LiveFrame, Answer]]:
    """Each of ``frames`` with its reply, before the next one is asked for.

    The reply is there when its frame comes, if the model allows that: the step is made
    and decoded as soon as the frame before is encoded, of which ``keep`` gets the
    codes (codebooks, 1). ``made`` gets each reply as soon as it is there; a last one is
    to a frame that never comes. ``quiet`` may end it before the ``frames`` do; those
    that nobody said are its tail. ``script`` is what the agent is to say. It is saved
    where ``saving`` says. What ``start`` has left over, with which the first frame
    begins, was answered.
    """
    came, heard, answered = itertools.tee(frames, 3)
    again, size = len(start.rest), engine.config.frame_size
    is_known = again > 0

    def sounds() -> Iterator[np.ndarray]:
        for idx, frame in enumerate(heard):
            if saving is not None and frame.num_samples < size:
                saving.at, saving.num_rest = idx, frame.num_samples
            yield frame.pcm[None]

    def hear(codes: np.ndarray) -> None:
        nonlocal is_known
        if not is_known:
            keep(codes)
        is_known = False

    user = UserSide(engine, start, sounds(), saving=saving)
    track, count = LiveTrack(engine, start, seed, user, hear, script, saving), 0
    for _ in run(engine, [track], sampling, capacity=1, live=True):
        whole = track.reply()
        reply = whole if whole is None or not again else _without(whole, again)
        if reply is not None and made is not None:
            made(reply)
        if whole and reply and (frame := next(answered, None)) is not None:
            if quiet is not None:
                if frame.arrived is None:
                    quiet.begin(count)
                quiet.hear(whole.text, whole.pcm)
            if again:
                length = frame.num_samples - again
                frame = replace(frame, pcm=frame.pcm[again:], num_samples=length)
                again = 0
            yield frame, reply
            count += 1
            if quiet is not None and quiet.end is not None:
                track.end()
                continue
        next(came, None)  # whoever has to wait for it does so here


def _without(reply: Answer, count: int) -> Answer:
    """The reply to a frame without the first samples, and what was said in it."""
    text, agent = reply.text[1:], reply.agent[:, 1:]
    return replace(reply, pcm=reply.pcm[count:], text=text, agent=agent)


def converse_many(
    engine: Engine,
    conversations: Iterable[Conversation],
    sampling: SamplingConfig,
    *,
    batch_size: int,
) -> Iterator[tuple[Conversation, Answer]]:
    """Answer recordings, at most ``batch_size`` at a time, in the order they end.

    One more than there are places is asked for, whose codes are made before a place is
    free; or, where the codec works on many at a time, a group of them.
    """
    if engine.codec.group > 1:
        yield from _converse_grouped(engine, conversations, sampling, batch_size)
        return
    with codec_worker(engine.codec, beside=batch_size) as worker:
        tracks = _prepared(engine, conversations, worker)
        done: deque[RecordingTrack] = deque()
        for stepped in run(engine, tracks, sampling, capacity=batch_size):
            for track in stepped:
                track.write()
            done.extend(track for track in stepped if track.is_complete)
            # Where decoding cannot keep up it is waited for: nothing piles up.
            while done and (done[0].is_decoded or len(done) > batch_size):
                first = done.popleft()
                yield first.conversation, first.answer()
        for track in done:
            yield track.conversation, track.answer()


def _prepared(
    engine: Engine, conversations: Iterable[Conversation], worker: Executor | None
) -> Iterator[RecordingTrack]:
    """Tracks of recordings; with a ``worker`` the next begins to be encoded early."""
    coming = _tracks(engine, conversations, worker)
    return coming if worker is None else _one_later(coming)


def _tracks(
    engine: Engine, conversations: Iterable[Conversation], worker: Executor | None
) -> Iterator[RecordingTrack]:
    """Tracks of recordings; takes of one have its codes together."""
    before: RecordingTrack | None = None
    for one in conversations:
        track = RecordingTrack(engine, one, worker, before)
        before = track if one.more_takes else None
        yield track


def _converse_grouped(
    engine: Engine,
    conversations: Iterable[Conversation],
    sampling: SamplingConfig,
    batch_size: int,
) -> Iterator[tuple[Conversation, Answer]]:
    """``converse_many`` with the codec's work done in groups.

    Chunks of a group are encoded before they are needed, and those that began together
    are decoded as they go on. Where the end follows from the sound they are decoded
    whole when they may be done: some go on, and are decoded again. A few results a step
    are given away: what is done with them runs beside the step that the GPU makes
    meanwhile, and none wait for the last one.
    """
    with group_worker(engine.codec) as worker:
        yield from _grouped(engine, conversations, sampling, batch_size, worker)


def _grouped(
    engine: Engine,
    conversations: Iterable[Conversation],
    sampling: SamplingConfig,
    batch_size: int,
    worker: GroupWorker | None,
) -> Iterator[tuple[Conversation, Answer]]:
    codec, group = engine.codec, engine.codec.group
    done: list[GroupedTrack] = []
    decodings: list[Decoding] = []
    decoded: deque[tuple[Conversation, Answer]] = deque()

    def decode() -> None:
        decoded.extend(decode_group(codec, done[:group], worker))
        del done[:group]

    def groups() -> Iterator[list[GroupedTrack | RecordingTrack]]:
        coming = iter(conversations)
        while some := list(itertools.islice(coming, group)):
            together = [one for one in some if not one.is_streamed]
            apart = _tracks(engine, [one for one in some if one.is_streamed], None)
            yield [*encode_group(engine, together, worker), *apart]

    def tracks() -> Iterator[GroupedTrack | RecordingTrack]:
        for some in groups() if worker is None else _one_later(groups()):
            for track in some:
                if isinstance(track, GroupedTrack) and track.quiet is None:
                    if not decodings or not decodings[-1].add(track):
                        decodings.append(Decoding(codec, worker))
                        decodings[-1].add(track)
                if track is some[-1] and len(some) < group and decodings:
                    decodings[-1].close()  # nobody else will come
                yield track

    waited = 0
    for stepped in run(engine, tracks(), sampling, capacity=batch_size):
        for decoding in decodings:
            decoded.extend(decoding.go_on())
        decodings[:] = [one for one in decodings if not one.is_done]
        for track in stepped:
            if isinstance(track, GroupedTrack):
                if track.wants_sound and track not in done:
                    done.append(track)
                continue
            track.write()
            if track.is_complete:
                decoded.append((track.conversation, track.answer()))
        waited = 0 if all(track.is_complete for track in done) else waited + 1
        while len(done) >= group or waited > _MOST_WAITED:
            decode()
            waited = 0
        for _ in range(-(-len(decoded) // group)):
            yield decoded.popleft()
    if done:
        decode()
    while decodings:
        for decoding in decodings:
            decoded.extend(decoding.go_on(wait=decoding is decodings[0]))
        decodings[:] = [one for one in decodings if not one.is_done]
        yield from decoded
        decoded.clear()
    yield from decoded


def _one_later(items: Iterable[Item]) -> Iterator[Item]:
    """Each when the next is there, too."""
    coming = iter(items)
    ready = next(coming, None)
    while ready is not None:
        following = next(coming, None)
        yield ready
        ready = following
