// One frame of the language model in one launch, for one conversation.
//
// The grid is as many blocks as the GPU has multiprocessors, all resident at once; they
// pass from phase to phase through `Grid::sync`. A phase is a matrix-vector product (its
// first weights are fetched before the wait) or an attention. Activations are float32
// and cross between blocks through the L2 cache, so they are read with __ldcg. Sizes and
// storage forms are constants that frame.py writes in front of this text.
constexpr int HEAD_DIM = DIM / HEADS, DEP_HEAD_DIM = DEP_DIM / DEP_HEADS;

// How a matrix is stored: bits 4 or 8 (affine, with scales and biases) or 16 (bfloat16).
template <int BITS_, int GROUP_, int K_>
struct Matrix {
  static constexpr int BITS = BITS_, GROUP = GROUP_, K = K_;
  static constexpr int PER = 128 / BITS;  // weights in 16 bytes
  static constexpr int CHUNKS = (K + 32 * PER - 1) / (32 * PER);
  const char* words;
  const bf16 *scales, *biases;
  __device__ Matrix(const void* w, const bf16* s, const bf16* b)
      : words((const char*)w), scales(s), biases(b) {}
  __device__ Matrix part(size_t first_row) const {  // from a row of a stack on
    return Matrix(words + first_row * K * BITS / 8,
                  BITS == 16 ? scales : scales + first_row * (K / GROUP),
                  BITS == 16 ? biases : biases + first_row * (K / GROUP));
  }
  __device__ float value(size_t row, int k) const {
    size_t at = row * K + k;
    if (BITS == 16) return to_float(((const bf16*)words)[at]);
    unsigned q = (unsigned char)words[at * BITS / 8];
    if (BITS == 4) q = (q >> (4 * (k & 1))) & 15;
    size_t group = row * (K / GROUP) + k / GROUP;
    float w = fmaf(to_float(scales[group]), (float)q,
                   to_float(biases[group]));
    return to_float(to_bf16(w));
  }
};

struct Shared : Scratch {
  float x[LONGEST];         // the vector to multiply by, permuted: see `place`
  float sums[LONGEST / 8];  // its sums over every 16 bytes' worth of weights
  float head[3 * HEAD_DIM];
  float partial[WARPS * HEAD_DIM > DEP_DIM ? WARPS * HEAD_DIM : DEP_DIM];
  float scores[MAX_SCORES];
  int last;
};

