"""The compiled step against the specification, whose operations it stands for."""

from __future__ import annotations

import operator
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import SMALL

from pplex.bench.random_model import TINY, random_codec, random_lm, random_prompt
from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.weights import LmTensors
from pplex.engine.c import binding
from pplex.engine.c.binding import BEST, load_library
from pplex.engine.c.codec import ELU, CCodec, activate
from pplex.engine.c.engine import CEngine, CompiledLm
from pplex.engine.c.memory import RowCache
from pplex.engine.c.structures import Row, Sampling
from pplex.engine.choose import make_engine
from pplex.engine.mlx.codec import MlxCodec
from pplex.model.cache import KvCache
from pplex.model.config import LmConfig
from pplex.model.lm import Lm
from pplex.model.sampling import (
    GREEDY,
    Sampler,
    SamplingConfig,
    draw,
    noise_key,
    noise_keys,
)
from pplex.model.streams import NOT_FORCED

pytestmark = pytest.mark.skipif(
    load_library("lm") is None, reason="the compiled step was not built"
)

# No width a multiple of the lanes, and feed-forward widths that are odd.
RAGGED = LmConfig(
    dim=36,
    num_heads=3,
    num_layers=2,
    hidden_dim=45,
    context=24,
    text_card=101,
    card=37,
    dep_q=8,
    depformer_dim=30,
    depformer_num_heads=2,
    depformer_num_layers=2,
    depformer_hidden_dim=23,
)
EVEN = replace(SMALL.lm, depformer_hidden_dim=128)


def make_lm(config: LmConfig, form: str) -> Lm:
    """A random model, its weights of ``form``: float32, bfloat16 or bits and group."""
    mx.random.seed(11)
    lm = Lm(config)
    if form == "bfloat16":
        lm.apply(lambda w: w.astype(mx.bfloat16).astype(mx.float32))
    elif form != "float32":
        bits, group_size = map(int, form.split("/"))
        nn.quantize(lm, group_size=group_size, bits=bits)
    mx.eval(lm.parameters())
    return lm


def compile_lm(lm: Lm) -> CompiledLm:
    """The compiled form of a model, made of its tensors."""
    forms = {
        name: Quantization(module.bits, module.group_size)
        for name, module in lm.named_modules()
        if "scales" in module
    }
    weights = dict(tree_flatten(lm.parameters()))
    return CompiledLm(lm.config, LmTensors(weights, forms, "random", ()))


FORMS = [
    (RAGGED, "float32"),
    (RAGGED, "bfloat16"),
    (EVEN, "bfloat16"),
    *((EVEN, f"{bits}/32") for bits in (2, 3, 4, 5, 6, 8)),
    (EVEN, "4/64"),
    (EVEN, "8/64"),
]


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0].dim}-{form[1]}")
def lm(request) -> Lm:
    return make_lm(*request.param)


@pytest.fixture(params=range(BEST + 1), ids=["any", "avx2", "avx512"])
def instruction_set(request):
    """One after the other, those that this machine has."""
    library = load_library("lm")
    if library.pplex_lm_use(request.param) != request.param:
        pytest.skip("not on this machine")
    yield request.param
    library.pplex_lm_use(BEST)


@dataclass
class Positions:
    """Random positions of a model: their inputs, and the column after them."""

    lm: Lm
    inputs: mx.array
    columns: np.ndarray
    column: np.ndarray

    def specified(self) -> KvCache:
        """The positions as the specification reads them."""
        cache = self.lm.make_cache()
        self.lm.temporal(self.inputs, cache)
        return cache

    def compiled(self, compiled: CompiledLm) -> RowCache:
        """The positions as compiled code reads them."""
        cache = compiled.make_cache()
        compiled.read(cache, np.array(self.inputs[0]))
        return cache


def start(lm: Lm, length: int, seed: int = 0) -> Positions:
    """``length`` random positions."""
    config, rng = lm.config, np.random.default_rng(seed)
    cards = np.array([config.text_card] + [config.card] * config.n_q)
    tokens = rng.integers(0, cards, (length + 1, config.num_streams)).astype(np.int32)
    inputs = lm.embed(mx.array(tokens[None, :length].swapaxes(1, 2)))
    return Positions(lm, inputs, tokens[:length], tokens[length:])


