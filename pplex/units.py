"""Numbers and lists as people read them: units and scales that suit, not too many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def size(num_bytes: float) -> str:
    """Bytes: ``640 B``, ``3.1 kB``, ``20 MB``, ``12.1 GB``."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            digits = int(unit != "B" and num_bytes < 9.95)
            return f"{num_bytes:.{digits}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def count(number: int) -> str:
    """How many: ``512``, ``41.0 k``, ``5.49 M``, ``7.69 G``."""
    value = float(number)
    if value < 1000:
        return str(number)
    for prefix in ("k", "M"):
        value /= 1000
        if value < 999.5:
            return f"{significant(value)} {prefix}"
    return f"{significant(value / 1000)} G"


def counted(number: int, what: str) -> str:
    """Some of a thing whose plural has an s: ``1 byte``, ``2 bytes``."""
    return f"{number} {what}{'s' * (number != 1)}"


def significant(value: float, digits: int = 3) -> str:
    """A number with this many digits, and all that are before its point."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".replace(",", " ")


def percent(share: float) -> str:
    """A share of 0 to 1: ``99.9 %``."""
    return f"{100 * share:.1f} %"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of many names: ``a, b, c and 5 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def duration(seconds: float) -> str:
    """A time to wait: ``1 s``, ``3 minutes``, ``2 hours``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{round(minutes)} minutes"
    return f"{round(minutes / 60)} hours"


class Scale:
    """One scale for a column of small numbers: a power of ten for its heading."""

    def __init__(self, values: Iterable[float]) -> None:
        """The largest of ``values``, none below 0, is to lie between 1 and 1000."""
        largest = max(values, default=0.0)
        exponent = math.floor(math.log10(largest)) if largest else 0
        self._exponent = min(0, 3 * (exponent // 3))

    def heading(self, title: str, unit: str) -> str:
        """``KL, 1e-6 nats``."""
        power = f"1e{self._exponent} " if self._exponent else ""
        return f"{title}, {power}{unit}"

    def scaled(self, value: float) -> float:
        """A value in the heading's unit."""
        return value / 10.0**self._exponent

    def text(self, value: float) -> str:
        """A value of the column; what is not 0 does not look like it."""
        scaled = self.scaled(value)
        return "<0.01" if 0 < scaled < 0.01 else f"{scaled:.2f}" if value else "0"
