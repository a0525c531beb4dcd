"""Sampling: the reference's kept ids, probabilities and draws."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pplex.model.sampling import (
    GREEDY,
    Sampler,
    SamplingConfig,
    draw,
    noise_keys,
    top_k_ids,
)

REFERENCE = Path(__file__).parent / "data" / "reference"
CASES = json.loads((REFERENCE / "sampling_cases.json").read_text())
ARRAYS = np.load(REFERENCE / "sampling.npz")


def kept(case: dict) -> tuple[np.ndarray, mx.array, int]:
    logits = ARRAYS[f"{case['case']}_logits"].reshape(1, -1)
    k = case["top_k"] or logits.shape[1]
    return logits, top_k_ids(mx.array(logits), min(k, logits.shape[1])), k


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["case"])
def test_the_references_ids_are_kept(case):
    _, ids, _ = kept(case)
    expected = ARRAYS[f"{case['case']}_kept_ids"].reshape(-1)
    np.testing.assert_array_equal(np.sort(np.array(ids)[0]), np.sort(expected))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["case"])
def test_the_references_noise_draws_the_references_ids(case):
    name = case["case"]
    logits, ids, _ = kept(case)
    order = ARRAYS[f"{name}_kept_ids"].reshape(-1)
    place = {int(idx): at for at, idx in enumerate(order)}
    ours = [place[int(idx)] for idx in np.array(ids)[0]]
    for noise, drawn in zip(
        ARRAYS[f"{name}_noise"], ARRAYS[f"{name}_drawn"], strict=True
    ):
        share = mx.array(noise.reshape(-1)[ours][None])
        found = draw(mx.array(logits), case["temperature"], len(ours), share)
        assert found.item() == int(drawn)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["top_k"]], ids=lambda c: c["case"]
)
def test_draws_follow_the_references_probabilities(case):
    logits, _, k = kept(case)
    probs = ARRAYS[f"{case['case']}_probs"].reshape(-1)
    rows = 4000
    noise = -mx.log(1 - mx.random.uniform(shape=(rows, k), key=mx.random.key(7)))
    many = mx.broadcast_to(mx.array(logits), (rows, logits.shape[1]))
    counts = np.bincount(
        np.array(draw(many, case["temperature"], k, noise)), minlength=len(probs)
    )
    likely = probs > 0.01
    spread = np.sqrt(probs * (1 - probs) / rows)
    assert (np.abs(counts / rows - probs)[likely] <= 5 * spread[likely]).all()
    assert counts[probs == 0].sum() == 0


def sampler(config: SamplingConfig, text_card=512, card=300, num_codebooks=8):
    return Sampler(config, text_card, card, num_codebooks)


def test_greedy_takes_the_largest_and_needs_no_noise():
    greedy = sampler(GREEDY, text_card=50)
    assert not greedy.draws
    logits = mx.array(np.eye(50, dtype=np.float32)[[17]])
    assert greedy.text(logits, None).item() == 17


def test_noise_of_a_row_depends_on_its_seed_and_frame_only():
    draws = sampler(SamplingConfig())
    alone = np.array(draws.noise(noise_keys([5], [9])))
    beside = np.array(draws.noise(noise_keys([1, 5, 2], [0, 9, 9])))
    np.testing.assert_array_equal(alone[0], beside[1])
    assert not np.array_equal(beside[0], beside[1])
    assert not np.array_equal(beside[1], beside[2])
    next_frame = np.array(draws.noise(noise_keys([5], [10])))
    assert not np.array_equal(alone, next_frame)


def test_text_and_audio_can_be_greedy_apart():
    config = SamplingConfig(temp=0.0)
    half = sampler(config)
    noise = half.noise(noise_keys([5], [9]))
    assert noise.shape == (1, config.text_top_k)
    logits = mx.random.normal((1, 300), key=mx.random.key(1))
    assert half.audio(logits, noise, 3).item() == mx.argmax(logits).item()


@pytest.mark.parametrize("top_k", [0, 10_000])
def test_top_k_of_zero_or_more_than_there_are_keeps_all(top_k):
    config = SamplingConfig(temp=1.0, top_k=top_k, text_temp=1.0, text_top_k=top_k)
    whole = sampler(config, text_card=7, card=5, num_codebooks=2)
    noise = whole.noise(noise_keys([1], [0]))
    assert noise.shape == (1, 7 + 2 * 5)
    assert 0 <= whole.audio(mx.zeros((1, 5)), noise, 1).item() < 5


@pytest.mark.parametrize(
    ("card", "k"), [(32000, 25), (2048, 250), (6400, 100), (64, 1)]
)
def test_the_largest_ids_are_found_in_rows_of_any_length(card, k):
    logits = np.random.default_rng(card).permutation(3 * card).reshape(3, card)
    found = np.sort(np.array(top_k_ids(mx.array(logits.astype(np.float32)), k)))
    np.testing.assert_array_equal(found, np.sort(np.argsort(-logits)[:, :k]))
