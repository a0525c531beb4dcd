// What rows attended to since their prompts and what they attended to of those, together.

// A warp has a row's head: `parts` of both are (rows, heads, HEAD_DIM + 2), sums of
// values by weight, the largest score, and the sum of weights. `rows`: see
// `attend_rows` in rows.py.
extern "C" __global__ void join_parts(const float* since, const float* before,
                                      const int* rows, bf16* y, int heads, int count) {
  int i = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (i >= count) return;
  since += (size_t)i * (HEAD_DIM + 2), before += (size_t)i * (HEAD_DIM + 2);
  const int* row = rows + i / heads * 4;
  // Unless the prompt has left the window.
  bool prompted = row[1] > max(row[2], row[0] - WINDOW + 1);
  float most = since[HEAD_DIM], largest = prompted ? fmaxf(most, before[HEAD_DIM]) : most;
  float now = expf(most - largest), then = prompted ? expf(before[HEAD_DIM] - largest) : 0;
  float weight = since[HEAD_DIM + 1] * now + (prompted ? before[HEAD_DIM + 1] * then : 0);
#pragma unroll
  for (int d = lane; d < HEAD_DIM / 2; d += 32) {
    float2 total = ((const float2*)since)[d], old{};
    if (prompted) old = ((const float2*)before)[d];
    ((unsigned*)y)[(size_t)i * (HEAD_DIM / 2) + d] =
        pair((total.x * now + old.x * then) / weight, (total.y * now + old.y * then) / weight);
  }
}
