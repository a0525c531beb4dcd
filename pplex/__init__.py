"""pplex: PersonaPlex full-duplex speech models on recordings, in MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pplex.library import Answer, Model, Piece, load

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
