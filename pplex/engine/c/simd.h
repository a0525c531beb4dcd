/* Vectors of floats of one instruction set's width: see each_cpu.h. */

#define INLINE TARGET static inline __attribute__((always_inline))
#define WIDTH (VECTOR_BYTES / 4) /* floats of a vector */
#define vec NAME(vec)
#define ints NAME(ints)
#define uints NAME(uints)

typedef float vec __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint32_t uints __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
typedef vec NAME(loose) __attribute__((aligned(4)));
typedef uint16_t NAME(shorts)
    __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));
typedef ints NAME(loose_ints) __attribute__((aligned(4)));
typedef int8_t NAME(bytes)
    __attribute__((vector_size(VECTOR_BYTES / 4), may_alias, aligned(1)));

INLINE vec NAME(splat)(float x) { return x - (vec){0}; }

INLINE vec NAME(load)(const float *x) { return *(const NAME(loose) *)x; }

INLINE ints NAME(load_ints)(const int32_t *x) { return *(const NAME(loose_ints) *)x; }

INLINE void NAME(store)(float *to, vec x) { *(NAME(loose) *)to = x; }

/* float32 of bytes: GCC 12 converts them one by one. */
INLINE vec NAME(load_bytes)(const int8_t *x) {
#if VECTOR_BYTES == 64
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
#elif VECTOR_BYTES == 32
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#else
  return __builtin_convertvector(*(const NAME(bytes) *)x, vec);
#endif
}

/* float32 of bfloat16. */
INLINE vec NAME(load_bfloat16)(const uint16_t *x) {
  return (vec)(__builtin_convertvector(*(const NAME(shorts) *)x, uints) << 16);
}

/* float32 of finite float16. */
INLINE vec NAME(load_float16)(const uint16_t *x) {
#if VECTOR_BYTES == 64
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif VECTOR_BYTES == 32
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#elif defined(__aarch64__)
  return (vec)vcvt_f32_f16(vld1_f16((const __fp16 *)x));
#else
  uints bits = __builtin_convertvector(*(const NAME(shorts) *)x, uints);
  vec magnitude = (vec)((bits & 0x7FFF) << 13) * 0x1p112f;
  return (vec)((uints)magnitude | (bits & 0x8000) << 16);
#endif
}

/* `x` where `mask` has all bits set, `other` where it has none. */
INLINE vec NAME(either)(ints mask, vec x, vec other) {
  return (vec)(((ints)x & mask) | ((ints)other & ~mask));
}

INLINE vec NAME(larger)(vec a, vec b) {
#if VECTOR_BYTES == 64
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif VECTOR_BYTES == 32
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return NAME(either)(a > b, a, b);
#endif
}

INLINE vec NAME(smaller)(vec a, vec b) {
#if VECTOR_BYTES == 64
  return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif VECTOR_BYTES == 32
  return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return NAME(either)(a < b, a, b);
#endif
}

/* Sum of `count` floats, a power of two, which are written over; in a fixed order. */
INLINE float NAME(fold)(float *x, int count) {
  for (int width = count / 2; width; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
}

/* e^x of x kept from -87 to 88, to 2 units in the last place.

   x = n ln 2 + r, and e^r = 1 + r + r^2 p(r): p was fitted to the least largest error
   for |r| <= ln 2 / 2, which is 3e-9. */
INLINE vec NAME(exp)(vec x) {
  const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
  x = NAME(smaller)(NAME(larger)(x, NAME(splat)(-87.0f)), NAME(splat)(88.0f));
  vec shifted = x * 1.44269504f + round, n = shifted - round;
  /* ln 2 in two parts, the first of few bits */
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = r * 1.3950490392744541e-3f + 8.368889801204205e-3f;
  p = p * r + 4.166620597243309e-2f;
  p = p * r + 0.166665181517601f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  return (vec)((uints)p + ((uints)shifted << 23));
}