// Put values k = 4 q .. 4 q + 3 where the lanes that hold their weights find them:
// float4 number (chunk, quad of the lane, lane). Full warps must call it together.
template <class M>
__device__ void place(Shared& sh, int q, float4 v) {
  constexpr int QUADS = M::PER / 4;
  int unit = q / QUADS, chunk = unit / 32, lane = unit % 32;
  float sum = v.x + v.y + v.z + v.w;
  for (int i = 1; i < QUADS; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
  if (q < M::K / 4) {
    ((float4*)sh.x)[(chunk * QUADS + q % QUADS) * 32 + lane] = v;
    if (q % QUADS == 0) sh.sums[unit] = sum;
  }
}

// Stage the vector `get(k)` (float4 from k on), normalised if `norm` is given.
template <class M, class Get>
__device__ void stage(Shared& sh, const float* norm, Get get) {
  constexpr int N = (M::K / 4 + THREADS - 1) / THREADS;
  float4 v[N];
  float squares = 0;
  for (int i = 0; i < N; i++) {
    int q = i * THREADS + threadIdx.x;
    v[i] = q < M::K / 4 ? get(4 * q) : make_float4(0, 0, 0, 0);
    squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
  }
  float scale = 1;
  if (norm) scale = rsqrtf(block_sum(sh, squares) / M::K + 1e-8f);
  for (int i = 0; i < N; i++) {
    int q = i * THREADS + threadIdx.x;
    if (norm && q < M::K / 4) {
      float4 w = __ldg((const float4*)norm + q);
      v[i] = make_float4(v[i].x * scale * w.x, v[i].y * scale * w.y,
                         v[i].z * scale * w.z, v[i].w * scale * w.w);
    }
    place<M>(sh, q, v[i]);
  }
  __syncthreads();
}

// Weights of two chunks of R rows, a lane's share of them.
template <class M, int R>
struct Tile {
  static constexpr int U = M::CHUNKS > 1 ? 2 : 1;
  uint4 w[U][R];
  float s[U][R], b[U][R];

  template <class Row>
  __device__ void load(const M& m, int batch, Row row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int u = 0; u < U; u++) {
      int k = ((batch * U + u) * 32 + lane) * M::PER;
      bool inside = k < M::K;
#pragma unroll
      for (int r = 0; r < R; r++) {
        size_t at = row(r);
        const char* p = m.words + (at * M::K + k) * M::BITS / 8;
        w[u][r] = make_uint4(0, 0, 0, 0);
        if (inside)
          asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                       : "=r"(w[u][r].x), "=r"(w[u][r].y), "=r"(w[u][r].z),
                         "=r"(w[u][r].w)
                       : "l"(p));
        s[u][r] = b[u][r] = 0;
        if (M::BITS < 16 && inside) {
          size_t group = at * (M::K / M::GROUP) + k / M::GROUP;
          s[u][r] = low(__ldg(&m.scales[group].bits));
          b[u][r] = low(__ldg(&m.biases[group].bits));
        }
      }
    }
  }

  __device__ void add(const Shared& sh, int batch, float (&acc)[R]) const {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int u = 0; u < U; u++) {
      int chunk = batch * U + u;
      if (U > 1 && chunk >= M::CHUNKS) break;
      bool inside = (chunk * 32 + lane) * M::PER < M::K;
      const float4* x = (const float4*)sh.x + chunk * (M::PER / 4) * 32 + lane;
      float p[R];
      for (int r = 0; r < R; r++) p[r] = 0;
      if (inside) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if constexpr (M::BITS == 4) {
            // bfloat16 128 + q, exactly; the 128s are taken off below.
            float4 low = x[2 * i * 32], high = x[(2 * i + 1) * 32];
#pragma unroll
            for (int r = 0; r < R; r++) {
              unsigned q = word(w[u][r], i);
              p[r] = two((q & 0x000F000Fu) | 0x43004300u, low.x, high.x, p[r]);
              p[r] = two(((q >> 4) & 0x000F000Fu) | 0x43004300u, low.y, high.y, p[r]);
              p[r] = two(((q >> 8) & 0x000F000Fu) | 0x43004300u, low.z, high.z, p[r]);
              p[r] = two(((q >> 12) & 0x000F000Fu) | 0x43004300u, low.w, high.w, p[r]);
            }
          } else if constexpr (M::BITS == 8) {
            float4 v = x[i * 32];
#pragma unroll
            for (int r = 0; r < R; r++) {
              unsigned q = word(w[u][r], i);
              p[r] = fmaf((float)(q & 255), v.x, p[r]);
              p[r] = fmaf((float)((q >> 8) & 255), v.y, p[r]);
              p[r] = fmaf((float)((q >> 16) & 255), v.z, p[r]);
              p[r] = fmaf((float)(q >> 24), v.w, p[r]);
            }
          } else if (i % 2 == 0) {
            float4 v = x[i / 2 * 32];
#pragma unroll
            for (int r = 0; r < R; r++) {
              p[r] = two(word(w[u][r], i), v.x, v.y, p[r]);
              p[r] = two(word(w[u][r], i + 1), v.z, v.w, p[r]);
            }
          }
        }
      }
      float sum = inside ? sh.sums[chunk * 32 + lane] : 0.0f;
#pragma unroll
      for (int r = 0; r < R; r++) {
        if (M::BITS == 16)
          acc[r] += p[r];
        else
          acc[r] += fmaf(s[u][r], p[r],
                         (b[u][r] - (M::BITS == 4 ? 128.0f * s[u][r] : 0.0f)) * sum);
      }
    }
  }

  __device__ static unsigned word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
  __device__ static float two(unsigned pair, float low, float high, float p) {
    p = fmaf(__uint_as_float(pair << 16), low, p);
    return fmaf(__uint_as_float(pair & 0xFFFF0000u), high, p);
  }
};

