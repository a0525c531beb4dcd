/* One frame of the language model on a CPU, for rows of a batch at different places.

   Loaded by engine.py, whose structures (structures.py) mirror those below. What a frame
   computes is that of the MLX operations in pplex/model; done one by one, their thousand
   small operations take far longer to start than to run.

   Matrices are packed in blocks of LANES outputs (pplex_lm_pack), so that an output has
   a lane of its own and is summed input by input. All sums of a row are taken in an
   order that depends on the model's sizes and the row's own positions alone: its result
   is the same bits whatever rows stand beside it, and however many threads there are.

   The functions that take a Crew are run by all of its threads together. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "threads.h"

enum { LANES = 16, AHEAD = 64 * LANES, FAR = 768 }; /* bytes, floats to prefetch */
enum { FLOAT32, FLOAT16, BFLOAT16 };                /* types of floats in memory */

/* Packed: block after block of LANES outputs. Of what is not quantized (`bits` 0) a block
   has LANES floats of `type` for each input, bfloat16 in words of two inputs one after
   the other. Else a record for each group of inputs: LANES scales, as many biases, of
   `type`, and words of 32 / bits values of an output. */
typedef struct {
  uint8_t *data;
  int32_t rows, columns, bits, group, type;
} Matrix;

/* Row after row, as in the file: floats of `type`, or quantized values of any number of
   bits whose scales and biases are. */
typedef struct {
  const void *words, *scales, *biases;
  int32_t rows, columns, bits, group, type;
} Table;

typedef struct {
  const float *norm1, *norm2;
  Matrix in_proj, out_proj, linear_in, linear_out;
} Layer;

typedef struct {
  int32_t dim, heads, layers, hidden, window, text_card, card, streams, steps;
  int32_t hiding_step;  /* the depformer step that does not see the first; -1: none */
  int32_t dep_dim, dep_heads, dep_layers, dep_hidden;
  int32_t threads;  /* that make a step together, at most */
  int32_t kv_bits;  /* 32 or 8, of keys and values that are kept */
  Table text_emb, audio_emb, dep_text_emb, dep_audio_emb;
  const Layer *temporal;  /* layers */
  const float *out_norm;
  Matrix text_linear, dep_input;
  const Layer *depformer;  /* steps x dep_layers */
  const Matrix *dep_heads_out;  /* steps */
} Model;

/* Temperature 0 takes the largest logit. */
typedef struct {
  float text_temp, temp;
  int32_t text_top_k, top_k, text_noise, noise_width;
} Sampling;

/* The key of a frame's noise; whether it draws another token than the row's. */
typedef struct {
  uint32_t key[2];
  int32_t is_apart;
} Other;

/* A row's keys (layers, heads, slots / LANES, head_dim, LANES) and values (layers,
   heads, slots, head_dim padded to LANES); how many positions it has; where else its
   first ones are, a multiple of LANES, and are read for several rows; the angles of the
   next; the key of this frame's noise; others that differ from it in that alone, and
   need no row of their own as long as they draw the same tokens.

   At 8 bits a vector is bytes after a scale, by which each is to be multiplied: a block
   of LANES begins with their scales. So it takes `kept_width` floats of memory. */
typedef struct {
  float *keys, *values;
  int64_t slots, end;
  const float *first_keys, *first_values;
  int64_t first_slots, num_first;
  const float *cosines, *sines;
  uint32_t key[2];
  Other *others;
  int64_t num_others;
} Row;

/* Keys and values of a head, some of whose slots, the first, lie elsewhere. */
typedef struct {
  const float *keys, *values, *first_keys, *first_values;
  long num_first;
  int bits;
} Past;

static long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

static long kept_width(long n, int bits) { return bits == 8 ? 1 + n / 4 : n; }

/* The bytes after the scales of a block at 8 bits. */
static const int8_t *bytes_of(const float *block) { return (const int8_t *)(block + LANES); }

