// Attention of a batch of rows over the ring that all share.

using Vectors = Kept<KV_BITS, HEAD_DIM>;
constexpr int PER = Vectors::PER, LANES = Vectors::LANES;  // lanes for a position
constexpr int TOGETHER = 32 / LANES, STRIDE = WARPS * TOGETHER, U = 4;

constexpr float WEIGHTS = 256;  // of those of bytes: halves have few small numbers
constexpr int TILE = 16, TILES = 2;  // positions on the tensor cores; loaded together

struct Attention : Scratch {
  float head[3 * HEAD_DIM];
  float partial[WARPS * HEAD_DIM];
  float scores[WINDOW + TILE];
};

// Scores of the query in `sh.head` and all positions; the largest of this lane's.
// `where(age)` is a slot.
template <class Where>
__device__ float score_numbers(Attention& sh, const Vectors& k, int visible, Where where) {
  int lane = threadIdx.x % 32, part = lane % LANES;
  float q[PER], most = LOWEST;
  for (int i = 0; i < PER; i++) q[i] = sh.head[part * PER + i];
  for (int begin = 0; begin < visible; begin += U * STRIDE) {
    int first = begin + threadIdx.x / 32 * TOGETHER + lane / LANES;
    Vectors::Part w[U];
#pragma unroll
    for (int u = 0; u < U; u++)
      if (first + u * STRIDE < visible) w[u] = k.load(where(first + u * STRIDE), part);
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = first + u * STRIDE;
      float x[PER], dot = 0;
      Vectors::unpack(w[u], x);
      for (int i = 0; i < PER; i++) dot += q[i] * x[i];
      for (int i = 1; i < LANES; i *= 2) dot += __shfl_xor_sync(~0u, dot, i);
      if (age >= visible) continue;
      if (part == 0) sh.scores[age] = dot;
      most = fmaxf(most, dot);
    }
  }
  return most;
}

// Sums of all values by the weights in `sh.scores`, a share of each warp in `sh.partial`.
template <class Where>
__device__ void gather_numbers(Attention& sh, const Vectors& v, int visible, Where where) {
  int lane = threadIdx.x % 32, part = lane % LANES;
  float acc[PER] = {};
  int first = threadIdx.x / 32 * TOGETHER + lane / LANES;
  for (int begin = first; begin < visible; begin += U * STRIDE) {
    Vectors::Part w[U];
#pragma unroll
    for (int u = 0; u < U; u++)
      if (begin + u * STRIDE < visible) w[u] = v.load(where(begin + u * STRIDE), part);
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (begin + u * STRIDE >= visible) continue;
      float x[PER], weight = sh.scores[begin + u * STRIDE];
      Vectors::unpack(w[u], x);
      for (int i = 0; i < PER; i++) acc[i] += weight * x[i];
    }
  }
  for (int i = 0; i < PER; i++)
    for (int o = LANES; o < 32; o *= 2) acc[i] += __shfl_xor_sync(~0u, acc[i], o);
  if (lane < LANES)
    for (int i = 0; i < PER; i++)
      sh.partial[threadIdx.x / 32 * HEAD_DIM + part * PER + i] = acc[i];
}

// Bytes are multiplied on the tensor cores, as halves, which have all of them exactly.
// There they take a third of the instructions, of which reading half the bytes leaves too
// little time. What they are multiplied by is the sum of two halves.

// Bytes `first` and `first + 1` of a word, less 128.
__device__ inline unsigned halves(unsigned bytes, int first) {
  unsigned y = __byte_perm(bytes, 0x64646464u, first ? 0x4342 : 0x4140);  // 1024 + byte
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(y) : "r"(0x64806480u));
  return y;
}

// Of two numbers the first halves (part 0), what is left of them (1), or zeros.
__device__ inline unsigned split(float x, float y, int part) {
  unsigned both;
  float first, second;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(first), "=f"(second)
      : "r"(both));
  if (part == 1)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y - second), "f"(x - first));
  return part > 1 ? 0 : both;
}

