// What the kernels share: reductions over a block, and the choice of an id.

using bf16 = __nv_bfloat16;

constexpr int WARPS = THREADS / 32;

struct Scratch {
  float reduce[32];
  unsigned histogram[256];
  unsigned long long best[32];
};

__device__ inline float warp_sum(float v) {
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
  return v;
}

__device__ inline float block_sum(Scratch& sh, float v) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sh.reduce[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < WARPS; i++) total += sh.reduce[i];
  return total;
}

__device__ inline float block_max(Scratch& sh, float v) {
  for (int i = 16; i; i /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, i));
  __syncthreads();
  if (threadIdx.x % 32 == 0) sh.reduce[threadIdx.x / 32] = v;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) v = fmaxf(v, sh.reduce[i]);
  return v;
}

__device__ inline unsigned ordered(float x) {  // larger float, larger integer
  unsigned u = __float_as_uint(x);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Value idx of MLX's uniform(shape=(width,), key=key): threefry with two words.
__device__ inline float uniform(uint2 key, unsigned idx, unsigned width) {
  const int turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  unsigned half = width / 2, odd = width % 2, keys[3] = {key.x, key.y};
  keys[2] = key.x ^ key.y ^ 0x1BD11BDAu;
  bool second = idx >= half + odd;
  unsigned x = second ? idx - half - odd : idx;
  unsigned y = second ? idx : idx < half ? idx + half + odd : 0;
  x += keys[0], y += keys[1];
#pragma unroll
  for (int i = 0; i < 5; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      x += y;
      y = __funnelshift_l(y, y, turns[i % 2 * 4 + j]) ^ x;
    }
    x += keys[(i + 1) % 3];
    y += keys[(i + 2) % 3] + i + 1;
  }
  float u = (float)(second ? y : x) * 0x1p-32f;
  return fminf(u, 1 - 0x1p-24f);
}

// The random numbers of a row: id i of a head takes number first + i of `width`.
struct Noise {
  uint2 key;
  unsigned first, width;
};

// An id from the logits, by one block: the largest, or by noise among those not smaller
// than the k-th largest. See pplex/model/sampling.py.
__device__ int choose(Scratch& sh, const float* logits, int n, Noise noise,
                      float temperature, int k) {
  int t = threadIdx.x;
  unsigned threshold = 0;
  bool draw = temperature > 0;
  if (draw && k < n) {
    int left = k;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = t; i < 256; i += THREADS) sh.histogram[i] = 0;
      __syncthreads();
      unsigned above = shift == 24 ? 0 : ~0u << (shift + 8);
      for (int i = t; i < n; i += THREADS) {
        unsigned u = ordered(__ldcg(logits + i));
        if ((u & above) == threshold) atomicAdd(&sh.histogram[(u >> shift) & 255], 1u);
      }
      __syncthreads();
      int digit = 255;
      for (; digit > 0 && (int)sh.histogram[digit] < left; digit--)
        left -= sh.histogram[digit];
      threshold |= (unsigned)digit << shift;
      __syncthreads();
    }
  }
  unsigned long long best = 0;
  for (int i = t; i < n; i += THREADS) {
    float x = __ldcg(logits + i);
    if (ordered(x) < threshold) continue;
    if (draw) {
      float u = fmaxf(uniform(noise.key, noise.first + i, noise.width), 0x1p-33f);
      x = x / temperature - logf(-logf(u));
    }
    // Of equals, the first.
    unsigned long long key = ((unsigned long long)ordered(x) << 32) | (0xFFFFFFFFu - i);
    if (key > best) best = key;
  }
  for (int i = 16; i; i /= 2) {
    unsigned long long other = __shfl_xor_sync(~0u, best, i);
    if (other > best) best = other;
  }
  if (t % 32 == 0) sh.best[t / 32] = best;
  __syncthreads();
  for (int i = 0; i < WARPS; i++)
    if (sh.best[i] > best) best = sh.best[i];
  __syncthreads();
  return 0xFFFFFFFFu - (unsigned)best;
}