// A product in two halves: `begin` fetches the first weights, `finish` does it all. An
// item is R rows, `row(item, r)` names them, `out(item, sums)` is called by every lane.
template <class M, int R, class Row>
struct Product {
  M m;
  int items;
  Row row;
  Tile<M, R> tile;
  static constexpr int BATCHES = (M::CHUNKS + Tile<M, R>::U - 1) / Tile<M, R>::U;

  __device__ Product(M m, int items, Row row) : m(m), items(items), row(row) {
    load(tile, first(), 0);
  }
  // Warps of different blocks first, so that few items spread over all blocks.
  __device__ static int first() {
    return (threadIdx.x / 32) * gridDim.x + blockIdx.x;
  }
  __device__ void load(Tile<M, R>& t, int item, int batch) {
    if (item < items) t.load(m, batch, [&](int r) { return row(item, r); });
  }
  template <class Out>
  __device__ void finish(const Shared& sh, Out out) {
    int step = WARPS * gridDim.x;
    for (int item = first(); item < items; item += step) {
      float acc[R];
      for (int r = 0; r < R; r++) acc[r] = 0;
#pragma unroll 1
      for (int batch = 0; batch < BATCHES; batch++) {
        Tile<M, R> next;
        if (batch + 1 < BATCHES)
          load(next, item, batch + 1);
        else
          load(next, item + step, 0);
        tile.add(sh, batch, acc);
        tile = next;
      }
      for (int r = 0; r < R; r++) acc[r] = warp_sum(acc[r]);
      out(item, acc);
    }
  }
};
template <int R, class M, class Row>
__device__ Product<M, R, Row> product(M m, int items, Row row) {
  return Product<M, R, Row>(m, items, row);
}

__device__ inline float4 load4(const float* p) { return __ldcg((const float4*)p); }

// Where the new position goes: see FrameCache.place.
struct Place {
  int position, slot, visible, capacity;
};

// What is kept of every layer (layers, heads, capacity, head_dim); scales at 8 bits.
struct Ring {
  void *keys, *key_scales, *values, *value_scales;
};
using Vectors = Kept<KV_BITS, HEAD_DIM>;

