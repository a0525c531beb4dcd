"""Answers that do not depend on company, by the way of GPUs, here on a CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small import SMALL, SharedSteps, converse, speech

from pplex.audio.files import Samples
from pplex.bench.random_model import random_codec, random_lm, random_prompt
from pplex.conversation.scheduler import converse_many
from pplex.conversation.tracks import Conversation
from pplex.engine.mlx.codec import MlxCodec
from pplex.model.mimi import make_mimi
from pplex.model.sampling import SamplingConfig

PARTS = "pcm", "text", "agent", "user"


@pytest.fixture(scope="module")
def engine():
    """Rows that share each step, and a codec that works on groups."""
    codec = random_codec(SMALL.mimi)
    engine = SharedSteps(SMALL, random_lm(SMALL.lm, 4), codec)
    engine.codec = codec_of_groups()
    return engine


@pytest.fixture(scope="module")
def launcher():
    """The thread of what the codec does beside the steps."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def codec_of_groups(**options) -> MlxCodec:
    mimi = make_mimi(SMALL.mimi, random_codec(SMALL.mimi))
    return MlxCodec(mimi, on_gpu=True, frames=8, **options)


@pytest.fixture(scope="module")
def recordings(engine):
    prompts = [random_prompt(SMALL)] * 2
    starts = [engine.prefill(prompt) for prompt in prompts]
    lengths = 8, 13, 2, 24, 5, 17, 8, 10, 6, 12
    return [
        Conversation(
            str(idx), Samples(speech(frames, idx).reshape(-1)), starts[idx % 2], idx
        )
        for idx, frames in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def alone(engine, recordings):
    """Each answered as if there were no other."""
    return {
        one.key: answer
        for some in recordings
        for one, answer in converse_many(engine, [some], SamplingConfig(), batch_size=1)
    }


@pytest.mark.parametrize(
    ("size", "order"), [(2, 1), (3, -1), (SharedSteps.gpu_rows, 1), (10, -1)]
)
def test_a_batch_of_any_size_in_any_order_says_the_same(
    engine, recordings, alone, size, order, monkeypatch, launcher
):
    if order == -1:
        monkeypatch.setattr(engine, "codec", codec_of_groups(launcher=launcher))
    found = dict.fromkeys(alone)
    for one, answer in converse_many(
        engine, recordings[::order], SamplingConfig(), batch_size=size
    ):
        found[one.key] = answer
    for key, answer in found.items():
        for part in PARTS:
            expected = getattr(alone[key], part)
            np.testing.assert_array_equal(getattr(answer, part), expected)


def test_one_recording_by_itself_says_the_same(engine, recordings, alone):
    start, frames = recordings[3].start, speech(24, 3)
    tokens, user, pcm = converse(engine, start, frames, SamplingConfig(), 3, chunk=8)
    answer = alone["3"]
    np.testing.assert_array_equal(
        tokens, np.concatenate([answer.text[None], answer.agent])
    )
    np.testing.assert_array_equal(user, answer.user)
    np.testing.assert_array_equal(pcm, answer.pcm)