def specified_logits(lm: Lm, cache: KvCache, column: np.ndarray, agent: np.ndarray):
    """All logits (1, ...) that are specified of a frame whose tokens are ``agent``."""
    hidden, text = lm.head(
        lm.temporal(lm.embed(mx.array(column)[..., None]), cache)[:, 0]
    )
    heads, said = [text], mx.array(agent)

    def follow(logits: mx.array, idx: int) -> mx.array:
        heads.append(logits)
        return said[:, 1 + idx]

    lm.depformer(hidden, said[:, 0], follow)
    return np.concatenate([np.array(head) for head in heads], axis=1)


def step(compiled, caches, columns, sampling=GREEDY, given=None, keys=None):
    """The agent's columns and the logits of a frame."""
    config = compiled.config
    width = config.text_card + config.num_codebooks * config.card
    logits = np.full((len(caches), width), np.nan, np.float32)
    rows = (Row * len(caches))()
    keys = keys or [(0, 0)] * len(caches)
    for row, cache, key in zip(rows, caches, keys, strict=True):
        cache.fill((row,))
        row.key[:] = key
    drawn = Sampling(**Sampler.of(config, sampling).layout())
    agent = compiled.step(rows, columns, given, drawn, logits)
    for cache in caches:
        cache.end += 1
    return agent, logits


@pytest.mark.parametrize("length", [1, 150])
def test_logits_are_those_of_the_specification(lm, length):
    prompt, compiled = start(lm, length), compile_lm(lm)
    cache, row, column = prompt.specified(), prompt.compiled(compiled), prompt.column
    for _ in range(30):
        agent, found = step(compiled, [row], column)
        expected = specified_logits(lm, cache, column, agent)
        spread = np.sqrt((expected**2).mean())
        assert np.abs(found - expected).max() < 2e-5 * spread
        column = np.concatenate([agent, column[:, 1 + lm.config.num_codebooks :]], 1)


def test_tokens_are_the_largest_logits_unless_they_are_given(lm, instruction_set):
    prompt, compiled = start(lm, 5), compile_lm(lm)
    column, config = prompt.column, lm.config
    given = np.full((1, config.num_agent_streams), NOT_FORCED, np.int32)
    given[0, [0, 3, 8]] = 5, 7, 9
    agent, logits = step(compiled, [prompt.compiled(compiled)], column, given=given)
    heads = np.split(logits[0, config.text_card :], config.num_codebooks)
    largest = [logits[0, : config.text_card].argmax(), *(h.argmax() for h in heads)]
    expected = np.where(given == NOT_FORCED, [largest], given)
    np.testing.assert_array_equal(agent, expected)
    found = specified_logits(lm, prompt.specified(), column, agent)
    np.testing.assert_allclose(logits, found, atol=1e-4)


@pytest.mark.parametrize("config", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(top_k=10, text_top_k=7),
        SamplingConfig(top_k=0, text_top_k=0, temp=2.0),
        SamplingConfig(temp=0.0),
        SamplingConfig(text_temp=0.0, top_k=3),
    ],
    ids=["default", "few", "all", "text only", "audio only"],
)
def test_draws_are_those_of_mlx_from_the_same_logits(config, sampling, instruction_set):
    lm = make_lm(config, "float32")
    prompt, compiled = start(lm, 5), compile_lm(lm)
    row, sampler = prompt.compiled(compiled), Sampler.of(config, sampling)
    for frame in range(40):
        seed = 2**40 + 17 * frame
        keys = [noise_key(seed, frame)]
        agent, logits = step(compiled, [row.copy()], prompt.column, sampling, keys=keys)
        noise = sampler.noise(mx.array(noise_keys([seed], [frame])))
        text, *heads = np.split(
            logits,
            [config.text_card + i * config.card for i in range(config.num_codebooks)],
            axis=1,
        )
        expected = [sampler.text(mx.array(text), noise).item()]
        for idx, head in enumerate(heads):
            expected.append(sampler.audio(mx.array(head), noise, idx).item())
        assert agent[0].tolist() == expected


