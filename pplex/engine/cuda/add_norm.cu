// sum = x + y, rounded; normed = RMSNorm of it, computed in float32. A block a row.
extern "C" __global__ void add_norm(const bf16* x, const bf16* y, const float* weight,
                                    bf16* sum, bf16* normed, int dim) {
  constexpr int MOST = 2;  // eights of a thread: widths up to 8192
  __shared__ Scratch sh;
  size_t row = blockIdx.y;
  const Eight* from = (const Eight*)(x + row * dim);
  const Eight* more = (const Eight*)(y + row * dim);
  Eight total[MOST];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    int idx = i * THREADS + threadIdx.x;
    if (8 * idx >= dim) break;
    Eight a = from[idx], b = more[idx];
    for (int j = 0; j < 4; j++) {
      unsigned s = pair(low(a.pairs[j]) + low(b.pairs[j]), high(a.pairs[j]) + high(b.pairs[j]));
      total[i].pairs[j] = s;
      squares += low(s) * low(s) + high(s) * high(s);
    }
    ((Eight*)(sum + row * dim))[idx] = total[i];
  }
  float scale = rsqrtf(block_sum(sh, squares) / dim + 1e-8f);
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    int idx = i * THREADS + threadIdx.x;
    if (8 * idx >= dim) break;
    Eight out;
    for (int j = 0; j < 4; j++) {
      float2 w = ((const float2*)weight)[4 * idx + j];
      unsigned s = total[i].pairs[j];
      out.pairs[j] = pair(low(s) * scale * w.x, high(s) * scale * w.y);
    }
    ((Eight*)(normed + row * dim))[idx] = out;
  }
}
