/* The language model's arithmetic, for one instruction set: see each_cpu.h. With vectors
   of 64 bytes there are 32 registers, else 16 are counted on. Sums are taken in the same
   order whatever the width. */

#include "simd.h"

/* LANES are PARTS vectors of the width that the instruction set has: a wider one would
   be taken apart through memory. */
#define PARTS (LANES / WIDTH)

INLINE int NAME(any)(ints x) {
  int found = 0;
  for (int lane = 0; lane < WIDTH; lane++) found |= x[lane];
  return found;
}

/* Sum of LANES lanes, in a fixed order. */
INLINE float NAME(total)(const vec x[PARTS]) {
  float sum[LANES];
  for (int v = 0; v < PARTS; v++) NAME(store)(sum + v * WIDTH, x[v]);
  return NAME(fold)(sum, LANES);
}

/* The largest of n > 0 values. */
INLINE float NAME(highest)(const float *x, long n) {
  float most = x[0];
  long i = 0;
  if (n >= WIDTH) {
    vec highest = NAME(load)(x);
    for (i = WIDTH; i + WIDTH <= n; i += WIDTH)
      highest = NAME(larger)(NAME(load)(x + i), highest);
    for (int lane = 0; lane < WIDTH; lane++)
      if (highest[lane] > most) most = highest[lane];
  }
  for (; i < n; i++)
    if (x[i] > most) most = x[i];
  return most;
}

/* Floats of one type. */
INLINE vec NAME(load_as)(const uint8_t *x, int type) {
  if (type == FLOAT16) return NAME(load_float16)((const uint16_t *)x);
  if (type == BFLOAT16) return NAME(load_bfloat16)((const uint16_t *)x);
  return NAME(load)((const float *)x);
}

/* ---- Products: R rows of x by B blocks of LANES outputs; R and B are constants ---- */

/* Of block b, vector v: index b * PARTS + v. */
#define EACH_VECTOR(i) _Pragma("GCC unroll 16") for (int i = 0; i < B * PARTS; i++)
#define EACH_ROW(i) _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)
#define PLACE(i, at) (((i) / PARTS + (at)) * LANES + (i) % PARTS * WIDTH)
/* Input i of row r: of TOGETHER rows, these are mixed input by input. */
#define INPUT(r, i) (R == TOGETHER ? x[(i) * TOGETHER + (r)] : x[(r) * ldx + (i)])
#if VECTOR_BYTES == 64
#define TOGETHER 8
#else
#define TOGETHER 4
#endif

/* float32, or float16. */
INLINE void NAME(dense)(const Matrix *w, int type, int R, int B, long block,
                        const float *x, long ldx, float *y, long ldy) {
  long n = w->columns, length = n * LANES;
  size_t size = type == FLOAT32 ? 4 : 2;
  const uint8_t *weights = w->data + block * length * size;
  vec even[8][4 * PARTS], odd[8][4 * PARTS];
  for (int r = 0; r < R; r++) EACH_VECTOR(v) even[r][v] = odd[r][v] = (vec){0};
#define WEIGHT(i, v)                                                                 \
  NAME(load_as)(weights + ((v) / PARTS * length + (i) * LANES + (v) % PARTS * WIDTH) * \
                              size, type)
  long i = 0;
  for (; i + 2 <= n; i += 2) {
    for (int b = 0; b < B; b++) {
      const uint8_t *next = weights + (b * length + i * LANES) * size + AHEAD;
      __builtin_prefetch(next);
      if (type == FLOAT32) __builtin_prefetch(next + LANES * size);
    }
    EACH_VECTOR(v) {
      vec w0 = WEIGHT(i, v), w1 = WEIGHT(i + 1, v);
      for (int r = 0; r < R; r++) {
        even[r][v] += INPUT(r, i) * w0;
        odd[r][v] += INPUT(r, i + 1) * w1;
      }
    }
  }
  if (i < n)
    EACH_VECTOR(v)
      for (int r = 0; r < R; r++) even[r][v] += INPUT(r, i) * WEIGHT(i, v);
#undef WEIGHT
  for (int r = 0; r < R; r++)
    EACH_VECTOR(v) NAME(store)(y + r * ldy + PLACE(v, block), even[r][v] + odd[r][v]);
}

INLINE void NAME(pairs)(const Matrix *w, int R, int B, long block, const float *x,
                        long ldx, float *y, long ldy) {
  long half = w->columns / 2;
  const int32_t *words = (const int32_t *)w->data + block * half * LANES;
  vec even[8][4 * PARTS], odd[8][4 * PARTS];
  EACH_ROW(r) EACH_VECTOR(v) even[r][v] = odd[r][v] = (vec){0};
  for (long i = 0; i < half; i++) {
    for (int b = 0; b < B; b++)
      __builtin_prefetch((const uint8_t *)(words + (b * half + i) * LANES) + AHEAD);
    EACH_VECTOR(v) {
      ints pair = NAME(load_ints)(words + (v / PARTS * half + i) * LANES +
                                  v % PARTS * WIDTH);
      vec w0 = (vec)(pair << 16), w1 = (vec)(pair & (int32_t)0xFFFF0000);
      EACH_ROW(r) {
        even[r][v] += INPUT(r, 2 * i) * w0;
        odd[r][v] += INPUT(r, 2 * i + 1) * w1;
      }
    }
  }
  EACH_ROW(r) EACH_VECTOR(v)
    NAME(store)(y + r * ldy + PLACE(v, block), even[r][v] + odd[r][v]);
}

