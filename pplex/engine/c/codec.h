/* The codec's computations, for one instruction set: see each_cpu.h. */

#include "simd.h"

#define UNITS (PANEL / WIDTH)

/* The first `count` lanes. */
INLINE void NAME(store_some)(float *p, vec x, long count) {
  if (count >= WIDTH) {
    NAME(store)(p, x);
    return;
  }
#if VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)x);
#else
  for (long i = 0; i < count; i++) p[i] = x[i];
#endif
}

/* Sum of the lanes, in a fixed order. */
INLINE float NAME(total)(vec x) {
  float sum[WIDTH];
  NAME(store)(sum, x);
  return NAME(fold)(sum, WIDTH);
}

INLINE vec NAME(elu)(vec x) {
  vec zero = {0};
  return NAME(larger)(x, zero) + (NAME(exp)(NAME(smaller)(x, zero)) - 1.0f);
}

/* x (1 + erf(x / sqrt 2)) / 2.

   erfc(z) = t q(t) e^(-z^2) with t = 1 / (1 + 0.46 z) for z >= 0: q was fitted to the
   least largest error of erfc, which is 3e-9. */
INLINE vec NAME(gelu)(vec x) {
  vec z = NAME(larger)(x, -x) * 0.70710678f;
  vec t = 1.0f / (z * 0.46f + 1.0f);
  vec q = t * 0.09034794569015503f - 0.45509836077690125f;
  q = q * t + 0.7224814295768738f;
  q = q * t - 0.23552265763282776f;
  q = q * t + 0.38738417625427246f;
  q = q * t + 0.22827713191509247f;
  q = q * t + 0.26213034987449646f;
  vec erfc = q * t * NAME(exp)(-(z * z));
  vec below = x * 0.5f * erfc;
  return NAME(either)(x < 0, below, x - below);
}

TARGET static void NAME(activate)(long activation, float *x, long count) {
  for (long i = 0; i < count; i += WIDTH) {
    vec v = {0};
    long here = count - i < WIDTH ? count - i : WIDTH;
    memcpy(&v, x + i, here * sizeof *x);
    NAME(store_some)(x + i, activation == ELU    ? NAME(elu)(v)
                       : activation == GELU ? NAME(gelu)(v)
                                            : NAME(exp)(v), here);
  }
}

/* The sums (ROWS, PANELS * 16), or what they are if this is no start, and the products of
   `depth` values of rows of a with as many rows of PANELS panels of b, in that order. */
#define TILE(ROWS, PANELS)                                                           \
  TARGET static void NAME(tile_##ROWS##x##PANELS)(                                   \
      long depth, const float *a, long lda, const float *b, long panel, int start,   \
      float *sums) {                                                                 \
    vec sum[ROWS][PANELS * UNITS] = {{{0}}};                                       \
    if (!start)                                                                      \
      _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++)                        \
          _Pragma("GCC unroll 16") for (int v = 0; v < PANELS * UNITS; v++)          \
              sum[r][v] = NAME(load)(sums + r * MAX_PANELS * PANEL + v * WIDTH);     \
    for (long i = 0; i < depth; i++) {                                               \
      vec column[PANELS * UNITS];                                                  \
      _Pragma("GCC unroll 16") for (int v = 0; v < PANELS * UNITS; v++)              \
          column[v] = *(const vec *)(b + v / UNITS * panel + i * PANEL +           \
                                       v % UNITS * WIDTH);                           \
      _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++)                        \
          _Pragma("GCC unroll 16") for (int v = 0; v < PANELS * UNITS; v++)          \
              sum[r][v] += a[r * lda + i] * column[v];                               \
    }                                                                                \
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++)                          \
        _Pragma("GCC unroll 16") for (int v = 0; v < PANELS * UNITS; v++)            \
            NAME(store)(sums + r * MAX_PANELS * PANEL + v * WIDTH, sum[r][v]);      \
  }

