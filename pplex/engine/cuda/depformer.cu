// All depformer steps of a frame in one launch, for a batch of rows, in bfloat16.
//
// The grid is as many blocks as the GPU has multiprocessors, all resident at once; they
// pass from phase to phase through `Grid::sync`. A product's block has a tile of rows and
// columns, its warps a share of the inner dimension each: every operand is read once,
// straight into the tensor cores' registers. Which inner dimension stands where does not
// matter as long as both sides agree, so lanes load 16 bytes at once. Sizes are constants
// that pplex/model/depformer_kernel.py writes in front of this text.
constexpr int WIDTH = 3 * DIM, HEAD_DIM = DIM / HEADS;
constexpr int SSQ_COLUMNS = 32, PARTS = (DIM + SSQ_COLUMNS - 1) / SSQ_COLUMNS;
constexpr int MOST_ROWS = 64;  // of a tile

struct Weights {
  const bf16 *qkv, *out, *up, *down, *head, *table;  // stacks, step after step
  const float *norm1, *norm2;
};

struct Work {  // all (rows, ...)
  bf16* x;      // (dim,): the residual
  float* ssq;   // (PARTS,): squares of x, summed over SSQ_COLUMNS columns
  bf16* past;   // (layers, steps, 3 dim): queries, keys and values
  bf16* y;      // (dim,)
  bf16* hidden; // (hidden,)
  bf16* logits; // (card,)
};

struct Shared : Scratch {
  float scale[MOST_ROWS];
  float sums[TILE_FLOATS];  // of every share of a tile
};

__device__ inline Eight load8(const bf16* p) {  // what other blocks have written
  uint4 w = __ldcg((const uint4*)p);
  return {{w.x, w.y, w.z, w.w}};
}

__device__ inline Eight load_weights(const bf16* p) {
  Eight w;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.pairs[0]), "=r"(w.pairs[1]), "=r"(w.pairs[2]), "=r"(w.pairs[3])
               : "l"(p));
  return w;
}

// A tile: 16 M rows; N eights of columns for each of HALVES groups of warps.
template <int M, int N, int HALVES>
struct Tile {
  static constexpr int ROWS = 16 * M, COLUMNS = 8 * N, SHARES = WARPS / HALVES;
  // A row of sums begins eight banks on: lanes that write together hit different ones.
  static constexpr int STRIDE = COLUMNS + 8, SIZE = ROWS * STRIDE;
  static_assert(COLUMNS % 32 == 0 || COLUMNS % 32 == 16, "banks");
  static_assert(ROWS <= MOST_ROWS && SIZE * WARPS <= TILE_FLOATS, "too large");
  int rows, columns;  // of the whole product; columns of one half
  __device__ int across() const { return (rows + ROWS - 1) / ROWS; }
  __device__ int count() const {
    return across() * ((columns + COLUMNS - 1) / COLUMNS);
  }
  __device__ int row(int tile) const { return tile % across() * ROWS; }
  __device__ int column(int tile) const { return tile / across() * COLUMNS; }

