"""Products of a few rows on Linux CPUs, with every instruction set that is here."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from pplex.backend import find_extension

LIBRARY = find_extension("_blas")
BEST = 2  # 0 any, 1 AVX2, 2 AVX-512
ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the products were not built")


@pytest.fixture(params=range(BEST + 1))
def product(request):
    """``a @ b`` or, if told, ``a @ b.T`` of float32 with an instruction set."""
    library = ctypes.CDLL(str(LIBRARY))
    number, pointer, factor = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    library.cblas_sgemm.argtypes = [
        *([number] * 6),
        *(factor, pointer, number, pointer, number),
        *(factor, pointer, number),
    ]
    library.cblas_sgemm.restype = None

    def run(a: np.ndarray, b: np.ndarray, transposed: bool) -> np.ndarray:
        m, k, n = *a.shape, len(b) if transposed else b.shape[1]
        c = np.full((m, n), np.nan, np.float32)
        library.cblas_sgemm(
            ROW_MAJOR,
            AS_IT_IS,
            TRANSPOSED if transposed else AS_IT_IS,
            *(m, n, k, 1.0, a.ctypes.data, k, b.ctypes.data, b.shape[1]),
            *(0.0, c.ctypes.data, n),
        )
        return c

    if library.pplex_blas_use(request.param) != request.param:
        pytest.skip("this processor has no such instructions")
    yield run
    library.pplex_blas_use(BEST)


def matrices(m: int, n: int, k: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(m + n + k)
    shape = (n, k) if transposed else (k, n)
    a, b = rng.standard_normal((m, k)), rng.standard_normal(shape)
    return a.astype(np.float32), b.astype(np.float32)


SIZES = [(1, 1), (3, 7), (64, 32), (67, 33), (130, 75), (257, 15)]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_products_are_those_of_float64(product, n, k, transposed):
    for m in range(1, 17):
        a, b = matrices(m, n, k, transposed)
        expected = a.astype(np.float64) @ (b.T if transposed else b)
        # Each term is rounded a few times, and there are k of them.
        np.testing.assert_allclose(product(a, b, transposed), expected, atol=3e-7 * k)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_row_is_the_same_bits_beside_any_others(product, n, k, transposed):
    a, b = matrices(16, n, k, transposed)
    alone = np.concatenate([product(row[None], b, transposed) for row in a])
    for m in range(2, 17):
        found = product(a[16 - m :], b, transposed)
        np.testing.assert_array_equal(found, alone[16 - m :])
