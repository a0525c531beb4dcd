"""pplex: PersonaPlex full-duplex speech models on recordings, in MLX."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pplex.library import Answer, Model, Piece, load

if sys.platform == "darwin":
    # MLX rounds the inputs of float32 products on an M5, unless it is told before it is
    # imported not to.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")

__all__ = ["Answer", "Model", "Piece", "load"]


def __getattr__(name: str) -> object:
    """The library's names, loaded when one is asked for: MLX takes its time."""
    if name == "__version__":
        from importlib.metadata import version

        return version("pplex")
    if name not in __all__:
        raise AttributeError(f"module 'pplex' has no attribute {name!r}")
    from pplex import library

    return getattr(library, name)
