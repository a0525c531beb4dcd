// y (batch, room + rows, channels) = state, then elu(x + bias + (skip + skip_bias)), of a
// skip only if `has_skip`. Those are (batch, rows, channels), a float4 four channels.
extern "C" __global__ void elu_behind(const float4* x, const float4* bias,
                                      const float4* skip, const float4* skip_bias,
                                      const float4* state, float4* y, int rows, int room,
                                      int quads, int has_skip) {
  int size = rows * quads, before = room * quads;
  size_t first = (size_t)blockIdx.y * size;
  x += first, skip += first, y += first + (size_t)blockIdx.y * before;
  state += (size_t)blockIdx.y * before;
  auto elu = [](float v) { return v > 0 ? v : expf(v) - 1; };
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < before + size;
       i += gridDim.x * THREADS) {
    if (i < before) {
      y[i] = state[i];
      continue;
    }
    int at = i - before;
    float4 v = x[at], b = bias[at % quads];
    v.x += b.x, v.y += b.y, v.z += b.z, v.w += b.w;
    if (has_skip) {
      float4 s = skip[at], c = skip_bias[at % quads];
      v.x += s.x + c.x, v.y += s.y + c.y, v.z += s.z + c.z, v.w += s.w + c.w;
    }
    y[i] = make_float4(elu(v.x), elu(v.y), elu(v.z), elu(v.w));
  }
}
