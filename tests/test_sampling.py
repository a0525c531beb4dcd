"""Sampling: the reference's kept ids, probabilities and draws."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pplex.model.sampling import (
    GREEDY,
    LEAST_TEMP,
    Sampler,
    SamplingConfig,
    draw,
    kth_largest,
    largest,
    noise_keys,
)

REFERENCE = Path(__file__).parent / "data" / "reference"
CASES = json.loads((REFERENCE / "sampling_cases.json").read_text())
ARRAYS = np.load(REFERENCE / "sampling.npz")


def logits_of(case: dict) -> tuple[mx.array, int]:
    logits = ARRAYS[f"{case['case']}_logits"].reshape(1, -1)
    return mx.array(logits), min(case["top_k"] or logits.shape[1], logits.shape[1])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["case"])
def test_the_references_ids_are_kept(case):
    logits, k = logits_of(case)
    kept = np.flatnonzero(np.array(largest(logits, k)))
    expected = ARRAYS[f"{case['case']}_kept_ids"].reshape(-1)
    np.testing.assert_array_equal(kept, np.sort(expected))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["case"])
def test_the_references_noise_draws_the_references_ids(case):
    name = case["case"]
    logits, k = logits_of(case)
    ids = ARRAYS[f"{name}_kept_ids"].reshape(-1)
    for noise, drawn in zip(
        ARRAYS[f"{name}_noise"], ARRAYS[f"{name}_drawn"], strict=True
    ):
        # Noise of its own for each id kept; ids left out would win if they were not.
        values = np.full(logits.shape, 1e-30, np.float32)
        values[0, ids] = noise.reshape(-1)
        found = draw(logits, case["temperature"], k, mx.array(values))
        assert found.item() == int(drawn)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["top_k"]], ids=lambda c: c["case"]
)
def test_draws_follow_the_references_probabilities(case):
    logits, k = logits_of(case)
    probs = ARRAYS[f"{case['case']}_probs"].reshape(-1)
    rows = 4000
    shape = (rows, logits.shape[1])
    noise = -mx.log(1 - mx.random.uniform(shape=shape, key=mx.random.key(7)))
    many = mx.broadcast_to(logits, shape)
    counts = np.bincount(
        np.array(draw(many, case["temperature"], k, noise)), minlength=len(probs)
    )
    likely = probs > 0.01
    spread = np.sqrt(probs * (1 - probs) / rows)
    assert (np.abs(counts / rows - probs)[likely] <= 5 * spread[likely]).all()
    assert counts[probs == 0].sum() == 0


def test_an_id_has_the_same_noise_whatever_the_logits():
    """Turned by 5 places, noise and logits draw the id 5 places further."""
    logits = np.random.default_rng(1).standard_normal((50, 300)).astype(np.float32)
    noise = np.random.default_rng(2).exponential(size=(50, 300)).astype(np.float32)
    drawn = np.array(draw(mx.array(logits), 1.0, 20, mx.array(noise)))
    assert len(set(drawn)) > 20
    turned = (mx.array(np.roll(array, 5, axis=1)) for array in (logits, noise))
    logits, noise = turned
    np.testing.assert_array_equal(
        np.array(draw(logits, 1.0, 20, noise)), (drawn + 5) % 300
    )


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_of_ids_that_tie_for_the_last_place_the_lowest_are_kept(k):
    logits = mx.array([[0.0, 3.0, 1.0, 1.0, 1.0, -2.0]])
    for idx in range(6):
        noise = mx.array(np.where(np.arange(6) == idx, 1e-9, 1.0)[None])
        drawn = draw(logits, 1.0, k, noise.astype(mx.float32)).item()
        assert drawn == (idx if idx in [1, 2, 3, 4][:k] else 1)


@pytest.mark.parametrize(("card", "k"), [(32000, 25), (2048, 250), (60, 59), (60, 1)])
def test_k_ids_are_kept_however_many_are_equal(card, k):
    rng = np.random.default_rng(card)
    logits = np.round(rng.standard_normal((4, card)) * [[1], [4], [20], [0]])
    expected = np.zeros(logits.shape, bool)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.put_along_axis(expected, best, True, axis=1)
    found = largest(mx.array(logits.astype(np.float32)), k)
    np.testing.assert_array_equal(np.array(found), expected)


@pytest.mark.parametrize("temp", [9e-10, 1e-38, 1e-45, 5e-324, 0.0])
def test_a_temperature_too_small_for_noise_is_greedy(temp):
    tiny = sampler(SamplingConfig(temp=temp, text_temp=temp))
    assert not tiny.draws
    assert tiny.layout() == sampler(SamplingConfig(temp=0, text_temp=0)).layout()


def test_the_least_temperature_that_is_drawn_with_takes_the_largest():
    logits = mx.random.normal((50, 2048), key=mx.random.key(3))
    noise = -mx.log(1 - mx.random.uniform(shape=logits.shape, key=mx.random.key(4)))
    drawn = draw(logits, LEAST_TEMP, 250, noise).tolist()
    assert drawn == mx.argmax(logits, axis=1).tolist()


def test_equal_logits_of_the_largest_give_the_lowest_id():
    logits = mx.array([[0.0, 3.0, 1.0, 3.0]])
    assert sampler(GREEDY, card=4).audio(logits, None, 0).item() == 1


def sampler(config: SamplingConfig, text_card=512, card=300, num_codebooks=8):
    return Sampler(config, text_card, card, num_codebooks)


def test_greedy_takes_the_largest_and_needs_no_noise():
    greedy = sampler(GREEDY, text_card=50)
    assert not greedy.draws
    logits = mx.array(np.eye(50, dtype=np.float32)[[17]])
    assert greedy.text(logits, None).item() == 17


def test_noise_of_a_row_depends_on_its_seed_and_frame_only():
    draws = sampler(SamplingConfig())
    alone = np.array(draws.noise(mx.array(noise_keys([5], [9]))))
    beside = np.array(draws.noise(mx.array(noise_keys([1, 5, 2], [0, 9, 9]))))
    np.testing.assert_array_equal(alone[0], beside[1])
    assert not np.array_equal(beside[0], beside[1])
    assert not np.array_equal(beside[1], beside[2])
    next_frame = np.array(draws.noise(mx.array(noise_keys([5], [10]))))
    assert not np.array_equal(alone, next_frame)


def test_text_and_audio_can_be_greedy_apart():
    config = SamplingConfig(temp=0.0)
    half = sampler(config)
    noise = half.noise(mx.array(noise_keys([5], [9])))
    assert noise.shape == (1, 512)
    logits = mx.random.normal((1, 300), key=mx.random.key(1))
    assert half.audio(logits, noise, 3).item() == mx.argmax(logits).item()


@pytest.mark.parametrize("top_k", [0, 10_000])
def test_top_k_of_zero_or_more_than_there_are_keeps_all(top_k):
    config = SamplingConfig(temp=1.0, top_k=top_k, text_temp=1.0, text_top_k=top_k)
    whole = sampler(config, text_card=7, card=5, num_codebooks=2)
    noise = whole.noise(mx.array(noise_keys([1], [0])))
    assert noise.shape == (1, 7 + 2 * 5)
    assert 0 <= whole.audio(mx.zeros((1, 5)), noise, 1).item() < 5


@pytest.mark.parametrize(
    ("card", "k"), [(32000, 25), (2048, 250), (6400, 100), (64, 1)]
)
def test_the_kth_largest_is_found_in_rows_of_any_length(card, k):
    logits = np.random.default_rng(card).permutation(3 * card).reshape(3, card)
    found = np.array(kth_largest(mx.array(logits.astype(np.float32)), k))
    np.testing.assert_array_equal(found, np.sort(logits)[:, -k][:, None])


def test_noise_is_finite_and_above_zero_whatever_is_drawn(monkeypatch):
    extremes = mx.array([0.0, 2.0**-32, 0.5, 1 - 2.0**-24])  # of mx.random.uniform
    monkeypatch.setattr(mx.random, "uniform", lambda shape, key: extremes)
    noise = np.array(sampler(SamplingConfig()).noise(mx.array(noise_keys([3], [0]))))
    assert (noise > 0).all() and np.isfinite(np.log(noise)).all()
    assert (np.diff(noise[0]) < 0).all()
