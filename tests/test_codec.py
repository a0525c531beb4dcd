"""The compiled codec against MLX's, and against itself in other chunks."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import mimi_arrays
from small import SMALL, speech

from pplex.checkpoint.codec_layout import sanitize_codec
from pplex.codec import native
from pplex.codec.codec import MlxCodec, make_codec
from pplex.codec.fused import FusedSeanet
from pplex.codec.mimi import Mimi
from pplex.model.config import (
    CodecTransformerConfig,
    MimiConfig,
    QuantizerConfig,
    SeanetConfig,
)

ULP = 2.0**-23
INSTRUCTION_SETS = range(native.BEST + 1)
# Nothing is a multiple of a vector's width, and the window is shorter than a chunk.
ODD = MimiConfig(
    num_codebooks=3,
    seanet=SeanetConfig(n_filters=6, dimension=20, kernel_size=5, last_kernel_size=5),
    transformer=CodecTransformerConfig(
        d_model=20, num_heads=2, num_layers=3, dim_feedforward=27, context=12
    ),
    quantizer=QuantizerConfig(dimension=7, n_q=4, bins=19),
)
# The published sizes, but for the number of layers and of codebooks in the file.
FULL = MimiConfig(
    transformer=CodecTransformerConfig(num_layers=2, context=7),
    quantizer=QuantizerConfig(n_q=8),
)
SIZES = {"small": SMALL.mimi, "odd": ODD}

needs_library = pytest.mark.skipif(
    native.library() is None, reason="the compiled codec was not built"
)


def random_mimi(config: MimiConfig) -> Mimi:
    mx.random.seed(7)
    mimi = Mimi(config)
    weights = sanitize_codec(mimi_arrays(config), config, Path("random"))
    mimi.load_weights(list(weights.items()), strict=True)
    return mimi


Pair = tuple[Mimi, native.NativeCodec]


def random_pair(config: MimiConfig) -> Pair:
    """A codec by MLX's operations, and the compiled one with its weights."""
    mimi = random_mimi(config)
    return mimi, native.NativeCodec(mimi, config)


@pytest.fixture(scope="module", params=SIZES)
def pair(request) -> Pair:
    return random_pair(SIZES[request.param])


@pytest.fixture(scope="module")
def full_pair() -> Pair:
    return random_pair(FULL)


