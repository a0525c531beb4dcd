// All depformer steps of a frame in one launch, for a batch of rows, in bfloat16.
//
// The grid is as many blocks as the GPU has multiprocessors, all resident at once. Up to
// ROWS rows are those of a team of blocks, which pass from phase to phase through
// `Grid::sync`. In a product a block has a tile of all these rows and some columns. Its
// operands come through shared memory, the first weights before the wait. A sum is that
// of SHARES of the inner dimension, in order: a warp has one of them, or warps with a
// part of the tile each make one after the other. So a row's bits are the same in any
// number of rows, and so are those of tiles of any width. Sizes are constants that
// depformer.py writes in front of this text.
constexpr int WIDTH = 3 * DIM, HEAD_DIM = DIM / HEADS;
constexpr int PARTS = DIM / 8;
// Of the inner dimension; eight rows of a piece are as many bytes as a warp loads.
constexpr int PIECE = 32, ROW_BYTES = 2 * PIECE, EIGHT_BYTES = 8 * ROW_BYTES;
constexpr int SHARES = WARPS;
constexpr int ROW_WARPS = 2, COLUMN_WARPS = WARPS / ROW_WARPS;  // where tiles are wide

struct Weights {
  const bf16 *qkv, *out, *up, *down, *head, *table;  // stacks, step after step
  const float *norm1, *norm2;
};

struct Work {  // all (rows, ...)
  bf16* x;      // (dim,): the residual
  bf16* normed; // (dim,): x times the next norm's weight; the scale comes later
  float* ssq;   // (PARTS,): squares of x, summed over eight columns
  bf16* past;   // (layers, steps, 3 dim): queries, keys and values
  bf16* y;      // (dim,)
  bf16* hidden; // (hidden,)
  bf16* logits; // (card,)
};

struct Shared : Scratch {
  float scale[ROWS];
  alignas(128) char stages[STAGES_BYTES];
};

// The blocks that share rows, and those rows.
struct Team {
  int block, blocks, first, rows;
};

__device__ inline float rounded(float x) { return to_float(to_bf16(x)); }

__device__ inline Eight load8(const bf16* p) {  // what other blocks have written
  uint4 w = __ldcg((const uint4*)p);
  return {{w.x, w.y, w.z, w.w}};
}

__device__ inline void copy16(unsigned to, const bf16* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}

// Sixteen bytes of this lane's of eight rows.
__device__ inline Eight load_shared(unsigned eight) {
  Eight w;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.pairs[0]), "=r"(w.pairs[1]), "=r"(w.pairs[2]), "=r"(w.pairs[3])
               : "r"(eight + 16 * (threadIdx.x % 32))
               : "memory");
  return w;
}

