"""The codec of each engine against the specification, and itself in other chunks."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import Arrays, mimi_arrays
from small import SMALL, decode_many, encode_many, speech

from pplex.checkpoint.codec_layout import sanitize_codec
from pplex.engine.c import codec as c
from pplex.engine.c.binding import BEST, load_library
from pplex.engine.c.codec import CCodec
from pplex.engine.cuda.codec import FusedSeanet
from pplex.engine.mlx.codec import GROUP_ROWS, MlxCodec
from pplex.model.config import (
    CodecTransformerConfig,
    MimiConfig,
    QuantizerConfig,
    SeanetConfig,
)
from pplex.model.mimi import Mimi, make_mimi

ULP = 2.0**-23
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
    load_library("codec") is None, reason="the compiled codec was not built"
)


def random_weights(config: MimiConfig) -> Arrays:
    """The tensors of a codec."""
    mx.random.seed(7)
    return sanitize_codec(mimi_arrays(config), config, Path("random"))


def random_mimi(config: MimiConfig) -> Mimi:
    return make_mimi(config, random_weights(config))


Pair = tuple[Mimi, CCodec]


def random_pair(config: MimiConfig) -> Pair:
    """The specification, and the compiled codec with its weights."""
    return random_mimi(config), CCodec(config, random_weights(config))


@pytest.fixture(scope="module", params=SIZES)
def config(request) -> MimiConfig:
    return SIZES[request.param]


@pytest.fixture(scope="module")
def pair(config) -> Pair:
    return random_pair(config)


@pytest.fixture(scope="module")
def full_pair() -> Pair:
    return random_pair(FULL)


@pytest.fixture(params=range(BEST + 1), ids=["any", "avx2", "avx512"])
def instruction_set(request):
    """One after the other, those that this machine has."""
    library = load_library("codec")
    assert library is not None
    if library.pplex_codec_use(request.param) != request.param:
        pytest.skip("not on this machine")
    yield request.param
    library.pplex_codec_use(BEST)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the root mean square of what is expected."""
    return float(np.abs(found - expected).max() / np.sqrt((expected**2).mean()))


@needs_library
def test_several_threads_give_the_same_bits(config):
    one, many = (CCodec(config, random_weights(config), n) for n in (1, 5))
    assert one.concurrent and not many.concurrent
    rng = np.random.default_rng(5)
    pcm = rng.uniform(-0.3, 0.3, (40, config.frame_size)).astype(np.float32)
    for sizes in ([40], [1, 7, 32]):
        states = [(c.make_state(), c.make_state()) for c in (one, many)]
        end = 0
        for size in sizes:
            piece = pcm[end : end + size]
            codes = [
                c.encode(piece, s[0]) for c, s in zip((one, many), states, strict=True)
            ]
            np.testing.assert_array_equal(*codes)
            sound = [
                c.decode(codes[0], s[1])
                for c, s in zip((one, many), states, strict=True)
            ]
            np.testing.assert_array_equal(*sound)
            end += size


@needs_library
def test_exponential_is_right_to_two_units_in_the_last_place(instruction_set):
    x = np.linspace(-87, 88, 1_000_003).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    found = c.activate(c.EXP, x)
    assert (np.abs(found / expected - 1)).max() <= 2 * ULP
    assert c.activate(c.EXP, np.zeros(1)) == 1


@needs_library
def test_elu_is_right_where_values_are_large_and_small(instruction_set):
    x = np.concatenate([np.linspace(-100, 100, 300_001), np.geomspace(-1e-9, -1, 999)])
    x = x.astype(np.float32)
    expected = np.where(x > 0, x, np.expm1(x.astype(np.float64)))
    found = c.activate(c.ELU, x)
    assert np.abs(found - expected).max() <= ULP
    np.testing.assert_array_equal(found[x >= 0], x[x >= 0])


@needs_library
def test_gelu_is_the_exact_one(instruction_set):
    x = np.linspace(-12, 12, 40_001).astype(np.float32)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x.astype(np.float64)])
    found = c.activate(c.GELU, x)
    assert np.abs(found - x * (1 + erf) / 2).max() <= 4 * ULP


@needs_library
def test_activation_of_a_value_does_not_depend_on_its_neighbours(instruction_set):
    x = np.random.default_rng(0).standard_normal(77).astype(np.float32)
    for kind in (c.ELU, c.GELU, c.EXP):
        whole = c.activate(kind, x)
        apart = [c.activate(kind, x[i : i + 1])[0] for i in range(len(x))]
        np.testing.assert_array_equal(whole, apart)


