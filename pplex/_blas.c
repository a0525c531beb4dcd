/* cblas_sgemm for MLX on Linux CPUs, passed on to another BLAS.

   MLX's Linux wheels carry the reference BLAS: one thread, no vector instructions.
   NumPy's wheels carry OpenBLAS with 64-bit integers under other names. pplex.backend
   loads this library before MLX, with its symbols global, so that MLX finds this
   cblas_sgemm first, and tells it where OpenBLAS's functions are.

   A product with one row goes to sgemv: sgemm would copy the whole matrix first. */

#include <stdint.h>

typedef void (*sgemm64)(int, int, int, int64_t, int64_t, int64_t, float,
                        const float *, int64_t, const float *, int64_t, float,
                        float *, int64_t);
typedef void (*sgemv64)(int, int, int64_t, int64_t, float, const float *, int64_t,
                        const float *, int64_t, float, float *, int64_t);

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

static sgemm64 gemm;
static sgemv64 gemv;

void pplex_set_blas(sgemm64 their_gemm, sgemv64 their_gemv) {
  gemm = their_gemm;
  gemv = their_gemv;
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k,
                 float alpha, const float *a, int lda, const float *b, int ldb,
                 float beta, float *c, int ldc) {
  if (order == ROW_MAJOR && m == 1) {
    int64_t step = trans_a == NO_TRANS ? 1 : lda;
    if (trans_b == NO_TRANS)
      gemv(order, TRANS, k, n, alpha, b, ldb, a, step, beta, c, 1);
    else
      gemv(order, NO_TRANS, n, k, alpha, b, ldb, a, step, beta, c, 1);
  } else {
    gemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}