// Attention of one new position over a ring; its keys and values are written there.
//
// A head is shared by SPLITS blocks, the last of which puts their parts together.
__device__ void attend(Shared& sh, const float* qkv, const Ring& ring, int layer,
                       const float* frequencies, Place where, float* parts,
                       unsigned* arrived, float* y) {
  int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS, t = threadIdx.x;
  if (head >= HEADS) return;
  constexpr int PAIRS = HEAD_DIM / 2;
  int slot = where.slot, visible = where.visible;
  size_t in_ring = ((size_t)layer * HEADS + head) * where.capacity;
  Vectors k(ring.keys, ring.key_scales, in_ring);
  Vectors v(ring.values, ring.value_scales, in_ring);
  int from = (long long)visible * split / SPLITS;
  int to = (long long)visible * (split + 1) / SPLITS;
  bool mine = slot >= from && slot < to;
  if (t < 2 * PAIRS) {
    int pair = t % PAIRS, key = t / PAIRS;
    const float* p = qkv + key * DIM + head * HEAD_DIM + 2 * pair;
    float re = __ldcg(p), im = __ldcg(p + 1), sine, cosine;
    sincosf((float)where.position * frequencies[pair], &sine, &cosine);
    float a = re * cosine - im * sine, b = re * sine + im * cosine;
    float scale = key ? 1 : rsqrtf((float)HEAD_DIM);
    sh.head[key * HEAD_DIM + 2 * pair] = a * scale;
    sh.head[key * HEAD_DIM + 2 * pair + 1] = b * scale;
  } else if (t < 2 * PAIRS + HEAD_DIM) {
    int d = t - 2 * PAIRS;
    sh.head[2 * HEAD_DIM + d] = __ldcg(qkv + 2 * DIM + head * HEAD_DIM + d);
  }
  __syncthreads();
  if (t / 32 == 0) k.put(slot, sh.head + HEAD_DIM, mine);
  if (t / 32 == 1) v.put(slot, sh.head + 2 * HEAD_DIM, mine);
  __syncthreads();

  constexpr int PER = Vectors::PER, LANES = Vectors::LANES;  // lanes for a position
  constexpr int ROWS = 32 / LANES;
  int lane = t % 32, part = lane % LANES, row = t / 32 * ROWS + lane / LANES;
  float q[PER], x[PER];
  for (int i = 0; i < PER; i++) q[i] = sh.head[part * PER + i];
  float most = LOWEST;
  for (int first = from; first < to; first += WARPS * ROWS) {
    int j = first + row;
    float dot = 0;
    if (j < to) {
      if (j == slot) {
        for (int i = 0; i < PER; i++) dot += q[i] * sh.head[HEAD_DIM + part * PER + i];
      } else {
        auto w = k.load(j, part);
        Vectors::unpack(w, x);
        for (int i = 0; i < PER; i++) dot += q[i] * x[i];
        dot *= w.scale;
      }
    }
    for (int i = 1; i < LANES; i *= 2) dot += __shfl_xor_sync(~0u, dot, i);
    if (j < to) {
      if (part == 0) sh.scores[j - from] = dot;
      most = fmaxf(most, dot);
    }
  }
  most = block_max(sh, most);
  float acc[PER] = {0}, sum = 0;
  for (int j = from + row; j < to; j += WARPS * ROWS) {
    float p = expf(sh.scores[j - from] - most);
    sum += p;
    if (j == slot) {
      for (int i = 0; i < PER; i++)
        acc[i] += p * sh.head[2 * HEAD_DIM + part * PER + i];
    } else {
      auto w = v.load(j, part);
      Vectors::unpack(w, x);
      p *= w.scale;
      for (int i = 0; i < PER; i++) acc[i] += p * x[i];
    }
  }
  for (int i = 0; i < PER; i++)
    for (int o = LANES; o < 32; o *= 2) acc[i] += __shfl_xor_sync(~0u, acc[i], o);
  if (lane < LANES)
    for (int i = 0; i < PER; i++)
      sh.partial[t / 32 * HEAD_DIM + part * PER + i] = acc[i];
  sum = block_sum(sh, part == 0 ? sum : 0.0f);
  float* own = parts + (size_t)(head * SPLITS + split) * (HEAD_DIM + 2);
  if (t < HEAD_DIM) {
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += sh.partial[i * HEAD_DIM + t];
    if (SPLITS == 1)
      y[head * HEAD_DIM + t] = total / sum;
    else
      own[t] = total;
  }
  if (SPLITS == 1) return;
  if (t == 0) own[HEAD_DIM] = most, own[HEAD_DIM + 1] = sum;
  __threadfence();
  __syncthreads();
  if (t == 0) sh.last = atomicAdd(arrived + head, 1u) == SPLITS - 1;
  __syncthreads();
  if (!sh.last || t >= HEAD_DIM) return;
  __threadfence();
  const float* all = parts + (size_t)head * SPLITS * (HEAD_DIM + 2);
  float m = LOWEST, total = 0, weight = 0;
  for (int i = 0; i < SPLITS; i++) m = fmaxf(m, __ldcg(all + i * (HEAD_DIM + 2) + HEAD_DIM));
  for (int i = 0; i < SPLITS; i++) {
    const float* p = all + i * (HEAD_DIM + 2);
    float share = __ldcg(p + HEAD_DIM + 1);
    if (share == 0) continue;  // an empty range
    float e = expf(__ldcg(p + HEAD_DIM) - m);
    total += e * __ldcg(p + t);
    weight += e * share;
  }
  y[head * HEAD_DIM + t] = total / weight;
}

