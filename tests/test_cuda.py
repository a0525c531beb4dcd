"""The CUDA kernels against MLX's operations; skipped where there is no such GPU."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import (
    check_live,
    check_saved_conversations,
    check_saved_rows,
    converse,
    speech,
)

from pplex.audio.files import Samples
from pplex.bench.random_model import (
    TINY,
    random_codec,
    random_model,
    random_prompt,
)
from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.weights import LmTensors
from pplex.conversation.scheduler import converse_many
from pplex.conversation.tracks import Conversation
from pplex.engine.cuda import depformer, frame
from pplex.engine.cuda.cache import SharedCache
from pplex.engine.cuda.codec import FusedSeanet, fuse
from pplex.engine.cuda.engine import CudaEngine
from pplex.engine.cuda.exchange import PinnedExchange
from pplex.engine.cuda.frame import FrameCache, FrameKernel
from pplex.engine.cuda.rows import (
    add_norm_rows,
    choose_text,
    gelu_rows,
    swiglu_rows,
)
from pplex.engine.mlx.exchange import Exchange
from pplex.engine.mlx.ring import CacheEach, FastCache
from pplex.model.cache import KvCache
from pplex.model.config import LmConfig, SeanetConfig
from pplex.model.lm import Lm
from pplex.model.mimi import make_mimi
from pplex.model.prompt import make_prompt
from pplex.model.sampling import Sampler, SamplingConfig, noise_key, noise_keys
from pplex.model.seanet import make_decoder, make_encoder
from pplex.model.streams import NOT_FORCED
from pplex.model.transformer import gelu

pytestmark = [
    pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("on_gpu"),
]

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
# Every id that a prompt or the codec knows has its row in the tables: a kernel reads
# what lies there, and beyond them that is whatever the memory had before.
CODEBOOKS = replace(TINY.mimi.quantizer, bins=CONFIG.card)
MODEL = replace(TINY, lm=CONFIG, mimi=replace(TINY.mimi, quantizer=CODEBOOKS))


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


def make_engine(
    lm: Lm, *, alone: bool = False, kv_bits: int | None = None
) -> CudaEngine:
    """The engine with the weights of ``lm``."""
    forms = {
        name: Quantization(module.bits, module.group_size)
        for name, module in lm.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    tensors = LmTensors(dict(tree_flatten(lm.parameters())), forms, "random", (16,))
    config = MODEL.with_kv_bits(kv_bits)
    return CudaEngine(config, tensors, random_codec(MODEL.mimi), alone=alone)


def write_out_tables(lm: Lm) -> None:
    """Replace quantized embeddings by what they stand for, rounded to bfloat16."""
    for owner in (lm, lm.depformer):
        for name in ("text_emb", "audio_emb"):
            table = owner[name]
            if not isinstance(table, nn.QuantizedEmbedding):
                continue
            weight = mx.dequantize(
                table.weight, table.scales, table.biases, table.group_size, table.bits
            )
            owner[name] = nn.Embedding(*weight.shape)
            owner[name].weight = weight.astype(mx.bfloat16).astype(mx.float32)


def prompt_cache(lm: Lm, frames: int, kv_bits: int | None) -> KvCache:
    rng = np.random.default_rng(frames)
    tokens = rng.integers(0, CONFIG.card, (1, CONFIG.num_streams, frames))
    kind = FastCache if kv_bits else RoundedCache
    cache = kind(CONFIG.num_layers, CONFIG.window, bits=kv_bits)
    lm.temporal(lm.embed(mx.array(tokens)), cache)
    mx.eval(cache.arrays())
    return cache


def rounded_sum(lm: Lm, tokens: mx.array) -> mx.array:
    """The sum (dim,) of the rows of ``tokens``, rounded as saved voices were made."""
    rows = [
        lm.audio_emb.weight[idx * (CONFIG.card + 1) + token] * (token >= 0)
        for idx, token in enumerate(tokens[1:])
    ]
    rows.append(lm.text_emb.weight[tokens[0]] * (tokens[0] >= 0))
    total = rows[0]
    for row in rows[1:]:
        total = (total + row).astype(mx.bfloat16).astype(mx.float32)
    return total


class RoundedCache(FastCache):  # products of matrices are in TF32 here
    """Keys and values as the kernel keeps them."""

    def update(
        self, layer: int, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        rounded = (a.astype(mx.bfloat16).astype(a.dtype) for a in (keys, values))
        return super().update(layer, *rounded)


def logits_of(lm: Lm, cache: KvCache, x: mx.array, column: mx.array) -> list:
    """Logits of all heads after the input ``x`` (dim,), with ``column`` forced."""
    hidden, text = lm.head(lm.temporal(x[None, None], cache)[:, 0])
    found = [text]

    def sample(logits: mx.array, idx: int) -> mx.array:
        found.append(logits)
        return mx.argmax(logits, axis=-1)

    lm.depformer(hidden, column[None, 0], sample, column[None, 1:])
    return [np.array(logits[0].astype(mx.float32)) for logits in found]


@pytest.mark.parametrize(
    ("bits", "group", "kv_bits"), [(4, 64, None), (8, 32, 8), (16, 64, None)]
)
def test_frame_kernel_computes_what_float32_does(bits, group, kv_bits):
    lm = random_lm(bits, group)
    precise = in_type(lm, bits, group, mx.float32)
    write_out_tables(precise)
    wanted = prompt_cache(precise, 7, kv_bits)
    assert frame.supports(lm)
    ring, kernel = FrameCache(wanted), FrameKernel(lm, kv_bits)
    sampler = Sampler(SamplingConfig(), CONFIG.text_card, CONFIG.card, AGENT - 1)
    rng = np.random.default_rng(0)
    errors = []
    for number in range(60):  # past the window of 39
        tokens = mx.array(rng.integers(-1, CONFIG.card, CONFIG.num_streams), mx.int32)
        given = mx.array(rng.integers(0, CONFIG.card, AGENT), mx.int32)
        key = noise_key((number << 33) + 5, number)
        user = tokens[AGENT:]
        drawn = number % 2 == 1
        column, work = kernel.run(
            tokens, user, ring, sampler, key, None if drawn else given
        )
        x = rounded_sum(precise, tokens)
        found, work = np.array(column)[:AGENT], np.array(work)
        assert column.tolist()[AGENT:] == user.tolist()
        text, codes = kernel.offsets["WORK_LOGITS"], kernel.offsets["WORK_DEP_LOGITS"]
        heads = [work[text : text + CONFIG.text_card]]
        heads += list(work[codes:][: (AGENT - 1) * CONFIG.card].reshape(AGENT - 1, -1))
        for head, expected in zip(
            heads, logits_of(precise, wanted, x, column[:AGENT]), strict=True
        ):
            errors.append(np.abs(head - expected).max() / np.abs(expected).max())
        if drawn:
            noise = sampler.noise(mx.array(noise_keys([(number << 33) + 5], [number])))
            again = [sampler.text(mx.array(heads[0])[None], noise).item()]
            again += [
                sampler.audio(mx.array(head)[None], noise, step).item()
                for step, head in enumerate(heads[1:])
            ]
            assert found.tolist() == again
        else:
            assert found.tolist() == np.array(given).tolist()
    # Keys and values that differ by 1e-6 are at times rounded to other neighbours: in
    # float32 that alone makes errors of 4e-3, half of them under 0.7e-3.
    assert max(errors) < 1e-2
    assert kv_bits or np.median(errors) < 2e-3


@pytest.mark.parametrize(
    ("card", "temp", "top_k"), [(2048, 0.8, 250), (32000, 0.7, 25)]
)
def test_choice_of_the_kernel_is_that_of_mlx(card, temp, top_k):
    rows = 64
    keys = mx.array(
        noise_keys([(row << 35) + 3 for row in range(rows)], list(range(rows)))
    )
    logits = mx.random.normal((rows, card)).astype(mx.bfloat16)
    sampler = Sampler(SamplingConfig(text_temp=temp, text_top_k=top_k), card, 64, 2)
    expected = sampler.text(logits, sampler.noise(keys)).tolist()
    user = mx.array([[5 + row, 1] for row in range(rows)])
    how = {"width": sampler.noise_width, "temp": temp, "top_k": top_k}
    column = choose_text(logits, user, keys, None, **how)
    assert column.tolist() == [
        [id, 0, 0, 5 + row, 1] for row, id in enumerate(expected)
    ]
    given = mx.array([[NOT_FORCED, 0, 0], [-1, 0, 0], [8, 0, 0]])
    column = choose_text(logits[:3], user[:3], keys[:3], given, **how)
    assert column[:, 0].tolist() == [expected[0], -1, 8]
    column = choose_text(logits, user, None, None, **how)
    assert column[:, 0].tolist() == mx.argmax(logits, axis=1).tolist()


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_shared_prompts_and_ring_attend_as_caches_of_their_own(kv_bits):
    rng = np.random.default_rng(0)
    prompts = []
    for length in (5, 120, 280):
        cache = KvCache(2, 299, bits=kv_bits)
        for layer in range(2):
            shape = 1, 4, length, 128
            cache.update(
                layer,
                *(mx.array(rng.standard_normal(shape), mx.bfloat16) for _ in range(2)),
            )
        cache.advance(length)
        cache.said = 0  # as after a prompt
        prompts.append(cache)
    shared, apart = SharedCache(prompts[0], 3, Exchange()), CacheEach(3)
    for row, prompt in enumerate(prompts):
        shared.put(row, prompt)
        apart.put(row, prompt)
    for step in range(320):
        for cache in (shared, apart):
            if step in (30, 290):
                cache.put(1, prompts[0])
            elif step == 200:
                cache.take([2, 0, 2])
            elif step == 210:
                cache.leave(2)
            elif step == 220:
                cache.put(2, prompts[1])
        taken = [0, 1] if 210 <= step < 220 else [0, 1, 2]
        masks = shared.mask(1), apart.mask(1)
        for layer in range(2):
            # Two rows are nobody's.
            qkv = mx.array(rng.standard_normal((1, 12, 5, 128)), mx.bfloat16)
            found, expected = (
                np.array(ring.attend(layer, qkv, 10000.0, mask).astype(mx.float32))
                for ring, mask in zip((shared, apart), masks, strict=True)
            )
            assert found.shape == expected.shape
            found, expected = found[:, :, taken], expected[:, :, taken]
            assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
        shared.advance(1)
        apart.advance(1)


# Rows of several tiles; widths that fill none of the kernel's tiles.
@pytest.mark.parametrize(("rows", "compiled"), [(4, False), (4, True), (150, False)])
def test_batch_kernels_compute_what_mlx_does(rows, compiled, monkeypatch):
    lm = random_lm(16)
    x = mx.random.normal((rows, CONFIG.dim)).astype(mx.bfloat16)
    given = mx.random.randint(0, CONFIG.card, (rows, AGENT))
    given[:, 4] = NOT_FORCED
    given[:, 7:] = NOT_FORCED
    user = mx.random.randint(0, CONFIG.card, (rows, CONFIG.num_codebooks))
    keys = mx.array(noise_keys(list(range(rows)), [3] * rows))
    sampler = Sampler(SamplingConfig(), CONFIG.text_card, CONFIG.card, AGENT - 1)
    assert depformer.supports(lm)
    if not compiled:
        monkeypatch.setattr(mx, "compile", lambda function: function)
    engine = make_engine(lm)
    by_kernels, specified = engine.make_frame(sampler), engine.plain_frame(sampler)
    assert engine._depformer_kernel is not None
    inputs = {"given": given, "user": user}, {"keys": keys, "user": user}
    found = [np.array(by_kernels(x, these)) for these in (*inputs, *inputs)]
    assert (found[0] == found[2]).all()
    assert (found[1] == found[3]).all()
    expected = [np.array(specified(x, these)) for these in inputs]
    # Roundings differ, and so a choice now and then; what is forced does not.
    assert (found[0][:, :4] == expected[0][:, :4]).all()
    assert (found[0] == expected[0]).mean() > 0.97
    # Of those drawn, rows in which all ids before are the same.
    for idx in range(AGENT):
        same = (found[1][:, :idx] == expected[1][:, :idx]).all(axis=1)
        assert (found[1] == expected[1])[same, idx].mean() > 0.9


def test_a_row_has_the_same_bits_in_the_depformers_kernel_for_any_number_of_rows():
    """Of sizes whose sums every kernel cuts into several pieces a share."""
    config = replace(CONFIG, depformer_dim=512, depformer_hidden_dim=1408)
    mx.random.seed(0)
    lm = Lm(config)
    parts = lm.depformer
    parts.apply(lambda a: mx.random.normal(a.shape) / a.shape[-1] ** 0.5)
    parts.set_dtype(mx.bfloat16)
    kernel = depformer.DepformerKernel(lm)
    sampler = Sampler(SamplingConfig(), config.text_card, config.card, AGENT - 1)
    rows = 150
    inputs = mx.random.normal((rows, config.num_codebooks * 512)).astype(mx.bfloat16)
    column = mx.random.randint(0, config.card, (rows, config.num_streams))
    keys = mx.array(noise_keys(list(range(rows)), [3] * rows))
    columns = [
        np.array(kernel(inputs[-n:], column[-n:], keys[-n:], None, sampler))
        for n in (rows, 1, 16, 17, 64, 65)
    ]
    for some in columns:
        np.testing.assert_array_equal(some, columns[0][-len(some) :])


@pytest.mark.parametrize("bits", [16, 4])
def test_embedded_columns_are_those_of_mlx(bits):
    engine = make_engine(random_lm(bits))
    tokens = mx.random.randint(-1, CONFIG.card, (2, CONFIG.num_streams, 3))
    found, expected = engine.inputs(tokens), engine.lm.embed(tokens)
    assert found.dtype == expected.dtype and found.tolist() == expected.tolist()
    inputs = engine.embed(np.array(tokens[0]))
    assert inputs.dtype == np.float32 and inputs.tolist() == expected[0].tolist()


@pytest.mark.parametrize("shape", [(1,), (3, 7), (16, 5, 1920), (1 << 20,)])
@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float32, np.int64, bool])
def test_what_goes_to_a_gpu_and_back_is_as_it_was(shape, dtype):
    exchange, rng = PinnedExchange(), np.random.default_rng(5)
    sent = [rng.integers(0, 2**30, shape).astype(dtype) for _ in range(5)]
    arrays = []
    for each in sent:  # the same memory for all, if it were free too soon
        mine = each.copy()
        arrays.append(exchange.send(mine))
        mine[:] = 0
    coming = [exchange.bring(array) for array in arrays]
    mx.async_eval([each.array for each in coming])
    for each, expected in zip(coming, sent, strict=True):
        found = each.read()
        assert found.dtype == expected.dtype
        assert (found == expected).all()
    # A part, which does not begin where an array does.
    part = exchange.bring(mx.contiguous(arrays[0]).reshape(-1)[1:] + 0)
    mx.async_eval(part.array)
    assert (part.read() == sent[0].reshape(-1)[1:]).all()


def test_norms_and_gates_are_those_of_float32():
    x, y = (mx.random.normal((3, 5, 96)).astype(mx.bfloat16) for _ in range(2))
    weight = mx.random.uniform(0.5, 1.5, (96,))
    total, normed = add_norm_rows(x, y, weight)
    assert total.tolist() == (x + y).tolist()
    expected = mx.fast.rms_norm((x + y).astype(mx.float32), weight, 1e-8)
    assert mx.abs(normed - expected).max() < 0.01 * mx.abs(expected).max()
    gate, value = mx.split(x.astype(mx.float32), 2, axis=-1)
    expected = nn.silu(gate) * value
    assert mx.abs(swiglu_rows(x) - expected).max() < 0.01 * mx.abs(expected).max()
    x = 3 * mx.random.normal((2, 5, 12))
    assert mx.abs(gelu_rows(x) - gelu(x)).max() < 1e-6


@pytest.mark.parametrize(("compute", "kv_bits"), [("dense", 8), ("quantized", None)])
def test_an_answer_does_not_depend_on_its_company(compute, kv_bits):
    model = random_model("medium", 4, compute, kv_bits=kv_bits, many=True)
    engine = model.engine
    start = engine.prefill(random_prompt(model.config))
    recordings = [
        Conversation(str(idx), Samples(speech(frames, idx).reshape(-1)), start, idx)
        for idx, frames in enumerate((70, 140, 33, 9, 131, 20, 64, 90))
    ]
    known = {}
    for size, some in (
        (8, recordings),
        (1, recordings[:2]),
        (3, recordings[::-1]),
        (300, recordings[2:]),
    ):
        for one, answer in converse_many(
            engine, some, SamplingConfig(), batch_size=size
        ):
            expected = known.setdefault(one.key, answer)
            for part in ("pcm", "text", "agent", "user"):
                found = getattr(answer, part)
                np.testing.assert_array_equal(found, getattr(expected, part))
    _, user, pcm = converse(engine, start, speech(70, 0), SamplingConfig(), 0, 128)
    np.testing.assert_array_equal(user, known["0"].user)
    np.testing.assert_array_equal(pcm, known["0"].pcm)


def test_the_codecs_fused_layers_are_its_layers():
    config = SeanetConfig(n_filters=8, dimension=32, ratios=(4, 3, 2))
    for make, shape in ((make_encoder, (2, 48, 1)), (make_decoder, (2, 3, 32))):
        layers = make(config)
        weights = [
            (name, 2 * mx.random.normal(a.shape) / a[0].size ** 0.5)
            for name, a in tree_flatten(layers.parameters())
        ]
        layers.load_weights(weights)
        fused = FusedSeanet(layers.model)
        assert fused.is_served
        runs = []
        for run_chunk in (fused, layers):
            state, run = None, []
            for chunk in range(3):
                x = mx.random.normal(shape, key=mx.random.key(chunk))
                y, state = run_chunk(x, state)
                run.append(np.array(y))
            runs.append(np.concatenate(run, axis=1))
        error = np.abs(runs[0] - runs[1]).max()
        assert 0 < np.abs(runs[1]).max()
        assert error < 5e-3 * np.abs(runs[1]).max()  # products are in TF32


def test_a_codec_is_fused_where_the_kernel_knows_its_widths():
    wide = replace(TINY.mimi, seanet=replace(TINY.mimi.seanet, n_filters=8))
    codes = mx.random.randint(0, 64, (2, 8, 5), key=mx.random.key(0))
    for config, is_served in ((wide, True), (TINY.mimi, False)):
        weights = random_codec(config)
        mimi, fused = make_mimi(config, weights), make_mimi(config, weights)
        fuse(fused)
        assert isinstance(fused.encoder, FusedSeanet) == is_served
        assert isinstance(fused.decoder, FusedSeanet) == is_served
        states = mimi.make_state(), fused.make_state()
        for first in (0, 2):  # a chunk of two frames, one of three
            part = codes[:, :, first : 2 + first + first // 2]
            expected, found = (
                np.array(codec.decode(part, state))
                for codec, state in zip((mimi, fused), states, strict=True)
            )
            assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_latents_attend_as_the_codec_specifies():
    # Chunks of many frames, past the window, and one of a single frame among them.
    transformer = replace(TINY.mimi.transformer, d_model=128, context=90)
    config = replace(
        TINY.mimi,
        transformer=transformer,
        seanet=replace(TINY.mimi.seanet, n_filters=8, dimension=128),
    )
    weights = random_codec(config)
    mimi, fused = make_mimi(config, weights), make_mimi(config, weights)
    fuse(fused)
    states = mimi.make_state(), fused.make_state()
    assert type(states[1].cache) is not type(states[0].cache)
    for frames in (17, 32, 1, 40, 16):
        pcm = mx.random.normal((3, frames * config.frame_size), key=mx.random.key(1))
        expected, found = (
            np.array(codec.encode_latent(0.1 * pcm, state))
            for codec, state in zip((mimi, fused), states, strict=True)
        )
        assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_a_streams_replies_are_those_to_a_recording():
    engine = make_engine(random_lm(4), alone=True)
    voice = np.zeros((CONFIG.num_codebooks, 60), np.int32)
    prompt = make_prompt(engine.config, [7], voice_codes=voice)
    check_live(engine, engine.prefill(prompt), 150)


@pytest.mark.parametrize(("frames", "kv_bits"), [(12, None), (60, None), (60, 8)])
@pytest.mark.parametrize("alone", [False, True])
def test_saved_rows_go_on_as_if_they_had_not_stopped(alone, frames, kv_bits):
    """Past the window: rows that share a ring and prompts, and those of one kernel.

    The prompt is shorter and longer than that.
    """
    engine = make_engine(random_lm(16), alone=alone, kv_bits=kv_bits)
    voice = np.zeros((CONFIG.num_codebooks, frames), np.int32)
    start = engine.prefill(make_prompt(engine.config, [7], voice_codes=voice))
    if not alone:
        rows = engine.rows(2, SamplingConfig())
        rows.join(start, 0)
        assert type(rows._cache) is SharedCache
    check_saved_rows(engine, start, 90, 12)
    check_saved_conversations(engine, start, 150)