  // Fetch a tile's weights into the L2 cache. Half h begins at row h * columns of `w`.
  template <int K>
  __device__ void prefetch(const bf16* w) const {
    if (blockIdx.x >= count()) return;
    int first = column(blockIdx.x), last = min(first + COLUMNS, columns);
    for (int h = 0; h < HALVES; h++) {
      const char* begin = (const char*)(w + ((size_t)h * columns + first) * K);
      int bytes = (last - first) * K * 2;
      for (int i = 128 * threadIdx.x; i < bytes; i += 128 * THREADS)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(begin + i));
    }
  }

  // x (rows, K) by w (HALVES * columns, K): `begin(row)` once a tile, `load(row, k)` are
  // eight values of x, `out(row, column, get)` is called by whole warps with a row's
  // columns side by side; `get(h)` is the sum for half h.
  template <int K, class Begin, class Load, class Out>
  __device__ void product(Shared& sh, const bf16* w, Begin begin, Load load, Out out) {
    int lane = threadIdx.x % 32, quad = lane / 4, part = lane % 4;
    int half = threadIdx.x / 32 % HALVES, share = threadIdx.x / 32 / HALVES;
    for (int tile = blockIdx.x; tile < count(); tile += gridDim.x) {
      int row0 = row(tile), column0 = column(tile);
      begin(row0);
      float acc[M][N][4] = {};
      const bf16* weights[N];
      for (int n = 0; n < N; n++) {
        int c = min(column0 + 8 * n + quad, columns - 1);
        weights[n] = w + ((size_t)half * columns + c) * K + 8 * part;
      }
#pragma unroll 2
      for (int k = 32 * share; k < K; k += 32 * SHARES) {
        Eight a[M][2], b[N];
#pragma unroll
        for (int n = 0; n < N; n++) b[n] = load_weights(weights[n] + k);
#pragma unroll
        for (int m = 0; m < M; m++)
          for (int r = 0; r < 2; r++)
            a[m][r] = load(min(row0 + 16 * m + 8 * r + quad, rows - 1), k + 8 * part);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            unsigned pairs[4] = {a[m][0].pairs[2 * i], a[m][1].pairs[2 * i],
                                 a[m][0].pairs[2 * i + 1], a[m][1].pairs[2 * i + 1]};
#pragma unroll
            for (int n = 0; n < N; n++)
              multiply(acc[m][n], pairs, b[n].pairs[2 * i], b[n].pairs[2 * i + 1]);
          }
      }
      float* mine = sh.sums + (share * HALVES + half) * SIZE;
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int r = 0; r < 2; r++)
            *(float2*)(mine + (16 * m + 8 * r + quad) * STRIDE + 8 * n + 2 * part) =
                make_float2(acc[m][n][2 * r], acc[m][n][2 * r + 1]);
      __syncthreads();
      for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
        int r = i / COLUMNS, c = i % COLUMNS;
        auto get = [&](int h) {
          float sum = 0;
          for (int s = 0; s < SHARES; s++)
            sum += sh.sums[(s * HALVES + h) * SIZE + r * STRIDE + c];
          return to_float(to_bf16(sum));
        };
        out(row0 + r, column0 + c, get);
      }
      __syncthreads();
    }
  }
};

__device__ inline Eight normed(Eight x, float scale, const float* weight) {
  float4 a = __ldg((const float4*)weight), b = __ldg((const float4*)weight + 1);
  float w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  for (int i = 0; i < 4; i++)
    x.pairs[i] = pair(low(x.pairs[i]) * scale * w[2 * i],
                      high(x.pairs[i]) * scale * w[2 * i + 1]);
  return x;
}

// What the rows from `row0` on are multiplied by to have a mean square of one.
__device__ inline void read_scales(Shared& sh, const float* ssq, int row0, int count,
                                   int rows) {
  int lane = threadIdx.x % 32;
  constexpr int EACH = (MOST_ROWS + WARPS - 1) / WARPS;
  float sums[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int row = min(row0 + i * WARPS + (int)threadIdx.x / 32, rows - 1);
    sums[i] = 0;
    for (int p = lane; p < PARTS; p += 32) sums[i] += __ldcg(ssq + (size_t)row * PARTS + p);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int r = i * WARPS + threadIdx.x / 32;
    float sum = warp_sum(sums[i]);
    if (lane == 0 && r < count) sh.scale[r] = rsqrtf(sum / DIM + 1e-8f);
  }
  __syncthreads();
}