static const float LEAST_UNIFORM = 0x1p-33f;  /* as in pplex/model/sampling.py */
static const float MOST_GUMBEL = 17;  /* -log(-log(1 - 2^-24)) is 16.6 */

/* ---- Stored values ---- */

static size_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

/* Bytes of a group's record. */
static size_t record_of(const Matrix *w) {
  return LANES * (2 * size_of(w->type) + (size_t)w->group * w->bits / 8);
}

/* Bytes of a block. */
static size_t block_of(const Matrix *w) {
  size_t columns = (size_t)w->columns;
  return w->bits ? columns / w->group * record_of(w) : columns * LANES * size_of(w->type);
}

static long blocks_of(const Matrix *w) { return (w->rows + LANES - 1) / LANES; }

/* Values lie one after the other, lowest bits first, across words. */
static uint32_t value_at(const uint32_t *words, long idx, int bits) {
  long at = idx * bits, word = at / 32;
  int shift = (int)(at % 32);
  uint64_t both = words[word];
  if (shift + bits > 32) both |= (uint64_t)words[word + 1] << 32;
  return (uint32_t)(both >> shift) & ((1u << bits) - 1);
}

static float float_at(const void *values, long idx, int type) {
  if (type == FLOAT32) return ((const float *)values)[idx];
  uint32_t half = ((const uint16_t *)values)[idx], bits = half << 16;
  float value;
  if (type == FLOAT16) {
    bits = (half & 0x7FFF) << 13;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    memcpy(&bits, &value, sizeof value);
    bits |= (half & 0x8000) << 16 | ((half & 0x7C00) == 0x7C00 ? 0x7F800000 : 0);
  }
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* x += row `idx` of a table. */
static void add_row(const Table *table, long idx, float *x) {
  long n = table->columns;
  if (table->bits == 0) {
    for (long i = 0; i < n; i++) x[i] += float_at(table->words, idx * n + i, table->type);
    return;
  }
  const uint32_t *row = (const uint32_t *)table->words + idx * n * table->bits / 32;
  long groups = n / table->group;
  for (long i = 0; i < n; i++) {
    long group = idx * groups + i / table->group;
    x[i] += float_at(table->scales, group, table->type) *
                (float)value_at(row, i, table->bits) +
            float_at(table->biases, group, table->type);
  }
}

/* The sum of a column's embeddings (dim): audio in order, text last. */
static void sum_rows(const Model *m, const int32_t *column, float *x) {
  memset(x, 0, (size_t)m->dim * sizeof *x);
  for (long s = 1; s < m->streams; s++)
    if (column[s] >= 0) add_row(&m->audio_emb, (s - 1) * (m->card + 1) + column[s], x);
  if (column[0] >= 0) add_row(&m->text_emb, column[0], x);
}

/* ---- Given ids ---- */

enum { NOT_FORCED = -2, INSTEAD = -3, TEXT_PAD = 3 }; /* as in pplex/model/streams.py */

/* The id that is said where the model chose `id`: that, or what is to be said in place
   of anything but padding. */
static int32_t instead_of(int32_t id, int32_t given) {
  return given > INSTEAD || id <= TEXT_PAD ? id : INSTEAD - given;
}

/* ---- Memory of a frame ---- */

typedef struct {
  long dim, qkv, hidden, dep_dim, dep_qkv, dep_hidden, text, audio;
} Widths;

static Widths widths_of(const Model *m) {
  return (Widths){
      .dim = padded(m->dim),
      .qkv = padded(3L * m->dim),
      .hidden = padded(2L * m->hidden),
      .dep_dim = padded(m->dep_dim),
      .dep_qkv = padded(3L * m->dep_dim),
      .dep_hidden = padded(2L * m->dep_hidden),
      .text = padded(m->text_card),
      .audio = padded(m->card),
  };
}

static long max_of(long a, long b) { return a > b ? a : b; }

enum { MANY = 2 };       /* pieces of a phase that is shared in any case */
enum { MIN_GROUP = 32 }; /* inputs that share a scale, at least */

/* Memory of a product, and of a head: rows that are mixed, and the sums of their groups,
   which all threads read; and a thread's own, for the sums of other rows' groups or the
   weights of a head's slots. */
typedef struct {
  float *mixed, *sums, *own;
} Room;

static Room room_of(const Model *m, long rows, int me, float *scratch) {
  long widest = max_of(max_of(m->dim, m->hidden), max_of(m->dep_dim, m->dep_hidden));
  long sums = padded(rows * (widest / MIN_GROUP + 1));
  long own = max_of(sums, max_of(padded(m->window), padded(m->steps)));
  float *after = scratch + padded(rows * widest);
  return (Room){scratch, after, after + sums + me * own};
}

static long room_size(const Model *m, long rows) {
  return room_of(m, rows, m->threads, NULL).own - (float *)NULL;
}

/* Floats that pplex_lm_step needs beside its arguments, for `rows` rows. */
long pplex_lm_scratch(const Model *m, long rows) {
  Widths w = widths_of(m);
  long slots = padded(m->steps), head = m->dep_dim / m->dep_heads;
  long per_row = 2 * w.dim + max_of(w.qkv, w.dep_qkv) + max_of(w.hidden, w.dep_hidden) +
                 padded((long)m->steps * m->dep_dim) + 2 * w.dep_dim + w.text + w.audio +
                 m->dep_layers * m->dep_heads * slots * (head + padded(head));
  return rows * per_row + room_size(m, rows) + 16 * LANES;
}

/* Floats that pplex_lm_read needs beside its arguments. */
long pplex_lm_read_scratch(const Model *m, long rows) {
  Widths w = widths_of(m);
  return rows * (2 * w.dim + w.qkv + w.hidden) + room_size(m, rows);
}

/* ---- Calls ---- */

/* A matrix to pack from rows as in the file; `bits` are those there, 0 for floats of
   `type`. */
typedef struct {
  const Matrix *to;
  const void *values, *scales, *biases;
  int32_t bits, type;
} Packing;

/* Whether `count` floats of a type can be packed as another; `fits` becomes 0 if not. */
typedef struct {
  const uint8_t *values;
  long count;
  int32_t from, to;
  atomic_int fits;
} Check;

typedef struct {
  const Model *model;
  const Sampling *sampling;
  long num_rows;
  const Row *rows;
  const int32_t *columns, *given;
  int32_t *agent;
  float *logits, *scratch;
} Step;

typedef struct {
  const Model *model;
  long num_rows;
  const Row *rows;
  const float *inputs;
  float *scratch;
} Reading;

typedef struct {
  const Matrix *w;
  const float *x;
  float *y, *own;
} Multiplication;

#define SOURCE "lm.h"
#include "each_cpu.h"

static int level = 2;

/* Choose the instruction set: the best there is up to `at_most`; which it is: 0 any,
   1 AVX2, 2 AVX-512. */
int pplex_lm_use(int at_most) {
  level = at_most;
  return best_set(level);
}

/* Whether all ids of a frame have rows in the tables. */
static int ids_are_known(const Model *m, long num_rows, const int32_t *columns,
                         const int32_t *given) {
  for (long r = 0; r < num_rows; r++)
    for (long s = 0; s < m->streams; s++)
      if (columns[r * m->streams + s] > (s ? m->card : m->text_card)) return 0;
  for (long r = 0; given && r < num_rows; r++)
    for (long s = 0; s <= m->steps; s++)
      if (given[r * (1 + m->steps) + s] > (s ? m->card : m->text_card)) return 0;
  return 1;
}

/* The inputs (num_columns, dim) of columns (num_columns, streams). Returns 0 if an id is
   beyond its table. */
int pplex_lm_embed(const Model *m, long num_columns, const int32_t *columns,
                   float *inputs) {
  if (!ids_are_known(m, num_columns, columns, NULL)) return 0;
  for (long i = 0; i < num_columns; i++)
    sum_rows(m, columns + i * m->streams, inputs + i * m->dim);
  return 1;
}

/* A frame for `num_rows` rows: from their columns of the grid (num_rows, streams) and
   what is given of the next (num_rows, 1 + steps; NULL: nothing; -2: not given) to the
   agent's (num_rows, 1 + steps). Each row's position is added to its keys and values;
   counting it is the caller's. The logits (num_rows, text_card + steps * card) are
   written out if there is a place for them. Rows may be the next positions of one
   conversation, in order, if all of it is given. Returns 0 if an id is beyond its table. */
int pplex_lm_step(const Model *model, const Sampling *sampling, long num_rows,
                  const Row *rows, const int32_t *columns, const int32_t *given,
                  int32_t *agent, float *logits, float *scratch) {
  if (!ids_are_known(model, num_rows, columns, given)) return 0;
  static void (*const steps[])(Crew *, void *) = OF_EACH_CPU(step);
  Step step = {model, sampling, num_rows, rows, columns, given, agent, logits, scratch};
  work_together(model->threads, steps[best_set(level)], &step);
  return 1;
}

/* Add positions whose inputs (num_rows, dim) are given to keys and values, and no more;
   rows are as in pplex_lm_step. */
void pplex_lm_read(const Model *model, long num_rows, const Row *rows,
                   const float *inputs, float *scratch) {
  static void (*const reads[])(Crew *, void *) = OF_EACH_CPU(read);
  Reading reading = {model, num_rows, rows, inputs, scratch};
  work_together(model->threads, reads[best_set(level)], &reading);
}

/* y = x w^T for one row, of which nothing but its time is of use. `own` has room for the
   columns of each thread. */
void pplex_lm_multiply(const Matrix *w, const float *x, float *y, float *own,
                       int threads) {
  static void (*const multiply[])(Crew *, void *) = OF_EACH_CPU(multiply);
  Multiplication whole = {w, x, y, own};
  work_together(threads, multiply[best_set(level)], &whole);
}

/* ---- Packing ---- */

/* Copy `count` words of LANES rows, which lie `apart`, side by side; zeros where there are
   no more than `rows` rows. */
static void interleave(const uint32_t *from, long apart, long rows, long count,
                       uint32_t *to) {
  for (long start = 0; start < count; start += LANES) {
    long end = start + LANES < count ? start + LANES : count;
    for (long lane = 0; lane < LANES; lane++)
      for (long i = start; i < end; i++)
        to[i * LANES + lane] = lane < rows ? from[lane * apart + i] : 0;
  }
}

/* The same of floats of one type. */
static void interleave_floats(const void *from, int type, long apart, long rows,
                              long count, void *to) {
  if (type == FLOAT32) {
    interleave(from, apart, rows, count, to);
    return;
  }
  const uint16_t *values = from;
  uint16_t *packed = to;
  for (long start = 0; start < count; start += LANES) {
    long end = start + LANES < count ? start + LANES : count;
    for (long lane = 0; lane < LANES; lane++)
      for (long i = start; i < end; i++)
        packed[i * LANES + lane] = lane < rows ? values[lane * apart + i] : 0;
  }
}

static void pack_block(const Packing *p, long block) {
  const Matrix *w = p->to;
  long first = block * LANES, rows = w->rows - first < LANES ? w->rows - first : LANES;
  long n = w->columns;
  uint8_t *to = w->data + block * block_of(w);
  if (w->bits == 0) {
    const uint8_t *from = (const uint8_t *)p->values + first * n * size_of(p->type);
    if (w->type == BFLOAT16 && p->type == FLOAT32) {
      const uint32_t *values = (const uint32_t *)from;
      uint32_t *words = (uint32_t *)to;
      for (long i = 0; i < n / 2; i++)
        for (long lane = 0; lane < LANES; lane++, words++) {
          const uint32_t *pair = values + lane * n + 2 * i;
          *words = lane < rows ? pair[0] >> 16 | pair[1] : 0;
        }
    } else if (w->type == BFLOAT16) {
      interleave((const uint32_t *)from, n / 2, rows, n / 2, (uint32_t *)to);
    } else {
      interleave_floats(from, w->type, n, rows, n, to);
    }
    return;
  }
  long groups = n / w->group, words = (long)w->group * w->bits / 32;
  size_t size = size_of(w->type);
  for (long g = 0; g < groups; g++, to += record_of(w)) {
    const uint8_t *scales = (const uint8_t *)p->scales + (first * groups + g) * size;
    const uint8_t *biases = (const uint8_t *)p->biases + (first * groups + g) * size;
    interleave_floats(scales, w->type, groups, rows, 1, to);
    interleave_floats(biases, w->type, groups, rows, 1, to + LANES * size);
    uint32_t *packed = (uint32_t *)(to + 2 * LANES * size);
    const uint32_t *values = (const uint32_t *)p->values + first * n / 32 * p->bits;
    if (p->bits == w->bits) {
      interleave(values + g * words, n * w->bits / 32, rows, words, packed);
      continue;
    }
    int per_word = 32 / w->bits;
    for (long i = 0; i < words; i++)
      for (long lane = 0; lane < LANES; lane++, packed++) {
        const uint32_t *row = values + lane * n * p->bits / 32;
        long at = g * w->group + i * per_word;
        *packed = 0;
        for (int j = 0; j < per_word && lane < rows; j++)
          *packed |= value_at(row, at + j, p->bits) << j * w->bits;
      }
  }
}

static void pack(Crew *crew, void *what) {
  enum { SOME = 4 };
  const Packing *packing = what;
  long blocks = blocks_of(packing->to);
  for (long i; (i = take_piece(crew, (blocks + SOME - 1) / SOME)) >= 0;)
    for (long b = i * SOME; b < blocks && b < (i + 1) * SOME; b++)
      pack_block(packing, b);
  meet(crew, 0);
}

/* Bytes of a packed matrix. */
long pplex_lm_packed_bytes(const Matrix *to) { return blocks_of(to) * (long)block_of(to); }

/* Pack a matrix into to->data, with so many threads; of lanes that have no row, zeros.
   `bits` and `type` are those of the values in the file, whose scales and biases have the
   matrix's type. */
void pplex_lm_pack(const Matrix *to, const void *values, const void *scales,
                   const void *biases, int bits, int type, int threads) {
  Packing packing = {to, values, scales, biases, bits, type};
  work_together(threads, pack, &packing);
}

static void check(Crew *crew, void *what) {
  enum { SOME = 1 << 16 };
  Check *c = what;
  for (long i; (i = take_piece(crew, (c->count + SOME - 1) / SOME)) >= 0;) {
    long end = (i + 1) * SOME < c->count ? (i + 1) * SOME : c->count;
    uint32_t lost = 0;
    if (c->from == FLOAT32 && c->to == BFLOAT16)
      for (long at = i * SOME; at < end; at++)
        lost |= ((const uint32_t *)c->values)[at] & 0xFFFF;
    if (c->to == FLOAT16)
      for (long at = i * SOME; at < end; at++)
        lost |= (((const uint16_t *)c->values)[at] & 0x7C00) == 0x7C00;
    if (lost) atomic_store(&c->fits, 0);
  }
  meet(crew, 0);
}

/* Whether `count` floats can be packed as another type, or as their own, float16, of
   which only finite ones are. */
int pplex_lm_fits(const void *values, long count, int from, int to, int threads) {
  Check whole = {values, count, from, to, 1};
  work_together(threads, check, &whole);
  return atomic_load(&whole.fits);
}
