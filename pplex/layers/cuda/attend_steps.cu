// Attention of depformer step `step` over the steps from `from` on, a warp a head. The
// step's queries, keys and values are put into the row's `past` (layers, steps, 3 heads,
// head_dim), of layer `layer`. A lane has two of 64 dimensions.
extern "C" __global__ void attend_steps(const bf16* qkv, bf16* past, bf16* y, int layer,
                                        int layers, int step, int steps, int from,
                                        int head_dim) {
  constexpr int MOST = 16;  // steps
  int row = blockIdx.y, lane = threadIdx.x % 32, head = threadIdx.x / 32;
  int width = 3 * WARPS * head_dim, words = width / 2;
  const unsigned* own = (const unsigned*)(qkv + (size_t)row * width);
  unsigned* kept = (unsigned*)past + ((size_t)row * layers + layer) * steps * words;
  for (int i = threadIdx.x; i < words; i += THREADS) kept[step * words + i] = own[i];
  int in_head = head * head_dim / 2, heads_words = WARPS * head_dim / 2;
  float dots[MOST] = {0}, most = LOWEST, total = 0, scale = rsqrtf((float)head_dim);
  for (int d = lane; d < head_dim / 2; d += 32) {
    unsigned q = own[in_head + d];
#pragma unroll
    for (int j = 0; j < MOST; j++) {
      if (j < from || j > step) continue;
      unsigned k = (j == step ? own : kept + j * words)[heads_words + in_head + d];
      dots[j] += low(q) * low(k) + high(q) * high(k);
    }
  }
#pragma unroll
  for (int j = 0; j < MOST; j++) {
    if (j < from || j > step) continue;
    dots[j] = warp_sum(dots[j]) * scale;
    most = fmaxf(most, dots[j]);
  }
#pragma unroll
  for (int j = 0; j < MOST; j++) {
    if (j < from || j > step) continue;
    dots[j] = expf(dots[j] - most);
    total += dots[j];
  }
  for (int d = lane; d < head_dim / 2; d += 32) {
    float first = 0, second = 0;
#pragma unroll
    for (int j = 0; j < MOST; j++) {
      if (j < from || j > step) continue;
      unsigned v = (j == step ? own : kept + j * words)[2 * heads_words + in_head + d];
      first += dots[j] * low(v), second += dots[j] * high(v);
    }
    ((unsigned*)y)[(size_t)row * heads_words + in_head + d] =
        pair(first / total, second / total);
  }
}