__device__ inline void multiply_halves(float (&c)[4], const unsigned (&a)[4],
                                       const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// N words that lie side by side.
template <int N>
__device__ inline void load_words(unsigned (&to)[N], const char* from) {
  static_assert(N % 2 == 0, "pairs");
#pragma unroll
  for (int i = 0; i < N; i += N % 4 ? 2 : 4)
    if constexpr (N % 4 == 0) {
      uint4 w = __ldcg((const uint4*)from + i / 4);
      to[i] = w.x, to[i + 1] = w.y, to[i + 2] = w.z, to[i + 3] = w.w;
    } else {
      uint2 w = __ldcg((const uint2*)from + i / 2);
      to[i] = w.x, to[i + 1] = w.y;
    }
}

// A tile's rows are positions, its columns the query's two parts.
template <class Where>
__device__ float score_bytes(Attention& sh, const Vectors& k, int visible, Where where) {
  constexpr int WORDS = HEAD_DIM / 16;  // of a row that a lane has
  int lane = threadIdx.x % 32, quad = lane / 4, part = lane % 4;
  unsigned q[WORDS][2];
#pragma unroll
  for (int i = 0; i < WORDS; i++)
    for (int e = 0; e < 2; e++) {
      const float* x = sh.head + part * HEAD_DIM / 4 + 4 * i + 2 * e;
      q[i][e] = split(x[0], x[1], quad);
    }
  float most = LOWEST;
  for (int begin = threadIdx.x / 32 * TILE; begin < visible; begin += TILES * WARPS * TILE) {
    unsigned w[TILES][2][WORDS];
    float scales[TILES][2];
#pragma unroll
    for (int u = 0; u < TILES; u++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        int age = begin + u * WARPS * TILE + 8 * r + quad;
        int slot = where(min(age, visible - 1));
        load_words(w[u][r], k.numbers + (size_t)slot * HEAD_DIM + part * HEAD_DIM / 4);
        scales[u][r] = __ldcg(k.scales + slot);
      }
#pragma unroll
    for (int u = 0; u < TILES; u++) {
      float dots[4] = {};
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        unsigned a[4] = {halves(w[u][0][i], 0), halves(w[u][1][i], 0),
                         halves(w[u][0][i], 2), halves(w[u][1][i], 2)};
        multiply_halves(dots, a, q[i]);
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        int age = begin + u * WARPS * TILE + 8 * r + quad;
        if (part || age >= visible) continue;
        float dot = (dots[2 * r] + dots[2 * r + 1]) * scales[u][r];
        sh.scores[age] = dot;
        most = fmaxf(most, dot);
      }
    }
  }
  return most;
}

// A tile's rows are dimensions, its columns the weights' two parts.
template <class Where>
__device__ void gather_bytes(Attention& sh, const Vectors& v, int visible, Where where) {
  constexpr int WORDS = HEAD_DIM / 32;
  int lane = threadIdx.x % 32, quad = lane / 4, part = lane % 4, warp = threadIdx.x / 32;
  float acc[2 * WORDS][4] = {};
  for (int begin = warp * TILE; begin < visible; begin += TILES * WARPS * TILE) {
    unsigned w[TILES][4][WORDS];
#pragma unroll
    for (int u = 0; u < TILES; u++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int age = begin + u * WARPS * TILE + 2 * part + i / 2 * 8 + i % 2;
        int slot = where(min(age, visible - 1));
        load_words(w[u][i], v.numbers + (size_t)slot * HEAD_DIM + quad * HEAD_DIM / 8);
      }
#pragma unroll
    for (int u = 0; u < TILES; u++) {
      int first = begin + u * WARPS * TILE;
      if (first >= visible) break;
      unsigned p[2];
      for (int e = 0; e < 2; e++) {
        float2 two = *(const float2*)(sh.scores + first + 2 * part + 8 * e);
        p[e] = split(two.x, two.y, quad);
      }
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        unsigned pairs[2][2];  // of two positions, two bytes each
#pragma unroll
        for (int e = 0; e < 2; e++)
          for (int h = 0; h < 2; h++)
            pairs[e][h] = __byte_perm(w[u][2 * e][i], w[u][2 * e + 1][i], h ? 0x7362 : 0x5140);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          unsigned a[4] = {halves(pairs[0][h], 0), halves(pairs[0][h], 2),
                           halves(pairs[1][h], 0), halves(pairs[1][h], 2)};
          multiply_halves(acc[2 * i + h], a, p);
        }
      }
    }
  }
  if (part == 0)
