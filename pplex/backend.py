"""Give MLX a fast BLAS on Linux CPUs; to be called before MLX is imported.

MLX's Linux wheels do their float32 matrix products with the reference BLAS, which
reaches a few percent of a processor's speed. The OpenBLAS in NumPy's wheels is put in
its place through a shim (``_blas.c``). Elsewhere, or where a part is missing, nothing
changes but the speed.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import sys
from pathlib import Path

BUNDLED = "mlx"
OPENBLAS = "numpy-openblas"

_libraries: list[ctypes.CDLL] = []  # kept loaded


def use_fast_blas() -> str:
    """Install the faster BLAS where it can be; the name of the one in use."""
    if _libraries:
        return OPENBLAS
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return BUNDLED
    shim, openblas = find_extension("_blas"), _find_openblas()
    if shim is None or openblas is None:
        return BUNDLED
    try:
        numpy_blas = ctypes.CDLL(str(openblas))
        ours = ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
        sgemm = numpy_blas.scipy_cblas_sgemm64_
        ours.pplex_set_blas(ctypes.cast(sgemm, ctypes.c_void_p))
        if "OPENBLAS_NUM_THREADS" not in os.environ:
            # Its threads spin while they wait: on a busy machine that costs far more
            # than a second core gains on products of this size.
            numpy_blas.scipy_openblas_set_num_threads64_(1)
    except (OSError, AttributeError):
        return BUNDLED
    _libraries.extend([numpy_blas, ours])
    return OPENBLAS


def find_extension(name: str) -> Path | None:
    """The compiled library ``name`` of this package; None where it was not built."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    return None


def _find_openblas() -> Path | None:
    import numpy

    libraries = Path(numpy.__file__).parent.parent / "numpy.libs"
    return next(iter(sorted(libraries.glob("libscipy_openblas64_*.so"))), None)