// Attention of step `step` over the steps from `from` on, a warp for a row and head.
__device__ void attend(const Work& work, int rows, int layer, int step, int from) {
  constexpr int PAIRS = HEAD_DIM / 2, D = (PAIRS + 31) / 32;
  int lane = threadIdx.x % 32, count = rows * HEADS;
  for (int i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < count; i += WARPS * gridDim.x) {
    int row = i / HEADS, head = i % HEADS;
    const unsigned* base =
        (const unsigned*)(work.past + ((size_t)row * LAYERS + layer) * STEPS * WIDTH) +
        head * PAIRS;
    auto read = [=](int j, int what, int d) {
      return d < PAIRS ? __ldcg(base + j * (WIDTH / 2) + what * (DIM / 2) + d) : 0;
    };
    unsigned q[D], k[STEPS][D], v[STEPS][D];
    for (int d = 0; d < D; d++) q[d] = read(step, 0, d * 32 + lane);
#pragma unroll
    for (int j = 0; j < STEPS; j++)
      for (int d = 0; d < D; d++) {
        bool seen = j >= from && j <= step;
        k[j][d] = seen ? read(j, 1, d * 32 + lane) : 0;
        v[j][d] = seen ? read(j, 2, d * 32 + lane) : 0;
      }
    float dots[STEPS], most = LOWEST, total = 0, first[D] = {}, second[D] = {};
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float dot = 0;
      for (int d = 0; d < D; d++)
        dot += low(q[d]) * low(k[j][d]) + high(q[d]) * high(k[j][d]);
      dots[j] = warp_sum(dot) * rsqrtf((float)HEAD_DIM);
      if (j >= from && j <= step) most = fmaxf(most, dots[j]);
    }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float p = j >= from && j <= step ? expf(dots[j] - most) : 0;
      total += p;
      for (int d = 0; d < D; d++)
        first[d] += p * low(v[j][d]), second[d] += p * high(v[j][d]);
    }
    for (int d = 0; d < D; d++)
      if (d * 32 + lane < PAIRS)
        ((unsigned*)work.y)[(size_t)row * (DIM / 2) + head * PAIRS + d * 32 + lane] =
            pair(first[d] / total, second[d] / total);
  }
}

// The residual of `row` becomes `input` plus row `id` of a table (zeros if absent).
__device__ void start_step(Work& work, int row, const bf16* input, const bf16* table,
                           int id) {
  for (int part = threadIdx.x / 32; part < PARTS; part += WARPS) {
    int d = part * SSQ_COLUMNS + threadIdx.x % 32;
    float value = 0;
    if (d < DIM) {
      float more = id < 0 ? 0 : to_float(table[(size_t)id * DIM + d]);
      bf16 sum = to_bf16(to_float(input[d]) + more);
      work.x[(size_t)row * DIM + d] = sum;
      value = to_float(sum);
    }
    value = warp_sum(value * value);
    if (threadIdx.x % 32 == 0) work.ssq[(size_t)row * PARTS + part] = value;
  }
}

// `inputs` (rows, steps, dim); `column` (rows, streams) has the text and the user's part;
// `keys` (rows, 2) and `given` (rows, 1 + steps) if there are any. `counters` are zeros,
// and are left so.
__device__ void depformer(const Weights& w, Work work, const bf16* inputs,
                          const bf16* text_table, const int* column,
                          const unsigned* keys, const int* given, unsigned* counters,
                          int* next_column, int rows, int first, int width,
                          float temperature, int top_k) {
  extern __shared__ __align__(16) char memory[];
  Shared& sh = *(Shared*)memory;
  Grid grid{counters};
  int lane = threadIdx.x % 32;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    if (threadIdx.x < STREAMS)
      next_column[row * STREAMS + threadIdx.x] = column[row * STREAMS + threadIdx.x];
    start_step(work, row, inputs + (size_t)row * STEPS * DIM, text_table,
               column[row * STREAMS]);
  }
  auto nothing = [](int) {};
  Tile<4, 6, 1> qkv{rows, WIDTH};
  Tile<2, 4, 1> narrow{rows, DIM};  // its columns are those of `ssq`
  Tile<4, 6, 2> up{rows, HIDDEN};
  Tile<4, 4, 1> head{rows, CARD};
  auto add = [&](int row, int c, auto get) {
    float value = 0;
    if (row < rows && c < DIM) {
      bf16* x = work.x + (size_t)row * DIM + c;
      bf16 sum = to_bf16(low(__ldcg(&x->bits)) + get(0));
      *x = sum;
      value = to_float(sum);
    }
    value = warp_sum(value * value);
    if (lane == 0 && row < rows) work.ssq[(size_t)row * PARTS + c / SSQ_COLUMNS] = value;
  };
