"""The CUDA kernels against MLX's operations; skipped where there is no such GPU."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pplex.config import LmConfig
from pplex.layers.cache import KvCache, SlotCache
from pplex.layers.cuda.cache import SharedCache
from pplex.model.depformer import NOT_FORCED
from pplex.model.frame_kernel import FrameCache, FrameKernel
from pplex.model.lm import Lm
from pplex.model.sampling import GREEDY, Sampler, SamplingConfig, noise_key, noise_keys

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")

CONFIG = LmConfig(
    dim=256,
    num_heads=4,
    num_layers=3,
    hidden_dim=704,
    context=40,
    text_card=512,
    card=256,
    dep_q=8,
    depformer_dim=64,
    depformer_num_heads=2,
    depformer_num_layers=2,
    depformer_hidden_dim=192,
)
AGENT = CONFIG.num_agent_streams


def random_lm(bits: int, group: int = 64) -> Lm:
    mx.random.seed(0)
    lm = Lm(CONFIG)
    weights = [
        (
            name,
            mx.random.uniform(0.5, 1.5, a.shape)
            if "norm" in name
            else mx.random.normal(a.shape) / a.shape[-1] ** 0.5,
        )
        for name, a in tree_flatten(lm.parameters())
    ]
    lm.load_weights(weights)
    if bits < 16:
        nn.quantize(lm, group_size=group, bits=bits)
    return in_type(lm, bits, group, mx.bfloat16)


def in_type(lm: Lm, bits: int, group: int, dtype: mx.Dtype) -> Lm:
    """A copy of ``lm`` with everything but packed words and norms in ``dtype``."""
    other = Lm(CONFIG)
    if bits < 16:
        nn.quantize(other, group_size=group, bits=bits)
    other.load_weights(
        [
            (name, a if a.dtype == mx.uint32 or "norm" in name else a.astype(dtype))
            for name, a in tree_flatten(lm.parameters())
        ]
    )
    mx.eval(other.parameters())
    return other


def prompt_cache(lm: Lm, frames: int) -> KvCache:
    rng = np.random.default_rng(frames)
    tokens = rng.integers(0, CONFIG.card, (1, CONFIG.num_streams, frames))
    cache = lm.make_cache()
    lm.temporal(lm.embed(mx.array(tokens)), cache)
    mx.eval(cache.arrays())
    return cache


def logits_of(lm: Lm, cache: KvCache, tokens: mx.array, column: mx.array) -> list:
    """Logits of all heads after ``tokens``, with ``column`` forced."""
    hidden, text = lm.head(lm.temporal(lm.embed(tokens[None, :, None]), cache)[:, 0])
    found = [text]

    def sample(logits: mx.array, idx: int) -> mx.array:
        found.append(logits)
        return mx.argmax(logits, axis=-1)

    lm.depformer(hidden, column[None, 0], sample, column[None, 1:])
    return [np.array(logits[0].astype(mx.float32)) for logits in found]


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32), (16, 64)])
def test_frame_kernel_computes_what_float32_does(bits, group):
    lm = random_lm(bits, group)
    precise = in_type(lm, bits, group, mx.float32)
    cache, wanted = prompt_cache(lm, 7), prompt_cache(precise, 7)
    ring, kernel = FrameCache(cache), FrameKernel(lm)
    sampler = Sampler(SamplingConfig(), CONFIG.text_card, CONFIG.card, AGENT - 1)
    rng = np.random.default_rng(0)
    for frame in range(60):  # past the window of 39
        tokens = mx.array(rng.integers(-1, CONFIG.card, CONFIG.num_streams), mx.int32)
        given = mx.array(rng.integers(0, CONFIG.card, AGENT), mx.int32)
        key = noise_key((frame << 33) + 5, frame)
        drawn = frame % 2 == 1
        column, work = kernel.run(tokens, ring, sampler, key, None if drawn else given)
        found, work = np.array(column), np.array(work)
        text, codes = kernel.offsets["WORK_LOGITS"], kernel.offsets["WORK_DEP_LOGITS"]
        heads = [work[text : text + CONFIG.text_card]]
        heads += list(work[codes:][: (AGENT - 1) * CONFIG.card].reshape(AGENT - 1, -1))
        for head, expected in zip(
            heads, logits_of(precise, wanted, tokens, column), strict=True
        ):
            # Keys and values are bfloat16 in the kernel.
            error = np.abs(head - expected).max() / np.abs(expected).max()
            assert error < (0.1 if bits == 16 else 0.01)
        if drawn:
            keys = noise_keys([(frame << 33) + 5], [frame])
            again = [sampler.text(mx.array(heads[0])[None], keys).item()]
            again += [
                sampler.audio(mx.array(head)[None], keys, step).item()
                for step, head in enumerate(heads[1:])
            ]
            assert found.tolist() == again
        else:
            assert found.tolist() == np.array(given).tolist()


def test_choice_of_the_kernel_is_that_of_mlx(monkeypatch):
    sampler = Sampler(SamplingConfig(), 32000, 2048, 8)
    keys = noise_keys([3, 1 << 40, 7], [0, 1, 2])
    text, audio = mx.random.normal((3, 32000)), mx.random.normal((3, 2048))
    found = [sampler.text(text, keys).tolist(), sampler.audio(audio, keys, 5).tolist()]
    monkeypatch.setattr("pplex.model.sampling.use_cuda", lambda: False)
    noise = sampler.noise(keys)
    assert found[0] == sampler.text(text, noise).tolist()
    assert found[1] == sampler.audio(audio, noise, 5).tolist()


def test_shared_prompts_and_ring_attend_as_caches_of_their_own():
    rng = np.random.default_rng(0)
    prompts = []
    for length in (5, 120, 280):
        cache = KvCache(2, 299)
        for layer in range(2):
            shape = 1, 4, length, 128
            cache.update(
                layer,
                *(mx.array(rng.standard_normal(shape), mx.bfloat16) for _ in range(2)),
            )
        cache.advance(length)
        prompts.append(cache)
    shared, apart = SharedCache(prompts[0], 3), SlotCache(prompts[0], 3)
    for row, prompt in enumerate(prompts):
        shared.put(row, prompt)
        apart.put(row, prompt)
    for step in range(320):
        if step in (30, 290):
            shared.put(1, prompts[0])
            apart.put(1, prompts[0])
        masks = shared.mask(1), apart.mask(1)
        for layer in range(2):
            qkv = mx.array(rng.standard_normal((3, 12, 1, 128)), mx.bfloat16)
            found, expected = (
                np.array(ring.attend(layer, qkv, 10000.0, mask).astype(mx.float32))
                for ring, mask in zip((shared, apart), masks, strict=True)
            )
            assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
        shared.advance(1)
        apart.advance(1)


@pytest.mark.parametrize("compiled", [False, True])
def test_batch_kernels_compute_what_mlx_does(compiled, monkeypatch):
    from pplex.conversation.generate import make_frame

    lm = random_lm(16)
    x = mx.random.normal((4, CONFIG.dim)).astype(mx.bfloat16)
    given = mx.random.randint(0, CONFIG.card, (4, AGENT))
    given[:, 4] = NOT_FORCED
    sampler = Sampler(GREEDY, CONFIG.text_card, CONFIG.card, AGENT - 1)
    if not compiled:
        monkeypatch.setattr(mx, "compile", lambda function: function)
    found = make_frame(lm, sampler)(x, {"given": given})
    for module in ("depformer", "frame_kernel", "sampling"):
        monkeypatch.setattr(f"pplex.model.{module}.use_cuda", lambda: False)
    monkeypatch.setattr("pplex.layers.transformer.use_cuda", lambda: False)
    expected = make_frame(lm, sampler)(x, {"given": given})
    assert found.tolist() == expected.tolist()
