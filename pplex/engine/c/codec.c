/* The codec on CPUs: see codec.py, which lays out what is read here.

   float32 throughout. Arrays are (rows, channels), a row a moment in time. Every value
   is summed in an order that depends on the sizes of its layer alone, so the same
   sound gives the same bits in chunks of any number of frames.

   The functions that take a Crew are run by all of its threads together. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "threads.h"

enum {
  PANEL = 16,      /* columns of a matrix that lie together */
  MAX_PANELS = 4,  /* panels of a tile */
  MAX_ROWS = 96,   /* rows whose sums are held while a part of a matrix is read */
  MAX_DEPTH = 1024 /* rows of a matrix that are read for all of these at a time */
};

enum { ELU = 1, GELU = 2 };                    /* activations */
enum { KEEP = 1, ADD = 2, EDGE = 4 };          /* what else a convolution does */

/* A matrix (k, n) in panels of 16 columns, (ceil(n / 16), k, 16), and as long a bias. */
typedef struct {
  const float *weight, *bias;
  long k, n;
} matrix;

/* A causal convolution: a product with `overlap` rows more than come with a chunk. */
typedef struct {
  matrix matrix;
  long channels, stride, overlap, state, activation, flags;
} convolution;

typedef struct {
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  matrix in_proj, out_proj, linear1, linear2;
} layer;

typedef struct {
  const layer *layers;
  const float *frequencies;
  long num_layers, width, heads, feed_forward, window, block, state;
} transformer;

/* One direction. The first (encoder) or last (decoder) `num_fine` convolutions have
   many rows and run frame by frame. `head` floats of room stand before each of their
   inputs; `fine` and `coarse` are the most floats that one of their arrays has a frame,
   `between` those of the array between the two. */
typedef struct {
  const convolution *convolutions;
  long num_convolutions, num_fine, head, fine, coarse, between;
  transformer transformer;
  convolution downsample;
  const float *upsample; /* (4, width) */
  long upsample_state, samples, latents;
  long threads; /* that work together, at most */
} direction;

typedef struct {
  matrix input, output;
  const matrix *tables; /* a codebook's rows are the columns; bias -|row|^2 / 2 */
  const float *rows;    /* (codebooks, bins, dim) */
  long num_codebooks, bins, dim, threads;
} quantizer;

/* A chunk to encode or decode. */
typedef struct {
  const direction *direction;
  float *state;
  long position;
  const float *from;
  long frames;
  float *to, *memory;
} Chunk;

typedef struct {
  const quantizer *quantizer;
  const float *latents;
  int32_t *codes;
  long frames;
  float *to, *memory;
} Codes;

enum { MANY = 2 }; /* pieces of a phase that is shared in any case */

/* What happens to the sums of a product. */
typedef struct {
  const float *bias, *add;
  float *keep;
  long activation;
} finish;

/* Places in memory that is only used during a call. */
typedef struct {
  float *x, *y, *kept, *between, *normed, *qkv, *hidden, *turns, *scores;
} room;

static float *place(float **next, long count) {
  float *here = *next;
  *next += (count + 2 * PANEL - 1) / PANEL * PANEL; /* whole vectors may be read */
  return here;
}

static float *lay_out(const direction *d, long frames, float *memory, room *r) {
  const transformer *t = &d->transformer;
  long rows = frames * d->latents, width = t->width;
  long most = d->coarse * frames > d->fine ? d->coarse * frames : d->fine;
  float *next = memory;
  r->x = place(&next, d->head + most) + d->head;
  r->y = place(&next, d->head + most) + d->head;
  r->kept = place(&next, most);
  r->between = place(&next, d->head + d->between * frames) + d->head;
  r->normed = place(&next, rows * width);
  r->qkv = place(&next, rows * 3 * width);
  r->hidden = place(&next, rows * t->feed_forward);
  r->turns = place(&next, rows * width / t->heads);
  r->scores = place(&next, (t->window + PANEL - 1) / PANEL * PANEL * d->threads);
  return next;
}

typedef struct {
  void (*encode)(Crew *, void *);
  void (*quantize)(Crew *, void *);
  void (*dequantize)(Crew *, void *);
  void (*decode)(Crew *, void *);
  void (*activate)(long, float *, long);
} engine;

#define SOURCE "codec.h"
#include "each_cpu.h"

static const engine *in_use;

/* Choose the instruction set: the best there is up to `level`; which it is. */
int pplex_codec_use(int level) {
  static const engine *const engines[] = OF_EACH_CPU(&engine);
  int set = best_set(level);
  in_use = engines[set];
  return set;
}

/* Numbers too small for float32's full precision take a hundred times as long and are
   far below what can be heard: they count as zero while a call lasts. */
#ifdef __x86_64__
static unsigned flush(void) {
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
}
static void restore(unsigned before) { _mm_setcsr(before); }
#else
static unsigned flush(void) { return 0; }
static void restore(unsigned before) { (void)before; }
#endif

/* Floats of memory that a call for `frames` frames needs. */
long pplex_codec_room(const direction *d, long frames) {
  room r;
  return lay_out(d, frames, 0, &r) - (float *)0;
}

typedef struct {
  void (*work)(Crew *, void *);
  void *what;
} Call;

static void flushed(Crew *crew, void *what) {
  const Call *call = what;
  unsigned before = flush();
  call->work(crew, call->what);
  restore(before);
}

static void run(long threads, void (*work)(Crew *, void *), void *what) {
  Call call = {work, what};
  work_together((int)threads, flushed, &call);
}

/* PCM (frames * samples) to latents (frames, width). */
void pplex_codec_encode(const direction *d, float *state, long position,
                        const float *pcm, long frames, float *latents,
                        float *memory) {
  Chunk chunk = {d, state, position, pcm, frames, latents, memory};
  run(d->threads, in_use->encode, &chunk);
}

/* Latents (frames, width) to codes (codebooks, frames). Memory: frames times the
   columns of `input` and a codebook, and 32 more. */
void pplex_codec_quantize(const quantizer *q, const float *latents, long frames,
                          int32_t *codes, float *memory) {
  Codes whole = {q, latents, codes, frames, 0, memory};
  run(q->threads, in_use->quantize, &whole);
}

/* Codes (codebooks, frames) to latents (frames, width). */
void pplex_codec_dequantize(const quantizer *q, const int32_t *codes, long frames,
                            float *latents, float *memory) {
  Codes whole = {q, 0, (int32_t *)codes, frames, latents, memory};
  run(q->threads, in_use->dequantize, &whole);
}

/* Latents (frames, width) to PCM (frames * samples). */
void pplex_codec_decode(const direction *d, float *state, long position,
                        const float *latents, long frames, float *pcm,
                        float *memory) {
  Chunk chunk = {d, state, position, latents, frames, pcm, memory};
  run(d->threads, in_use->decode, &chunk);
}

/* An activation of `count` values, in place. */
void pplex_codec_activate(long activation, float *x, long count) {
  unsigned before = flush();
  in_use->activate(activation, x, count);
  restore(before);
}
