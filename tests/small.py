"""A small model with random weights, and conversations with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from pplex.audio.files import Samples
from pplex.audio.streams import LiveFrame
from pplex.bench.random_model import TINY
from pplex.conversation.answer import Answer
from pplex.conversation.scheduler import converse as run
from pplex.conversation.scheduler import converse_live as run_live
from pplex.conversation.scheduler import converse_many
from pplex.conversation.state import start_from
from pplex.conversation.tracks import Conversation
from pplex.engine.base import Engine, Start
from pplex.engine.mlx.engine import MlxEngine
from pplex.model.sampling import GREEDY, SamplingConfig

FRAME = 1920
# Published checkpoints hold depformer steps that no conversation runs; so has this.
SMALL = replace(TINY, lm=replace(TINY.lm, dep_q=16))


class SharedSteps(MlxEngine):
    """MLX's engine on a CPU with rows that share each step, as on GPUs."""

    gpu_rows = 8

    def __init__(self, *tensors) -> None:
        super().__init__(*tensors, on_gpu=False)
        self._num_rows = self.gpu_rows


def speech(frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((frames, FRAME)).astype(np.float32)


def converse(engine, start, frames, sampling=GREEDY, seed=0, chunk=16):
    """Tokens (agent streams, frames), the user's codes and PCM of a conversation."""
    chunks = (frames[i : i + chunk] for i in range(0, len(frames), chunk))
    pieces = run(engine, start, seed, chunks, sampling, decode_frames=chunk)
    replies = list(pieces)
    return (
        np.concatenate([np.concatenate([r.text[None], r.agent]) for r in replies], 1),
        np.concatenate([r.user for r in replies], 1),
        np.concatenate([r.pcm for r in replies]),
    )


def live_frames(frames: Iterable[np.ndarray]) -> Iterator[LiveFrame]:
    """Frames (frame_size,) as a stream has them."""
    return (LiveFrame(frame, FRAME, None) for frame in frames)


def converse_live(engine, start, frames, sampling=GREEDY, seed=0) -> list[Answer]:
    """The replies to frames (frame_size,) one by one, with the codes of each frame."""
    codes: list[np.ndarray] = []
    coming = live_frames(frames)
    replies = run_live(engine, start, seed, coming, sampling, keep=codes.append)
    said = [reply for _, reply in replies]
    return [replace(one, user=user) for one, user in zip(said, codes, strict=True)]


def check_live(engine: Engine, start: Start, frames: int) -> None:
    """That the replies to a stream are those to a recording, to the bit."""
    pcm, drawn = speech(frames, 2), SamplingConfig(top_k=20, text_top_k=10)
    whole = converse(engine, start, pcm, drawn, chunk=engine.codec.chunk_frames)
    said = converse_live(engine, start, pcm, drawn)
    found = (
        np.concatenate([np.concatenate([r.text[None], r.agent]) for r in said], 1),
        np.concatenate([r.user for r in said], 1),
        np.concatenate([r.pcm for r in said]),
    )
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def check_saved_rows(engine: Engine, start: Start, frames: int, points: int) -> None:
    """That rows go on from random points of a run as that run did, side by side.

    Each is saved there without a trace, and its tokens are drawn.
    """
    lm, rng = engine.config.lm, np.random.default_rng(3)
    user = rng.integers(0, lm.card, (frames, lm.num_codebooks)).astype(np.int32)
    sampling = SamplingConfig(top_k=20, text_top_k=10)
    at = sorted(rng.choice(frames, points, replace=False).tolist())
    saved = []

    def run(stops: list[int]) -> np.ndarray:
        rows = engine.rows(1, sampling)
        place = rows.join(start, 5)
        columns = []
        for frame, tokens in enumerate(user):
            if frame in stops:
                saved.append(rows.save(place))
            columns.append(rows.step(tokens[None]))
        return np.stack([column.tokens()[place] for column in columns])

    whole = run([])
    np.testing.assert_array_equal(run(at), whole)
    rows = engine.rows(points, sampling)
    places = [rows.join(engine.restore(one), 5) for one in saved]
    for step in range(frames):
        seated = [(p, a + step) for p, a in zip(places, at, strict=True) if p >= 0]
        for place, frame in seated:
            if frame == frames:
                rows.leave(place)
                places[places.index(place)] = -1
        seated = [(place, frame) for place, frame in seated if frame < frames]
        if not seated:
            break
        tokens = np.zeros((points, lm.num_codebooks), np.int32)
        for place, frame in seated:
            tokens[place] = user[frame]
        found = rows.step(tokens).tokens()
        for place, frame in seated:
            np.testing.assert_array_equal(found[place], whole[frame], f"{at}, {frame}")


def check_saved_conversations(
    engine: Engine, start: Start, frames: int, count: int = 12
) -> None:
    """That answering a recording in two parts is answering it whole, to the byte.

    It is cut at ``count`` random places, of which every second is between two frames.
    There Moshi, which hears a frame before it answers it, may answer the first part's
    last otherwise.
    """
    sampling = SamplingConfig(top_k=20, text_top_k=10)
    pcm = speech(frames, 1).reshape(-1)[: 500 - FRAME]
    places = np.arange(1, frames - 1)
    cuts = FRAME * np.random.default_rng(4).choice(places, count, replace=False)
    cuts[1::2] += 500

    def answer(parts: list[tuple[np.ndarray, Start]], saves: bool) -> list[Answer]:
        those = [
            Conversation(f"{idx:02}", Samples(part), start, 5, saves=saves)
            for idx, (part, start) in enumerate(parts)
        ]
        said = converse_many(engine, those, sampling, batch_size=len(those))
        return [answer for _, answer in sorted(said, key=lambda pair: pair[0].key)]

    (whole,) = answer([(pcm, start)], False)
    first = answer([(pcm[:cut], start) for cut in cuts], True)
    starts = [start_from(engine, one.saved or {}) for one in first]
    second = answer(
        [(pcm[cut:], s) for cut, s in zip(cuts, starts, strict=True)], False
    )
    for cut, one, other in zip(cuts, first, second, strict=True):
        for name in ("pcm", "text", "agent"):
            parts = [getattr(one, name), getattr(other, name)]
            expected = getattr(whole, name)
            if engine.config.lm.is_moshi and cut % FRAME:
                parts[0] = expected[..., : -parts[1].shape[-1]]
            found = np.concatenate(parts, axis=-1)
            np.testing.assert_array_equal(found, expected, f"{name} {cut}")


def encode_many(codec, recordings) -> list[np.ndarray]:
    """Codes (codebooks, frames) of PCM (frames, frame_size), by groups."""
    return _by_groups(codec, codec.encode_next, recordings, 0, 1)


def decode_many(codec, recordings) -> list[np.ndarray]:
    """PCM (samples,) of codes (codebooks, frames), by groups."""
    return _by_groups(codec, codec.decode_next, recordings, 1, 0)


def _by_groups(codec, code_next, recordings, axis: int, made: int):
    found = []
    for first in range(0, len(recordings), codec.group):
        group = recordings[first : first + codec.group]
        state, size = codec.make_state(), codec.chunk_frames
        longest = max(one.shape[axis] for one in group)
        chunks = []
        for start in range(0, longest, size):
            stretch = (slice(None),) * axis + (slice(start, start + size),)
            chunks.append(code_next([one[stretch] for one in group], state)())
        found += [np.concatenate(row, axis=made) for row in zip(*chunks, strict=True)]
    return found
