// Attention of a codec's transformer to a chunk of `t` new positions and to those before
// them, float32, by tiles of queries. Queries and keys are turned here.

constexpr int QUADS = HEAD_DIM / 4, QUERIES = 64, KEYS = 32, PER = 16;
constexpr int ROWS = QUERIES / PER, COLUMNS = KEYS / PER;
static_assert(QUADS == PER && THREADS == PER * PER);

struct Row {  // one head of a row
  const float4 *qkv, *keys, *values;
  const float2 *cosines, *sines;
  int end, stride, window;

  // Four numbers of a new position's query (part 0), key (1) or value (2).
  __device__ float4 fresh(int position, int part, int quad) const {
    int i = position - end;
    float4 x = qkv[(size_t)(3 * i + part) * stride + quad];
    if (part == 2) return x;
    float2 c = cosines[i * QUADS + quad], s = sines[i * QUADS + quad];
    return make_float4(x.x * c.x - x.y * s.x, x.x * s.x + x.y * c.x,
                       x.z * c.y - x.w * s.y, x.z * s.y + x.w * c.y);
  }

  // The same of a key or a value, of any position.
  __device__ float4 load(int position, int part, int quad) const {
    if (position >= end) return fresh(position, part, quad);
    return (part == 1 ? keys : values)[position % window * QUADS + quad];
  }
};

__device__ inline float dot(float4 a, float4 b, float sum) {
  return a.x * b.x + (a.y * b.y + (a.z * b.z + (a.w * b.w + sum)));
}

// `qkv` (rows, t, 3, heads, HEAD_DIM); `cosines`, `sines` (t, HEAD_DIM / 2). Position p
// lies in slot p % window of `old_keys`, `old_values` (rows, heads, old_slots, HEAD_DIM),
// and of `keys`, `values`, which are made. `y` is (rows, t, heads, HEAD_DIM).
extern "C" __global__ __launch_bounds__(THREADS) void attend_latents(
    const float4* qkv, const float4* old_keys, const float4* old_values,
    const float2* cosines, const float2* sines, float4* y, float4* keys, float4* values,
    int t, int end, int heads, int old_slots, int slots, int window, int block) {
  __shared__ float4 q[QUERIES][QUADS + 1], k[KEYS][QUADS + 1], v[KEYS][QUADS];
  __shared__ float p[QUERIES][KEYS + 4];
  int head = blockIdx.x % heads, tile = blockIdx.x / heads, tiles = gridDim.x / heads;
  int lane = threadIdx.x % PER, part = threadIdx.x / PER, stride = heads * QUADS;
  size_t old = ((size_t)blockIdx.y * heads + head) * old_slots * QUADS;
  Row row{qkv + (size_t)blockIdx.y * t * 3 * stride + head * QUADS,
          old_keys + old, old_values + old, cosines, sines, end, stride, window};
  size_t own = ((size_t)blockIdx.y * heads + head) * slots * QUADS;
  for (int at = end + t - slots + tile * PER + part; at < end + t; at += tiles * PER) {
    size_t to = own + at % window * QUADS + lane;
    keys[to] = row.load(at, 1, lane), values[to] = row.load(at, 2, lane);
  }
  int first = end + tile * QUERIES, last = min(first + QUERIES, end + t) - 1;
  for (int i = part; i < QUERIES; i += PER)
    q[i][lane] = row.fresh(min(first + i, last), 0, lane);
  auto seen_from = [=](int at) { return max((at / block + 1) * block - window, 0); };
  float scale = 1 / sqrtf((float)HEAD_DIM);
  float4 sums[ROWS] = {};
  float most[ROWS], weight[ROWS] = {};
  for (int i = 0; i < ROWS; i++) most[i] = LOWEST;
  for (int begin = seen_from(first); begin <= last; begin += KEYS) {
    __syncthreads();
    for (int i = part; i < KEYS; i += PER) {
      int at = min(begin + i, last);
      k[i][lane] = row.load(at, 1, lane), v[i][lane] = row.load(at, 2, lane);
    }
    __syncthreads();
    float scores[ROWS][COLUMNS] = {};
#pragma unroll 4
    for (int quad = 0; quad < QUADS; quad++) {
      float4 key[COLUMNS];
      for (int j = 0; j < COLUMNS; j++) key[j] = k[lane + PER * j][quad];
      for (int i = 0; i < ROWS; i++) {
        float4 query = q[part + PER * i][quad];
        for (int j = 0; j < COLUMNS; j++) scores[i][j] = dot(query, key[j], scores[i][j]);
      }
    }
    for (int i = 0; i < ROWS; i++) {
      int at = first + part + PER * i, from = seen_from(at);
      float largest = most[i];
      for (int j = 0; j < COLUMNS; j++) {
        int key = begin + lane + PER * j;
        scores[i][j] = key < from || key > at ? LOWEST : scores[i][j] * scale;
        largest = fmaxf(largest, scores[i][j]);
      }
      for (int n = 1; n < PER; n *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, n));
      float less = expf(most[i] - largest);
      most[i] = largest, weight[i] *= less;
      sums[i].x *= less, sums[i].y *= less, sums[i].z *= less, sums[i].w *= less;
      for (int j = 0; j < COLUMNS; j++) {
        float share = scores[i][j] == LOWEST ? 0 : expf(scores[i][j] - largest);
        weight[i] += share;
        p[part + PER * i][lane + PER * j] = share;
      }
    }
    __syncwarp();  // a query is half a warp's
#pragma unroll 2
    for (int four = 0; four < KEYS; four += 4) {
      float4 value[4];
      for (int n = 0; n < 4; n++) value[n] = v[four + n][lane];
      for (int i = 0; i < ROWS; i++) {
        float4 share = *(const float4*)&p[part + PER * i][four];
        float each[4] = {share.x, share.y, share.z, share.w};
        for (int n = 0; n < 4; n++) {
          sums[i].x += each[n] * value[n].x, sums[i].y += each[n] * value[n].y;
          sums[i].z += each[n] * value[n].z, sums[i].w += each[n] * value[n].w;
        }
      }
    }
  }
  for (int i = 0; i < ROWS; i++) {
    for (int n = 1; n < PER; n *= 2) weight[i] += __shfl_xor_sync(~0u, weight[i], n);
    int at = first + part + PER * i;
    float4 sum = sums[i];
    sum.x /= weight[i], sum.y /= weight[i], sum.z /= weight[i], sum.w /= weight[i];
    if (at <= last)
      y[((size_t)blockIdx.y * t + at - end) * stride + head * QUADS + lane] = sum;
  }
}
