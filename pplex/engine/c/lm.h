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

/* ---- Products: R rows of x by B blocks of LANES outputs; R and B are constants ---- */

/* Of block b, vector v: index b * PARTS + v. */
#define EACH_VECTOR(i) _Pragma("GCC unroll 16") for (int i = 0; i < B * PARTS; i++)
#define EACH_ROW(i) _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)
#define PLACE(i, at, length)                                                         \
  (((i) / PARTS * (length) + (at)) * LANES + (i) % PARTS * WIDTH)

INLINE void NAME(dense32)(const Matrix *w, int R, int B, long block, const float *x,
                          long ldx, float *y, long ldy) {
  long n = w->columns;
  const float *weights = (const float *)w->words + block * n * LANES;
  vec even[8][4 * PARTS], odd[8][4 * PARTS];
  for (int r = 0; r < R; r++) EACH_VECTOR(v) even[r][v] = odd[r][v] = (vec){0};
  long i = 0;
  for (; i + 2 <= n; i += 2) {
    for (int b = 0; b < B; b++) {
      __builtin_prefetch(weights + (b * n + i) * LANES + AHEAD);
      __builtin_prefetch(weights + (b * n + i + 1) * LANES + AHEAD);
    }
    EACH_VECTOR(v) {
      vec w0 = NAME(load)(weights + PLACE(v, i, n));
      vec w1 = NAME(load)(weights + PLACE(v, i + 1, n));
      for (int r = 0; r < R; r++) {
        even[r][v] += x[r * ldx + i] * w0;
        odd[r][v] += x[r * ldx + i + 1] * w1;
      }
    }
  }
  if (i < n)
    EACH_VECTOR(v)
      for (int r = 0; r < R; r++)
        even[r][v] += x[r * ldx + i] * NAME(load)(weights + PLACE(v, i, n));
  for (int r = 0; r < R; r++)
    EACH_VECTOR(v)
      NAME(store)(y + r * ldy + PLACE(v, block, 1), even[r][v] + odd[r][v]);
}

INLINE void NAME(dense16)(const Matrix *w, int R, int B, long block, const float *x,
                          long ldx, float *y, long ldy) {
  long half = w->columns / 2;
  const int32_t *words = w->words + block * half * LANES;
  vec even[8][4 * PARTS], odd[8][4 * PARTS];
  EACH_ROW(r) EACH_VECTOR(v) even[r][v] = odd[r][v] = (vec){0};
  for (long i = 0; i < half; i++) {
    for (int b = 0; b < B; b++)
      __builtin_prefetch(words + (b * half + i) * LANES + AHEAD);
    EACH_VECTOR(v) {
      ints pair = NAME(load_ints)(words + PLACE(v, i, half));
      vec w0 = (vec)(pair << 16), w1 = (vec)(pair & (int32_t)0xFFFF0000);
      EACH_ROW(r) {
        even[r][v] += x[r * ldx + 2 * i] * w0;
        odd[r][v] += x[r * ldx + 2 * i + 1] * w1;
      }
    }
  }
  EACH_ROW(r) EACH_VECTOR(v)
    NAME(store)(y + r * ldy + PLACE(v, block, 1), even[r][v] + odd[r][v]);
}

/* The lowest 4 or 8 bits of each word. */
INLINE vec NAME(values)(ints words, int bits) {
#if VECTOR_BYTES == 64
  if (bits == 4) {  /* one permutation, which reads these bits alone */
    const vec table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(table, words);
  }
#endif
  return __builtin_convertvector(words & ((1 << bits) - 1), vec);
}