def check_it_computes_what_is_specified(
    pair: Pair, num_frames: int, chunk: int
) -> None:
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
def test_it_computes_what_is_specified(pair, instruction_set, chunk):
    check_it_computes_what_is_specified(pair, 12, chunk)


@needs_library
def test_it_computes_what_is_specified_at_full_size(full_pair):
    check_it_computes_what_is_specified(full_pair, 6, 5)


def check_chunks_of_any_size_give_the_same_bits(
    codec: CCodec, divisions: list[list[int]]
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
    weights = random_weights(ODD)
    tables = mx.array(weights["quantizer.acoustic.codebooks"])
    tables[:, 4:] = tables[:, 4:5]
    codec = CCodec(ODD, weights | {"quantizer.acoustic.codebooks": tables})
    codes = codec.encode(speech(60), codec.make_state())[1:]
    assert codes.max() == 4


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
    codec = CCodec(ODD, random_weights(ODD))
    codec.encode(speech(1), codec.make_state())
    tiny = np.full(100, 1e-40, np.float32)
    assert (tiny * np.float32(0.5) > 0).all()


@needs_library
def test_what_does_not_fit_is_refused():
    codec = CCodec(ODD, random_weights(ODD))
    state = codec.make_state()
    with pytest.raises(ValueError, match="1920 samples"):
        codec.encode(np.zeros((2, 1919), np.float32), state)
    with pytest.raises(ValueError, match="3 codebooks"):
        codec.decode(np.zeros((4, 2), np.int32), state)
    for code in (-1, 19):
        with pytest.raises(ValueError, match="0 to 18"):
            codec.decode(np.full((3, 2), code), state)
    assert state.end == 0


def test_chunks_of_any_size_give_the_same_bits_on_a_cpu_by_mlx():
    codec = MlxCodec(random_mimi(ODD), on_gpu=False)
    frames = speech(5)
    codes = codec.encode(frames, codec.make_state())
    state = codec.make_state()
    whole = codec.decode(codes, codec.make_state())
    parts = [codec.decode(codes[:, i : i + 1], state) for i in range(5)]
    assert codes.shape == (3, 5)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


CHUNK_FRAMES = 24  # fewer than a GPU takes, which a CPU would be slow at
# Two groups, the second of few rows and of more than one chunk.
LENGTHS = [CHUNK_FRAMES + 2, *range(GROUP_ROWS - 1, 0, -1), 33, 31]


def test_a_recordings_bits_do_not_depend_on_what_is_coded_beside_it():
    """The way of GPUs, here on the CPU."""
    codec = MlxCodec(random_mimi(SMALL.mimi), on_gpu=True, frames=CHUNK_FRAMES)
    recordings = [speech(frames, seed=frames) for frames in (CHUNK_FRAMES + 2, 7, 33)]
    codes = encode_many(codec, recordings)
    pcm = decode_many(codec, codes)
    for idx, frames in enumerate(recordings):
        (found,) = encode_many(codec, [frames])
        np.testing.assert_array_equal(found, codes[idx])
        beside = decode_many(codec, [*codes[idx:][::-1], codes[0]])
        np.testing.assert_array_equal(beside[len(codes) - idx - 1], pcm[idx])
        # And as a stream, in pieces of any length.
        encoder, decoder = codec.make_state(), codec.make_state()
        for first in range(0, len(frames), 10):
            stretch = slice(first, first + 10)
            found = codec.encode(frames[stretch], encoder)
            np.testing.assert_array_equal(found, codes[idx][:, stretch])
            found = codec.decode(found, decoder).reshape(-1, frames.shape[1])
            expected = pcm[idx].reshape(-1, frames.shape[1])[stretch]
            np.testing.assert_array_equal(found, expected)


def test_recordings_coded_in_groups_are_as_alone():
    """The way of GPUs, here on the CPU: codes agree, rounding may differ."""
    mimi = random_mimi(SMALL.mimi)
    codec, one = (
        MlxCodec(mimi, on_gpu=True, alone=alone, frames=CHUNK_FRAMES)
        for alone in (False, True)
    )
    recordings = [speech(frames, seed=frames) for frames in LENGTHS]
    codes = encode_many(codec, recordings)
    for found, frames in zip(codes, recordings, strict=True):
        alone = one.encode(frames, one.make_state())
        np.testing.assert_array_equal(found, alone)
    pcm = decode_many(codec, codes)
    for found, columns in zip(pcm, codes, strict=True):
        alone = one.decode(columns, one.make_state())
        np.testing.assert_allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize("last", [1, 3, 5, 8])
def test_on_gpus_the_last_chunk_may_be_ragged(config, last):
    """The way of GPUs, here on the CPU: it is padded."""
    mimi, frames = random_mimi(config), speech(16 + last, seed=6)
    codec = MlxCodec(mimi, on_gpu=True, alone=True, frames=8)
    state = mimi.make_state()
    expected = np.array(mimi.encode(mx.array(frames.reshape(1, -1)), state)[0])
    chunks, state = (frames[:16], frames[16:]), codec.make_state()
    codes = [codec.encode(chunk, state) for chunk in chunks]
    np.testing.assert_array_equal(np.concatenate(codes, axis=1), expected)
    whole = np.array(mimi.decode(mx.array(expected[None]), mimi.make_state())[0])
    state = codec.make_state()
    pcm = [codec.decode(chunk, state) for chunk in codes]
    np.testing.assert_allclose(np.concatenate(pcm), whole, atol=1e-5)


def test_on_gpus_every_chunk_of_one_recording_has_one_shape(monkeypatch):
    """However it comes: live, as a recording, and at the end."""
    shapes = set()

    def noting(run):
        def noted(self, x, state):
            shapes.add(x.shape)
            return run(self, x, state)

        return noted

    for name in ("encode", "decode"):
        monkeypatch.setattr(Mimi, name, noting(getattr(Mimi, name)))
    codec = MlxCodec(random_mimi(SMALL.mimi), on_gpu=True, alone=True, frames=4)
    frames = speech(6)
    for size in (1, len(frames)):
        states = codec.make_state(), codec.make_state()
        for first in range(0, len(frames), size):
            codes = codec.encode(frames[first : first + size], states[0])
            codec.decode(codes, states[1])
    books = SMALL.mimi.num_codebooks
    assert shapes == {(1, 4 * frames.shape[1]), (1, books, 4)}


@pytest.mark.parametrize("alone", [False, True])
def test_on_gpus_what_follows_a_ragged_chunk_goes_on_from_it(alone):
    """The way of GPUs, here on the CPU; and from where it was saved."""
    mimi = random_mimi(SMALL.mimi)
    codec = MlxCodec(mimi, on_gpu=True, alone=alone, frames=CHUNK_FRAMES)
    frames = speech(CHUNK_FRAMES + 5)
    codes = codec.encode(frames, codec.make_state())
    pcm = codec.decode(codes, codec.make_state())
    states = codec.make_state(), codec.make_state()
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for first, last in ((0, 3), (3, 20), (20, CHUNK_FRAMES + 2), (-3, None)):
        found[0].append(codec.encode(frames[first:last], states[0]))
        found[1].append(codec.decode(codes[:, first:last], states[1]))
        states = tuple(codec.make_state(codec.save(state)) for state in states)
    np.testing.assert_array_equal(np.concatenate(found[0], axis=1), codes)
    np.testing.assert_array_equal(np.concatenate(found[1]), pcm)


@needs_library
def test_recordings_coded_after_each_other_are_the_same_bits_as_alone(pair):
    _, codec = pair
    recordings = [speech(frames, seed=frames) for frames in (7, 1, 30)]
    codes = encode_many(codec, recordings)
    for found, frames in zip(codes, recordings, strict=True):
        alone = codec.encode(frames, codec.make_state())
        np.testing.assert_array_equal(found, alone)
    for found, one in zip(decode_many(codec, codes), codes, strict=True):
        alone = codec.decode(one, codec.make_state())
        np.testing.assert_array_equal(found, alone)


def test_fused_layers_are_the_layers(config, monkeypatch):
    """The kernel's part in MLX's operations, as its own words define it."""

    def elu_behind(x, bias, skip, state):
        total = x + bias if skip is None else x + bias + (skip[0] + skip[1])
        y = mx.where(total > 0, total, mx.exp(total) - 1)
        return y if state is None else mx.concatenate([state, y], axis=1)

    monkeypatch.setattr("pplex.engine.cuda.codec.elu_behind", elu_behind)
    mimi = random_mimi(config)
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
