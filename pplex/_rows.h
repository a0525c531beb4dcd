/* Products of a few rows, for one instruction set: see _each_cpu.h. A vector wider than
   the set has would be taken apart through memory. With vectors of 64 bytes there are 32
   registers, else 16 are counted on. Every output is summed in an order that depends on
   k alone: a row's result is the same bits whatever rows stand beside it. */

enum { NAME(WIDTH) = VECTOR_BYTES / 4 };
#define WIDTH NAME(WIDTH)
#define lanes NAME(lanes)
#define loose NAME(loose)
typedef float lanes __attribute__((vector_size(VECTOR_BYTES)));
typedef float loose __attribute__((vector_size(VECTOR_BYTES), aligned(4)));

/* Sum of the lanes, in a fixed order. */
TARGET static inline float NAME(total)(lanes x) {
  float sum[WIDTH];
  memcpy(sum, &x, sizeof x);
  for (int width = WIDTH / 2; width; width /= 2)
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  return sum[0];
}

/* c[r][j] = a[r] . b[j] for ROWS rows of a and COLUMNS rows of b. */
#define DOTS(ROWS, COLUMNS)                                                          \
  TARGET static void NAME(dots_##ROWS##x##COLUMNS)(                                  \
      long k, const float *a, long lda, const float *b, long ldb, float *c,          \
      long ldc) {                                                                    \
    lanes even[ROWS][COLUMNS] = {{{0}}}, odd[ROWS][COLUMNS] = {{{0}}};               \
    long i = 0;                                                                      \
    for (; i + 2 * WIDTH <= k; i += 2 * WIDTH)                                       \
      for (int j = 0; j < COLUMNS; j++) {                                            \
        lanes b0 = *(const loose *)(b + j * ldb + i);                                \
        lanes b1 = *(const loose *)(b + j * ldb + i + WIDTH);                        \
        for (int r = 0; r < ROWS; r++) {                                             \
          even[r][j] += *(const loose *)(a + r * lda + i) * b0;                      \
          odd[r][j] += *(const loose *)(a + r * lda + i + WIDTH) * b1;               \
        }                                                                            \
      }                                                                              \
    for (int r = 0; r < ROWS; r++)                                                   \
      for (int j = 0; j < COLUMNS; j++) {                                            \
        float rest = 0;                                                              \
        for (long l = i; l < k; l++) rest += a[r * lda + l] * b[j * ldb + l];        \
        c[r * ldc + j] = NAME(total)(even[r][j] + odd[r][j]) + rest;                 \
      }                                                                              \
  }
DOTS(1, 4)
DOTS(1, 1)
DOTS(2, 1)
DOTS(4, 1)
#if VECTOR_BYTES == 64
DOTS(2, 4)
DOTS(4, 2)
#else
DOTS(2, 2)
#endif
#undef DOTS

/* c = a b^T: m rows of a, n rows of b, both of length k. */
TARGET static void NAME(product_transposed)(long m, long n, long k, const float *a,
                                            long lda, const float *b, long ldb,
                                            float *c, long ldc) {
  for (long r = 0; r < m;) {
    long left = m - r, step = left >= 4 ? 4 : left >= 2 ? 2 : 1, j = 0;
    const float *ar = a + r * lda;
    float *cr = c + r * ldc;
#define COLUMNS(ROWS, COUNT)                                                         \
  for (; j + COUNT <= n; j += COUNT)                                                 \
    NAME(dots_##ROWS##x##COUNT)(k, ar, lda, b + j * ldb, ldb, cr + j, ldc);
#if VECTOR_BYTES == 64
    if (step == 4) COLUMNS(4, 2)
    if (step == 2) COLUMNS(2, 4)
#else
    if (step == 2) COLUMNS(2, 2)
#endif
    if (step == 4) COLUMNS(4, 1)
    if (step == 2) COLUMNS(2, 1)
    if (step == 1) COLUMNS(1, 4)
    if (step == 1) COLUMNS(1, 1)
#undef COLUMNS
    r += step;
  }
}

/* c = a b: m rows of a, k rows of b of length n. */
TARGET static void NAME(product)(long m, long n, long k, const float *a, long lda,
                                 const float *b, long ldb, float *c, long ldc) {
  for (long r = 0; r < m; r++) {
    const float *ar = a + r * lda;
    float *cr = c + r * ldc;
    long j = 0;
    for (; j + 4 * WIDTH <= n; j += 4 * WIDTH) {
      lanes sum[4] = {{0}};
      for (long i = 0; i < k; i++)
        for (int v = 0; v < 4; v++)
          sum[v] += ar[i] * *(const loose *)(b + i * ldb + j + WIDTH * v);
      memcpy(cr + j, sum, sizeof sum);
    }
    for (; j + WIDTH <= n; j += WIDTH) {
      lanes sum = {0};
      for (long i = 0; i < k; i++) sum += ar[i] * *(const loose *)(b + i * ldb + j);
      memcpy(cr + j, &sum, sizeof sum);
    }
    for (; j < n; j++) {
      float sum = 0;
      for (long i = 0; i < k; i++) sum += ar[i] * b[i * ldb + j];
      cr[j] = sum;
    }
  }
}
#undef WIDTH
#undef lanes
#undef loose
