// A barrier for so many blocks of a launch, which must all be resident at once.
struct Grid {
  unsigned* counters;  // two zeros
  unsigned blocks;
  unsigned target = 0;

  __device__ void sync() {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      target += blocks;
      atomicAdd(counters, 1u);
      unsigned seen, spins = 0;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counters));
        if (++spins > (1u << 27)) __trap();
      } while (seen < target);
    }
    __syncthreads();
  }

  // Leave zeros for the next launch.
  __device__ void finish() {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(counters + 1, 1u) == blocks - 1) counters[0] = counters[1] = 0;
  }
};