// Attention within the depformer: every block does it for itself, into `y`.
__device__ void attend_steps(Shared& sh, const float* qkv, int step, int first,
                             float* y) {
  constexpr int W = 3 * DEP_DIM, D = (DEP_HEAD_DIM + 31) / 32;
  int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < DEP_HEADS; head += WARPS) {
    const float* base = qkv + head * DEP_HEAD_DIM;
    float q[D], acc[D], most = LOWEST, sum = 0;
    for (int i = 0; i < D; i++) {
      int d = i * 32 + lane;
      q[i] = d < DEP_HEAD_DIM
                 ? __ldcg(base + step * W + d) * rsqrtf((float)DEP_HEAD_DIM)
                 : 0;
      acc[i] = 0;
    }
    for (int j = first; j <= step; j++) {
      float dot = 0;
      for (int i = 0; i < D; i++) {
        int d = i * 32 + lane;
        if (d < DEP_HEAD_DIM) dot += q[i] * __ldcg(base + j * W + DEP_DIM + d);
      }
      dot = warp_sum(dot);
      float m = fmaxf(most, dot), old = expf(most - m), p = expf(dot - m);
      sum = sum * old + p;
      for (int i = 0; i < D; i++) {
        int d = i * 32 + lane;
        if (d < DEP_HEAD_DIM)
          acc[i] = acc[i] * old + p * __ldcg(base + j * W + 2 * DEP_DIM + d);
      }
      most = m;
    }
    for (int i = 0; i < D; i++) {
      int d = i * 32 + lane;
      if (d < DEP_HEAD_DIM) y[head * DEP_HEAD_DIM + d] = acc[i] / sum;
    }
  }
  __syncthreads();
}

using Text = Matrix<TEXT, DIM>;
using Audio = Matrix<AUDIO, DIM>;
using Qkv = Matrix<QKV, DIM>;
using Out = Matrix<OUT, DIM>;
using Up = Matrix<UP, DIM>;
using Down = Matrix<DOWN, HIDDEN>;
using Head = Matrix<HEAD, DIM>;
using DepIn = Matrix<DEP_IN, DIM>;
using DepText = Matrix<DEP_TEXT, DEP_DIM>;
using DepAudio = Matrix<DEP_AUDIO, DEP_DIM>;
using DepQkv = Matrix<DEP_QKV, DEP_DIM>;
using DepOut = Matrix<DEP_OUT, DEP_DIM>;
using DepUp = Matrix<DEP_UP, DEP_DIM>;
using DepDown = Matrix<DEP_DOWN, DEP_HIDDEN>;
using DepHead = Matrix<DEP_HEAD, DEP_DIM>;

struct Weights {
  Text text_emb;
  Audio audio_emb;
  Qkv qkv;
  Out out;
  Up up;
  Down down;
  Head head;
  DepIn dep_in;
  DepText dep_text_emb;
  DepAudio dep_audio_emb;
  DepQkv dep_qkv;
  DepOut dep_out;
  DepUp dep_up;
  DepDown dep_down;
  DepHead dep_head;
  const float *norm1, *norm2, *out_norm, *dep_norm1, *dep_norm2, *frequencies;
};

// How ids are drawn; of the frame's `noise_width` random numbers, `text_noise` are text's.
struct Sampling {
  uint2 key;
  float text_temperature, temperature;
  int text_top_k, top_k, text_noise, noise_width;
};