/* The lowest 4 or 8 bits of each word. */
INLINE vec NAME(values)(ints words, int bits) {
#if VECTOR_BYTES == 64
  if (bits == 4) {  /* one permutation, which reads these bits alone */
    const __m512 table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vec)_mm512_permutexvar_ps((__m512i)words, table);
  }
#endif
  return __builtin_convertvector(words & ((1 << bits) - 1), vec);
}

/* Group by group: scale * sum(x q) + bias * sum(x). `plain` has the sums of x, those of
   a row's groups one after the other. */
INLINE void NAME(affine)(const Matrix *w, int bits, int R, int B, long block,
                         const float *x, long ldx, const float *plain, float *y,
                         long ldy) {
  const int per_word = 32 / bits;
  long group_words = w->group / per_word, groups = w->columns / w->group;
  size_t floats = LANES * size_of(w->type), record = record_of(w);
  size_t length = groups * record;
  const uint8_t *start = w->data + block * length;
  vec sums[8][4 * PARTS];
  for (int r = 0; r < R; r++) EACH_VECTOR(v) sums[r][v] = (vec){0};
  for (long g = 0; g < groups; g++, x += w->group * (R == TOGETHER ? TOGETHER : 1)) {
    const uint8_t *group = start + g * record, *words = group + 2 * floats;
    for (int b = 0; b < B; b++)
      for (size_t at = 0; at < 2 * floats; at += 64)
        __builtin_prefetch(group + b * length + at + AHEAD);
    vec part[8][4 * PARTS];
    for (int r = 0; r < R; r++) EACH_VECTOR(v) part[r][v] = (vec){0};
    for (long i = 0; i < group_words; i++) {
      for (int b = 0; b < B; b++)
        __builtin_prefetch(words + b * length + i * LANES * 4 + AHEAD);
      EACH_VECTOR(v) {
        ints word = NAME(load_ints)((const int32_t *)(words + v / PARTS * length) +
                                    i * LANES + v % PARTS * WIDTH);
        for (int j = 0; j < per_word; j++) {
          vec q = NAME(values)(word >> j * bits, bits);
          for (int r = 0; r < R; r++) part[r][v] += INPUT(r, i * per_word + j) * q;
        }
      }
    }
    EACH_VECTOR(v) {
      const uint8_t *scales = group + v / PARTS * length;
      size_t at = v % PARTS * WIDTH * (floats / LANES);
      vec scale = NAME(load_as)(scales + at, w->type);
      vec bias = NAME(load_as)(scales + floats + at, w->type);
      for (int r = 0; r < R; r++) {
        sums[r][v] += part[r][v] * scale;
        sums[r][v] += plain[r * groups + g] * bias;
      }
    }
  }
  for (int r = 0; r < R; r++)
    EACH_VECTOR(v) NAME(store)(y + r * ldy + PLACE(v, block), sums[r][v]);
}
#undef EACH_VECTOR
#undef EACH_ROW
#undef PLACE
#undef INPUT

typedef void (*NAME(kernel))(const Matrix *, long, const float *, long, const float *,
                             float *, long);

#define KERNEL(KIND, R, B, ...)                                                      \
  TARGET static void NAME(KIND##_##R##x##B)(const Matrix *w, long block,             \
                                            const float *x, long ldx,                \
                                            const float *plain, float *y, long ldy) { \
    (void)plain;                                                                     \
    __VA_ARGS__                                                                      \
  }
#define KERNELS(R, B)                                                                \
  KERNEL(float32, R, B, NAME(dense)(w, FLOAT32, R, B, block, x, ldx, y, ldy);)       \
  KERNEL(float16, R, B, NAME(dense)(w, FLOAT16, R, B, block, x, ldx, y, ldy);)       \
  KERNEL(bfloat16, R, B, NAME(pairs)(w, R, B, block, x, ldx, y, ldy);)               \
  QUANTIZED(R, B)
#define QUANTIZED(R, B)                                                              \
  KERNEL(affine8, R, B, NAME(affine)(w, 8, R, B, block, x, ldx, plain, y, ldy);)     \
  KERNEL(affine4, R, B, NAME(affine)(w, 4, R, B, block, x, ldx, plain, y, ldy);)
KERNELS(1, 1)
KERNELS(1, 2)
KERNELS(2, 1)
KERNELS(4, 1)
#if VECTOR_BYTES == 64
KERNELS(8, 1)
QUANTIZED(8, 2)
KERNELS(1, 4)
KERNELS(2, 2)
KERNELS(2, 4)
KERNELS(4, 2)
#endif

/* The kernels for 1, 2, 4 and 8 rows, and for 1, 2 and 4 blocks at once: as many as there
   are registers for. */
