"""Loudness of a voice prompt, as NVIDIA's `load_voice_prompt` sets it.

ITU-R BS.1770 integrated loudness with pyloudnorm's defaults, then one linear gain;
peaks are not limited.
"""

import warnings

import numpy as np

from pplex.errors import PplexError

_TRIM_MARGIN = 5  # windows of 20 ms that stay before and after the sound
_MIN_DURATION_S = 0.4  # one block of the measurement


def normalize_loudness(
    pcm: np.ndarray, sample_rate: int, target_lufs: float = -24.0
) -> np.ndarray:
    """Scale PCM (samples,) so that its integrated loudness is `target_lufs`."""
    loudness = integrated_loudness(pcm, sample_rate)
    gain = 10.0 ** ((target_lufs - loudness) / 20.0)
    scaled: np.ndarray = pcm * np.float64(gain)
    return scaled.astype(np.float32)


def integrated_loudness(pcm: np.ndarray, sample_rate: int) -> float:
    """Measure PCM (samples,) in LUFS; refuse what is too short or silent."""
    import pyloudnorm  # brings in scipy: slow, and only voice prompts need it

    if len(pcm) < _MIN_DURATION_S * sample_rate:
        raise PplexError(
            f"the voice recording is too short: {len(pcm) / sample_rate:.2f} s; "
            f"at least {_MIN_DURATION_S} s are needed to measure its loudness"
        )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        loudness = float(pyloudnorm.Meter(sample_rate).integrated_loudness(pcm))
    if not np.isfinite(loudness):
        raise PplexError(
            "the voice recording is silent or too quiet for its loudness to be "
            "measured; give one in which somebody speaks"
        )
    return loudness


def trim_silence(pcm: np.ndarray, sample_rate: int) -> np.ndarray:
    """PCM (samples,) without what is silent at its ends, but for a little of it.

    Silent is what lies 40 dB below the loudest 20 ms.
    """
    window = max(1, sample_rate // 50)
    count = len(pcm) // window
    if not count:
        return pcm
    power = np.square(pcm[: count * window].reshape(count, window)).mean(axis=1)
    loud = np.flatnonzero(power > 1e-4 * power.max())
    if not len(loud):
        return pcm
    start = max(0, loud[0] - _TRIM_MARGIN) * window
    return pcm[start : (loud[-1] + 1 + _TRIM_MARGIN) * window]
