"""How loud a recording is, as far as it is worth a warning."""

from typing import Literal

import numpy as np

Channel = int | Literal["mix"]

_SILENT = 2.0**-11  # half of the range: 16 steps of 16 bits, -66 dB
_LARGE_OFFSET = 0.05


class Levels:
    """The range of each channel so far, and the average of the one that is heard."""

    def __init__(self) -> None:
        self._low = self._high = np.zeros(0)
        self._heard_low, self._heard_high = np.inf, -np.inf
        self._sum, self._count = 0.0, 0

    def add(self, block: np.ndarray, heard: np.ndarray) -> None:
        """Take note of a block (frames, channels) and what is heard of it (frames,)."""
        low, high = block.min(axis=0), block.max(axis=0)
        if not self._count:
            self._low, self._high = low, high
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        self._heard_low = min(self._heard_low, float(heard.min()))
        self._heard_high = max(self._heard_high, float(heard.max()))
        self._sum += float(heard.sum(dtype=np.float64))
        self._count += len(heard)

    def warnings(self, name: str, channel: Channel) -> list[str]:
        """What is said of ``name`` if its ``channel`` is silent or far from zero."""
        if not self._count:
            return []
        found = []
        what = "the mix of its channels" if channel == "mix" else f"channel {channel}"
        if self._heard_high - self._heard_low < 2 * _SILENT:
            loud = np.flatnonzero(self._high - self._low >= 2 * _SILENT)
            hint = ""
            if len(loud):
                hint = f"; --channel {loud[0] + 1} picks one that is not"
            found.append(f"{name}: {what} is silent{hint}")
        offset = self._sum / self._count
        if abs(offset) > _LARGE_OFFSET:
            found.append(
                f"{name}: {what} has a DC offset of {offset:+.2f} of full scale; "
                "a high-pass filter takes it away"
            )
        return found
