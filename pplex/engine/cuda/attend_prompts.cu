// Attention over prompts that rows share: sixteen rows that have the same one at a time,
// on the tensor cores, so that its keys and values are read once for all of them.
//
// A warp takes sixteen keys at a time. Which dimension of a head stands where in a
// product does not matter as long as both sides agree, so lanes load 16 bytes at once.

constexpr int ROWS = 16, KEYS = 16, GROUPS = HEAD_DIM / 32, HALVES = HEAD_DIM / 64;

__device__ inline Eight load8(const bf16* p) { return *(const Eight*)p; }

// Head blockIdx.x of the rows in tile blockIdx.y: `tiles` (tiles, 1 + ROWS) are a
// prompt's number and the rows, -1 for none. `parts` (rows, heads, HEAD_DIM + 2) is the
// sum of values by weight, the largest score, and the sum of weights. `rows`: see
// `attend_rows` in rows.py.
extern "C" __global__ void attend_prompts(const bf16* qkv, const bf16* keys,
                                          const bf16* values, const int* tiles,
                                          const int* rows, const float* frequencies,
                                          float* parts, int slots) {
  __shared__ float sums[WARPS][ROWS][HEAD_DIM + 4];  // no two lanes write to one bank
  __shared__ float most_of[WARPS][ROWS], weight_of[WARPS][ROWS];
  int head = blockIdx.x, heads = gridDim.x, lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32, quad = lane / 4, part = lane % 4;
  const int* tile = tiles + (1 + ROWS) * blockIdx.y;
  size_t begin = ((size_t)tile[0] * heads + head) * slots * HEAD_DIM;
  const bf16 *k = keys + begin, *v = values + begin;

  __shared__ __align__(16) unsigned queries[ROWS][HEAD_DIM / 2];
  for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 2; i += THREADS) {
    int idx = i % (HEAD_DIM / 2), row = tile[1 + i / (HEAD_DIM / 2)];
    unsigned turned = 0;
    if (row >= 0) {
      const unsigned* p = (const unsigned*)(qkv + ((size_t)row * 3 * heads + head) * HEAD_DIM);
      float re = low(p[idx]), im = high(p[idx]), sine, cosine;
      sincosf((float)rows[4 * row] * frequencies[idx], &sine, &cosine);
      float scale = rsqrtf((float)HEAD_DIM);
      turned = pair((re * cosine - im * sine) * scale, (re * sine + im * cosine) * scale);
    }
    queries[i / (HEAD_DIM / 2)][idx] = turned;
  }
  // What rows `quad` and `quad + 8` see, and this lane's part of their queries.
  int from[2], to = 0;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = tile[1 + quad + 8 * r];
    from[r] = 1 << 30;
    if (row < 0) continue;
    int first_kept = rows[4 * row + 2];
    from[r] = max(0, rows[4 * row] - WINDOW + 1 - first_kept);
    to = max(to, rows[4 * row + 1] - first_kept);
  }
  for (int i = 16; i; i /= 2) to = max(to, __shfl_xor_sync(~0u, to, i));
  __syncthreads();
  unsigned q[GROUPS][2][4];
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      Eight w = *(const Eight*)&queries[quad + 8 * r][16 * g + 4 * part];
#pragma unroll
      for (int i = 0; i < 4; i++) q[g][i / 2][i % 2 * 2 + r] = w.pairs[i];
    }

  float most[2] = {LOWEST, LOWEST}, weight[2] = {0, 0}, acc[HALVES][8][4] = {};
  for (int key = warp * KEYS; key < to; key += WARPS * KEYS) {
    auto inside = [=](int j) { return min(j, to - 1) * HEAD_DIM; };
    float scores[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const bf16* p = k + inside(key + 8 * n + quad) + 8 * part;
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        Eight w = load8(p + 32 * g);
        multiply(scores[n], q[g][0], w.pairs[0], w.pairs[1]);
        multiply(scores[n], q[g][1], w.pairs[2], w.pairs[3]);
      }
    }
    float largest[2] = {most[0], most[1]};
#pragma unroll
    for (int n = 0; n < 2; n++)
      for (int i = 0; i < 4; i++) {
        int j = key + 8 * n + 2 * part + i % 2, r = i / 2;
        if (j < from[r] || j >= to) scores[n][i] = LOWEST;
        largest[r] = fmaxf(largest[r], scores[n][i]);
      }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      for (int i = 1; i < 4; i *= 2)
        largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], i));
      float old = expf(most[r] - largest[r]);
      weight[r] *= old;
#pragma unroll
      for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int i = 0; i < 8; i++) acc[h][i][2 * r] *= old, acc[h][i][2 * r + 1] *= old;
      most[r] = largest[r];
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
      for (int i = 0; i < 4; i++) {
        float p = scores[n][i] == LOWEST ? 0 : expf(scores[n][i] - most[i / 2]);
        weight[i / 2] += p;
        scores[n][i] = p;
      }
    unsigned p[4] = {pair(scores[0][0], scores[0][1]), pair(scores[0][2], scores[0][3]),
                     pair(scores[1][0], scores[1][1]), pair(scores[1][2], scores[1][3])};
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      Eight w[4];
      for (int i = 0; i < 4; i++)
        w[i] = load8(v + inside(key + 2 * part + i / 2 * 8 + i % 2) + 64 * h + 8 * quad);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        unsigned half = i % 2 ? 0x7632 : 0x5410;
        multiply(acc[h][i], p,
                 __byte_perm(w[0].pairs[i / 2], w[1].pairs[i / 2], half),
                 __byte_perm(w[2].pairs[i / 2], w[3].pairs[i / 2], half));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    for (int i = 1; i < 4; i *= 2) weight[r] += __shfl_xor_sync(~0u, weight[r], i);
    int row = quad + 8 * r;
    if (part == 0) most_of[warp][row] = most[r], weight_of[warp][row] = weight[r];
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int i = 0; i < 8; i++)
        for (int e = 0; e < 2; e++)
          sums[warp][row][((8 * h + i) * 2 + e) * 4 + part] = acc[h][i][2 * r + e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += THREADS) {
    int row = i / HEAD_DIM, at = i % HEAD_DIM;
    int d = at / 64 * 64 + 8 * (2 * (at % 4) + at / 4 % 2) + at / 8 % 8;
    if (tile[1 + row] < 0) continue;
    float largest = LOWEST, total = 0, weights = 0;
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, most_of[w][row]);
    for (int w = 0; w < WARPS; w++) {
      float share = expf(most_of[w][row] - largest);
      total += share * sums[w][row][at], weights += share * weight_of[w][row];
    }
    float* out = parts + ((size_t)tile[1 + row] * heads + head) * (HEAD_DIM + 2);
    out[d] = total;
    if (d == 0) out[HEAD_DIM] = largest, out[HEAD_DIM + 1] = weights;
  }
}