/* Group by group: scale * sum(x q) + bias * sum(x). */
INLINE void NAME(affine)(const Matrix *w, int bits, int R, int B, long block,
                         const float *x, long ldx, float *y, long ldy) {
  const int per_word = 32 / bits;
  long row_words = w->columns / per_word, group_words = w->group / per_word;
  long groups = w->columns / w->group;
  const int32_t *words = w->words + block * row_words * LANES;
  const float *scales = w->scales + block * groups * LANES;
  const float *biases = w->biases + block * groups * LANES;
  vec sums[8][4 * PARTS];
  for (int r = 0; r < R; r++) EACH_VECTOR(v) sums[r][v] = (vec){0};
  for (long g = 0; g < groups; g++) {
    vec part[8][4 * PARTS];
    float plain[8] = {0};
    for (int r = 0; r < R; r++) EACH_VECTOR(v) part[r][v] = (vec){0};
    for (long i = g * group_words; i < (g + 1) * group_words; i++) {
      for (int b = 0; b < B; b++)
        __builtin_prefetch(words + (b * row_words + i) * LANES + AHEAD);
      EACH_VECTOR(v) {
        ints word = NAME(load_ints)(words + PLACE(v, i, row_words));
        for (int j = 0; j < per_word; j++) {
          vec q = NAME(values)(word >> j * bits, bits);
          for (int r = 0; r < R; r++) part[r][v] += x[r * ldx + i * per_word + j] * q;
        }
      }
    }
    for (int r = 0; r < R; r++) {
      vec sum[PARTS] = {{0}};
      for (long i = 0; i < w->group; i += LANES)
        for (int v = 0; v < PARTS; v++)
          sum[v] += NAME(load)(x + r * ldx + g * w->group + i + v * WIDTH);
      plain[r] = NAME(total)(sum);
    }
    EACH_VECTOR(v) {
      vec scale = NAME(load)(scales + PLACE(v, g, groups));
      vec bias = NAME(load)(biases + PLACE(v, g, groups));
      for (int r = 0; r < R; r++) {
        sums[r][v] += part[r][v] * scale;
        sums[r][v] += plain[r] * bias;
      }
    }
  }
  for (int r = 0; r < R; r++)
    EACH_VECTOR(v) NAME(store)(y + r * ldy + PLACE(v, block, 1), sums[r][v]);
}
#undef EACH_VECTOR
#undef EACH_ROW
#undef PLACE

#define KERNEL(KIND, R, B, ...)                                                      \
  TARGET static void NAME(KIND##_##R##x##B)(const Matrix *w, long block,             \
                                            const float *x, long ldx, float *y,      \
                                            long ldy) {                              \
    __VA_ARGS__                                                                      \
  }
#define KERNELS(R, B)                                                                \
  KERNEL(dense32, R, B, NAME(dense32)(w, R, B, block, x, ldx, y, ldy);)              \
  KERNEL(dense16, R, B, NAME(dense16)(w, R, B, block, x, ldx, y, ldy);)              \
  KERNEL(affine8, R, B, NAME(affine)(w, 8, R, B, block, x, ldx, y, ldy);)            \
  KERNEL(affine4, R, B, NAME(affine)(w, 4, R, B, block, x, ldx, y, ldy);)
KERNELS(1, 1)
KERNELS(2, 1)
KERNELS(4, 1)
#if VECTOR_BYTES == 64
KERNELS(8, 1)
KERNELS(1, 4)
KERNELS(2, 4)
KERNELS(4, 2)
#else
KERNELS(1, 2)
#endif

typedef void (*NAME(kernel))(const Matrix *, long, const float *, long, float *, long);