#pragma unroll
    for (int i = 0; i < 2 * WORDS; i++)
      for (int r = 0; r < 2; r++)
        sh.partial[warp * HEAD_DIM + quad * HEAD_DIM / 8 + 2 * i + r] =
            (acc[i][2 * r] + acc[i][2 * r + 1]) / WEIGHTS;
}

// One new position of row blockIdx.y, head blockIdx.x. Its keys and values are written
// to `slot` of the ring (rows, heads, capacity, head_dim); those said before lie in the
// slots before it, newest first. `parts` are as those of attend_prompts.cu, which sees
// what came before. `rows`: see `attend_rows` in rows.py.
extern "C" __global__ void attend(const bf16* qkv, void* keys, void* key_scales,
                                  void* values, void* value_scales, const int* rows,
                                  const float* frequencies, float* parts, int slot,
                                  int capacity) {
  extern __shared__ __align__(16) char memory[];
  Attention& sh = *(Attention*)memory;
  int head = blockIdx.x, row = blockIdx.y, heads = gridDim.x, t = threadIdx.x;
  int position = rows[4 * row], said = position - rows[4 * row + 1];
  int visible = min(said + 1, WINDOW);
  size_t in_ring = ((size_t)row * heads + head) * capacity;
  Vectors k(keys, key_scales, in_ring), v(values, value_scales, in_ring);
  const bf16* base = qkv + ((size_t)row * 3 * heads + head) * HEAD_DIM;
  constexpr int PAIRS = HEAD_DIM / 2;
  for (int i = t; i < 2 * PAIRS; i += THREADS) {
    int pair = i % PAIRS, key = i / PAIRS;
    const bf16* p = base + (size_t)key * heads * HEAD_DIM + 2 * pair;
    float re = to_float(p[0]), im = to_float(p[1]), sine, cosine;
    sincosf((float)position * frequencies[pair], &sine, &cosine);
    float a = re * cosine - im * sine, b = re * sine + im * cosine;
    float scale = key ? 1 : rsqrtf((float)HEAD_DIM);
    sh.head[key * HEAD_DIM + 2 * pair] = a * scale;
    sh.head[key * HEAD_DIM + 2 * pair + 1] = b * scale;
  }
  for (int d = t; d < HEAD_DIM; d += THREADS)
    sh.head[2 * HEAD_DIM + d] = to_float(base[(size_t)2 * heads * HEAD_DIM + d]);
  __syncthreads();
  if (t / 32 == 0) k.put(slot, sh.head + HEAD_DIM, true);
  if (t / 32 == 1) v.put(slot, sh.head + 2 * HEAD_DIM, true);
  __syncthreads();
  auto where = [=](int age) { return age > slot ? slot - age + capacity : slot - age; };
  constexpr bool BYTES = KV_BITS == 8;
  float most = block_max(sh, BYTES ? score_bytes(sh, k, visible, where)
                                   : score_numbers(sh, k, visible, where));
  float sum = 0;
  for (int age = t; age < visible + TILE; age += THREADS) {
    float weight = age < visible ? expf(sh.scores[age] - most) : 0;
    sum += weight;
    if (BYTES && age < visible) weight *= WEIGHTS * __ldcg(v.scales + where(age));
    sh.scores[age] = weight;
  }
  sum = block_sum(sh, sum);
  if (BYTES) gather_bytes(sh, v, visible, where);
  else gather_numbers(sh, v, visible, where);
  __syncthreads();
  float* out = parts + ((size_t)row * heads + head) * (HEAD_DIM + 2);
  for (int d = t; d < HEAD_DIM; d += THREADS) {
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += sh.partial[i * HEAD_DIM + d];
    out[d] = total;
  }
  if (t == 0) out[HEAD_DIM] = most, out[HEAD_DIM + 1] = sum;
}
