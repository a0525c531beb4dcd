"""Limits on a score, for scripts: ``reply_delay.median>1.2`` is a failure."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pplex.errors import PplexError

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_LIMIT = re.compile(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Limit:
    """A figure of the total by its dotted name, and what it must not be."""

    text: str
    name: tuple[str, ...]
    compare: str
    number: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read ``NAME[.PART]>NUMBER`` (or ``<``, ``>=``, ``<=``)."""
        match = _LIMIT.fullmatch(text)
        try:
            name, compare, number = match.groups() if match else ("", "", "nan")
            value = float(number)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise PplexError(
                f"--fail-if {text!r}: give NAME>NUMBER or NAME<NUMBER, with a name as "
                "in --format json's total, such as reply_delay.median>1.2"
            )
        return cls(text, tuple(name.split(".")), compare, value)

    def broken(self, total: Mapping[str, Any]) -> str | None:
        """A sentence if the figure is what it must not be, or is not there."""
        value = self._find(total)
        if value is None:
            return f"{self.text}: there is no such figure in these recordings"
        if _COMPARE[self.compare](value, self.number):
            return f"{self.text}: it is {value:g}"
        return None

    def _find(self, total: Mapping[str, Any]) -> float | None:
        """The figure; a name may leave out that it is in seconds.

        PplexError for a name that no score has.
        """
        found: Any = total
        for part in self.name:
            names = [part, f"{part}_s"] if isinstance(found, Mapping) else []
            known = [name for name in names if name in found]
            if not known:
                where = found if isinstance(found, Mapping) else {}
                raise PplexError(
                    f"--fail-if {self.text!r}: a score has no {'.'.join(self.name)}; "
                    + (f"known here are {', '.join(where)}" if where else "it is one")
                )
            found = found[known[0]]
            if found is None:
                return None
        if isinstance(found, Mapping):
            raise PplexError(
                f"--fail-if {self.text!r}: {'.'.join(self.name)} has several figures; "
                f"add one of {', '.join(f'.{part}' for part in found)}"
            )
        return float(found)
