// y = silu(gate) * value, rounded at each step, of x = gate, value of a row.
extern "C" __global__ void swiglu(const bf16* x, bf16* y, int width) {
  size_t row = blockIdx.y;
  int idx = blockIdx.x * THREADS + threadIdx.x;
  if (8 * idx >= width) return;
  Eight gate = ((const Eight*)(x + 2 * row * width))[idx];
  Eight value = ((const Eight*)(x + (2 * row + 1) * width))[idx];
  Eight out;
  auto silu = [](float v) { return to_float(to_bf16(v / (1 + expf(-v)))); };
  for (int j = 0; j < 4; j++)
    out.pairs[j] = pair(silu(low(gate.pairs[j])) * low(value.pairs[j]),
                        silu(high(gate.pairs[j])) * high(value.pairs[j]));
  ((Eight*)(y + row * width))[idx] = out;
}