#if WIDTH == 16
/* The same of PANELS panels, none or one, and the first half of the next. */
typedef float NAME(half) __attribute__((vector_size(32), aligned(4), may_alias));
#define HALF_TILE(ROWS, PANELS)                                                      \
  TARGET static void NAME(half_##ROWS##x##PANELS)(                                   \
      long depth, const float *a, long lda, const float *b, long panel, int start,   \
      float *sums) {                                                                 \
    vec sum[ROWS] = {{0}};                                                           \
    NAME(half) rest[ROWS] = {{0}};                                                   \
    if (!start)                                                                      \
      _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                      \
        const float *from = sums + r * MAX_PANELS * PANEL;                           \
        if (PANELS) sum[r] = NAME(load)(from);                                       \
        rest[r] = *(const NAME(half) *)(from + PANELS * PANEL);                      \
      }                                                                              \
    for (long i = 0; i < depth; i++, b += PANEL) {                                   \
      vec column = NAME(load)(b);                                                    \
      NAME(half) last = *(const NAME(half) *)(b + PANELS * panel);                   \
      _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                      \
        if (PANELS) sum[r] += a[r * lda + i] * column;                               \
        rest[r] += a[r * lda + i] * last;                                            \
      }                                                                              \
    }                                                                                \
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                        \
      float *to = sums + r * MAX_PANELS * PANEL;                                     \
      if (PANELS) NAME(store)(to, sum[r]);                                           \
      *(NAME(half) *)(to + PANELS * PANEL) = rest[r];                                \
    }                                                                                \
  }
HALF_TILE(8, 0) HALF_TILE(4, 0) HALF_TILE(2, 0) HALF_TILE(1, 0)
HALF_TILE(8, 1) HALF_TILE(4, 1) HALF_TILE(2, 1) HALF_TILE(1, 1)
#undef HALF_TILE
#endif

typedef void (*NAME(tile))(long, const float *, long, const float *, long, int,
                           float *);

/* By panels, then from the most rows to one: as many as there are registers for. */
#if WIDTH == 16
TILE(8, 1) TILE(4, 1) TILE(2, 1) TILE(1, 1)
TILE(8, 2) TILE(4, 2) TILE(2, 2) TILE(1, 2)
TILE(8, 3) TILE(4, 3) TILE(2, 3) TILE(1, 3)
TILE(6, 4) TILE(4, 4) TILE(2, 4) TILE(1, 4)
static const NAME(tile) NAME(tiles)[][4] = {
    {NAME(tile_8x1), NAME(tile_4x1), NAME(tile_2x1), NAME(tile_1x1)},
    {NAME(tile_8x2), NAME(tile_4x2), NAME(tile_2x2), NAME(tile_1x2)},
    {NAME(tile_8x3), NAME(tile_4x3), NAME(tile_2x3), NAME(tile_1x3)},
    {NAME(tile_6x4), NAME(tile_4x4), NAME(tile_2x4), NAME(tile_1x4)},
};
static const int NAME(heights)[][4] = {
    {8, 4, 2, 1}, {8, 4, 2, 1}, {8, 4, 2, 1}, {6, 4, 2, 1}};
static const NAME(tile) NAME(halves)[][4] = {
    {NAME(half_8x0), NAME(half_4x0), NAME(half_2x0), NAME(half_1x0)},
    {NAME(half_8x1), NAME(half_4x1), NAME(half_2x1), NAME(half_1x1)},
};
#elif WIDTH == 8
TILE(6, 1) TILE(4, 1) TILE(2, 1) TILE(1, 1)
TILE(3, 2) TILE(2, 2) TILE(1, 2)
static const NAME(tile) NAME(tiles)[][4] = {
    {NAME(tile_6x1), NAME(tile_4x1), NAME(tile_2x1), NAME(tile_1x1)},
    {NAME(tile_3x2), NAME(tile_2x2), NAME(tile_1x2), NAME(tile_1x2)},
};
static const int NAME(heights)[][4] = {{6, 4, 2, 1}, {3, 2, 1, 1}};
#else
TILE(3, 1) TILE(2, 1) TILE(1, 1)
static const NAME(tile) NAME(tiles)[][4] = {
    {NAME(tile_3x1), NAME(tile_2x1), NAME(tile_1x1), NAME(tile_1x1)}};
static const int NAME(heights)[][4] = {{3, 2, 1, 1}};
#endif
#undef TILE

/* Panels that tiles of `rows` rows span: the more sums the more work at a time. */
TARGET static long NAME(panels_at_once)(long rows) {
  return WIDTH == 16 ? 4 : WIDTH == 8 && rows < 4 ? 2 : 1;
}

/* Finish the sums of some rows and `columns` columns; `at` is the first's place. The
   last three are constants. */
