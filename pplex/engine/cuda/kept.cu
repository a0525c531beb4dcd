// Keys or values that are kept: bfloat16, or bytes and a scale for each vector.

// Those of a head: vectors of WIDTH numbers, a slot each. A lane has PER of one's.
template <int BITS, int WIDTH>
struct Kept {
  static constexpr int PER = 128 / BITS, LANES = WIDTH / PER;
  char* numbers;
  float* scales;  // none with 16 bits

  struct Part {
    uint4 words;
    float scale;
  };

  __device__ Kept(void* all, void* all_scales, size_t first_slot)
      : numbers((char*)all + first_slot * WIDTH * BITS / 8),
        scales(BITS == 8 ? (float*)all_scales + first_slot : nullptr) {}

  __device__ Part load(int slot, int lane) const {
    const char* p = numbers + (size_t)slot * WIDTH * BITS / 8 + lane * 16;
    return {__ldcg((const uint4*)p), BITS == 8 ? __ldcg(scales + slot) : 1};
  }

  // The numbers, which are to be multiplied by the scale.
  __device__ static void unpack(const Part& part, float (&to)[PER]) {
    unsigned words[4] = {part.words.x, part.words.y, part.words.z, part.words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (BITS == 16) {
        to[2 * i] = low(words[i]), to[2 * i + 1] = high(words[i]);
      } else {
        // The last byte of 2^23 + n: converting integers is what a GPU does slowest.
#pragma unroll
        for (int j = 0; j < 4; j++)
          to[4 * i + j] = __uint_as_float(__byte_perm(words[i], 0x4B000000u, 0x7440 + j)) -
                          (0x1p23f + 128);
      }
    }
  }

  // By a warp: keep `x`, in shared memory, if it is `mine`; then x is what is kept.
  __device__ void put(int slot, float* x, bool mine) const {
    int lane = threadIdx.x % 32;
    char* to = numbers + (size_t)slot * WIDTH * BITS / 8;
    float most = 0;
    if constexpr (BITS == 8) {
      for (int d = lane; d < WIDTH; d += 32) most = fmaxf(most, fabsf(x[d]));
      for (int i = 16; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
      if (mine && lane == 0) scales[slot] = most / 127;
    }
    for (int d = lane; d < WIDTH; d += 32) {
      if constexpr (BITS == 16) {
        bf16 rounded = to_bf16(x[d]);
        if (mine) ((bf16*)to)[d] = rounded;
        x[d] = to_float(rounded);
      } else {
        float whole = most > 0 ? rintf(x[d] * (127 / most)) : 0;
        if (mine) to[d] = (char)((int)whole + 128);
        x[d] = whole * (most / 127);
      }
    }
  }
};
