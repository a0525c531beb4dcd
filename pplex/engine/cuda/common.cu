// What the kernels share: bfloat16, reductions over a block, and the choice of an id.
// No header is included: NVRTC compiles these texts ten times as fast without.

struct bf16 {
  unsigned short bits;
};

__device__ inline float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two of them in a word, the first in its low half.
__device__ inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ inline unsigned pair(float first, float second) {
  return to_bf16(first).bits | (unsigned)to_bf16(second).bits << 16;
}

// Eight of them, the width of a load; rows of all models are multiples of it.
struct alignas(16) Eight {
  unsigned pairs[4];
};

// c (16, 8) += a (16, 16) b (16, 8) on the tensor cores, a warp's registers each.
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int WARPS = THREADS / 32;
[[maybe_unused]] constexpr float LOWEST = -3e38f;

struct alignas(16) Scratch {
  float reduce[32];
  unsigned histogram[256];
  unsigned long long best[32];
  int digit, left;
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
  unsigned u = __float_as_uint(x + 0.0f);      // -0 is 0
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

// As in pplex/model/streams.py.
constexpr int NOT_FORCED = -2, INSTEAD = -3, TEXT_PAD = 3;

// The text id that is said where `id` was chosen: that, one that is given in any case, or
// one that is given in place of anything but padding.
__device__ inline int take_given(int id, int given) {
  if (given > NOT_FORCED) return given;
  return given == NOT_FORCED || id <= TEXT_PAD ? id : INSTEAD - given;
}

// The random numbers of a row: id i of a head takes number first + i of `width`.
struct Noise {
  uint2 key;
  unsigned first, width;
};

// A larger float has a larger key, and of equal ones the first.
__device__ inline unsigned long long key_of(float x, int i) {
  return ((unsigned long long)ordered(x) << 32) | (0xFFFFFFFFu - i);
}

[[maybe_unused]] constexpr int HELD = 8;  // numbers that a thread reads at a time

// The least key that the k largest of `get(0)` to `get(n - 1)` have and no other, by a
// block: its digits of eight bits, first to last, until they tell them apart.
// Keys below `floor` are none of them.
template <class Get>
__device__ unsigned long long least_key(Scratch& sh, Get get, int n, int k,
                                        unsigned long long floor = 0) {
  int t = threadIdx.x, lane = t % 32, left = k;
  unsigned long long found = 0;
  float x[HELD] = {};
  for (int shift = 56; shift >= 0 && left; shift -= 8) {
    if (shift == 24)  // of places, the digits that all share
      for (; shift && n <= 1 << shift; shift -= 8) found |= 0xFFull << shift;
    for (int i = t; i < 256; i += THREADS) sh.histogram[i] = 0;
    __syncthreads();
    unsigned long long above = shift == 56 ? 0 : ~0ull << (shift + 8);
    for (int begin = t; begin - t < n; begin += HELD * THREADS) {
      if (shift == 56 || n > HELD * THREADS)
#pragma unroll
        for (int u = 0; u < HELD; u++)
          if (begin + u * THREADS < n) x[u] = get(begin + u * THREADS);
#pragma unroll
      for (int u = 0; u < HELD; u++) {
        int i = begin + u * THREADS;
        unsigned long long key = key_of(x[u], i);
        bool counts = i < n && key >= floor && (key & above) == found;
        if (!__any_sync(~0u, counts)) continue;
        unsigned bin = counts ? (key >> shift) & 255 : 256;
        unsigned same = __match_any_sync(~0u, bin);
        if (counts && lane == __ffs(same) - 1)
          atomicAdd(&sh.histogram[bin], (unsigned)__popc(same));
      }
    }
    __syncthreads();
    if (t < 32) {  // a lane has eight bins, the first lane the highest
      int mine[8], sum = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) sum += mine[i] = sh.histogram[255 - 8 * lane - i];
      int before = sum;
      for (int i = 1; i < 32; i *= 2) {
        int other = __shfl_up_sync(~0u, before, i);
        if (lane >= i) before += other;
      }
      before -= sum;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (before < left && left <= before + mine[i]) {
          sh.digit = 255 - 8 * lane - i;
          sh.left = left == before + mine[i] ? 0 : left - before;  // 0: all of them
        }
        before += mine[i];
      }
    }
    __syncthreads();
    found |= (unsigned long long)sh.digit << shift;
    left = sh.left;
  }
  return found > floor ? found : floor;  // it may end before the floor's last digits
}

// An id from the logits `get(id)`, by one block: the largest, or by noise among the k
// largest. See pplex/model/sampling.py.
template <class Get>
__device__ int choose(Scratch& sh, Get get, int n, Noise noise, float temperature,
                      int k) {
  int t = threadIdx.x;
  bool draw = temperature > 0;
  unsigned long long least = 0, best = 0;
  if (draw && k < n) {
    if (n > HELD * THREADS && k <= THREADS) {  // no less than k threads' largest
      float most = LOWEST;
#pragma unroll 8
      for (int i = t; i < n; i += THREADS) most = fmaxf(most, get(i));
      least = least_key(sh, [=](int) { return most; }, THREADS, k) >> 32 << 32;
    }
    least = least_key(sh, get, n, k, least);
  }
  for (int i = t; i < n; i += THREADS) {
    float x = get(i);
    if (key_of(x, i) < least) continue;
    if (draw) {
      float u = fmaxf(uniform(noise.key, noise.first + i, noise.width), 0x1p-33f);
      x = x / temperature - logf(-logf(u));
    }
    unsigned long long key = key_of(x, i);
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