INLINE void NAME(finish_as)(const finish *f, const float *sums, long rows, long columns,
                            const float *bias, long at, long n, float *out, int adds,
                            int keeps, long activation) {
  for (long r = 0; r < rows; r++, at += n, sums += MAX_PANELS * PANEL)
    for (long c = 0; c < columns; c += WIDTH) {
      vec x = NAME(load)(sums + c);
      long count = columns - c;
      if (bias) x += NAME(load)(bias + c);
      if (adds) x += NAME(load)(f->add + at + c);
      if (keeps) NAME(store_some)(f->keep + at + c, x, count);
      if (activation == ELU) x = NAME(elu)(x);
      if (activation == GELU) x = NAME(gelu)(x);
      NAME(store_some)(out + at + c, x, count);
    }
}

TARGET static void NAME(finished)(const finish *f, const float *sums, long rows,
                                  long columns, const float *bias, long at, long n,
                                  float *out) {
#define FINISH(...) NAME(finish_as)(f, sums, rows, columns, bias, at, n, out, __VA_ARGS__)
  if (f->activation == ELU && f->add && !f->keep)
    FINISH(1, 0, ELU);
  else if (f->activation == ELU && f->keep && !f->add)
    FINISH(0, 1, ELU);
  else if (f->activation == ELU && !f->keep)
    FINISH(0, 0, ELU);
  else
    FINISH(f->add != 0, f->keep != 0, f->activation);
#undef FINISH
}

/* out (rows, n) = a (rows, k), whose rows start `lda` apart, times a matrix: a phase,
   which the caller ends. */
TARGET static void NAME(product)(Crew *crew, const matrix *m, long rows, const float *a,
                                 long lda, const finish *f, float *out) {
  float sums[MAX_ROWS * MAX_PANELS * PANEL] __attribute__((aligned(64)));
  long panels = (m->n + PANEL - 1) / PANEL, size = m->k * PANEL;
  long most = NAME(panels_at_once)(rows), parts = (rows + MAX_ROWS - 1) / MAX_ROWS;
  while (most > 1 && panels * parts < most * crew->of) most--;
  long groups = (panels + most - 1) / most;
  for (long i; (i = take_piece(crew, groups * parts)) >= 0;) {
    long p = i / parts * most, wide = panels - p < most ? panels - p : most;
    long first = i % parts * MAX_ROWS;
    long high = rows - first < MAX_ROWS ? rows - first : MAX_ROWS;
    const NAME(tile) *tiles = NAME(tiles)[wide - 1];
    const int *heights = NAME(heights)[wide - 1];
    long column = p * PANEL;
    long columns = m->n - column < wide * PANEL ? m->n - column : wide * PANEL;
#if WIDTH == 16
    if (wide <= 2 && columns <= wide * PANEL - PANEL / 2) tiles = NAME(halves)[wide - 1];
#endif
    for (long k = 0; k < m->k; k += MAX_DEPTH) {
      long depth = m->k - k < MAX_DEPTH ? m->k - k : MAX_DEPTH;
      for (long r = 0, step = 0; r < high; r += heights[step]) {
        while (heights[step] > high - r) step++;
        tiles[step](depth, a + (first + r) * lda + k, lda,
                    m->weight + p * size + k * PANEL, size, k == 0,
                    sums + r * MAX_PANELS * PANEL);
      }
    }
    NAME(finished)(f, sums, high, columns, m->bias ? m->bias + column : 0,
                   first * m->n + column, m->n, out);
  }
}

/* One convolution of x, `rows` rows with room before them; the carried rows change. After
   a phase, and a phase itself, which the caller ends. */
TARGET static void NAME(convolve)(Crew *crew, const convolution *c, float *state,
                                  int starts, float *x, long rows, float *kept,
                                  float *out) {
  long size = c->overlap * c->channels;
  float *carried = state + c->state;
  meet(crew, 1);
  while (take_piece(crew, 1) == 0) {
    if (starts && c->flags & EDGE)
      for (long i = 0; i < c->overlap; i++)
        memcpy(carried + i * c->channels, x, c->channels * sizeof *x);
    memcpy(x - size, carried, size * sizeof *x);
    memcpy(carried, x + rows * c->channels - size, size * sizeof *x);
  }
  meet(crew, MANY);
  finish f = {c->matrix.bias, c->flags & ADD ? kept : 0, c->flags & KEEP ? kept : 0,
              c->activation};
  NAME(product)(crew, &c->matrix, rows / c->stride, x - size, c->stride * c->channels, &f,
                out);
}