#pragma unroll 1
  for (int s = 0; s < STEPS; s++) {
#pragma unroll 1
    for (int l = 0; l < LAYERS; l++) {
      size_t layer = (size_t)s * LAYERS + l;
      int row0 = 0;
      auto begin = [&](int row) {
        row0 = row;
        read_scales(sh, work.ssq, row, MOST_ROWS, rows);
      };
      {
        const bf16* weights = w.qkv + layer * WIDTH * DIM;
        const float* norm = w.norm1 + layer * DIM;
        qkv.prefetch<DIM>(weights);
        grid.sync();
        qkv.product<DIM>(
            sh, weights, begin,
            [&](int row, int k) {
              return normed(load8(work.x + (size_t)row * DIM + k), sh.scale[row - row0],
                            norm + k);
            },
            [&](int row, int c, auto get) {
              if (row < rows && c < WIDTH)
                work.past[(((size_t)row * LAYERS + l) * STEPS + s) * WIDTH + c] =
                    to_bf16(get(0));
            });
      }
      const bf16* out = w.out + layer * DIM * DIM;
      narrow.prefetch<DIM>(out);
      grid.sync();
      attend(work, rows, l, s, s == HIDING_STEP);
      grid.sync();
      narrow.product<DIM>(
          sh, out, nothing,
          [&](int row, int k) { return load8(work.y + (size_t)row * DIM + k); }, add);
      {
        const bf16* weights = w.up + layer * 2 * HIDDEN * DIM;
        const float* norm = w.norm2 + layer * DIM;
        up.prefetch<DIM>(weights);
        grid.sync();
        up.product<DIM>(
            sh, weights, begin,
            [&](int row, int k) {
              return normed(load8(work.x + (size_t)row * DIM + k), sh.scale[row - row0],
                            norm + k);
            },
            [&](int row, int c, auto get) {
              if (row >= rows || c >= HIDDEN) return;
              float gate = get(0);
              gate = to_float(to_bf16(gate / (1 + expf(-gate))));
              work.hidden[(size_t)row * HIDDEN + c] = to_bf16(gate * get(1));
            });
      }
      const bf16* down = w.down + layer * DIM * HIDDEN;
      narrow.prefetch<HIDDEN>(down);
      grid.sync();
      narrow.product<HIDDEN>(
          sh, down, nothing,
          [&](int row, int k) { return load8(work.hidden + (size_t)row * HIDDEN + k); },
          add);
    }
    const bf16* weights = w.head + (size_t)s * CARD * DIM;
    head.prefetch<DIM>(weights);
    grid.sync();
    head.product<DIM>(
        sh, weights, nothing,
        [&](int row, int k) { return load8(work.x + (size_t)row * DIM + k); },
        [&](int row, int c, auto get) {
          if (row < rows && c < CARD) work.logits[(size_t)row * CARD + c] = to_bf16(get(0));
        });
    grid.sync();
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
      int id = given ? given[row * (1 + STEPS) + 1 + s] : NOT_FORCED;
      if (id == NOT_FORCED) {
        Noise noise{};
        if (keys) noise.key = make_uint2(keys[2 * row], keys[2 * row + 1]);
        noise.first = first + s * CARD, noise.width = width;
        const bf16* logits = work.logits + (size_t)row * CARD;
        id = choose(sh, [=](int i) { return low(__ldcg(&logits[i].bits)); }, CARD, noise,
                    temperature, top_k);
      }
      if (threadIdx.x == 0) next_column[row * STREAMS + 1 + s] = id;
      if (s + 1 < STEPS)
        start_step(work, row, inputs + ((size_t)row * STEPS + s + 1) * DIM,
                   w.table + (size_t)s * (CARD + 1) * DIM, id);
    }
  }
  grid.finish();
}