@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_equal_logits_are_drawn_as_with_mlx(top_k, instruction_set):
    """Of those that are equal the lowest ids are drawn from, here of the first."""
    lm = make_lm(RAGGED, "float32")
    first = lm.text_linear.weight[:1]
    lower = RAGGED.text_card - 30
    lm.text_linear.weight = mx.concatenate(
        [mx.repeat(first * share, n, 0) for share, n in ((0.5, lower), (0.9, 30))]
    )
    prompt, compiled = start(lm, 5), compile_lm(lm)
    row, column = prompt.compiled(compiled), prompt.column
    sampling, drawn = SamplingConfig(text_top_k=top_k), set()
    for frame in range(40):
        keys = [(9, frame)]
        agent, logits = step(compiled, [row.copy()], column, sampling, keys=keys)
        sampler = Sampler.of(RAGGED, sampling)
        noise = sampler.noise(mx.array(noise_keys([9], [frame])))[:, : RAGGED.text_card]
        text = logits[:, : RAGGED.text_card]
        ranks = np.argsort(-text[0], kind="stable")[:top_k]
        assert agent[0, 0] == draw(mx.array(text), 0.7, top_k, noise).item()
        assert agent[0, 0] == ranks[np.argmin(np.array(noise)[0, ranks])]
        drawn.add(int(agent[0, 0]))
    assert len(drawn) > top_k // 2