// What the team's rows are multiplied by to have a mean square of one.
__device__ inline void read_scales(Shared& sh, const float* ssq, const Team& team) {
  int lane = threadIdx.x % 32;
  constexpr int EACH = ROWS / WARPS;
  float sums[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int row = team.first + min(i * WARPS + (int)threadIdx.x / 32, team.rows - 1);
    sums[i] = 0;
    for (int p = lane; p < PARTS / 4; p += 32) {
      float4 four = __ldcg((const float4*)(ssq + (size_t)row * PARTS) + p);
      sums[i] += (four.x + four.y) + (four.z + four.w);
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    float sum = warp_sum(sums[i]);
    if (lane == 0) sh.scale[i * WARPS + threadIdx.x / 32] = rsqrtf(sum / DIM + 1e-8f);
  }
}

// Rows (K) times a matrix (HALVES * columns, K), of which a tile has EIGHTS of columns;
// SPLIT: a warp has a share. To make it fetches the first weights; then comes a wait, and
// `run`. A stage of PER pieces is fetched by GROUP threads, each piece's rows first.
template <int K, int EIGHTS, int HALVES = 1, bool SPLIT = true>
struct Product {
  static constexpr int PIECES = K / PIECE, EACH = (PIECES + SHARES - 1) / SHARES;
  static constexpr int COLUMNS = 8 * EIGHTS, LINES = ROWS + HALVES * COLUMNS;
  static constexpr int GROUP = SPLIT ? 32 : THREADS, ROOM = STAGES_BYTES / THREADS * GROUP;
  static constexpr bool fit(int per) {
    return EACH % per == 0 && 4 * per * LINES * ROW_BYTES <= ROOM;
  }
  static constexpr int PER = SPLIT ? 1 : fit(4) ? 4 : fit(2) ? 2 : 1;
  static constexpr int STAGE = PER * LINES * ROW_BYTES;
  static constexpr int COUNT = (SPLIT ? 1 : SHARES) * EACH / PER;
  static constexpr int STAGES = ROOM / STAGE < COUNT + 1 ? ROOM / STAGE : COUNT + 1;
  static_assert(STAGES > 1, "too large");
  // What a warp has of the tile.
  static constexpr int TALL = ROWS / 16 / (SPLIT ? 1 : ROW_WARPS);
  static constexpr int WIDE = EIGHTS / (SPLIT ? 1 : COLUMN_WARPS);
  static_assert(TALL > 0 && (SPLIT || EIGHTS % COLUMN_WARPS == 0), "no part of a tile");
  // Lanes that write sums of eight rows together hit different banks.
  static constexpr int STRIDE = HALVES * COLUMNS + (HALVES * EIGHTS % 2 ? 0 : 8);
  static_assert(!SPLIT || 4 * SHARES * ROWS * STRIDE <= STAGES_BYTES, "too large");
  using Sums = float[TALL][HALVES][WIDE][4];
  Shared& sh;
  const Team& team;
  const bf16* w;
  int columns, tiles, piece0;
  unsigned stages;

  __device__ Product(Shared& sh, const Team& team, const bf16* w, int columns)
      : sh(sh), team(team), w(w), columns(columns) {
    int group = threadIdx.x / GROUP;
    stages = (unsigned)__cvta_generic_to_shared(sh.stages) + group * ROOM;
    piece0 = group * EACH;
    tiles = (columns + COLUMNS - 1) / COLUMNS;
    if (team.block < tiles)
      for (int s = 0; s < STAGES - 1; s++) fetch_weights(team.block, s, s);
  }

  // `get(i)` is where line i of those from `first` on begins, if it is there.
  template <class Get>
  __device__ void fetch(int stage, int slot, int first, int lines, Get get) const {
    int t = threadIdx.x % GROUP, part = t % 4, j = t / 8 % PER;
    int piece = piece0 + stage * PER + j;
    if (stage >= COUNT || piece >= PIECES) return;
    unsigned to = stages + slot * STAGE + (j * LINES + first) * ROW_BYTES + 16 * part;
#pragma unroll
    for (int i = t / 8 / PER * 2 + t / 4 % 2; i < lines; i += GROUP / 4 / PER)
      if (const bf16* from = get(i)) copy16(to + i * ROW_BYTES, from + piece * PIECE + 8 * part);
  }

  __device__ void fetch_weights(int tile, int stage, int slot) const {
    fetch(stage, slot, ROWS, HALVES * COLUMNS, [=](int i) {
      int c = min(tile * COLUMNS + i % COLUMNS, columns - 1) + i / COLUMNS * columns;
      return w + (size_t)c * K;
    });
  }

  __device__ void fetch_rows(const bf16* x, int stage, int slot) const {
    fetch(stage, slot, 0, ROWS, [=](int i) {
      return i < team.rows ? x + (size_t)(team.first + i) * K : nullptr;
    });
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // Add what a piece gives to this warp's part of the tile, which begins there.
  __device__ void multiply_piece(Sums& acc, unsigned rows, unsigned weights) const {
    Eight b[HALVES][WIDE];
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int n = 0; n < WIDE; n++)
        b[h][n] = load_shared(weights + (h * EIGHTS + n) * EIGHT_BYTES);
#pragma unroll
    for (int m = 0; m < TALL; m++) {
      Eight a[2];
      for (int r = 0; r < 2; r++) a[r] = load_shared(rows + (2 * m + r) * EIGHT_BYTES);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        unsigned pairs[4] = {a[0].pairs[2 * i], a[1].pairs[2 * i], a[0].pairs[2 * i + 1],
                             a[1].pairs[2 * i + 1]};
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
          for (int n = 0; n < WIDE; n++)
            multiply(acc[m][h][n], pairs, b[h][n].pairs[2 * i], b[h][n].pairs[2 * i + 1]);
      }
    }
  }

  // `before()` once; `out(row, column, v)` are sums of two columns of every half, called
  // by whole warps, also for rows that are not there.
  template <class Before, class Out>
  __device__ void run(const bf16* x, Before before, Out out) {
    int warp = threadIdx.x / 32;
    int row0 = SPLIT ? 0 : warp % ROW_WARPS * TALL * 2;  // in eights
    int column0 = SPLIT ? 0 : warp / ROW_WARPS * WIDE;
#pragma unroll 1
    for (int tile = team.block; tile < tiles; tile += team.blocks) {
#pragma unroll 1
      for (int s = 0; s < STAGES - 1; s++) {
        if (tile != team.block) fetch_weights(tile, s, s);
        fetch_rows(x, s, s);
      }
      if (tile == team.block) before();
      Sums acc = {}, total = {};
#pragma unroll 1
      for (int s = 0, slot = 0; s < COUNT; s++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        if constexpr (SPLIT) __syncwarp();
        else __syncthreads();
        int free = slot ? slot - 1 : STAGES - 1;
        fetch_weights(tile, s + STAGES - 1, free);
        fetch_rows(x, s + STAGES - 1, free);
        unsigned at = stages + slot * STAGE;
#pragma unroll
        for (int j = 0; j < PER; j++, at += LINES * ROW_BYTES)
          if (piece0 + s * PER + j < PIECES)
            multiply_piece(acc, at + row0 * EIGHT_BYTES,
                           at + (ROWS / 8 + column0) * EIGHT_BYTES);
        if (!SPLIT && (s + 1) * PER % EACH == 0)
          for_all([&](int m, int h, int n, int i) {
            total[m][h][n][i] += acc[m][h][n][i];
            acc[m][h][n][i] = 0;
          });
        slot = slot + 1 == STAGES ? 0 : slot + 1;
      }
      __syncthreads();
      if constexpr (SPLIT) {
        give_sums(acc, tile, out);
        __syncthreads();
      } else {
        give(total, row0, EIGHTS * tile + column0, out);
      }
    }
  }

  template <class Each>
  __device__ static void for_all(Each each) {
#pragma unroll
    for (int m = 0; m < TALL; m++)
#pragma unroll
      for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int n = 0; n < WIDE; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) each(m, h, n, i);
  }

  // This warp's part of the tile, which begins at eights of rows and columns.
  template <class Out>
  __device__ void give(const Sums& total, int row0, int column0, Out out) const {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < WIDE; n++) {
      if (8 * (column0 + n) >= columns) continue;
#pragma unroll
      for (int m = 0; m < TALL; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float2 v[HALVES];
          for (int h = 0; h < HALVES; h++)
            v[h] = make_float2(total[m][h][n][2 * r], total[m][h][n][2 * r + 1]);
          out(8 * (row0 + 2 * m + r) + lane / 4, 8 * (column0 + n) + 2 * (lane % 4), v);
        }
    }
  }

  // The tile, of which every warp has a share.
  template <class Out>
  __device__ void give_sums(const Sums& acc, int tile, Out out) const {
    int lane = threadIdx.x % 32;
    float *sums = (float*)sh.stages, *mine = sums + threadIdx.x / 32 * ROWS * STRIDE;
    mine += lane / 4 * STRIDE + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < TALL; m++)