#define OF_EACH_KIND(R, B)                                                           \
  { NAME(float32_##R##x##B), NAME(float16_##R##x##B), NAME(bfloat16_##R##x##B),      \
    NAME(affine8_##R##x##B), NAME(affine4_##R##x##B) }
#if VECTOR_BYTES == 64
static const int NAME(at_once)[] = {4, 4, 2, 2};
static const NAME(kernel) NAME(kernels)[4][3][5] = {
    {OF_EACH_KIND(1, 1), OF_EACH_KIND(1, 2), OF_EACH_KIND(1, 4)},
    {OF_EACH_KIND(2, 1), OF_EACH_KIND(2, 2), OF_EACH_KIND(2, 4)},
    {OF_EACH_KIND(4, 1), OF_EACH_KIND(4, 2)},
    {OF_EACH_KIND(8, 1),
     {NULL, NULL, NULL, NAME(affine8_8x2), NAME(affine4_8x2)}},
};
#else
static const int NAME(at_once)[] = {2, 1, 1};
static const NAME(kernel) NAME(kernels)[3][3][5] = {
    {OF_EACH_KIND(1, 1), OF_EACH_KIND(1, 2)},
    {OF_EACH_KIND(2, 1)},
    {OF_EACH_KIND(4, 1)},
};
#endif
#undef KERNEL
#undef KERNELS
#undef QUANTIZED
#undef OF_EACH_KIND

/* Sums of each group of `count` of a row's inputs. */
TARGET static void NAME(sum_groups)(const Matrix *w, long count, const float *x,
                                    float *plain) {
  for (long g = 0; w->bits && g < count; g += w->group) {
    vec sum[PARTS] = {{0}};
    for (long i = 0; i < w->group; i += LANES)
      for (int v = 0; v < PARTS; v++) sum[v] += NAME(load)(x + g + i + v * WIDTH);
    *plain++ = NAME(total)(sum);
  }
}

/* Mix each TOGETHER rows of the first `m`, and sum the groups of all of these: a phase.
   No two threads write to one line. */
TARGET static void NAME(mix_rows)(Crew *crew, const Matrix *w, long m, const float *x,
                                  long ldx, float *mixed, float *plain) {
  long n = w->columns, groups = w->bits ? n / w->group : 0;
  long some = w->bits ? 4 * w->group : 256, parts = (n + some - 1) / some;
  for (long piece; (piece = take_piece(crew, m / TOGETHER * parts)) >= 0;) {
    long first = piece / parts * TOGETHER, start = piece % parts * some;
    long count = n - start < some ? n - start : some;
    float *to = mixed + first * n + start * TOGETHER;
    for (int r = 0; r < TOGETHER; r++) {
      const float *from = x + (first + r) * ldx + start;
      for (long i = 0; i < count; i++) to[i * TOGETHER + r] = from[i];
      NAME(sum_groups)(w, count, from, plain + (first + r) * groups + start / some * 4);
    }
  }
  meet(crew, MANY);
}

/* y = x w^T for m rows: a phase, which the caller ends. Rows of x and y are ldx and ldy
   apart; y is written up to a multiple of LANES. A few blocks of the matrix are read, then
   used for every row. */
TARGET static void NAME(product)(Crew *crew, const Matrix *w, long m, const float *x,
                                 long ldx, float *y, long ldy, const Room *room) {
  int kind = w->bits ? w->bits == 8 ? 3 : 4 : w->type;
  long blocks = blocks_of(w), groups = w->bits ? w->columns / w->group : 0;
  long mixed = m / TOGETHER * TOGETHER;
  if (mixed) NAME(mix_rows)(crew, w, mixed, x, ldx, room->mixed, room->sums);
  /* As many blocks at once as leave no thread with much more than its share. */
  long wide = NAME(at_once)[0];
  while (wide > 1 && (blocks + wide * crew->of - 1) / (wide * crew->of) * wide *
                             crew->of * 8 > blocks * 9)
    wide /= 2;
  int is_first = 1;
  for (long i; (i = take_piece(crew, (blocks + wide - 1) / wide)) >= 0;) {
    for (long r = mixed; is_first && r < m; r++)
      NAME(sum_groups)(w, w->columns, x + r * ldx, room->own + r * groups);
    is_first = 0;
    long start = i * wide, end = start + wide < blocks ? start + wide : blocks;
    for (long r = 0; r < m;) {
      int size = 0;
      while (2 << size <= m - r && 2 << size <= TOGETHER) size++;
      const float *from = r < mixed ? room->mixed + r * w->columns : x + r * ldx;
      const float *sums = (r < mixed ? room->sums : room->own) + r * groups;
      for (long block = start; block < end;) {
        /* Floats have two sums of an output. */
        int most = w->bits || 1 << size < TOGETHER ? NAME(at_once)[size] : 1, some = 0;
        while (2 << some <= most && block + (2 << some) <= end) some++;
        NAME(kernels)[size][some][kind](w, block, from, ldx, sums, y + r * ldy, ldy);
        block += 1 << some;
      }
      r += 1 << size;
    }
  }
}

TARGET static void NAME(multiply)(Crew *crew, void *what) {
  const Multiplication *m = what;
  long n = m->w->columns;
  Room room = {.own = m->own + crew->me * n};
  NAME(product)(crew, m->w, 1, m->x, n, m->y, padded(m->w->rows), &room);
  meet(crew, 0);
}

/* ---- What lies between products ---- */

/* x += y, if there is one, of n values; what is left of it after normalization. */
TARGET static void NAME(norm)(const float *weight, long n, float *x, const float *y,
                              float *to) {
  for (long i = 0; y && i < n; i++) x[i] += y[i];
  vec sums[PARTS] = {{0}};
  long i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int v = 0; v < PARTS; v++) {
      vec values = NAME(load)(x + i + v * WIDTH);
      sums[v] += values * values;
    }
  float sum = NAME(total)(sums);
  for (; i < n; i++) sum += x[i] * x[i];
  float scale = 1 / sqrtf(sum / (float)n + 1e-8f);
  for (i = 0; i < n; i++) to[i] = x[i] * scale * weight[i];
}

/* silu(x) * (what stands `apart` from it), of n values. */
TARGET static void NAME(gate)(long n, float *x, long apart) {
  long i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    vec a = NAME(load)(x + i);
    NAME(store)(x + i, a / (1.0f + NAME(exp)(-a)) * NAME(load)(x + apart + i));
  }
  if (i < n) {
    float a[WIDTH] = {0};
    memcpy(a, x + i, (size_t)(n - i) * sizeof *a);
    vec gates = NAME(load)(a);
    NAME(store)(a, gates / (1.0f + NAME(exp)(-gates)));
    for (long j = i; j < n; j++) x[j] = a[j - i] * x[apart + j];
  }
}

TARGET static void NAME(rotate)(long head_dim, float *x, const float *cosines,
                                const float *sines) {
  for (long i = 0; i < head_dim / 2; i++) {
    float real = x[2 * i], imaginary = x[2 * i + 1];
    x[2 * i] = real * cosines[i] - imaginary * sines[i];
    x[2 * i + 1] = real * sines[i] + imaginary * cosines[i];
  }
}

/* One of a head's vectors at 8 bits: its scale, and bytes that are `apart`. */
TARGET static void NAME(remember_bytes)(long n, const float *x, float *scale, int8_t *to,
                                        long apart) {
  const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
  float most = 0;
  for (long d = 0; d < n; d++) most = fabsf(x[d]) > most ? fabsf(x[d]) : most;
  float times = most > 0 ? 127 / most : 0;
  *scale = most / 127;
  for (long d = 0; d < n; d++) to[d * apart] = (int8_t)(x[d] * times + round - round);
}

/* Keys and values of one head: `slot` from a position's own. */
TARGET static void NAME(remember)(long head_dim, long slot, const float *key,
                                  const float *value, float *keys, float *values,
                                  int bits) {
  if (bits == 8) {
    long first = slot / LANES * LANES, lane = slot % LANES;
    float *block = keys + first * kept_width(head_dim, 8);
    NAME(remember_bytes)(head_dim, key, block + lane, (int8_t *)(block + LANES) + lane, LANES);
    block = values + first * kept_width(head_dim, 8);
    NAME(remember_bytes)(head_dim, value, block + lane,
                         (int8_t *)(block + LANES) + lane * head_dim, 1);
    return;
  }
  float *place = keys + slot / LANES * head_dim * LANES + slot % LANES;
  for (long d = 0; d < head_dim; d++) place[d * LANES] = key[d];
  long width = padded(head_dim);
  memcpy(values + slot * width, value, (size_t)head_dim * sizeof *value);
  memset(values + slot * width + head_dim, 0, (size_t)(width - head_dim) * sizeof *value);
}

/* Scores of the slots of whole blocks from `slot` to `end`. */
INLINE void NAME(score)(long head_dim, long slot, long end, float scale, const float *q,
                        const float *keys, int bits, float *weights) {
  for (; slot < end; slot += LANES) {
    vec even[PARTS] = {{0}}, odd[PARTS] = {{0}};
    const float *block = keys + slot * kept_width(head_dim, bits);
    long d = 0;
    if (bits == 8) {
      const int8_t *bytes = bytes_of(block);
      for (; d < head_dim; d += 2) {
        __builtin_prefetch(bytes + d * LANES + FAR);
        for (int v = 0; v < PARTS; v++) {
          even[v] += q[d] * NAME(load_bytes)(bytes + d * LANES + v * WIDTH);
          odd[v] += q[d + 1] * NAME(load_bytes)(bytes + (d + 1) * LANES + v * WIDTH);
        }
      }
      for (int v = 0; v < PARTS; v++) {
        even[v] = (even[v] + odd[v]) * NAME(load)(block + v * WIDTH);
        odd[v] = (vec){0};
      }
    }
    for (; d + 2 <= head_dim; d += 2) {
      __builtin_prefetch(block + d * LANES + FAR, 0, 2);
      __builtin_prefetch(block + (d + 1) * LANES + FAR, 0, 2);
      for (int v = 0; v < PARTS; v++) {
        even[v] += q[d] * NAME(load)(block + d * LANES + v * WIDTH);
        odd[v] += q[d + 1] * NAME(load)(block + (d + 1) * LANES + v * WIDTH);
      }
    }
    for (int v = 0; v < PARTS; v++) {
      if (d < head_dim) even[v] += q[d] * NAME(load)(block + d * LANES + v * WIDTH);
      NAME(store)(weights + slot + v * WIDTH, (even[v] + odd[v]) * scale);
    }
  }
}

/* out += the values from `slot` to `end`, each times its weight; `count` vectors, from
   number `d` of each on. */
INLINE void NAME(mix)(long slot, long end, long width, long d, int count,
                      const float *weights, const float *values, int bits, vec *out) {
  for (; bits == 8 && slot < end; slot++) {
    const float *block = values + slot / LANES * LANES * kept_width(width, 8);
    const int8_t *value = bytes_of(block) + slot % LANES * width + d;
    for (int v = 0; v < count; v += 4 * PARTS) __builtin_prefetch(value + v * WIDTH + FAR);
    for (int v = 0; v < count; v++)
      out[v] += weights[slot] * NAME(load_bytes)(value + v * WIDTH);
  }
  for (; slot < end; slot++) {
    const float *value = values + slot * width + d;
    for (int v = 0; v < count; v += PARTS) __builtin_prefetch(value + v * WIDTH + FAR, 0, 2);
    for (int v = 0; v < count; v++) out[v] += weights[slot] * NAME(load)(value + v * WIDTH);
  }
}

/* Weights of slots at 8 bits, from `slot` to `end`, times the scales of their values. */
INLINE void NAME(rescale)(long slot, long end, long width, const float *values,
                          float *weights) {
  for (; slot < end; slot += LANES)
    for (int v = 0; v < LANES; v += WIDTH) {
      const float *scales = values + slot * kept_width(width, 8) + v;
      NAME(store)(weights + slot + v, NAME(load)(weights + slot + v) * NAME(load)(scales));
    }
}

/* Attention of one head over the slots from `first` (0 or 1) to `filled`; y may be q. */
TARGET static void NAME(attend)(long head_dim, long first, long filled, const float *q,
                                Past past, float *weights, float *y) {
  float scale = 1 / sqrtf((float)head_dim);
  long apart = past.num_first;
  NAME(score)(head_dim, 0, apart, scale, q, past.first_keys, past.bits, weights);
  NAME(score)(head_dim, apart, filled, scale, q, past.keys, past.bits, weights);
  float most = NAME(highest)(weights + first, filled - first);
  for (long slot = 0; slot < filled; slot += WIDTH)
    NAME(store)(weights + slot, NAME(exp)(NAME(load)(weights + slot) - most));
  for (long slot = filled; slot < padded(filled); slot++) weights[slot] = 0;
  if (first) weights[0] = 0;
  vec sums[PARTS] = {{0}};
  for (long slot = 0; slot < filled; slot += LANES)
    for (int v = 0; v < PARTS; v++) sums[v] += NAME(load)(weights + slot + v * WIDTH);
  float share = 1 / NAME(total)(sums);
  long width = padded(head_dim);
  if (past.bits == 8) {
    NAME(rescale)(0, apart, width, past.first_values, weights);
    NAME(rescale)(apart, filled, width, past.values, weights);
  }
  enum { AT_ONCE = 4 };
  for (long d = 0; d < width; d += AT_ONCE * WIDTH) {
    vec out[AT_ONCE] = {{0}};
    long left = head_dim - d;
    const float *own = past.values, *shared = past.first_values;
    long after = max_of(first, apart);
    if (width - d >= AT_ONCE * WIDTH) {
      NAME(mix)(first, apart, width, d, AT_ONCE, weights, shared, past.bits, out);
      NAME(mix)(after, filled, width, d, AT_ONCE, weights, own, past.bits, out);
    } else {
      for (int v = 0; v * WIDTH < width - d; v++) {
        long from = d + v * WIDTH;
        NAME(mix)(first, apart, width, from, 1, weights, shared, past.bits, out + v);
        NAME(mix)(after, filled, width, from, 1, weights, own, past.bits, out + v);
      }
    }
    for (int v = 0; v < AT_ONCE && left > 0; v++, left -= WIDTH) {
      out[v] *= share;
      memcpy(y + d + v * WIDTH, &out[v], (size_t)(left < WIDTH ? left : WIDTH) * 4);
    }
  }
}

TARGET static float *NAME(take)(float **scratch, long n) {
  float *taken = *scratch;
  *scratch += padded(n);
  return taken;
}

/* x += y, if there is one, and y = x normalized, of m rows; between two phases. */
TARGET static void NAME(norm_all)(Crew *crew, const float *weight, long m, long n,
                                  float *x, int adds, float *y, long ld) {
  meet(crew, m);
  for (long r; (r = take_piece(crew, m)) >= 0;)
    NAME(norm)(weight, n, x + r * ld, adds ? y + r * ld : NULL, y + r * ld);
  meet(crew, MANY);
}

/* A layer's second half, after attention: to x, the residual, what attention found is
   added; y is what is to be added next. The caller ends the last phase. */
TARGET static void NAME(finish)(Crew *crew, const Layer *layer, long m, long dim,
                                long hidden, float *x, const float *attended,
                                long ld_attended, float *y, float *wide,
                                const Room *room) {
  enum { SOME = 16 * LANES };
  long ld = padded(dim), ld_wide = padded(2 * hidden);
  long parts = (hidden + SOME - 1) / SOME;
  NAME(product)(crew, &layer->out_proj, m, attended, ld_attended, y, ld, room);
  NAME(norm_all)(crew, layer->norm2, m, dim, x, 1, y, ld);
  NAME(product)(crew, &layer->linear_in, m, y, ld, wide, ld_wide, room);
  meet(crew, m * parts);
  for (long i; (i = take_piece(crew, m * parts)) >= 0;) {
    long start = i % parts * SOME, left = hidden - start;
    NAME(gate)(left < SOME ? left : SOME, wide + i / parts * ld_wide + start, hidden);
  }
  meet(crew, MANY);
  NAME(product)(crew, &layer->linear_out, m, wide, ld_wide, y, ld, room);
}

/* The first half of temporal layer `l`: the next position of each row, whose row of x is
   that of `rows`, becomes queries, keys and values; the first of these are replaced by
   what they attend to. Rows may be positions of one conversation, in order: each is
   written before the next one attends. */
TARGET static void NAME(attend_all)(Crew *crew, const Model *m, long l, long num_rows,
                                    const Row *rows, float *x, float *y, float *qkv,
                                    const Room *room) {
  Widths w = widths_of(m);
  const Layer *layer = m->temporal + l;
  long head_dim = m->dim / m->heads;
  int bits = m->kv_bits;
  long key_width = kept_width(head_dim, bits);
  long value_width = kept_width(padded(head_dim), bits);
  NAME(norm_all)(crew, layer->norm1, num_rows, m->dim, x, l > 0, y, w.dim);
  NAME(product)(crew, &layer->in_proj, num_rows, y, w.dim, qkv, w.qkv, room);
  meet(crew, MANY);
  /* Head by head: what rows share stays near from one to the next. */
  long at_once = num_rows > 1 && rows[0].keys == rows[1].keys ? num_rows : 1;
  for (long i; (i = take_piece(crew, m->heads * num_rows / at_once)) >= 0;) {
    long h = i * at_once / num_rows, first = i * at_once % num_rows;
    for (long r = first; r < first + at_once; r++) {
      const Row *row = rows + r;
      float *q = qkv + r * w.qkv + h * head_dim, *key = q + m->dim, *value = key + m->dim;
      NAME(rotate)(head_dim, q, row->cosines, row->sines);
      NAME(rotate)(head_dim, key, row->cosines, row->sines);
      long slot = row->end % m->window, head = l * m->heads + h;
      long filled = row->end < m->window ? row->end + 1 : m->window;
      float *keys = row->keys + head * row->slots * key_width;
      float *values = row->values + head * row->slots * value_width;
      Past past = {keys, values, row->first_keys, row->first_values, row->num_first, bits};
      if (past.num_first) {
        past.first_keys += head * row->first_slots * key_width;
        past.first_values += head * row->first_slots * value_width;
      }
      NAME(remember)(head_dim, slot, key, value, keys, values, bits);
      NAME(attend)(head_dim, 0, filled, q, past, room->own, q);
    }
  }
  meet(crew, MANY);
}

/* Positions that are read and not answered: of the last layer, keys and values will do. */
TARGET static void NAME(read)(Crew *crew, void *what) {
  const Reading *reading = what;
  const Model *m = reading->model;
  long num_rows = reading->num_rows;
  float *scratch = reading->scratch;
  Widths w = widths_of(m);
  float *x = NAME(take)(&scratch, num_rows * w.dim);
  float *y = NAME(take)(&scratch, num_rows * w.dim);
  float *qkv = NAME(take)(&scratch, num_rows * w.qkv);
  float *wide = NAME(take)(&scratch, num_rows * w.hidden);
  Room room = room_of(m, num_rows, crew->me, scratch);
  for (long r; (r = take_piece(crew, num_rows)) >= 0;)
    memcpy(x + r * w.dim, reading->inputs + r * m->dim, (size_t)m->dim * sizeof *x);
  for (long l = 0; l < m->layers; l++) {
    if (l)
      NAME(finish)(crew, m->temporal + l - 1, num_rows, m->dim, m->hidden, x, qkv, w.qkv,
                   y, wide, &room);
    NAME(attend_all)(crew, m, l, num_rows, reading->rows, x, y, qkv, &room);
  }
}

/* ---- Choice ---- */

/* Bits of the values from `first` on of mx.random.uniform(shape=(width,), key=key):
   Threefry of two uints, which are those of a value in each half, and twenty rounds. */
INLINE uints NAME(random_bits)(const uint32_t key[2], uint32_t first, uint32_t width) {
  static const uint32_t lanes[LANES] = {0, 1, 2,  3,  4,  5,  6,  7,
                                        8, 9, 10, 11, 12, 13, 14, 15};
  static const int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA};
  uint32_t half = width / 2, start = half + width % 2; /* of the second half */
  uints idx = *(const uints *)lanes + first;
  uints second = (uints)(idx >= start);
  uints x = idx - (second & start) + keys[0];
  uints y = (second & idx) | (~second & (uints)(idx < half) & (idx + start));
  y += keys[1];
  _Pragma("GCC unroll 5") for (uint32_t i = 0; i < 5; i++) {
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
      int by = turns[i % 2][j];
      x += y;
      y = (y << by | y >> (32 - by)) ^ x;
    }
    x += keys[(i + 1) % 3];
    y += keys[(i + 2) % 3] + i + 1;
  }
  return (second & y) | (~second & x);
}

