/* Weights to packed codes, scales and biases, as MLX's affine quantization makes them
   from float32, and to float16; a block at a time, for pplex.checkpoint.blocks.

   The arithmetic follows MLX's quantize step for step, so that the result is the same
   to the bit. A group's values lie one after another and its codes fill whole words,
   so rows do not matter here. Sums of exact numbers only: the compiler may vectorize
   everything. */

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math") /* else comparisons are not vectorized */
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BF16, F16, F32, MAX_GROUP = 128, LANES = 16 };

#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

/* Rounded half to even; what is too large, infinite or no number gets the exponent of
   infinity, which float16 numbers do not have. */
INLINE uint16_t to_half(float x) {
  uint32_t bits = as_bits(x), size = bits & 0x7fffffff;
  uint32_t normal = ((size + 0xfff + ((size >> 13) & 1)) >> 13) - (112 << 10);
  uint32_t small = as_bits(as_float(size) + 0.5f) - 0x3f000000;
  uint32_t half = size < 0x38800000 ? small : normal;
  half = size >= 0x477ff000 ? 0x7c00 : half;
  return (uint16_t)(half | ((bits >> 16) & 0x8000));
}

INLINE int is_finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

/* Widen `count` values to float32; whether all are finite. */
INLINE int widen(const void *values, int kind, long start, int count, float *wide) {
  uint32_t worst = 0;
  if (kind == BF16) {
    const uint16_t *in = (const uint16_t *)values + start;
    for (int i = 0; i < count; i++) wide[i] = as_float((uint32_t)in[i] << 16);
  } else if (kind == F16) {
    const uint16_t *in = (const uint16_t *)values + start;
    for (int i = 0; i < count; i++) {
      uint32_t bits = in[i], exponent = bits & 0x7c00;
      float size = as_float((bits & 0x7fff) << 13) * 0x1p112f;
      size = exponent == 0x7c00 ? INFINITY : size;
      wide[i] = as_float(as_bits(size) | (bits & 0x8000) << 16);
    }
  } else {
    memcpy(wide, (const float *)values + start, (size_t)count * sizeof *wide);
  }
  for (int i = 0; i < count; i++) {
    uint32_t size = as_bits(wide[i]) & 0x7fffffff;
    worst = size > worst ? size : worst;
  }
  return worst < 0x7f800000;
}

/* Eight codes of a byte each to 8 * BITS bits, the first code lowest. */
INLINE uint64_t squeeze(uint64_t x, int bits) {
  x = (x & 0x00ff00ff00ff00ff) | (x & 0xff00ff00ff00ff00) >> (8 - bits);
  x = (x & 0x0000ffff0000ffff) | (x & 0xffff0000ffff0000) >> (16 - 2 * bits);
  return (x & 0xffffffff) | x >> 32 << (4 * bits);
}

INLINE int quantize(const void *values, int kind, long num_groups, int group_size,
                    int bits, uint8_t *packed, uint16_t *scales, uint16_t *biases) {
  const float top = (float)((1 << bits) - 1);
  int good = 1;
  for (long group = 0; group < num_groups; group++) {
    float w[MAX_GROUP];
    uint8_t codes[MAX_GROUP];
    good &= widen(values, kind, group * group_size, group_size, w);
    float low = INFINITY, high = -INFINITY, lows[LANES], highs[LANES];
    for (int l = 0; l < LANES; l++) lows[l] = highs[l] = w[l];
    for (int i = LANES; i < group_size; i += LANES)
      for (int l = 0; l < LANES; l++) {
        lows[l] = w[i + l] < lows[l] ? w[i + l] : lows[l];
        highs[l] = w[i + l] > highs[l] ? w[i + l] : highs[l];
      }
    for (int l = 0; l < LANES; l++) {
      low = lows[l] < low ? lows[l] : low;
      high = highs[l] > high ? highs[l] : high;
    }
    /* The extreme farther from zero gets a code of its own, and so does zero. */
    int from_low = fabsf(low) > fabsf(high);
    float edge = from_low ? low : high, bias = 0;
    float scale = (high - low) / top;
    scale = scale > 1e-7f ? scale : 1e-7f;
    scale = from_low ? scale : -scale;
    float steps = rintf(edge / scale);
    if (steps != 0) {
      scale = edge / steps;
      bias = edge;
    }
    for (int i = 0; i < group_size; i++) {
      float code = (w[i] - bias) / scale;
      code = code > 0 ? code : 0;
      code = code < top ? code : top;
      codes[i] = (uint8_t)as_bits(code + 0x1.8p23f); /* rounds half to even */
    }
    for (int i = 0; i < group_size; i += 8) {
      uint64_t eight;
      memcpy(&eight, codes + i, sizeof eight);
      eight = squeeze(eight, bits);
      memcpy(packed, &eight, (size_t)bits);
      packed += bits;
    }
    scales[group] = to_half(scale);
    biases[group] = to_half(bias);
    good &= is_finite(scales[group]) & is_finite(biases[group]);
  }
  return good;
}

/* Quantize groups of 32, 64 or 128 values; whether everything fits its type. */
FOR_EACH_CPU
int pplex_quantize(const void *values, int kind, long num_groups, int group_size,
                   int bits, uint8_t *packed, uint16_t *scales, uint16_t *biases) {
#define CASE(KIND, BITS)                                                             \
  if (kind == KIND && bits == BITS)                                                  \
    return quantize(values, KIND, num_groups, group_size, BITS, packed, scales, biases);
  CASE(BF16, 4)
  CASE(BF16, 8)
  return quantize(values, kind, num_groups, group_size, bits, packed, scales, biases);
}

/* Round values to float16; whether all of them fit. */
FOR_EACH_CPU
int pplex_halve(const void *values, int kind, long count, uint16_t *halves) {
  int good = 1;
  for (long start = 0; start < count; start += MAX_GROUP) {
    float wide[MAX_GROUP];
    int num = count - start < MAX_GROUP ? (int)(count - start) : MAX_GROUP;
    good &= widen(values, kind, start, num, wide);
    for (int i = 0; i < num; i++) {
      halves[start + i] = to_half(wide[i]);
      good &= is_finite(halves[start + i]);
    }
  }
  return good;
}
