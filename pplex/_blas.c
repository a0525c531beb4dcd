/* cblas_sgemm for MLX on Linux CPUs.

   MLX's Linux wheels carry the reference BLAS: one thread, no vector instructions.
   pplex.backend loads this library before MLX, with its symbols global, so that MLX
   finds this cblas_sgemm first. Products of many rows go to the OpenBLAS in NumPy's
   wheels, which has 64-bit integers and other names; products of a few rows, which is
   what a frame of a conversation needs, are done here: OpenBLAS would copy the matrix
   first, and a row's result would depend on the number of rows (see _rows.h). */

#include <stdint.h>
#include <string.h>

typedef void (*sgemm64)(int, int, int, int64_t, int64_t, int64_t, float,
                        const float *, int64_t, const float *, int64_t, float,
                        float *, int64_t);

enum { ROW_MAJOR = 101, NO_TRANS = 111, MAX_ROWS = 16 };

typedef void (*few_rows)(long, long, long, const float *, long, const float *, long,
                         float *, long);

#define SOURCE "_rows.h"
#include "_each_cpu.h"

static sgemm64 gemm;
static few_rows product = product_base, product_transposed = product_transposed_base;

/* Choose the instruction set for a few rows: the best there is up to `level`; which it
   is: 0 any, 1 AVX2, 2 AVX-512. */
int pplex_blas_use(int level) {
  static const few_rows products[] = OF_EACH_CPU(product);
  static const few_rows transposed[] = OF_EACH_CPU(product_transposed);
  int set = best_set(level);
  product = products[set];
  product_transposed = transposed[set];
  return set;
}

void pplex_set_blas(sgemm64 theirs) {
  gemm = theirs;
  pplex_blas_use(2);
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k,
                 float alpha, const float *a, int lda, const float *b, int ldb,
                 float beta, float *c, int ldc) {
  if (order != ROW_MAJOR || trans_a != NO_TRANS || m > MAX_ROWS || alpha != 1.0f ||
      beta != 0.0f)
    gemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  else if (trans_b == NO_TRANS)
    product(m, n, k, a, lda, b, ldb, c, ldc);
  else
    product_transposed(m, n, k, a, lda, b, ldb, c, ldc);
}