def test_a_row_is_the_same_bits_beside_any_others(lm):
    compiled = compile_lm(lm)
    lengths = [0 if i == 4 else 1 + 9 * i % 64 for i in range(13)]
    prompts = [start(lm, n, seed=i) for i, n in enumerate(lengths) if n]
    rows = [prompt.compiled(compiled) for prompt in prompts]
    columns = np.concatenate([prompt.column for prompt in prompts])
    alone = [
        step(compiled, [row.copy()], prompt.column)[1]
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    for chosen in ([0], [1, 0], [2, 3, 0], range(4), range(5, 12), range(12)):
        chosen = list(chosen)
        caches = [rows[i].copy() for i in chosen]
        _, together = step(compiled, caches, columns[chosen])
        for idx, row in enumerate(chosen):
            np.testing.assert_array_equal(together[idx], alone[row][0])


@pytest.mark.parametrize("room", [0, 30])
def test_copies_are_the_same_bits_whether_they_or_their_source_go_on(lm, room):
    """Until one of them is full, the first positions are read from the source."""
    compiled, window = compile_lm(lm), lm.config.window
    prompt, other = start(lm, 2 * window), start(lm, 2 * window, seed=1)
    inputs, others = np.array(prompt.inputs[0]), np.array(other.inputs[0])
    columns = np.repeat(prompt.column, 9, axis=0)
    for length in (window // 2 + 1, window - 1, window, window + 20):
        alone, source = compiled.make_cache(), compiled.make_cache()
        for cache in (alone, source):
            compiled.read(cache, inputs[:length])
        copies = [source.copy(room) for _ in columns]
        for cache, more in ((source, 1), (alone, window), (source, window)):
            compiled.read(cache, others[:more])
            if cache is alone:
                for row in copies:
                    compiled.read(row, others[:more])
            _, expected = step(compiled, [alone], prompt.column)
            _, found = step(compiled, copies, columns)
            np.testing.assert_array_equal(found, np.repeat(expected, 9, axis=0))


def test_absent_tokens_add_nothing():
    lm = make_lm(EVEN, "float32")
    prompt, compiled = start(lm, 5), compile_lm(lm)
    column = prompt.column
    column[0, [0, 4, 16]] = -1
    agent, found = step(compiled, [prompt.compiled(compiled)], column)
    expected = specified_logits(lm, prompt.specified(), column, agent)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tokens_that_no_table_has_are_refused():
    lm = make_lm(EVEN, "float32")
    prompt, compiled = start(lm, 5), compile_lm(lm)
    row, column = prompt.compiled(compiled), prompt.column
    agent = column[:, : EVEN.num_agent_streams]
    with pytest.raises(ValueError, match="shape"):
        step(compiled, [row], column[:, :-1])
    with pytest.raises(ValueError, match="shape"):
        compiled.embed(column[:, :-1])
    with pytest.raises(ValueError, match="shape"):
        compiled.force(row, column, agent[:, :-1])
    column[0, 3] = EVEN.card + 1
    with pytest.raises(ValueError, match="beyond"):
        step(compiled, [row], column)
    with pytest.raises(ValueError, match="beyond"):
        compiled.embed(column)
    with pytest.raises(ValueError, match="beyond"):
        compiled.force(row, column, agent)
    assert row.end == 5


@pytest.mark.parametrize("parts", [[150], [1] * 40 + [110], [7, 130, 13]])
def test_positions_are_the_same_bits_read_or_given_alone_or_many_at_once(lm, parts):
    """Past the window, and past what is read in one piece."""
    prompt, compiled = start(lm, sum(parts)), compile_lm(lm)
    inputs = compiled.embed(prompt.columns)
    np.testing.assert_array_equal(inputs, np.array(prompt.inputs[0]))
    said = np.concatenate([prompt.columns[1:], prompt.column])
    said = said[:, : lm.config.num_agent_streams]
    stepped, read, forced = (compiled.make_cache() for _ in range(3))
    expected = [
        step(compiled, [stepped], column[None], given=agent[None])[1]
        for column, agent in zip(prompt.columns, said, strict=True)
    ]
    logits, end = [], 0
    for length in parts:
        piece = slice(end, end + length)
        compiled.read(read, inputs[piece])
        logits.append(compiled.force(forced, prompt.columns[piece], said[piece]))
        end += length
    np.testing.assert_array_equal(np.concatenate(logits), np.concatenate(expected))
    after = [step(compiled, [c], prompt.column)[1] for c in (stepped, read, forced)]
    np.testing.assert_array_equal(after[1], after[0])
    np.testing.assert_array_equal(after[2], after[0])


@pytest.fixture
def shared_steps(monkeypatch):
    """Steps are made by five threads, whatever there are of cores."""
    monkeypatch.setattr("pplex.engine.c.engine.SHARED_BYTES", 0)
    monkeypatch.setattr("pplex.engine.c.engine.num_cores", lambda: 5)


def test_steps_shared_among_threads_are_the_same_bits(lm, monkeypatch):
    """Of one row and many, and of a prompt that is read."""
    prompt, one = start(lm, 40), compile_lm(lm)
    monkeypatch.setattr("pplex.engine.c.engine.SHARED_BYTES", 0)
    monkeypatch.setattr("pplex.engine.c.engine.num_cores", lambda: 5)
    many = compile_lm(lm)
    assert one._model.threads == 1 and many._model.threads == 5
    caches = [prompt.compiled(compiled) for compiled in (one, many)]
    for rows in (1, 2, 7):
        columns = np.repeat(prompt.column, rows, axis=0)
        found = [
            step(compiled, [cache.copy() for _ in range(rows)], columns)[1]
            for compiled, cache in zip((one, many), caches, strict=True)
        ]
        np.testing.assert_array_equal(*found)


WIDE = replace(SMALL.lm, dim=512, hidden_dim=2048, num_heads=8, num_layers=1)


def test_shared_steps_give_the_same_bits_from_any_thread(shared_steps):
    lm = make_lm(WIDE, "float32")
    prompt, compiled = start(lm, 5), compile_lm(lm)
    row, column = prompt.compiled(compiled), prompt.column
    caches = [row.copy() for _ in range(40)]
    agent, expected = step(compiled, [row], column)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda c: step(compiled, [c], column)[1], caches))
    for logits in found:
        np.testing.assert_array_equal(logits, expected)
    whole = specified_logits(lm, prompt.specified(), column, agent)
    np.testing.assert_allclose(expected, whole, atol=1e-4)