// `given` is text, then codes; `column` is that, then the user's codes as they came.
__device__ void frame(const Weights& w, const int* tokens, const int* user,
                      const int* given, Place where, Sampling sampling,
                      const Ring& ring, int* column, float* work) {
  extern __shared__ __align__(16) char memory[];
  Shared& sh = *(Shared*)memory;
  unsigned* counters = (unsigned*)work;
  Grid grid{counters};
  unsigned* arrived = counters + 32;
  float* x = work + WORK_X;
  float* qkv = work + WORK_QKV;
  float* y = work + WORK_Y;
  float* hidden = work + WORK_HIDDEN;
  float* logits = work + WORK_LOGITS;
  float* parts = work + WORK_PARTS;
  float* dep_in = work + WORK_DEP_IN;
  float* dep_x = work + WORK_DEP_X;
  float* dep_qkv = work + WORK_DEP_QKV;
  float* dep_hidden = work + WORK_DEP_HIDDEN;
  float* dep_logits = work + WORK_DEP_LOGITS;
  Noise noise{sampling.key, 0, (unsigned)sampling.noise_width};
  int t = threadIdx.x, lane = t % 32, everyone = blockIdx.x * THREADS + t;
  if (everyone < N_Q - STEPS) column[1 + STEPS + everyone] = user[everyone];

  for (int d = everyone; d < DIM; d += gridDim.x * THREADS) {
    float sum = 0;
    for (int i = 0; i <= N_Q; i++) {
      int stream = (i + 1) % (N_Q + 1);  // text last
      int id = tokens[stream];
      float value = id < 0        ? 0
                    : stream == 0 ? w.text_emb.value(id, d)
                                  : w.audio_emb.value((i * (CARD + 1)) + id, d);
      sum = i ? to_float(to_bf16(sum + value)) : value;
    }
    x[d] = sum;
  }

#pragma unroll 1
  for (int l = 0; l < LAYERS; l++) {
    auto pairs = [](int item, int r) { return 2 * item + r; };
    {
      auto p = product<2>(w.qkv.part((size_t)l * 3 * DIM), 3 * DIM / 2, pairs);
      grid.sync();
      stage<Qkv>(sh, w.norm1 + l * DIM, [&](int k) { return load4(x + k); });
      p.finish(sh, [&](int item, const float* v) {
        if (lane < 2) qkv[2 * item + lane] = lane ? v[1] : v[0];
      });
    }
    grid.sync();
    attend(sh, qkv, ring, l, w.frequencies, where, parts, arrived + l * HEADS, y);
    {
      auto p = product<2>(w.out.part((size_t)l * DIM), DIM / 2, pairs);
      grid.sync();
      stage<Out>(sh, nullptr, [&](int k) { return load4(y + k); });
      p.finish(sh, [&](int item, const float* v) {
        if (lane < 2) x[2 * item + lane] = __ldcg(x + 2 * item + lane) + (lane ? v[1] : v[0]);
      });
    }
    {
      auto p = product<2>(w.up.part((size_t)l * 2 * HIDDEN), HIDDEN,
                          [](int item, int r) { return r * HIDDEN + item; });
      grid.sync();
      stage<Up>(sh, w.norm2 + l * DIM, [&](int k) { return load4(x + k); });
      p.finish(sh, [&](int item, const float* v) {
        if (lane == 0) hidden[item] = v[0] / (1 + expf(-v[0])) * v[1];
      });
    }
    {
      auto p = product<2>(w.down.part((size_t)l * DIM), DIM / 2, pairs);
      grid.sync();
      stage<Down>(sh, nullptr, [&](int k) { return load4(hidden + k); });
      p.finish(sh, [&](int item, const float* v) {
        if (lane < 2) x[2 * item + lane] = __ldcg(x + 2 * item + lane) + (lane ? v[1] : v[0]);
      });
    }
  }
  {
    auto pairs = [](int item, int r) { return 2 * item + r; };
    auto p = product<2>(w.head, TEXT_CARD / 2, pairs);
    grid.sync();
    stage<Head>(sh, w.out_norm, [&](int k) { return load4(x + k); });
    p.finish(sh, [&](int item, const float* v) {
      if (lane < 2) logits[2 * item + lane] = lane ? v[1] : v[0];
    });
    __syncthreads();
    auto in = product<2>(w.dep_in, STEPS * DEP_DIM / 2, pairs);
    stage<DepIn>(sh, w.out_norm, [&](int k) { return load4(x + k); });
    in.finish(sh, [&](int item, const float* v) {
      if (lane < 2) dep_in[2 * item + lane] = lane ? v[1] : v[0];
    });
  }
  grid.sync();
  int token = choose(sh, [=](int i) { return __ldcg(logits + i); }, TEXT_CARD, noise,
                     sampling.text_temperature, sampling.text_top_k);
  noise.first = sampling.text_noise;
  token = take_given(token, given[0]);
  if (everyone == 0) column[0] = token;

#pragma unroll 1
  for (int s = 0; s < STEPS; s++) {
    auto pairs = [](int item, int r) { return 2 * item + r; };
    auto single = [](int item, int) { return item; };
    auto begin = [&](int d) {
      float value = token < 0 ? 0
                    : s == 0  ? w.dep_text_emb.value(token, d)
                              : w.dep_audio_emb.value((s - 1) * (CARD + 1) + token, d);
      return __ldcg(dep_in + s * DEP_DIM + d) + value;
    };
#pragma unroll 1
    for (int l = 0; l < DEP_LAYERS; l++) {
      size_t layer = (size_t)s * DEP_LAYERS + l;
      float* steps = dep_qkv + (size_t)l * STEPS * 3 * DEP_DIM;
      {
        auto p = product<2>(w.dep_qkv.part(layer * 3 * DEP_DIM), 3 * DEP_DIM / 2, pairs);
        const float* norm = w.dep_norm1 + layer * DEP_DIM;
        if (l == 0) {
          __syncthreads();
          stage<DepQkv>(sh, norm, [&](int k) {
            float4 v = make_float4(begin(k), begin(k + 1), begin(k + 2), begin(k + 3));
            if (blockIdx.x == 0) *(float4*)(dep_x + k) = v;
            return v;
          });
        } else {
          grid.sync();
          stage<DepQkv>(sh, norm, [&](int k) { return load4(dep_x + k); });
        }
        p.finish(sh, [&](int item, const float* v) {
          if (lane < 2) steps[s * 3 * DEP_DIM + 2 * item + lane] = lane ? v[1] : v[0];
        });
      }
      {
        auto p = product<1>(w.dep_out.part(layer * DEP_DIM), DEP_DIM, single);
        grid.sync();
        int first = s == HIDING_STEP;
        attend_steps(sh, steps, s, first, sh.partial);
        stage<DepOut>(sh, nullptr, [&](int k) {
          return *(const float4*)(sh.partial + k);
        });
        p.finish(sh, [&](int item, const float* v) {
          if (lane == 0) dep_x[item] = __ldcg(dep_x + item) + v[0];
        });
      }
      {
        auto p = product<2>(w.dep_up.part(layer * 2 * DEP_HIDDEN), DEP_HIDDEN,
                            [](int item, int r) { return r * DEP_HIDDEN + item; });
        grid.sync();
        stage<DepUp>(sh, w.dep_norm2 + layer * DEP_DIM,
                     [&](int k) { return load4(dep_x + k); });
        p.finish(sh, [&](int item, const float* v) {
          if (lane == 0) dep_hidden[item] = v[0] / (1 + expf(-v[0])) * v[1];
        });
      }
      {
        auto p = product<1>(w.dep_down.part(layer * DEP_DIM), DEP_DIM, single);
        grid.sync();
        stage<DepDown>(sh, nullptr, [&](int k) { return load4(dep_hidden + k); });
        p.finish(sh, [&](int item, const float* v) {
          if (lane == 0) dep_x[item] = __ldcg(dep_x + item) + v[0];
        });
      }
    }
    auto p = product<1>(w.dep_head.part((size_t)s * CARD), CARD, single);
    grid.sync();
    stage<DepHead>(sh, nullptr, [&](int k) { return load4(dep_x + k); });
    p.finish(sh, [&](int item, const float* v) {
      if (lane == 0) dep_logits[s * CARD + item] = v[0];
    });
    grid.sync();
    const float* found = dep_logits + s * CARD;
    token = choose(sh, [=](int i) { return __ldcg(found + i); }, CARD, noise,
                   sampling.temperature, sampling.top_k);
    noise.first += CARD;
    if (given[1 + s] != NOT_FORCED) token = given[1 + s];
    if (everyone == 0) column[1 + s] = token;
  }
}