TARGET static int32_t NAME(largest)(const float *x, long n) {
  float highest = NAME(highest)(x, n);
  long i = 0;
  while (i < n && x[i] != highest) i++;
  return i < n ? (int32_t)i : 0;
}

/* The float at place `order` of all floats, the least first. */
INLINE float NAME(at_order)(uint32_t order) {
  uint32_t bits = order >> 31 ? order & 0x7FFFFFFFu : ~order;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* The k largest of n values: all that are above `least`, and of those that equal it the
   ones up to place `last`. It is found bit by bit, from the highest. */
TARGET static float NAME(least_of)(const float *x, long n, long k, long *last) {
  uint32_t order = 0;
  *last = n;
  for (int bit = 31; bit >= 0; bit--) {
    uint32_t tried = order | 1u << bit;
    float least = NAME(at_order)(tried);
    ints counts = {0};
    long i = 0, count = 0;
    for (; i + WIDTH <= n; i += WIDTH) counts -= NAME(load)(x + i) >= least;
    for (; i < n; i++) count += x[i] >= least;
    for (int lane = 0; lane < WIDTH; lane++) count += counts[lane];
    if (count >= k) order = tried;
    if (count == k) return least;
  }
  float least = order ? NAME(at_order)(order) : -INFINITY;
  for (long i = 0; i < n; i++) k -= x[i] > least;
  for (long i = 0; i < n && k; i++)
    if (x[i] == least && --k == 0) *last = i;
  return least;
}

/* The largest of logit / temp - log(noise) among the top_k, of ties for the last place
   the lowest ids; the noise of an id is value `first + id` of the key's. */
TARGET static int32_t NAME(choose)(const float *logits, long card, float temp, long top_k,
                                   const uint32_t key[2], uint32_t first,
                                   uint32_t width) {
  int32_t best = NAME(largest)(logits, card);
  if (!(temp > 0)) return best;
  long last = card;
  float least = top_k < card ? NAME(least_of)(logits, card, top_k, &last) : -INFINITY;
  float score = -INFINITY;
  int32_t chosen = best;
  /* From the largest's vector on, as most ids are then out of reach of any noise. */
  for (long at = -WIDTH; at < card; at += WIDTH) {
    long start = at < 0 ? best / WIDTH * WIDTH : at;
    vec values = NAME(load)(logits + start), scaled = values / temp;
    ints reach = (values >= least) & (scaled + MOST_GUMBEL >= score);
    if (!NAME(any)(reach)) continue;
    uints noise = NAME(random_bits)(key, first + (uint32_t)start, width);
    /* -log(-log(u)) is at most -log(1 - u), which is tried first, with room for what
       is rounded. */
    float beaten = score - 0.01f - 1e-6f * fabsf(score);
    vec away = 1.0f - __builtin_convertvector(noise, vec) * 0x1p-32f;
    reach &= away <= NAME(exp)(scaled - beaten);
    for (long lane = 0; lane < WIDTH && start + lane < card; lane++) {
      if (!reach[lane] || (values[lane] == least && start + lane > last)) continue;
      float u = (float)noise[lane] * 0x1p-32f;
      u = u < 1 - 0x1p-24f ? u : 1 - 0x1p-24f;
      float found = scaled[lane] - logf(-logf(u > LEAST_UNIFORM ? u : LEAST_UNIFORM));
      int32_t id = (int32_t)(start + lane);
      if (found > score || (found == score && id < chosen)) {
        score = found;
        chosen = id;
      }
    }
  }
  return chosen;
}

/* Choose the tokens at place `at` of the agent's columns, if they are not given, from
   `logits` (rows, padded card); those are written out as values from `place` on. After
   a phase, and a phase itself, which the caller ends. */
TARGET static void NAME(choose_all)(Crew *crew, const Step *step, long at, long card,
                                    float temp, long top_k, long noise,
                                    const float *logits, long place) {
  const Model *m = step->model;
  long num_agent = 1 + m->steps, num_logits = m->text_card + (long)m->steps * m->card;
  meet(crew, step->num_rows);
  for (long r; (r = take_piece(crew, step->num_rows)) >= 0;) {
    const float *row = logits + r * padded(card);
    long idx = r * num_agent + at;
    uint32_t first = (uint32_t)noise, width = (uint32_t)step->sampling->noise_width;
    int32_t given = step->given ? step->given[idx] : NOT_FORCED;
    const Row *one = step->rows + r;
    int32_t id = NAME(choose)(row, card, temp, top_k, one->key, first, width);
    step->agent[idx] = given > NOT_FORCED ? given : instead_of(id, given);
    for (long i = 0; i < one->num_others && given <= NOT_FORCED; i++) {
      Other *other = one->others + i;
      if (other->is_apart) continue;
      id = NAME(choose)(row, card, temp, top_k, other->key, first, width);
      other->is_apart = instead_of(id, given) != step->agent[idx];
    }
    if (step->logits)
      memcpy(step->logits + r * num_logits + place, row, (size_t)card * sizeof *row);
  }
}

TARGET static void NAME(step)(Crew *crew, void *what) {
  const Step *step = what;
  const Model *m = step->model;
  const Sampling *sampling = step->sampling;
  long num_rows = step->num_rows, num_agent = 1 + m->steps;
  float *scratch = step->scratch;
  Widths w = widths_of(m);
  long inputs_width = padded((long)m->steps * m->dep_dim);
  long slots = padded(m->steps);
  long dep_head = m->dep_dim / m->dep_heads, dep_padded = padded(dep_head);
  float *x = NAME(take)(&scratch, num_rows * w.dim);
  float *y = NAME(take)(&scratch, num_rows * w.dim);
  float *qkv = NAME(take)(&scratch, num_rows * max_of(w.qkv, w.dep_qkv));
  float *wide = NAME(take)(&scratch, num_rows * max_of(w.hidden, w.dep_hidden));
  float *inputs = NAME(take)(&scratch, num_rows * inputs_width);
  float *dep_x = NAME(take)(&scratch, num_rows * w.dep_dim);
  float *dep_y = NAME(take)(&scratch, num_rows * w.dep_dim);
  float *text = NAME(take)(&scratch, num_rows * w.text);
  float *audio = NAME(take)(&scratch, num_rows * w.audio);
  long dep_keys_size = m->dep_heads * slots * dep_head;
  long dep_values_size = m->dep_heads * slots * dep_padded;
  float *dep_keys = NAME(take)(&scratch, num_rows * m->dep_layers * dep_keys_size);
  float *dep_values = NAME(take)(&scratch, num_rows * m->dep_layers * dep_values_size);
  Room room = room_of(m, num_rows, crew->me, scratch);

  for (long r; (r = take_piece(crew, num_rows)) >= 0;)
    sum_rows(m, step->columns + r * m->streams, x + r * w.dim);
  for (long l = 0; l < m->layers; l++) {
    NAME(attend_all)(crew, m, l, num_rows, step->rows, x, y, qkv, &room);
    NAME(finish)(crew, m->temporal + l, num_rows, m->dim, m->hidden, x, qkv, w.qkv, y,
                 wide, &room);
  }
  NAME(norm_all)(crew, m->out_norm, num_rows, m->dim, x, m->layers > 0, y, w.dim);
  NAME(product)(crew, &m->text_linear, num_rows, y, w.dim, text, w.text, &room);
  NAME(choose_all)(crew, step, 0, m->text_card, sampling->text_temp,
                   sampling->text_top_k, 0, text, 0);
  meet(crew, MANY);
  NAME(product)(crew, &m->dep_input, num_rows, y, w.dim, inputs, inputs_width, &room);
  for (long s = 0; s < m->steps; s++) {
    const Table *table = s ? &m->dep_audio_emb : &m->dep_text_emb;
    long first = s ? (s - 1) * (m->card + 1) : 0;
    meet(crew, num_rows);
    for (long r; (r = take_piece(crew, num_rows)) >= 0;) {
      int32_t token = step->agent[r * num_agent + s];
      float *row = dep_x + r * w.dep_dim;
      memcpy(row, inputs + r * inputs_width + s * m->dep_dim, (size_t)m->dep_dim * 4);
      if (token >= 0) add_row(table, first + token, row);
    }
    long hide_first = s == m->hiding_step;
    for (long l = 0; l < m->dep_layers; l++) {
      const Layer *layer = m->depformer + s * m->dep_layers + l;
      NAME(norm_all)(crew, layer->norm1, num_rows, m->dep_dim, dep_x, l > 0, dep_y,
                     w.dep_dim);
      NAME(product)(crew, &layer->in_proj, num_rows, dep_y, w.dep_dim, qkv, w.dep_qkv,
                    &room);
      meet(crew, MANY);
      for (long i; (i = take_piece(crew, num_rows * m->dep_heads)) >= 0;) {
        long r = i / m->dep_heads, h = i % m->dep_heads, at = r * m->dep_layers + l;
        float *q = qkv + r * w.dep_qkv + h * dep_head;
        float *key = q + m->dep_dim, *value = key + m->dep_dim;
        float *keys = dep_keys + at * dep_keys_size + h * slots * dep_head;
        float *values = dep_values + at * dep_values_size + h * slots * dep_padded;
        Past past = {.keys = keys, .values = values, .bits = 32};
        NAME(remember)(dep_head, s, key, value, keys, values, past.bits);
        NAME(attend)(dep_head, hide_first, s + 1, q, past, room.own, q);
      }
      meet(crew, MANY);
      NAME(finish)(crew, layer, num_rows, m->dep_dim, m->dep_hidden, dep_x, qkv,
                   w.dep_qkv, dep_y, wide, &room);
    }
    meet(crew, num_rows);
    for (long r; (r = take_piece(crew, num_rows)) >= 0;)
      for (long i = 0; i < m->dep_dim && m->dep_layers; i++)
        dep_x[r * w.dep_dim + i] += dep_y[r * w.dep_dim + i];
    meet(crew, MANY);
    NAME(product)(crew, m->dep_heads_out + s, num_rows, dep_x, w.dep_dim, audio, w.audio,
                  &room);
    NAME(choose_all)(crew, step, 1 + s, m->card, sampling->temp, sampling->top_k,
                     sampling->text_noise + s * m->card, audio,
                     m->text_card + s * m->card);
  }
  meet(crew, 0);
}
#undef TOGETHER