/* Run r->x, `count` floats, through convolutions, into r->x; how many floats. */
TARGET static long NAME(convolve_all)(Crew *crew, const convolution *c, long num,
                                      float *state, int starts, long count, room *r) {
  for (long i = 0; i < num; i++) {
    long rows = count / c[i].channels;
    NAME(convolve)(crew, &c[i], state, starts, r->x, rows, r->kept, r->y);
    count = rows / c[i].stride * c[i].matrix.n;
    float *x = r->x;
    r->x = r->y, r->y = x;
  }
  return count;
}

/* Copy `count` floats, a phase of its own after a phase. */
TARGET static void NAME(copy)(Crew *crew, const float *from, long count, float *to) {
  meet(crew, 1);
  while (take_piece(crew, 1) == 0) memcpy(to, from, count * sizeof *to);
}

TARGET static void NAME(layer_norm)(const float *x, long rows, long width,
                                    const float *weight, const float *bias,
                                    float *restrict out) {
  for (long r = 0; r < rows; r++, x += width, out += width) {
    vec sum = {0}, squares = {0};
    float rest = 0, rest_squares = 0;
    long c = 0;
    for (; c + WIDTH <= width; c += WIDTH) sum += NAME(load)(x + c);
    for (long i = c; i < width; i++) rest += x[i];
    float mean = (NAME(total)(sum) + rest) / width;
    for (c = 0; c + WIDTH <= width; c += WIDTH) {
      vec apart = NAME(load)(x + c) - mean;
      squares += apart * apart;
    }
    for (long i = c; i < width; i++) rest_squares += (x[i] - mean) * (x[i] - mean);
    float variance = (NAME(total)(squares) + rest_squares) / width;
    float scale = 1.0f / sqrtf(variance + 1e-5f);
    for (c = 0; c < width; c++) out[c] = (x[c] - mean) * scale * weight[c] + bias[c];
  }
}

/* Turn the pairs of a head by a row's angles: cosines, then sines. */
TARGET static void NAME(rotate)(float *x, long dim, const float *turns) {
  for (long i = 0; i < dim / 2; i++) {
    float real = x[2 * i], imaginary = x[2 * i + 1];
    float cosine = turns[i], sine = turns[dim / 2 + i];
    x[2 * i] = real * cosine - imaginary * sine;
    x[2 * i + 1] = real * sine + imaginary * cosine;
  }
}

/* Add a position's key and value of head `h`, and attend: its part of y (width) of qkv
   (3 width).

   Keys are (heads, dim, slots), values (slots, width); position p lies in slot
   p % window, and slots are a whole number of vectors. */
TARGET static void NAME(attend)(const transformer *t, long h, const float *qkv,
                                long position, float *keys, float *values, float *scores,
                                float *y) {
  long width = t->width, dim = width / t->heads, window = t->window;
  long slots = (window + PANEL - 1) / PANEL * PANEL, slot = position % window;
  long filled = position + 1 < window ? position + 1 : window;
  long used = (filled + WIDTH - 1) / WIDTH * WIDTH;
  long block_end = (position / t->block + 1) * t->block;
  const float *q = qkv + h * dim, *k = keys + h * dim * slots;
  for (long i = h * dim; i < (h + 1) * dim; i++)
    keys[i * slots + slot] = qkv[width + i];
  memcpy(values + slot * width + h * dim, qkv + 2 * width + h * dim, dim * sizeof *y);
  for (long j = 0; j < used; j += 4 * WIDTH) {
    vec sum[4] = {{0}};
    long vectors = (used - j) / WIDTH < 4 ? (used - j) / WIDTH : 4;
    if (vectors == 4) {
      for (long i = 0; i < dim; i++)
        for (int v = 0; v < 4; v++)
          sum[v] += q[i] * NAME(load)(k + i * slots + j + v * WIDTH);
      for (int v = 0; v < 4; v++) NAME(store)(scores + j + v * WIDTH, sum[v]);
    } else
      for (long v = 0; v < vectors; v++) {
        vec one = {0};
        for (long i = 0; i < dim; i++)
          one += q[i] * NAME(load)(k + i * slots + j + v * WIDTH);
        NAME(store)(scores + j + v * WIDTH, one);
      }
  }
  float largest = scores[slot];
  for (long j = 0; j < filled; j++)
    if (scores[j] > largest) largest = scores[j];
  for (long j = 0; j < used; j += WIDTH)
    NAME(store)(scores + j, NAME(exp)(NAME(load)(scores + j) - largest));
  for (long j = filled; j < used; j++) scores[j] = 0;
  /* What the block's last position will not see, the block's first does not. */
  for (long p = position + 1; p < block_end; p++)
    if (p >= window) scores[p % window] = 0;
  vec sum = {0};
  for (long j = 0; j < used; j += WIDTH) sum += NAME(load)(scores + j);
  float scale = 1.0f / NAME(total)(sum);
  for (long i = 0; i < dim; i += WIDTH) {
    vec even = {0}, odd = {0};
    const float *v = values + h * dim + i;
    long j = 0;
    for (; j + 2 <= filled; j += 2) {
      even += scores[j] * NAME(load)(v + j * width);
      odd += scores[j + 1] * NAME(load)(v + (j + 1) * width);
    }
    if (j < filled) even += scores[j] * NAME(load)(v + j * width);
    NAME(store_some)(y + h * dim + i, (even + odd) * scale, dim - i);
  }
}

