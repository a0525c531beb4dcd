"""Voice prompts are set to -24 LUFS as the reference does."""

import json
from pathlib import Path

import numpy as np
import pytest

from pplex.audio.files import read_pcm
from pplex.audio.loudness import integrated_loudness, normalize_loudness
from pplex.errors import PplexError

DATA = Path(__file__).parent / "data" / "respond"
RATE = 24_000
CASES = json.loads((DATA / "voice_loudness.json").read_text())


@pytest.mark.parametrize("name", sorted(CASES))
def test_loudness_and_gain_are_the_references(name):
    pcm = read_pcm(DATA / name, sample_rate=RATE).pcm
    expected = CASES[name]
    assert len(pcm) == expected["samples"]
    loudness = integrated_loudness(pcm, RATE)
    assert loudness == pytest.approx(expected["integrated_lufs"], abs=1e-6)
    scaled = normalize_loudness(pcm, RATE)
    assert scaled.dtype == np.float32
    assert np.abs(scaled).max() == pytest.approx(expected["max_abs_after"], abs=1e-7)
    np.testing.assert_allclose(scaled, pcm * expected["gain"], rtol=1e-6, atol=1e-9)


def test_samples_are_the_references():
    run = DATA.parent / "reference" / "b_wav_voice_no_text.npz"
    pcm = read_pcm(DATA / "voice_NATM0.wav", sample_rate=RATE).pcm
    expected = np.load(run)["voice_pcm"].reshape(-1)
    # Bit-identical with the SciPy it was made with; others round the filter otherwise.
    found = normalize_loudness(pcm, RATE)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_peaks_are_not_limited():
    pcm = np.zeros(RATE, np.float32)
    pcm[::2400] = 0.05
    scaled = normalize_loudness(pcm, RATE, target_lufs=0.0)
    assert np.abs(scaled).max() > 1.0
    assert integrated_loudness(scaled, RATE) == pytest.approx(0.0, abs=1e-4)


def test_short_recordings_are_refused():
    with pytest.raises(PplexError, match="too short"):
        normalize_loudness(np.ones(int(0.4 * RATE) - 1, np.float32), RATE)


@pytest.mark.parametrize("level", [0.0, 1e-9])
def test_silence_is_refused(level):
    rng = np.random.default_rng(0)
    with pytest.raises(PplexError, match="silent"):
        normalize_loudness((level * rng.standard_normal(RATE)).astype("f4"), RATE)
