// Kernels for a batch of rows: attention over a ring that all rows share, and sampling.

constexpr int LANES = HEAD_DIM / 8, TOGETHER = 32 / LANES;  // lanes for a position

struct Attention : Scratch {
  float head[3 * HEAD_DIM];
  float partial[WARPS * HEAD_DIM];
  float scores[WINDOW];
};

__device__ inline void unpack(uint4 w, float (&v)[8]) {
  unsigned u[4] = {w.x, w.y, w.z, w.w};
  for (int i = 0; i < 4; i++) {
    v[2 * i] = __uint_as_float(u[i] << 16);
    v[2 * i + 1] = __uint_as_float(u[i] & 0xFFFF0000u);
  }
}

struct Ring {  // (rows, heads, capacity, head_dim)
  bf16 *keys, *values;
  int capacity;
};

struct Prompts {  // (prompts, heads, slots, head_dim)
  const bf16 *keys, *values;
  int slots;
};

// One new position of row blockIdx.y, head blockIdx.x. Its keys and values are written
// to `slot` of the ring; those said before lie in the slots before it, newest first, and
// what came before them in the row's prompt.
__device__ void attend(const bf16* qkv, Ring ring, Prompts prompts, const int* rows,
                       const float* frequencies, int slot, bf16* y) {
  extern __shared__ char memory[];
  Attention& sh = *(Attention*)memory;
  int head = blockIdx.x, row = blockIdx.y, heads = gridDim.x, t = threadIdx.x;
  int position = rows[4 * row], said = position - rows[4 * row + 1];
  int first_kept = rows[4 * row + 2], prompt = rows[4 * row + 3];
  int visible = min(position - first_kept + 1, WINDOW);
  size_t in_ring = ((size_t)row * heads + head) * ring.capacity * HEAD_DIM;
  size_t in_prompts = ((size_t)prompt * heads + head) * prompts.slots * HEAD_DIM;
  bf16 *k = ring.keys + in_ring, *v = ring.values + in_ring;
  const bf16 *k0 = prompts.keys + in_prompts, *v0 = prompts.values + in_prompts;
  const bf16* base = qkv + ((size_t)row * 3 * heads + head) * HEAD_DIM;
  constexpr int PAIRS = HEAD_DIM / 2;
  for (int i = t; i < 2 * PAIRS; i += THREADS) {
    int pair = i % PAIRS, key = i / PAIRS;
    const bf16* p = base + (size_t)key * heads * HEAD_DIM + 2 * pair;
    float re = __bfloat162float(p[0]), im = __bfloat162float(p[1]), sine, cosine;
    sincosf((float)position * frequencies[pair], &sine, &cosine);
    float a = re * cosine - im * sine, b = re * sine + im * cosine;
    if (key) {
      bf16 a16 = __float2bfloat16(a), b16 = __float2bfloat16(b);
      k[(size_t)slot * HEAD_DIM + 2 * pair] = a16;
      k[(size_t)slot * HEAD_DIM + 2 * pair + 1] = b16;
      a = __bfloat162float(a16), b = __bfloat162float(b16);
    } else {
      float scale = rsqrtf((float)HEAD_DIM);
      a *= scale, b *= scale;
    }
    sh.head[key * HEAD_DIM + 2 * pair] = a;
    sh.head[key * HEAD_DIM + 2 * pair + 1] = b;
  }
  for (int d = t; d < HEAD_DIM; d += THREADS) {
    bf16 value = base[(size_t)2 * heads * HEAD_DIM + d];
    v[(size_t)slot * HEAD_DIM + d] = value;
    sh.head[2 * HEAD_DIM + d] = __bfloat162float(value);
  }
  __syncthreads();
  int lane = t % 32, part = lane % LANES, first = t / 32 * TOGETHER + lane / LANES;
  constexpr int STRIDE = WARPS * TOGETHER, U = 4;
  auto load = [&](const bf16* said_part, const bf16* prompt_part, int age) {
    int j = slot - age;
    const bf16* p = age <= said
                        ? said_part + (j < 0 ? j + ring.capacity : j) * HEAD_DIM
                        : prompt_part + (position - age - first_kept) * HEAD_DIM;
    return __ldcg((const uint4*)(p + part * 8));
  };
  float q[8], most = -INFINITY;
  for (int i = 0; i < 8; i++) q[i] = sh.head[part * 8 + i];
  for (int begin = 0; begin < visible; begin += U * STRIDE) {
    uint4 w[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = begin + u * STRIDE + first;
      if (age > 0 && age < visible) w[u] = load(k, k0, age);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = begin + u * STRIDE + first;
      float x[8], dot = 0;
      if (age == 0)
        for (int i = 0; i < 8; i++) x[i] = sh.head[HEAD_DIM + part * 8 + i];
      else
        unpack(w[u], x);
      for (int i = 0; i < 8; i++) dot += q[i] * x[i];
      for (int i = 1; i < LANES; i *= 2) dot += __shfl_xor_sync(~0u, dot, i);
      if (age < visible) {
        if (part == 0) sh.scores[age] = dot;
        most = fmaxf(most, dot);
      }
    }
  }
  most = block_max(sh, most);
  float acc[8] = {0}, sum = 0;
  for (int begin = 0; begin < visible; begin += U * STRIDE) {
    uint4 w[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = begin + u * STRIDE + first;
      if (age > 0 && age < visible) w[u] = load(v, v0, age);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = begin + u * STRIDE + first;
      if (age >= visible) continue;
      float x[8], p = expf(sh.scores[age] - most);
      sum += p;
      if (age == 0)
        for (int i = 0; i < 8; i++) x[i] = sh.head[2 * HEAD_DIM + part * 8 + i];
      else
        unpack(w[u], x);
      for (int i = 0; i < 8; i++) acc[i] += p * x[i];
    }
  }
  for (int i = 0; i < 8; i++)
    for (int o = LANES; o < 32; o *= 2) acc[i] += __shfl_xor_sync(~0u, acc[i], o);
  if (lane < LANES)
    for (int i = 0; i < 8; i++) sh.partial[t / 32 * HEAD_DIM + part * 8 + i] = acc[i];
  sum = block_sum(sh, part == 0 ? sum : 0.0f);
  for (int d = t; d < HEAD_DIM; d += THREADS) {
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += sh.partial[i * HEAD_DIM + d];
    y[((size_t)row * heads + head) * HEAD_DIM + d] = __float2bfloat16(total / sum);
  }
}