/* Each row of x normalized: a phase after a phase. */
TARGET static void NAME(norm_all)(Crew *crew, const float *x, long rows, long width,
                                  const float *weight, const float *bias, float *out) {
  meet(crew, rows);
  for (long row; (row = take_piece(crew, rows)) >= 0;)
    NAME(layer_norm)(x + row * width, 1, width, weight, bias, out + row * width);
  meet(crew, MANY);
}

/* x (rows, width), in place, at positions from `position` on. After a phase; the caller
   ends the last. */
TARGET static void NAME(transform)(Crew *crew, const transformer *t, float *state,
                                   long position, float *x, long rows, room *r) {
  long width = t->width, dim = width / t->heads;
  long slots = (t->window + PANEL - 1) / PANEL * PANEL;
  float *scores = r->scores + crew->me * slots;
  meet(crew, rows);
  for (long row; (row = take_piece(crew, rows)) >= 0;)
    for (long i = 0; i < dim / 2; i++) {
      float angle = (float)(position + row) * t->frequencies[i]; /* rounded, as there */
      r->turns[row * dim + i] = cos(angle);
      r->turns[row * dim + dim / 2 + i] = sin(angle);
    }
  finish plain = {0}, added = {.add = x}, gelu = {.activation = GELU};
  for (long i = 0; i < t->num_layers; i++) {
    const layer *l = &t->layers[i];
    float *keys = state + t->state + i * 2 * slots * width;
    float *values = keys + slots * width;
    NAME(norm_all)(crew, x, rows, width, l->norm1_weight, l->norm1_bias, r->normed);
    NAME(product)(crew, &l->in_proj, rows, r->normed, width, &plain, r->qkv);
    meet(crew, MANY);
    for (long h; (h = take_piece(crew, t->heads)) >= 0;)
      for (long row = 0; row < rows; row++) {
        float *qkv = r->qkv + row * 3 * width, *turns = r->turns + row * dim;
        NAME(rotate)(qkv + h * dim, dim, turns);
        NAME(rotate)(qkv + width + h * dim, dim, turns);
        NAME(attend)(t, h, qkv, position + row, keys, values, scores,
                     r->normed + row * width);
      }
    meet(crew, MANY);
    NAME(product)(crew, &l->out_proj, rows, r->normed, width, &added, x);
    NAME(norm_all)(crew, x, rows, width, l->norm2_weight, l->norm2_bias, r->normed);
    NAME(product)(crew, &l->linear1, rows, r->normed, width, &gelu, r->hidden);
    meet(crew, MANY);
    NAME(product)(crew, &l->linear2, rows, r->hidden, t->feed_forward, &added, x);
  }
}

TARGET static void NAME(encode)(Crew *crew, void *what) {
  const Chunk *c = what;
  const direction *d = c->direction;
  float *state = c->state, *memory = c->memory;
  room r;
  lay_out(d, c->frames, memory, &r);
  int starts = c->position == 0;
  long fine = d->num_fine, rows = c->frames * d->latents;
  while (take_piece(crew, 1) == 0) continue; /* a phase to come after */
  for (long frame = 0; frame < c->frames; frame++) {
    NAME(copy)(crew, c->from + frame * d->samples, d->samples, r.x);
    NAME(convolve_all)(crew, d->convolutions, fine, state, starts, d->samples, &r);
    NAME(copy)(crew, r.x, d->between, r.between + frame * d->between);
  }
  NAME(copy)(crew, r.between, c->frames * d->between, r.x);
  NAME(convolve_all)(crew, d->convolutions + fine, d->num_convolutions - fine, state,
                     starts, c->frames * d->between, &r);
  NAME(transform)(crew, &d->transformer, state, c->position, r.x, rows, &r);
  NAME(convolve)(crew, &d->downsample, state, starts, r.x, rows, r.kept, c->to);
  meet(crew, 0);
}

