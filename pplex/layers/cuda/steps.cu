// Kernels between the matrix products of a batch: residual and norm, short attention.

__device__ inline float value(bf16 x) { return __bfloat162float(x); }

// sum = x + y, rounded; normed = RMSNorm of it, computed in float32. A block a row.
__device__ void add_norm(const bf16* x, const bf16* y, const float* weight, bf16* sum,
                         bf16* normed, int dim) {
  __shared__ Scratch sh;
  size_t first = (size_t)blockIdx.y * dim;
  float squares = 0;
  for (int i = threadIdx.x; i < dim; i += THREADS) {
    bf16 s = __float2bfloat16(value(x[first + i]) + value(y[first + i]));
    sum[first + i] = s;
    squares += value(s) * value(s);
  }
  float scale = rsqrtf(block_sum(sh, squares) / dim + 1e-8f);
  for (int i = threadIdx.x; i < dim; i += THREADS)
    normed[first + i] = __float2bfloat16(value(sum[first + i]) * scale * weight[i]);
}

// Attention of depformer step `step` over the steps from `from` on, a warp a head. The
// step's queries, keys and values go to the row's `kept` (steps, 3 heads, head_dim).
__device__ void attend_steps(const bf16* qkv, bf16* kept, bf16* y, int step, int from,
                             int heads, int head_dim) {
  constexpr int MOST = 8;  // dimensions of a lane
  int row = blockIdx.y, lane = threadIdx.x % 32, width = 3 * heads * head_dim;
  const bf16* own = qkv + (size_t)row * width;
  for (int i = threadIdx.x; i < width; i += THREADS) kept[step * width + i] = own[i];
  for (int head = threadIdx.x / 32; head < heads; head += WARPS) {
    float q[MOST], acc[MOST], most = -INFINITY, total = 0;
    for (int i = 0; i < MOST; i++) {
      int d = i * 32 + lane;
      q[i] = d < head_dim ? value(own[head * head_dim + d]) * rsqrtf((float)head_dim) : 0;
      acc[i] = 0;
    }
    for (int j = from; j <= step; j++) {
      const bf16* k = (j == step ? own : kept + j * width) + (heads + head) * head_dim;
      const bf16* v = k + heads * head_dim;
      float dot = 0;
      for (int i = 0; i < MOST; i++) {
        int d = i * 32 + lane;
        if (d < head_dim) dot += q[i] * value(k[d]);
      }
      dot = warp_sum(dot);
      float m = fmaxf(most, dot), old = expf(most - m), p = expf(dot - m);
      total = total * old + p;
      for (int i = 0; i < MOST; i++) {
        int d = i * 32 + lane;
        if (d < head_dim) acc[i] = acc[i] * old + p * value(v[d]);
      }
      most = m;
    }
    for (int i = 0; i < MOST; i++) {
      int d = i * 32 + lane;
      if (d < head_dim)
        y[((size_t)row * heads + head) * head_dim + d] = __float2bfloat16(acc[i] / total);
    }
  }
}
