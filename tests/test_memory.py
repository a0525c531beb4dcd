"""What is held while recordings are answered, by the way of GPUs, here on a CPU."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small import SMALL, SharedSteps, encode_many, live_frames, speech

from pplex.audio.files import Samples
from pplex.batch.decoding import Decoder, Job, Size
from pplex.bench.random_model import random_codec, random_lm, random_prompt
from pplex.conversation.scheduler import converse, converse_live
from pplex.conversation.session import warm_up
from pplex.engine import device
from pplex.engine.choose import KINDS, batch_size, need_bytes
from pplex.engine.mlx.codec import MlxCodec, frames_within, work_bytes
from pplex.engine.mlx.engine import MlxEngine
from pplex.model.config import ModelConfig
from pplex.model.mimi import make_mimi
from pplex.model.sampling import GREEDY, SamplingConfig

PUBLISHED = ModelConfig()


def make_engine(kind=MlxEngine, **how) -> MlxEngine:
    return kind(SMALL, random_lm(SMALL.lm, 16), random_codec(SMALL.mimi), **how)


def test_a_chunk_takes_no_more_memory_than_is_counted_for_it():
    mimi = make_mimi(PUBLISHED.mimi, random_codec(PUBLISHED.mimi))
    codec = MlxCodec(mimi, on_gpu=True, frames=1)
    recordings = [speech(2, seed) for seed in range(16)]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    encode_many(codec, recordings)
    peak = mx.get_peak_memory() - before
    assert 0.6 < peak / work_bytes(PUBLISHED.mimi, 1) < 1.0


def test_on_a_mac_the_codec_takes_less_than_a_gigabyte_which_rows_are_left():
    cost = KINDS["gpu"].cost(PUBLISHED, random_lm(PUBLISHED.lm, 4))
    frames = frames_within(PUBLISHED.mimi, 1e9)
    assert cost.codec_work == work_bytes(PUBLISHED.mimi, frames) < 1e9
    assert work_bytes(PUBLISHED.mimi, 2 * frames) > 1e9
    row = 1000 * cost.position
    free = cost.codec_work / 0.9 + 10.01 * row / 0.9
    assert KINDS["gpu"].max_rows(cost, row, free) == 10


@pytest.mark.parametrize("total_gb", [8, 16, 24, 36, 64])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_no_mac_is_given_more_rows_than_its_working_set_holds(
    monkeypatch, total_gb, bits
):
    for name, kind in KINDS.items():
        found = replace(kind, is_available=lambda is_it=name == "gpu": is_it)
        monkeypatch.setitem(KINDS, name, found)
    cost = KINDS["gpu"].cost(PUBLISHED, random_lm(PUBLISHED.lm, bits))
    held = 1e9 * total_gb * (2 / 3 if total_gb <= 36 else 3 / 4)
    for frames in (125, 750, 5000):
        rows = batch_size(PUBLISHED, cost, frames, held - cost.held, prompt_frames=250)
        need = need_bytes(PUBLISHED, cost, frames + 250, rows)
        assert need <= held or rows == 1


def test_a_group_whose_memory_does_not_suffice_is_coded_in_shorter_chunks(monkeypatch):
    mimi = make_mimi(SMALL.mimi, random_codec(SMALL.mimi))
    codec, small = (MlxCodec(mimi, on_gpu=True, frames=n) for n in (16, 4))
    encode = mimi.encode

    def scarce(pcm, state):
        if pcm.shape[1] > 4 * 1920:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
        return encode(pcm, state)

    monkeypatch.setattr(type(mimi), "encode", lambda _, *given: scarce(*given))
    recordings = [speech(frames, frames) for frames in (19, 3)]
    expected = encode_many(small, recordings)
    for found, codes in zip(encode_many(codec, recordings), expected, strict=True):
        np.testing.assert_array_equal(found, codes)
    assert codec.chunk_frames == 4
    assert (codec.form, small.form) == (", codec by 4 frames", "")


def test_it_is_said_that_the_codecs_chunks_became_shorter(small_model, monkeypatch):
    notes: list[str] = []
    decoder = Decoder(small_model, GREEDY, Size(1, 9, 1, 9), notes.append)
    codec, voice = small_model.engine.codec, next(iter(small_model.voices))
    before = codec.chunk_frames
    monkeypatch.setattr(codec, "chunk_frames", before // 2)
    job = Job("a", Samples(speech(3).reshape(-1)), voice, "Hi.", 0)
    list(decoder.run(iter([job])))
    assert any(f"chunks of {before} frames become" in note for note in notes)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_keys_and_values_have_their_place_from_the_start(rows, live):
    kind = MlxEngine if rows == 1 else SharedSteps
    engine = make_engine(kind, **({"on_gpu": False} if rows == 1 else {}))
    start = engine.prefill(random_prompt(SMALL))
    places = engine.rows(rows, GREEDY, live=live)
    places.join(start, 0, 9)
    cache = places._cache if rows == 1 else places._cache.save(0)
    size = SMALL.lm.window if live else start.prompt.num_frames - 1 + 9
    for _ in range(9):
        assert {array.shape[2] for array in cache.arrays()} == {size}
        places.step(np.zeros((rows, SMALL.lm.num_codebooks), np.int32)).tokens()
    assert {array.shape[2] for array in cache.arrays()} == {size}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_talk_may_move_from_thread_to_thread(on_gpu):
    engine = make_engine(on_gpu=on_gpu, alone=on_gpu)
    start, frames = engine.prefill(random_prompt(SMALL)), speech(4)

    def talk():
        coming = live_frames(frames)
        return converse_live(engine, start, 0, coming, SamplingConfig())

    expected, moving = [reply.pcm for _, reply in talk()], talk()
    found = []
    for _ in frames:
        thread = threading.Thread(target=lambda: found.append(next(moving)[1].pcm))
        thread.start()
        thread.join()
    np.testing.assert_array_equal(found, expected)


def test_frames_are_compiled_once_before_the_first_is_answered():
    class Counting(SharedSteps):
        made = 0
        is_async = True

        def make_frame(self, sampler):
            self.made += 1
            frame, self.kinds = super().make_frame(sampler), []
            return lambda x, given: self.kinds.append(set(given)) or frame(x, given)

    engine = make_engine(Counting)
    start = engine.prefill(random_prompt(SMALL))
    assert warm_up(engine, start, GREEDY) is None
    known = list(engine.kinds)
    chunks = [speech(1)] * 3
    list(converse(engine, start, 0, chunks, GREEDY, decode_frames=1))
    assert engine.made == 1
    assert all(kind in known for kind in engine.kinds[len(known) :])


def test_on_a_mac_mlx_keeps_little_for_later_and_weights_stay(monkeypatch):
    asked = {}
    info = {"max_recommended_working_set_size": 11 << 30}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: info)
    for name in ("set_cache_limit", "set_wired_limit"):
        note = functools.partial(asked.__setitem__, name)
        monkeypatch.setattr(mx, name, note)
    device.bound_memory(5)
    assert asked == {"set_cache_limit": 5, "set_wired_limit": 11 << 30}


@pytest.mark.parametrize(
    ("platform", "value"), [("darwin", "0"), ("linux", None), ("darwin", "1")]
)
def test_float32_stays_float32_on_a_mac_unless_asked_otherwise(platform, value):
    given = f"os.environ['MLX_ENABLE_TF32'] = '{value}'; " if value == "1" else ""
    code = (
        f"import os, sys; os.environ.pop('MLX_ENABLE_TF32', None); {given}"
        f"sys.platform = '{platform}'; import pplex; assert 'mlx' not in sys.modules; "
        "print(os.environ.get('MLX_ENABLE_TF32'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(value), done.stderr