#pragma unroll
      for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int n = 0; n < WIDE; n++)
#pragma unroll
          for (int r = 0; r < 2; r++)
            *(float2*)(mine + (16 * m + 8 * r) * STRIDE + 8 * (h * EIGHTS + n)) =
                make_float2(acc[m][h][n][2 * r], acc[m][h][n][2 * r + 1]);
    __syncthreads();
    // Where `out` shuffles, all tiles are whole.
    for (int i = threadIdx.x; i < ROWS * COLUMNS / 2; i += THREADS) {
      int row = i / (COLUMNS / 2), column = i % (COLUMNS / 2) * 2;
      if (tile * COLUMNS + column >= columns) continue;
      float2 v[HALVES] = {};
#pragma unroll
      for (int s = 0; s < SHARES; s++)
        for (int h = 0; h < HALVES; h++) {
          float2 share = *(const float2*)(sums + (s * ROWS + row) * STRIDE + h * COLUMNS + column);
          v[h].x += share.x, v[h].y += share.y;
        }
      out(row, tile * COLUMNS + column, v);
    }
  }
};

// Attention of step `step` over the steps from `from` on, LANES lanes for a row and head.
__device__ void attend(const Work& work, const Team& team, int layer, int step, int from) {
  constexpr int LANES = HEAD_DIM / 8, TOGETHER = 32 / LANES;
  int lane = threadIdx.x % LANES, count = team.rows * HEADS;
  int begin = (threadIdx.x / 32 * team.blocks + team.block) * TOGETHER;
  for (; begin < count; begin += WARPS * team.blocks * TOGETHER) {
    int i = begin + threadIdx.x % 32 / LANES, item = min(i, count - 1);
    size_t row = team.first + item / HEADS;
    int head = item % HEADS * HEAD_DIM + 8 * lane;
    const bf16* base = work.past + (row * LAYERS + layer) * STEPS * WIDTH + head;
    Eight q = load8(base + (size_t)step * WIDTH), k[STEPS] = {}, v[STEPS] = {};
#pragma unroll
    for (int j = 0; j < STEPS; j++)
      if (j >= from && j <= step) {
        k[j] = load8(base + (size_t)j * WIDTH + DIM);
        v[j] = load8(base + (size_t)j * WIDTH + 2 * DIM);
      }
    float dots[STEPS], most = LOWEST, total = 0, sums[8] = {};
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float dot = 0;
      for (int d = 0; d < 4; d++)
        dot += low(q.pairs[d]) * low(k[j].pairs[d]) + high(q.pairs[d]) * high(k[j].pairs[d]);
      for (int d = 1; d < LANES; d *= 2) dot += __shfl_xor_sync(~0u, dot, d);
      dots[j] = dot * rsqrtf((float)HEAD_DIM);
      if (j >= from && j <= step) most = fmaxf(most, dots[j]);
    }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float p = j >= from && j <= step ? expf(dots[j] - most) : 0;
      total += p;
      for (int d = 0; d < 4; d++)
        sums[2 * d] += p * low(v[j].pairs[d]), sums[2 * d + 1] += p * high(v[j].pairs[d]);
    }
    Eight y;
    for (int d = 0; d < 4; d++)
      y.pairs[d] = pair(sums[2 * d] / total, sums[2 * d + 1] / total);
    if (i < count) *(Eight*)(work.y + row * DIM + head) = y;
  }
}

