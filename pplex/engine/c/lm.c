/* One frame of the language model on a CPU, for rows of a batch at different places.

   Loaded by engine.py, whose structures (structures.py) mirror those below. What a frame
   computes is that of the MLX operations in pplex/model; done one by one, their thousand small operations take far longer to start than to run.

   Matrices are packed in blocks of LANES outputs (pplex_lm_pack), so that an output has
   a lane of its own and is summed input by input. All sums of a row are taken in an
   order that depends on the model's sizes and the row's own positions alone: its result
   is the same bits whatever rows stand beside it. */

#ifdef __linux__
#define _GNU_SOURCE
#include <sched.h>
#endif
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum { LANES = 16, AHEAD = 16 * LANES, FAR = 512 };  /* words to prefetch */
enum { FLOAT32 = 32, BFLOAT16 = 16 };  /* `bits` of what is not quantized */

/* Packed: words of block b, input by input, LANES outputs beside each other. A word
   holds a float32, two bfloat16 of inputs one after the other, or 32 / bits quantized
   values; scales and biases are packed alike, a value for each group of inputs. */
typedef struct {
  const int32_t *words;
  const float *scales, *biases;
  int32_t rows, columns, bits, group;
} Matrix;

/* Row after row, as MLX holds it: float32, or quantized values of any number of bits. */
typedef struct {
  const void *words;
  const float *scales, *biases;
  int32_t rows, columns, bits, group;
} Table;

typedef struct {
  const float *norm1, *norm2;
  Matrix in_proj, out_proj, linear_in, linear_out;
} Layer;

