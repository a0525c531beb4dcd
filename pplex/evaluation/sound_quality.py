"""How good the agent's speech sounds, as Microsoft's DNSMOS predicts it.

The package speechmos carries the networks of DNSMOS P.835 and P.808 (Reddy et al.,
ICASSP 2021 and 2022); neither torch nor a network connection is needed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.speech_activity import VAD_RATE, Segment, sound_of

_LEAST_S = 1.0  # of speech; less says nothing
_FIGURES = {
    "overall": "ovrl_mos",
    "signal": "sig_mos",
    "background": "bak_mos",
    "p808": "p808_mos",
}


@dataclass(frozen=True)
class SoundQuality:
    """Rates speech from 1 (bad) to 5 (excellent)."""

    version: str
    rate: Callable[..., dict[str, float]]

    def __call__(
        self, pcm: np.ndarray, speech: Sequence[Segment]
    ) -> dict[str, float] | None:
        """The mean opinion of the speech in PCM (samples,) of ``VAD_RATE``.

        Only the stretches of ``speech`` are rated, one behind the other: silence
        between them would be rated too. None for less than a second of them.
        """
        spoken = sound_of(pcm, VAD_RATE, speech)
        if len(spoken) < _LEAST_S * VAD_RATE:
            return None
        found = self.rate(np.clip(spoken, -1.0, 1.0), sr=VAD_RATE)
        return {name: float(found[key]) for name, key in _FIGURES.items()}

    def describe(self) -> dict[str, str]:
        """Name and version, for the output."""
        return {"name": "DNSMOS", "version": f"speechmos {self.version}"}


def make_sound_quality() -> SoundQuality:
    """DNSMOS; PplexError where its package is not installed."""
    try:
        from speechmos import dnsmos
    except ImportError as e:
        raise PplexError(f"--mos cannot be had ({e}): install pplex[mos]") from e
    return SoundQuality(importlib.metadata.version("speechmos"), dnsmos.run)