@pytest.fixture(params=INSTRUCTION_SETS, ids=["any", "avx2", "avx512"])
def instruction_set(request):
    """One after the other, those that this machine has."""
    library = native.library()
    assert library is not None
    if library.pplex_codec_use(request.param) != request.param:
        pytest.skip("not on this machine")
    yield request.param
    library.pplex_codec_use(native.BEST)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the root mean square of what is expected."""
    return float(np.abs(found - expected).max() / np.sqrt((expected**2).mean()))


@needs_library
def test_exponential_is_right_to_two_units_in_the_last_place(instruction_set):
    x = np.linspace(-87, 88, 1_000_003).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    found = native.activate(native.EXP, x)
    assert (np.abs(found / expected - 1)).max() <= 2 * ULP
    assert native.activate(native.EXP, np.zeros(1)) == 1


@needs_library
def test_elu_is_right_where_values_are_large_and_small(instruction_set):
    x = np.concatenate([np.linspace(-100, 100, 300_001), np.geomspace(-1e-9, -1, 999)])
    x = x.astype(np.float32)
    expected = np.where(x > 0, x, np.expm1(x.astype(np.float64)))
    found = native.activate(native.ELU, x)
    assert np.abs(found - expected).max() <= ULP
    np.testing.assert_array_equal(found[x >= 0], x[x >= 0])


@needs_library
def test_gelu_is_the_exact_one(instruction_set):
    x = np.linspace(-12, 12, 40_001).astype(np.float32)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x.astype(np.float64)])
    found = native.activate(native.GELU, x)
    assert np.abs(found - x * (1 + erf) / 2).max() <= 4 * ULP


@needs_library
def test_activation_of_a_value_does_not_depend_on_its_neighbours(instruction_set):
    x = np.random.default_rng(0).standard_normal(77).astype(np.float32)
    for kind in (native.ELU, native.GELU, native.EXP):
        whole = native.activate(kind, x)
        apart = [native.activate(kind, x[i : i + 1])[0] for i in range(len(x))]
        np.testing.assert_array_equal(whole, apart)


def check_it_computes_what_mlx_does(pair: Pair, num_frames: int, chunk: int) -> None:
    mimi, codec = pair
    frames = speech(num_frames, seed=4)
    starts = range(0, num_frames, chunk)
    state = mimi.make_state()
    expected = np.array(mimi.encode_latent(mx.array(frames.reshape(1, -1)), state)[0])
    state = codec.make_state()
    parts = [codec.encode_latents(frames[i : i + chunk], state) for i in starts]
    assert relative(np.concatenate(parts), expected) < 1e-4

    codes = np.array(mimi.quantizer.encode(mx.array(expected[None]))[0])
    found = codec.encode(frames, codec.make_state())
    np.testing.assert_array_equal(found, codes)
    expected = np.array(mimi.decode(mx.array(codes[None]), mimi.make_state())[0])
    state = codec.make_state()
    parts = [codec.decode(codes[:, i : i + chunk], state) for i in starts]
    assert relative(np.concatenate(parts), expected) < 1e-4


@needs_library
@pytest.mark.parametrize("chunk", [1, 12])
def test_it_computes_what_mlx_does(pair, instruction_set, chunk):
    check_it_computes_what_mlx_does(pair, 12, chunk)


@needs_library
def test_it_computes_what_mlx_does_at_full_size(full_pair):
    check_it_computes_what_mlx_does(full_pair, 6, 5)


def check_chunks_of_any_size_give_the_same_bits(
    codec: native.NativeCodec, divisions: list[list[int]]
) -> None:
    frames = speech(sum(divisions[0]), seed=5)

    def run(sizes: list[int]) -> tuple[np.ndarray, ...]:
        ends = np.cumsum(sizes)[:-1]
        encoder, decoder = codec.make_state(), codec.make_state()
        latents = [codec.encode_latents(p, encoder) for p in np.split(frames, ends)]
        codes = [codec.quantize(p) for p in latents]
        whole = np.concatenate(codes, axis=1)
        pcm = [codec.decode(p, decoder) for p in np.split(whole, ends, axis=1)]
        return np.concatenate(latents), whole, np.concatenate(pcm)

    expected = run(divisions[0])
    for sizes in divisions[1:]:
        for found, whole in zip(run(sizes), expected, strict=True):
            np.testing.assert_array_equal(found, whole)


@needs_library
def test_chunks_of_any_size_give_the_same_bits(pair, instruction_set):
    divisions = [[32, 8], [1] * 40, [3] * 13 + [1], [40], [0, 5, 0, 1, 34]]
    check_chunks_of_any_size_give_the_same_bits(pair[1], divisions)


@needs_library
def test_chunks_of_any_size_give_the_same_bits_at_full_size(full_pair):
    divisions = [[32, 1], [1] * 33, [3] * 11]
    check_chunks_of_any_size_give_the_same_bits(full_pair[1], divisions)


@needs_library
def test_of_equally_near_codes_the_first_wins():
    mimi = random_mimi(ODD)
    tables = mx.array(mimi.quantizer.acoustic.codebooks)
    tables[:, 5:] = tables[:, 5:6]
    mimi.quantizer.acoustic.codebooks = tables
    codec = native.NativeCodec(mimi, ODD)
    codes = codec.encode(speech(60), codec.make_state())[1:]
    assert codes.max() == 5


@needs_library
def test_streams_in_several_threads_do_not_mix(pair):
    _, codec = pair

    def converse(seed: int) -> np.ndarray:
        encoder, decoder = codec.make_state(), codec.make_state()
        frames = speech(6, seed)
        codes = [codec.encode(frame[None], encoder) for frame in frames]
        return np.concatenate([codec.decode(c, decoder) for c in codes])

    apart = [converse(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(converse, range(6)))
    np.testing.assert_array_equal(together, apart)


@needs_library
def test_tiny_numbers_count_as_zero_only_inside():
    codec = native.NativeCodec(random_mimi(ODD), ODD)
    codec.encode(speech(1), codec.make_state())
    tiny = np.full(100, 1e-40, np.float32)
    assert (tiny * np.float32(0.5) > 0).all()


@needs_library
def test_what_does_not_fit_is_refused():
    codec = native.NativeCodec(random_mimi(ODD), ODD)
    state = codec.make_state()
    with pytest.raises(ValueError, match="1920 samples"):
        codec.encode(np.zeros((2, 1919), np.float32), state)
    with pytest.raises(ValueError, match="3 codebooks"):
        codec.decode(np.zeros((4, 2), np.int32), state)
    for code in (-1, 19):
        with pytest.raises(ValueError, match="0 to 18"):
            codec.decode(np.full((3, 2), code), state)
    assert state.end == 0


def test_without_the_library_mlx_does_it(monkeypatch):
    mimi = random_mimi(ODD)
    if native.library() is not None:
        assert isinstance(make_codec(mimi, ODD), native.NativeCodec)
    monkeypatch.setattr(native, "find_extension", lambda name: None)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    codec = make_codec(mimi, ODD)
    assert isinstance(codec, MlxCodec)
    with pytest.raises(ValueError, match="missing"):
        native.NativeCodec(mimi, ODD)
    frames = speech(5)
    codes = codec.encode(frames, codec.make_state())
    state = codec.make_state()
    whole = codec.decode(codes, codec.make_state())
    parts = [codec.decode(codes[:, i : i + 1], state) for i in range(5)]
    assert codes.shape == (3, 5)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_fused_layers_are_the_layers(pair, monkeypatch):
    """The kernel's part in MLX's operations, as its own words define it."""

    def elu_behind(x, bias, skip, state, *, keep=False):
        total = x + bias if skip is None else x + bias + skip
        y = mx.where(total > 0, total, mx.exp(total) - 1)
        y = y if state is None else mx.concatenate([state, y], axis=1)
        return y, total if keep else None

    monkeypatch.setattr("pplex.codec.fused.elu_behind", elu_behind)
    mimi, _ = pair
    config = mimi._config
    for layers, shape in (
        (mimi.encoder, (2, 2 * config.frame_size, 1)),
        (mimi.decoder, (2, 4, config.seanet.dimension)),
    ):
        fused = FusedSeanet(layers.model)
        expected_state = state = None
        for chunk in range(3):
            x = mx.random.normal(shape, key=mx.random.key(chunk))
            expected, expected_state = layers(x, expected_state)
            found, state = fused(x, state)
            assert mx.allclose(found, expected, rtol=1e-4, atol=1e-5)