FORKED = """
import os, sys
import pplex.engine.c.engine
from test_c_engine import *

pplex.engine.c.engine.SHARED_BYTES = 0
pplex.engine.c.engine.num_cores = lambda: 2
lm = make_lm(WIDE, "float32")
prompt, compiled = start(lm, 5), compile_lm(lm)
row, column = prompt.compiled(compiled), prompt.column
rows = [row, row.copy()]
logits = step(compiled, rows[:1], column)[1]
child = os.fork()
if child == 0:
    os._exit(0 if (step(compiled, rows[1:], column)[1] == logits).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(
    sys.platform == "darwin", reason="its frameworks do not outlive a fork"
)
def test_a_forked_process_can_make_steps():
    """It has none of the threads that were started before it."""
    # Not from where pplex's sources may lie, which have no compiled parts.
    command, folder = [sys.executable, "-c", FORKED], Path(__file__).parent
    assert subprocess.run(command, cwd=folder, timeout=120).returncode == 0


def test_a_live_conversation_has_its_memory_before_the_first_frame():
    """Growing takes a tenth of a second where the window is long."""
    long = replace(TINY, lm=replace(TINY.lm, context=900))
    engine = CEngine(long, random_lm(long.lm, 16), random_codec(long.mimi))
    prefilled = engine.prefill(random_prompt(long))
    rows = engine.rows(1, GREEDY, live=True)
    cache = rows._caches[rows.join(prefilled, 0)]
    arrays = cache.arrays()
    assert all(array.size >= 899 * long.lm.dim for array in arrays)
    for _ in range(400):
        rows.step(np.zeros((1, long.lm.num_codebooks), np.int32))
    assert all(map(operator.is_, cache.arrays(), arrays))


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_rows_are_computed_once_while_they_are_alike(monkeypatch, kv_bits):
    """Each is what it is alone, past the window, and when the first one is gone."""
    config, length, places = replace(TINY, kv_bits=kv_bits), 90, 6
    engine = CEngine(config, random_lm(config.lm, 16), random_codec(config.mimi))
    prefilled = engine.prefill(random_prompt(config))
    drawn = SamplingConfig(temp=0.02, text_temp=0.02)
    heard = np.zeros((length, places, config.lm.num_codebooks), np.int32)
    heard[5:, 5] = 1
    given = np.full((length, places), NOT_FORCED, np.int32)
    given[4, 4] = 7

    def answer(joined: range) -> np.ndarray:
        rows = engine.rows(places, drawn)
        # The place of each is its seed, with which it is alone, too.
        for seed in range(joined.stop):
            rows.join(prefilled, seed, length)
        for seed in range(joined.start):
            rows.leave(seed)
        said = []
        for idx in range(length):
            if idx == 8 and len(joined) > 1:
                rows.leave(0)
            said.append(rows.step(heard[idx], given[idx]).tokens()[joined])
        return np.stack(said, axis=1)

    alone = [answer(range(seed, seed + 1))[0] for seed in range(places)]
    made, step = [], engine.lm.step
    monkeypatch.setattr(
        engine.lm,
        "step",
        lambda rows, *rest: made.append(len(rows)) or step(rows, *rest),
    )
    for seed, said in enumerate(answer(range(places))):
        until = length if seed else 8
        np.testing.assert_array_equal(said[:until], alone[seed][:until])
    # Text that is given is read at once, what is heard with the next frame.
    assert made[:7] == [1, 1, 1, 1, 2, 2, 3] and made[-1] == 5


@pytest.fixture
def not_built(monkeypatch):
    """As where the compiled parts were not built."""
    monkeypatch.setattr(binding, "find_extension", lambda name: None)
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def test_where_it_was_built_it_is_the_engine_of_cpus():
    engine = make_engine(TINY, random_lm(TINY.lm, 16), random_codec(TINY.mimi))
    assert engine.name == "c"
    assert isinstance(engine.codec, CCodec)


def test_where_it_was_not_built_mlx_does_it(not_built):
    engine = make_engine(TINY, random_lm(TINY.lm, 16), random_codec(TINY.mimi))
    assert engine.name == "mlx"
    assert isinstance(engine.codec, MlxCodec)
    with pytest.raises(ValueError, match="missing"):
        CompiledLm(TINY.lm, random_lm(TINY.lm, 16))
    with pytest.raises(ValueError, match="missing"):
        CCodec(TINY.mimi, random_codec(TINY.mimi))
    with pytest.raises(ValueError, match="missing"):
        activate(ELU, np.zeros(1))
