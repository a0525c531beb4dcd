// y = gelu(x), four values a thread.
extern "C" __global__ void gelu(const float4* x, float4* y, int quads) {
  int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= quads) return;
  auto of = [](float v) { return v * (1 + erff(v * 0.70710678f)) / 2; };
  float4 v = x[i];
  y[i] = make_float4(of(v.x), of(v.y), of(v.z), of(v.w));
}