// The residual of `row` becomes `input` plus row `id` of a table (zeros if absent).
__device__ void start_step(const Work& work, size_t row, const bf16* input,
                           const bf16* table, int id, const float* norm) {
  for (int part = threadIdx.x; part < PARTS; part += THREADS) {
    Eight x = *(const Eight*)(input + 8 * part), more = {}, normed;
    if (id >= 0) more = *(const Eight*)(table + (size_t)id * DIM + 8 * part);
    float squares = 0;
    for (int i = 0; i < 4; i++) {
      float a = rounded(low(x.pairs[i]) + low(more.pairs[i]));
      float b = rounded(high(x.pairs[i]) + high(more.pairs[i]));
      const float* weight = norm + 8 * part + 2 * i;
      x.pairs[i] = pair(a, b);
      normed.pairs[i] = pair(a * weight[0], b * weight[1]);
      squares += a * a + b * b;
    }
    *(Eight*)(work.x + row * DIM + 8 * part) = x;
    *(Eight*)(work.normed + row * DIM + 8 * part) = normed;
    work.ssq[row * PARTS + part] = squares;
  }
}

// `inputs` (rows, steps, dim); `column` (rows, streams) has the text and the user's part;
// `keys` (rows, 2) and `given` (rows, 1 + steps) if there are any. `counters` are zeros,
// and are left so.
__device__ void depformer(const Weights& w, const Work& work, const bf16* inputs,
                          const bf16* text_table, const int* column,
                          const unsigned* keys, const int* given, unsigned* counters,
                          int* next_column, int rows, int first, int width,
                          float temperature, int top_k) {
  extern __shared__ __align__(128) char memory[];
  Shared& sh = *(Shared*)memory;
  int teams = (rows + ROWS - 1) / ROWS, blocks = gridDim.x / teams;
  int number = blockIdx.x / blocks, most = (rows + teams - 1) / teams;
  if (number >= teams) return;
  Team team{(int)blockIdx.x % blocks, blocks, number * most,
            min(most, rows - number * most)};
  Grid grid{counters + 32 * number, (unsigned)blocks};
  int lane = threadIdx.x % 32, last = team.first + team.rows;
  for (int row = team.first + team.block; row < last; row += blocks) {
    for (int i = threadIdx.x; i < STREAMS; i += THREADS)
      next_column[row * STREAMS + i] = column[row * STREAMS + i];
    start_step(work, row, inputs + (size_t)row * STEPS * DIM, text_table,
               column[row * STREAMS], w.norm1);
  }
  auto nothing = [] {};
  auto scales = [&] { read_scales(sh, work.ssq, team); };
#pragma unroll 1
  for (int s = 0; s < STEPS; s++) {
#pragma unroll 1
    for (int l = 0; l < LAYERS; l++) {
      size_t layer = (size_t)s * LAYERS + l;
      // The sum of the residual and a product; the norm that is next.
      auto add_for = [&](const float* norm) {
        return [&, norm](int r, int c, const float2(&v)[1]) {
          size_t at = (size_t)(team.first + r) * DIM + c;
          float squares = 0;
          if (r < team.rows) {
            unsigned x = __ldcg((const unsigned*)(work.x + at));
            float a = rounded(low(x) + rounded(v[0].x));
            float b = rounded(high(x) + rounded(v[0].y));
            float2 weight = __ldg((const float2*)(norm + c));
            *(unsigned*)(work.x + at) = pair(a, b);
            *(unsigned*)(work.normed + at) = pair(a * weight.x, b * weight.y);
            squares = a * a + b * b;
          }
          for (int i = 1; i < 4; i *= 2) squares += __shfl_xor_sync(~0u, squares, i);
          if (r < team.rows && lane % 4 == 0) work.ssq[at / 8] = squares;
        };
      };
      {
        Product<DIM, 3 * WIDER, 1, WIDER == 1> qkv(sh, team, w.qkv + layer * WIDTH * DIM, WIDTH);
        grid.sync();
        qkv.run(work.normed, scales, [&](int r, int c, const float2(&v)[1]) {
          if (r >= team.rows) return;
          size_t at = ((size_t)(team.first + r) * LAYERS + l) * STEPS + s;
          *(unsigned*)(work.past + at * WIDTH + c) =
              pair(v[0].x * sh.scale[r], v[0].y * sh.scale[r]);
        });
      }
      {
        Product<DIM, WIDER> out(sh, team, w.out + layer * DIM * DIM, DIM);
        grid.sync();
        attend(work, team, l, s, s == HIDING_STEP);
        grid.sync();
        out.run(work.y, nothing, add_for(w.norm2 + layer * DIM));
      }
      {
        Product<DIM, 3 * WIDER, 2, WIDER == 1> up(sh, team, w.up + layer * 2 * HIDDEN * DIM, HIDDEN);
        grid.sync();
        up.run(work.normed, scales, [&](int r, int c, const float2(&v)[2]) {
          if (r >= team.rows) return;
          auto gated = [&](float gate, float value) {
            gate = rounded(gate * sh.scale[r]);
            return rounded(gate / (1 + expf(-gate))) * rounded(value * sh.scale[r]);
          };
          *(unsigned*)(work.hidden + (size_t)(team.first + r) * HIDDEN + c) =
              pair(gated(v[0].x, v[1].x), gated(v[0].y, v[1].y));
        });
      }
      {
        Product<HIDDEN, WIDER> down(sh, team, w.down + layer * DIM * HIDDEN, DIM);
        grid.sync();
        down.run(work.hidden, nothing,
                 add_for(w.norm1 + (l + 1 < LAYERS ? layer + 1 : layer) * DIM));
      }
    }
    {
      Product<DIM, 2 * WIDER, 1, WIDER == 1> head(sh, team, w.head + (size_t)s * CARD * DIM, CARD);
      grid.sync();
      head.run(work.x, nothing, [&](int r, int c, const float2(&v)[1]) {
        if (r < team.rows)
          *(unsigned*)(work.logits + (size_t)(team.first + r) * CARD + c) =
              pair(v[0].x, v[0].y);
      });
    }
    grid.sync();
    for (int row = team.first + team.block; row < last; row += blocks) {
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
                   w.table + (size_t)s * (CARD + 1) * DIM, id,
                   w.norm1 + (size_t)(s + 1) * LAYERS * DIM);
    }
  }
  grid.finish();
}
