// Attention of a batch of rows over the ring that all share.

using Vectors = Kept<KV_BITS, HEAD_DIM>;
constexpr int PER = Vectors::PER, LANES = Vectors::LANES;  // lanes for a position
constexpr int TOGETHER = 32 / LANES;

struct Attention : Scratch {
  float head[3 * HEAD_DIM];
  float partial[WARPS * HEAD_DIM];
  float scores[WINDOW];
};

// One new position of row blockIdx.y, head blockIdx.x. Its keys and values are written
// to `slot` of the ring (rows, heads, capacity, head_dim); those said before lie in the
// slots before it, newest first. What came before them is in `parts`, from
// attend_prompts.cu. `rows`: see `attend_rows` in rows.py.
extern "C" __global__ void attend(const bf16* qkv, void* keys, void* key_scales,
                                  void* values, void* value_scales, const float* parts, const int* rows,
                                  const float* frequencies, bf16* y, int slot,
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
  int lane = t % 32, part = lane % LANES, first = t / 32 * TOGETHER + lane / LANES;
  constexpr int STRIDE = WARPS * TOGETHER, U = 4;
  auto load = [&](const Vectors& from, int age) {
    int j = slot - age;
    return from.load(j < 0 ? j + capacity : j, part);
  };
  float q[PER], most = LOWEST;
  for (int i = 0; i < PER; i++) q[i] = sh.head[part * PER + i];
  for (int begin = 0; begin < visible; begin += U * STRIDE) {
    Vectors::Part w[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = begin + u * STRIDE + first;
      if (age > 0 && age < visible) w[u] = load(k, age);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = begin + u * STRIDE + first;
      float x[PER], dot = 0;
      if (age == 0) {
        for (int i = 0; i < PER; i++) x[i] = sh.head[HEAD_DIM + part * PER + i];
        w[u].scale = 1;
      } else {
        Vectors::unpack(w[u], x);
      }
      for (int i = 0; i < PER; i++) dot += q[i] * x[i];
      dot *= w[u].scale;
      for (int i = 1; i < LANES; i *= 2) dot += __shfl_xor_sync(~0u, dot, i);
      if (age < visible) {
        if (part == 0) sh.scores[age] = dot;
        most = fmaxf(most, dot);
      }
    }
  }
  most = block_max(sh, most);
  float acc[PER] = {0}, sum = 0;
  for (int begin = 0; begin < visible; begin += U * STRIDE) {
    Vectors::Part w[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = begin + u * STRIDE + first;
      if (age > 0 && age < visible) w[u] = load(v, age);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      int age = begin + u * STRIDE + first;
      if (age >= visible) continue;
      float x[PER], p = expf(sh.scores[age] - most);
      sum += p;
      if (age == 0) {
        for (int i = 0; i < PER; i++) x[i] = sh.head[2 * HEAD_DIM + part * PER + i];
      } else {
        Vectors::unpack(w[u], x);
        p *= w[u].scale;
      }
      for (int i = 0; i < PER; i++) acc[i] += p * x[i];
    }
  }
  for (int i = 0; i < PER; i++)
    for (int o = LANES; o < 32; o *= 2) acc[i] += __shfl_xor_sync(~0u, acc[i], o);
  if (lane < LANES)
    for (int i = 0; i < PER; i++)
      sh.partial[t / 32 * HEAD_DIM + part * PER + i] = acc[i];
  sum = block_sum(sh, part == 0 ? sum : 0.0f);
  // The prompt's share, unless it has left the window.
  const float* before = parts + ((size_t)row * heads + head) * (HEAD_DIM + 2);
  bool prompted = rows[4 * row + 1] > max(rows[4 * row + 2], position - WINDOW + 1);
  float largest = prompted ? fmaxf(most, before[HEAD_DIM]) : most;
  float now = expf(most - largest), then = prompted ? expf(before[HEAD_DIM] - largest) : 0;
  float weight = sum * now + (prompted ? before[HEAD_DIM + 1] * then : 0);
  for (int d = t; d < HEAD_DIM; d += THREADS) {
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += sh.partial[i * HEAD_DIM + d];
    total = total * now + (prompted ? before[d] * then : 0);
    y[((size_t)row * heads + head) * HEAD_DIM + d] = to_bf16(total / weight);
  }
}