TARGET static void NAME(decode)(Crew *crew, void *what) {
  const Chunk *c = what;
  const direction *d = c->direction;
  float *state = c->state, *memory = c->memory;
  room r;
  lay_out(d, c->frames, memory, &r);
  long width = d->transformer.width, rows = c->frames * d->latents;
  long coarse = d->num_convolutions - d->num_fine;
  while (take_piece(crew, 1) == 0) {
    const float *w = d->upsample, *latents = c->from;
    float *previous = state + d->upsample_state;
    for (long row = 0; row < c->frames; row++, latents += width) {
      float *restrict out = r.x + row * 2 * width;
      for (long i = 0; i < width; i++) {
        out[i] = latents[i] * w[i] + previous[i] * w[2 * width + i];
        out[width + i] = latents[i] * w[width + i] + previous[i] * w[3 * width + i];
      }
      memcpy(previous, latents, width * sizeof *latents);
    }
  }
  NAME(transform)(crew, &d->transformer, state, c->position, r.x, rows, &r);
  NAME(convolve_all)(crew, d->convolutions, coarse, state, 0, rows * width, &r);
  NAME(copy)(crew, r.x, c->frames * d->between, r.between);
  for (long frame = 0; frame < c->frames; frame++) {
    NAME(copy)(crew, r.between + frame * d->between, d->between, r.x);
    NAME(convolve_all)(crew, d->convolutions + coarse, d->num_fine, state, 0, d->between,
                       &r);
    NAME(copy)(crew, r.x, d->samples, c->to + frame * d->samples);
  }
  meet(crew, 0);
}

TARGET static void NAME(quantize)(Crew *crew, void *what) {
  const Codes *c = what;
  const quantizer *q = c->quantizer;
  long dim = q->dim, frames = c->frames;
  float *memory = c->memory;
  float *residual = place(&memory, frames * 2 * dim), *scores = memory;
  int32_t *codes = c->codes;
  finish plain = {0};
  NAME(product)(crew, &q->input, frames, c->latents, q->input.k, &plain, residual);
  for (long book = 0; book < q->num_codebooks; book++, codes += frames) {
    float *part = residual + (book ? dim : 0);
    finish f = {.bias = q->tables[book].bias};
    meet(crew, MANY);
    NAME(product)(crew, &q->tables[book], frames, part, 2 * dim, &f, scores);
    meet(crew, frames);
    for (long frame; (frame = take_piece(crew, frames)) >= 0;) {
      const float *score = scores + frame * q->bins;
      long best = 0;
      for (long i = 1; i < q->bins; i++)
        if (score[i] > score[best]) best = i;
      codes[frame] = best;
      const float *row = q->rows + (book * q->bins + best) * dim;
      for (long i = 0; i < dim; i++) part[frame * 2 * dim + i] -= row[i];
    }
  }
  meet(crew, 0);
}

TARGET static void NAME(dequantize)(Crew *crew, void *what) {
  const Codes *c = what;
  const quantizer *q = c->quantizer;
  long dim = q->dim, frames = c->frames;
  float *memory = c->memory;
  for (long frame; (frame = take_piece(crew, frames)) >= 0;) {
    float *sums = memory + frame * 2 * dim;
    memset(sums, 0, 2 * dim * sizeof *sums);
    for (long book = 0; book < q->num_codebooks; book++) {
      const float *row = q->rows + (book * q->bins + c->codes[book * frames + frame]) * dim;
      float *sum = sums + (book ? dim : 0);
      for (long i = 0; i < dim; i++) sum[i] += row[i];
    }
  }
  finish plain = {0};
  meet(crew, MANY);
  NAME(product)(crew, &q->output, frames, memory, 2 * dim, &plain, c->to);
  meet(crew, 0);
}

static const engine NAME(engine) = {NAME(encode), NAME(quantize), NAME(dequantize),
                                    NAME(decode), NAME(activate)};

#undef UNITS