typedef struct {
  int32_t dim, heads, layers, hidden, window, text_card, card, streams, steps;
  int32_t hiding_step;  /* the depformer step that does not see the first; -1: none */
  int32_t dep_dim, dep_heads, dep_layers, dep_hidden;
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

/* A row's keys (layers, heads, slots / LANES, head_dim, LANES) and values (layers,
   heads, slots, head_dim padded to LANES); how many positions it has; where else its
   first ones are, a multiple of LANES, and are read for several rows; the angles of the
   next; the key of this frame's noise. */
typedef struct {
  float *keys, *values;
  int64_t slots, end;
  const float *first_keys, *first_values;
  int64_t first_slots, num_first;
  const float *cosines, *sines;
  uint32_t key[2];
} Row;

/* Keys and values of a head, some of whose slots, the first, lie elsewhere. */
typedef struct {
  const float *keys, *values, *first_keys, *first_values;
  long num_first;
} Past;

static long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

static const float LEAST_UNIFORM = 0x1p-33f;  /* as in pplex/model/sampling.py */
static const float MOST_GUMBEL = 17;  /* -log(-log(1 - 2^-24)) is 16.6 */

/* ---- Quantized values ---- */

/* Values lie one after the other, lowest bits first, across words. */
static uint32_t value_at(const uint32_t *words, long idx, int bits) {
  long at = idx * bits, word = at / 32;
  int shift = (int)(at % 32);
  uint64_t both = words[word];
  if (shift + bits > 32) both |= (uint64_t)words[word + 1] << 32;
  return (uint32_t)(both >> shift) & ((1u << bits) - 1);
}

/* Pack `rows` x `columns` values of `from` bits, row after row, as `bits`; of lanes that
   have no row, zeros. Returns 0 if bfloat16 was asked for and does not hold them. */
int pplex_lm_pack(const uint32_t *source, long rows, long columns, int from, int bits,
                  uint32_t *words) {
  long per_word = 32 / bits, per_row = (columns + per_word - 1) / per_word;
  long source_row = from == 32 ? columns : columns * from / 32;
  for (long block = 0; block * LANES < rows; block++, words += per_row * LANES)
    for (long lane = 0; lane < LANES; lane++) {
      long row = block * LANES + lane;
      const uint32_t *values = source + row * source_row;
      for (long i = 0; i < per_row; i++) {
        uint32_t word = 0;
        if (row >= rows) {
        } else if (from == bits) {
          word = values[i];
        } else if (bits == BFLOAT16) {
          uint32_t even = values[2 * i];
          uint32_t odd = 2 * i + 1 < columns ? values[2 * i + 1] : 0;
          if ((even | odd) & 0xFFFF) return 0;
          word = even >> 16 | odd;
        } else {
          for (long j = 0; j < per_word && i * per_word + j < columns; j++)
            word |= value_at(values, i * per_word + j, from) << j * bits;
        }
        words[i * LANES + lane] = word;
      }
    }
  return 1;
}

/* x += row `idx` of a table. */
static void add_row(const Table *table, long idx, float *x) {
  long n = table->columns;
  if (table->bits == FLOAT32) {
    const float *row = (const float *)table->words + idx * n;
    for (long i = 0; i < n; i++) x[i] += row[i];
    return;
  }
  const uint32_t *row = (const uint32_t *)table->words + idx * n * table->bits / 32;
  long groups = n / table->group;
  for (long i = 0; i < n; i++) {
    long group = idx * groups + i / table->group;
    x[i] += table->scales[group] * (float)value_at(row, i, table->bits) +
            table->biases[group];
  }
}

/* The sum of a column's embeddings (dim): audio in order, text last. */
static void sum_rows(const Model *m, const int32_t *column, float *x) {
  memset(x, 0, (size_t)m->dim * sizeof *x);
  for (long s = 1; s < m->streams; s++)
    if (column[s] >= 0) add_row(&m->audio_emb, (s - 1) * (m->card + 1) + column[s], x);
  if (column[0] >= 0) add_row(&m->text_emb, column[0], x);
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

/* Floats that pplex_lm_step needs beside its arguments, for `rows` rows. */
long pplex_lm_scratch(const Model *m, long rows) {
  Widths w = widths_of(m);
  long slots = padded(m->steps), head = m->dep_dim / m->dep_heads;
  long per_row = 3 * w.dim + max_of(w.qkv, w.dep_qkv) + max_of(w.hidden, w.dep_hidden) +
                 padded((long)m->steps * m->dep_dim) + 3 * w.dep_dim + w.text + w.audio +
                 m->dep_layers * m->dep_heads * slots * (head + padded(head));
  return rows * per_row + padded(m->window) + padded(m->steps) + 64 * LANES;
}

/* ---- Large products are shared among threads, which sleep between them ---- */

typedef struct Product {
  void (*part)(const struct Product *, long first, long last);
  const Matrix *w;
  long rows;
  const float *x;
  long ldx;
  float *y;
  long ldy;
} Product;

/* Below this many bytes of weights waking another thread is not worth it; nor is it in a
   batch, where the codec keeps the other cores busy. BLOCKS_EACH blocks are taken at a
   time. */
enum { SHARED_BYTES = 1 << 20, BLOCKS_EACH = 8, MAX_THREADS = 16 };

static struct {
  pthread_mutex_t busy, lock; /* one product at a time; what follows */
  pthread_cond_t wake, done;
  int threads, working; /* 0 threads: not started, -1: alone */
  unsigned long number; /* of the product */
  const Product *product;  /* NULL: none that can be joined */
  atomic_long next;        /* block */
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static long blocks_of(const Matrix *w) { return (w->rows + LANES - 1) / LANES; }

static void take_parts(const Product *product) {
  long blocks = blocks_of(product->w), first;
  while ((first = atomic_fetch_add(&pool.next, BLOCKS_EACH)) < blocks)
    product->part(product, first,
                  first + BLOCKS_EACH < blocks ? first + BLOCKS_EACH : blocks);
}

static void *work(void *unused) {
  unsigned long seen = 0;
  pthread_mutex_lock(&pool.lock);
  for (;;) {
    while (!pool.product || pool.number == seen)
      pthread_cond_wait(&pool.wake, &pool.lock);
    seen = pool.number;
    const Product *product = pool.product;
    pool.working++;
    pthread_mutex_unlock(&pool.lock);
    take_parts(product);
    pthread_mutex_lock(&pool.lock);
    if (--pool.working == 0) pthread_cond_signal(&pool.done);
  }
  return unused;
}

/* A child process has none of the threads. */
static void forget_threads(void) {
  pthread_mutex_init(&pool.busy, NULL);
  pthread_mutex_init(&pool.lock, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pthread_cond_init(&pool.done, NULL);
  pool.threads = pool.working = 0;
  pool.product = NULL;
}

static int usable_cores(void) {
#ifdef __linux__
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
#endif
  return 1;
}

static void start_threads(void) {
  static int hooked;
  int wanted = usable_cores();
  if (wanted > MAX_THREADS) wanted = MAX_THREADS;
  if (!hooked) hooked = pthread_atfork(NULL, NULL, forget_threads) == 0;
  for (pool.threads = 0; hooked && pool.threads < wanted - 1; pool.threads++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, NULL) != 0) break;
    pthread_detach(thread);
  }
  if (pool.threads == 0) pool.threads = -1;
}

static void run_product(const Product *product) {
  const Matrix *w = product->w;
  long bytes = (long)w->rows * w->columns / 8 * w->bits;
  int shared = bytes >= SHARED_BYTES && pthread_mutex_trylock(&pool.busy) == 0;
  if (shared && pool.threads == 0) start_threads();
  if (!shared || pool.threads < 0) {
    product->part(product, 0, blocks_of(w));
  } else {
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.next, 0);
    pool.product = product;
    pool.number++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_parts(product);
    pthread_mutex_lock(&pool.lock);
    pool.product = NULL; /* who wakes now has nothing left to do */
    while (pool.working) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
  }
  if (shared) pthread_mutex_unlock(&pool.busy);
}

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
  static void (*const steps[])(const Model *, const Sampling *, long, const Row *,
                               const int32_t *, const int32_t *, int32_t *, float *,
                               float *) = OF_EACH_CPU(step);
  steps[best_set(level)](model, sampling, num_rows, rows, columns, given, agent, logits,
                         scratch);
  return 1;
}

/* Add positions whose inputs (num_rows, dim) are given to keys and values, and no more;
   rows are as in pplex_lm_step. */
void pplex_lm_read(const Model *model, long num_rows, const Row *rows,
                   const float *inputs, float *scratch) {
  static void (*const reads[])(const Model *, long, const Row *, const float *,
                               float *) = OF_EACH_CPU(read);
  reads[best_set(level)](model, num_rows, rows, inputs, scratch);
}

/* Floats that pplex_lm_read needs beside its arguments. */
long pplex_lm_read_scratch(const Model *m, long num_rows) {
  Widths w = widths_of(m);
  return num_rows * (2 * w.dim + w.qkv + w.hidden) + padded(m->window);
}
