"""Pictures for ``--plot`` and ``--png``: the only module that knows matplotlib.

Neither pyplot nor settings of the user's own: the same figures give the same file.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pplex.errors import PplexError
from pplex.files import Place, atomic_write, check_named, put

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange are the user and the agent, as in the report's page.
BLUE, ORANGE, GREEN, PURPLE = "#2466c2", "#b4530a", "#1b6e3c", "#8a1c7c"
RED, GREY = "#b3261e", "#5d6069"
LINES = (BLUE, ORANGE, GREEN, PURPLE, GREY, "#0b7285")

# What each format writes of its own accord: dates and versions.
_NO_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_STYLE = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#dcdde1",
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a dollar
    "svg.fonttype": "none",  # words stay words
    "svg.hashsalt": "pplex",
}
_DPI = 120
_MAX_POINTS = 1500


def check_plot(path: Path | None, overwrite: bool = True) -> None:
    """Refuse a plot whose name tells no format, that exists, or without matplotlib."""
    if path is None:
        return
    check_named(path, tuple(_NO_METADATA), overwrite)
    if importlib.util.find_spec("matplotlib") is None:
        raise PplexError(
            f"cannot draw {path}: matplotlib is not installed; "
            "pip install 'pplex[plots]'"
        )


@contextmanager
def plot(
    path: Path, width: float, height: float, *, place: Place = put
) -> Iterator[Figure]:
    """Yield a figure of this many inches; write it when the body is done.

    The suffix of ``path`` tells the format; a descriptor gets PNG. The file is there
    whole or not at all.
    """
    check_plot(path)
    from matplotlib import style
    from matplotlib.figure import Figure

    suffix = path.suffix.lower() or ".png"
    with style.context(["default", _STYLE]):
        figure = Figure((width, height), dpi=_DPI)
        yield figure
        with warnings.catch_warnings(), atomic_write(path, place=place) as temporary:
            # Words in a script that the font does not have become boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(temporary, format=suffix[1:], metadata=_NO_METADATA[suffix])
            if suffix == ".svg":  # without what XML puts before it, for HTML pages
                text = temporary.read_text(encoding="utf-8")
                start = text.index("<svg")
                temporary.write_text(text[start:], encoding="utf-8", newline="\n")


def thinned(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of a long row, of each few the largest: none is lost."""
    size = -(-len(values) // _MAX_POINTS) or 1
    starts = np.arange(0, len(values), size)
    return starts, np.maximum.reduceat(np.asarray(values, float), starts)


def shortened(name: str, most: int = 80) -> str:
    """A name or path as a title has room for it, by its end."""
    return name if len(name) <= most else "\u2026" + name[1 - most :]


def plain_numbers(axes: Axes) -> None:
    """Label a logarithmic y axis with 20 and 50, not with powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