#define ROW_OF_KERNELS(R, B)                                                         \
  { NAME(dense32_##R##x##B), NAME(dense16_##R##x##B), NAME(affine8_##R##x##B),       \
    NAME(affine4_##R##x##B) }

/* A part of `product`: the blocks from `first` to `last`. A few blocks of the matrix are
   read, then used for every row. */
TARGET static void NAME(part)(const Product *p, long first, long last) {
#if VECTOR_BYTES == 64
  static const NAME(kernel) one[4][4] = {ROW_OF_KERNELS(1, 1), ROW_OF_KERNELS(2, 1),
                                         ROW_OF_KERNELS(4, 1), ROW_OF_KERNELS(8, 1)};
  static const NAME(kernel) more[4][4] = {ROW_OF_KERNELS(1, 4), ROW_OF_KERNELS(2, 4),
                                          ROW_OF_KERNELS(4, 2), ROW_OF_KERNELS(8, 1)};
  static const int at_once[4] = {4, 4, 2, 1};
  const int largest = 3;
#else
  static const NAME(kernel) one[3][4] = {ROW_OF_KERNELS(1, 1), ROW_OF_KERNELS(2, 1),
                                         ROW_OF_KERNELS(4, 1)};
  static const NAME(kernel) more[3][4] = {ROW_OF_KERNELS(1, 2), ROW_OF_KERNELS(2, 1),
                                          ROW_OF_KERNELS(4, 1)};
  static const int at_once[3] = {2, 1, 1};
  const int largest = 1;
#endif
  const Matrix *w = p->w;
  int kind = w->bits == FLOAT32 ? 0 : w->bits == BFLOAT16 ? 1 : w->bits == 8 ? 2 : 3;
  int widest = at_once[0];
  for (long start = first; start < last; start += widest) {
    long end = start + widest < last ? start + widest : last;
    for (long r = 0; r < p->rows;) {
      long left = p->rows - r;
      int size = left >= 8 ? 3 : left >= 4 ? 2 : left >= 2 ? 1 : 0;
      if (size > largest) size = largest;
      const float *x = p->x + r * p->ldx;
      float *y = p->y + r * p->ldy;
      long block = start;
      for (; block + at_once[size] <= end; block += at_once[size])
        more[size][kind](w, block, x, p->ldx, y, p->ldy);
      for (; block < end; block++) one[size][kind](w, block, x, p->ldx, y, p->ldy);
      r += 1 << size;
    }
  }
}

/* y = x w^T for m rows. Rows of x and y are ldx and ldy apart; y is written up to a
   multiple of LANES. */
TARGET static void NAME(product)(const Matrix *w, long m, const float *x, long ldx,
                                 float *y, long ldy) {
  Product whole = {NAME(part), w, m, x, ldx, y, ldy};
  run_product(&whole);
}
#undef KERNEL
#undef KERNELS
#undef ROW_OF_KERNELS

/* ---- What lies between products ---- */

TARGET static void NAME(norm)(const float *weight, long m, long n, const float *x,
                              float *y, long ld) {
  for (long r = 0; r < m; r++, x += ld, y += ld) {
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
    for (i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
  }
}

/* The first n of each row: silu(first n) * (next n). */
TARGET static void NAME(gate)(long m, long n, float *x, long ld) {
  for (long r = 0; r < m; r++, x += ld) {
    long i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
      vec a = NAME(load)(x + i);
      NAME(store)(x + i, a / (1.0f + NAME(exp)(-a)) * NAME(load)(x + n + i));
    }
    if (i < n) {
      float a[WIDTH] = {0};
      memcpy(a, x + i, (size_t)(n - i) * sizeof *a);
      vec gates = NAME(load)(a);
      NAME(store)(a, gates / (1.0f + NAME(exp)(-gates)));
      for (long j = i; j < n; j++) x[j] = a[j - i] * x[n + j];
    }
  }
}

TARGET static void NAME(add)(long m, long n, float *x, const float *y, long ldx,
                             long ldy) {
  for (long r = 0; r < m; r++)
    for (long i = 0; i < n; i++) x[r * ldx + i] += y[r * ldy + i];
}

TARGET static void NAME(rotate)(long heads, long head_dim, float *x, const float *cosines,
                                const float *sines) {
  for (long h = 0; h < heads; h++, x += head_dim)
    for (long i = 0; i < head_dim / 2; i++) {
      float real = x[2 * i], imaginary = x[2 * i + 1];
      x[2 * i] = real * cosines[i] - imaginary * sines[i];
      x[2 * i + 1] = real * sines[i] + imaginary * cosines[i];
    }
}

/* Keys and values of one head: `slot` from a position's own. */
TARGET static void NAME(remember)(long head_dim, long slot, const float *key,
                                  const float *value, float *keys, float *values) {
  float *place = keys + slot / LANES * head_dim * LANES + slot % LANES;
  for (long d = 0; d < head_dim; d++) place[d * LANES] = key[d];
  long width = padded(head_dim);
  memcpy(values + slot * width, value, (size_t)head_dim * sizeof *value);
  memset(values + slot * width + head_dim, 0, (size_t)(width - head_dim) * sizeof *value);
}

/* Scores of the slots of whole blocks from `slot` to `end`. */
INLINE void NAME(score)(long head_dim, long slot, long end, float scale, const float *q,
                        const float *keys, float *weights) {
  for (; slot < end; slot += LANES) {
    vec even[PARTS] = {{0}}, odd[PARTS] = {{0}};
    const float *block = keys + slot * head_dim;
    long d = 0;
    for (; d + 2 <= head_dim; d += 2) {
      __builtin_prefetch(block + d * LANES + FAR);
      __builtin_prefetch(block + (d + 1) * LANES + FAR);
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

/* out += the values from `slot` to `end`, each times its weight; `count` vectors. */
INLINE void NAME(mix)(long slot, long end, long width, int count, const float *weights,
                      const float *values, vec *out) {
  for (; slot < end; slot++) {
    const float *value = values + slot * width;
    for (int v = 0; v < count; v += PARTS) __builtin_prefetch(value + v * WIDTH + FAR);
    for (int v = 0; v < count; v++) out[v] += weights[slot] * NAME(load)(value + v * WIDTH);
  }
}

/* Attention of one head over the slots from `first` (0 or 1) to `filled`; y may be q. */
TARGET static void NAME(attend)(long head_dim, long first, long filled, const float *q,
                                Past past, float *weights, float *y) {
  float scale = 1 / sqrtf((float)head_dim);
  long apart = past.num_first;
  NAME(score)(head_dim, 0, apart, scale, q, past.first_keys, weights);
  NAME(score)(head_dim, apart, filled, scale, q, past.keys, weights);
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
  enum { AT_ONCE = 4 };
  for (long d = 0; d < width; d += AT_ONCE * WIDTH) {
    vec out[AT_ONCE] = {{0}};
    long left = head_dim - d;
    const float *own = past.values + d, *shared = apart ? past.first_values + d : own;
    if (width - d >= AT_ONCE * WIDTH) {
      NAME(mix)(first, apart, width, AT_ONCE, weights, shared, out);
      NAME(mix)(max_of(first, apart), filled, width, AT_ONCE, weights, own, out);
    } else {
      for (int v = 0; v * WIDTH < width - d; v++) {
        NAME(mix)(first, apart, width, 1, weights, shared + v * WIDTH, out + v);
        NAME(mix)(max_of(first, apart), filled, width, 1, weights, own + v * WIDTH,
                  out + v);
      }
    }
    for (int v = 0; v < AT_ONCE && left > 0; v++, left -= WIDTH) {
      out[v] *= share;
      memcpy(y + d + v * WIDTH, &out[v], (size_t)(left < WIDTH ? left : WIDTH) * 4);
    }
  }
}

/* A layer's second half, after attention: y attended, x the residual. */
TARGET static void NAME(finish)(const Layer *layer, long m, long dim, long hidden,
                                float *x, const float *attended, long ld_attended,
                                float *y, float *wide) {
  long ld = padded(dim), ld_wide = padded(2 * hidden);
  NAME(product)(&layer->out_proj, m, attended, ld_attended, y, ld);
  NAME(add)(m, dim, x, y, ld, ld);
  NAME(norm)(layer->norm2, m, dim, x, y, ld);
  NAME(product)(&layer->linear_in, m, y, ld, wide, ld_wide);
  NAME(gate)(m, hidden, wide, ld_wide);
  NAME(product)(&layer->linear_out, m, wide, ld_wide, y, ld);
  NAME(add)(m, dim, x, y, ld, ld);
}

TARGET static float *NAME(take)(float **scratch, long n) {
  float *taken = *scratch;
  *scratch += padded(n);
  return taken;
}

/* The first half of temporal layer `l`: the next position of each row, whose row of x is
   that of `rows`, becomes queries, keys and values; the first of these are replaced by
   what they attend to. Rows may be positions of one conversation, in order: each is
   written before the next one attends. */
TARGET static void NAME(attend_all)(const Model *m, long l, long num_rows, const Row *rows,
                              const float *x, float *y, float *qkv, float *weights) {
  Widths w = widths_of(m);
  const Layer *layer = m->temporal + l;
  long head_dim = m->dim / m->heads, head_padded = padded(head_dim);
  NAME(norm)(layer->norm1, num_rows, m->dim, x, y, w.dim);
  NAME(product)(&layer->in_proj, num_rows, y, w.dim, qkv, w.qkv);
  for (long r = 0; r < num_rows; r++)
    NAME(rotate)(2 * m->heads, head_dim, qkv + r * w.qkv, rows[r].cosines, rows[r].sines);
  /* Head by head: what rows share stays near from one to the next. */
  for (long h = 0; h < m->heads; h++)
    for (long r = 0; r < num_rows; r++) {
      const Row *row = rows + r;
      float *q = qkv + r * w.qkv + h * head_dim, *key = q + m->dim, *value = key + m->dim;
      long slot = row->end % m->window, head = l * m->heads + h;
      long filled = row->end < m->window ? row->end + 1 : m->window;
      float *keys = row->keys + head * row->slots * head_dim;
      float *values = row->values + head * row->slots * head_padded;
      Past past = {keys, values, row->first_keys, row->first_values, row->num_first};
      if (past.num_first) {
        past.first_keys += head * row->first_slots * head_dim;
        past.first_values += head * row->first_slots * head_padded;
      }
      NAME(remember)(head_dim, slot, key, value, keys, values);
      NAME(attend)(head_dim, 0, filled, q, past, weights, q);
    }
}

/* Positions that are read and not answered: of the last layer, keys and values will do. */
TARGET static void NAME(read)(const Model *m, long num_rows, const Row *rows,
                              const float *inputs, float *scratch) {
  Widths w = widths_of(m);
  float *x = NAME(take)(&scratch, num_rows * w.dim);
  float *y = NAME(take)(&scratch, num_rows * w.dim);
  float *qkv = NAME(take)(&scratch, num_rows * w.qkv);
  float *wide = NAME(take)(&scratch, num_rows * w.hidden);
  float *weights = NAME(take)(&scratch, padded(m->window));
  for (long r = 0; r < num_rows; r++)
    memcpy(x + r * w.dim, inputs + r * m->dim, (size_t)m->dim * sizeof *x);
  for (long l = 0; l < m->layers; l++) {
    if (l)
      NAME(finish)(m->temporal + l - 1, num_rows, m->dim, m->hidden, x, qkv, w.qkv, y,
                   wide);
    NAME(attend_all)(m, l, num_rows, rows, x, y, qkv, weights);
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

/* A bound that the k largest of n values reach, and with them those that are equal to
   the last: found bit by bit, from the highest. */
TARGET static float NAME(least_of)(const float *x, long n, long k) {
  uint32_t order = 0;
  for (int bit = 31; bit >= 0; bit--) {
    uint32_t tried = order | 1u << bit;
    float least = NAME(at_order)(tried);
    ints counts = {0};
    long i = 0, count = 0;
    for (; i + WIDTH <= n; i += WIDTH) counts -= NAME(load)(x + i) >= least;
    for (; i < n; i++) count += x[i] >= least;
    for (int lane = 0; lane < WIDTH; lane++) count += counts[lane];
    if (count >= k) order = tried;
    if (count == k) break;
  }
  return order ? NAME(at_order)(order) : -INFINITY;
}

/* The largest of logit / temp - log(noise) among the top_k, ties of the last included;
   the noise of an id is value `first + id` of the row's. */
TARGET static int32_t NAME(choose)(const float *logits, long card, float temp, long top_k,
                                   const Row *row, uint32_t first, uint32_t width) {
  int32_t best = NAME(largest)(logits, card);
  if (!(temp > 0)) return best;
  float least = top_k < card ? NAME(least_of)(logits, card, top_k) : -INFINITY;
  float score = -INFINITY;
  int32_t chosen = best;
  /* From the largest's vector on, as most ids are then out of reach of any noise. */
  for (long at = -WIDTH; at < card; at += WIDTH) {
    long start = at < 0 ? best / WIDTH * WIDTH : at;
    vec values = NAME(load)(logits + start), scaled = values / temp;
    ints reach = (values >= least) & (scaled + MOST_GUMBEL >= score);
    if (!NAME(any)(reach)) continue;
    uints noise = NAME(random_bits)(row->key, first + (uint32_t)start, width);
    /* -log(-log(u)) is at most -log(1 - u), which is tried first, with room for what
       is rounded. */
    float beaten = score - 0.01f - 1e-6f * fabsf(score);
    vec away = 1.0f - __builtin_convertvector(noise, vec) * 0x1p-32f;
    reach &= away <= NAME(exp)(scaled - beaten);
    for (long lane = 0; lane < WIDTH && start + lane < card; lane++) {
      if (!reach[lane]) continue;
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

TARGET static void NAME(step)(const Model *m, const Sampling *sampling, long num_rows,
                              const Row *rows, const int32_t *columns,
                              const int32_t *given, int32_t *agent, float *logits_out, float *scratch) {
  Widths w = widths_of(m);
  long num_agent = 1 + m->steps;
  long num_logits = m->text_card + (long)m->steps * m->card;
  long inputs_width = padded((long)m->steps * m->dep_dim);
  long slots = padded(m->steps);
  long dep_head = m->dep_dim / m->dep_heads, dep_padded = padded(dep_head);
  float *x = NAME(take)(&scratch, num_rows * w.dim);
  float *y = NAME(take)(&scratch, num_rows * w.dim);
  float *hidden = NAME(take)(&scratch, num_rows * w.dim);
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
  float *weights = NAME(take)(&scratch, max_of(padded(m->window), slots));

  for (long r = 0; r < num_rows; r++)
    sum_rows(m, columns + r * m->streams, x + r * w.dim);

  for (long l = 0; l < m->layers; l++) {
    NAME(attend_all)(m, l, num_rows, rows, x, y, qkv, weights);
    NAME(finish)(m->temporal + l, num_rows, m->dim, m->hidden, x, qkv, w.qkv, y, wide);
  }
  NAME(norm)(m->out_norm, num_rows, m->dim, x, hidden, w.dim);

  NAME(product)(&m->text_linear, num_rows, hidden, w.dim, text, w.text);
  for (long r = 0; r < num_rows; r++) {
    const float *logits = text + r * w.text;
    int32_t id = NAME(choose)(logits, m->text_card, sampling->text_temp, sampling->text_top_k,
                        rows + r, 0, (uint32_t)sampling->noise_width);
    int forced = given && given[r * num_agent] != -2;
    agent[r * num_agent] = forced ? given[r * num_agent] : id;
    if (logits_out)
      memcpy(logits_out + r * num_logits, logits, (size_t)m->text_card * 4);
  }

  NAME(product)(&m->dep_input, num_rows, hidden, w.dim, inputs, inputs_width);
  for (long s = 0; s < m->steps; s++) {
    const Table *table = s ? &m->dep_audio_emb : &m->dep_text_emb;
    for (long r = 0; r < num_rows; r++) {
      int32_t token = agent[r * num_agent + s];
      long first = s ? (s - 1) * (m->card + 1) : 0;
      float *row = dep_x + r * w.dep_dim;
      memcpy(row, inputs + r * inputs_width + s * m->dep_dim, (size_t)m->dep_dim * 4);
      if (token >= 0) add_row(table, first + token, row);
    }
    long hide_first = s == m->hiding_step;
    for (long l = 0; l < m->dep_layers; l++) {
      const Layer *layer = m->depformer + s * m->dep_layers + l;
      NAME(norm)(layer->norm1, num_rows, m->dep_dim, dep_x, dep_y, w.dep_dim);
      NAME(product)(&layer->in_proj, num_rows, dep_y, w.dep_dim, qkv, w.dep_qkv);
      for (long r = 0; r < num_rows; r++) {
        float *q = qkv + r * w.dep_qkv, *key = q + m->dep_dim, *value = key + m->dep_dim;
        for (long h = 0; h < m->dep_heads; h++) {
          float *keys = dep_keys + (r * m->dep_layers + l) * dep_keys_size +
                        h * slots * dep_head;
          float *values = dep_values + (r * m->dep_layers + l) * dep_values_size +
                          h * slots * dep_padded;
          NAME(remember)(dep_head, s, key + h * dep_head, value + h * dep_head, keys,
                         values);
          Past past = {.keys = keys, .values = values};
          NAME(attend)(dep_head, hide_first, s + 1, q + h * dep_head, past, weights,
                       q + h * dep_head);
        }
      }
      NAME(finish)(layer, num_rows, m->dep_dim, m->dep_hidden, dep_x, qkv, w.dep_qkv,
                   dep_y, wide);
    }
    NAME(product)(m->dep_heads_out + s, num_rows, dep_x, w.dep_dim, audio, w.audio);
    for (long r = 0; r < num_rows; r++) {
      const float *logits = audio + r * w.audio;
      long at = r * num_agent + 1 + s;
      uint32_t first = (uint32_t)(sampling->text_noise + s * m->card);
      int32_t id = NAME(choose)(logits, m->card, sampling->temp, sampling->top_k, rows + r,
                          first, (uint32_t)sampling->noise_width);
      agent[at] = given && given[at] != -2 ? given[at] : id;
      if (logits_out)
        memcpy(logits_out + r * num_logits + m->text_card + s * m->card, logits,
               (size_t)m->card * 4);
    }
  }
}
