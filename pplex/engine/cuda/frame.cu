// One frame of the language model in one launch, for one conversation.
//
// The grid is as many blocks as the GPU has multiprocessors, all resident at once; they
// pass from phase to phase through `Grid::sync`. A phase is a matrix-vector product (its
// first weights are fetched before the wait) or an attention. Activations are float32
// and cross between blocks through the L2 cache, so they are read with __ldcg. Sizes and
// storage forms are constants that frame.py writes in front of this text.
constexpr int HEAD_DIM = DIM / HEADS, DEP_HEAD_DIM = DEP_DIM / DEP_HEADS;

// How a matrix is stored: bits 4 or 8 (affine, with scales and biases) or 16 (bfloat16).
template <int BITS_, int GROUP_, int K_>
struct Matrix {
  static constexpr int BITS = BITS_, GROUP = GROUP_, K = K_;
  static constexpr int PER = 128 / BITS;  // weights in 16 bytes
  static constexpr int CHUNK = 4 * PER, CHUNKS = (K + CHUNK - 1) / CHUNK;  // four lanes'
  const char* words;
  const bf16 *scales, *biases;
  __device__ Matrix(const void* w, const bf16* s, const bf16* b)
      : words((const char*)w), scales(s), biases(b) {}
  __device__ Matrix part(size_t first_row) const {  // from a row of a stack on
    return Matrix(words + first_row * K * BITS / 8,
                  BITS == 16 ? scales : scales + first_row * (K / GROUP),
                  BITS == 16 ? biases : biases + first_row * (K / GROUP));
  }
  __device__ float value(size_t row, int k) const {
    size_t at = row * K + k;
    if (BITS == 16) return to_float(((const bf16*)words)[at]);
    unsigned q = (unsigned char)words[at * BITS / 8];
    if (BITS == 4) q = (q >> (4 * (k & 1))) & 15;
    size_t group = row * (K / GROUP) + k / GROUP;
    float w = fmaf(to_float(scales[group]), (float)q,
                   to_float(biases[group]));
    return to_float(to_bf16(w));
  }
};

constexpr int TILES = 16;  // of a `Product`'s group of warps at a time
constexpr int AHEAD = 2;   // units that a warp reads before it multiplies

struct Shared : Scratch {
  unsigned x[STAGED];  // the vector to multiply by, of every warp its own: see `Product`
  float x_sums[STAGED / 16];
  float sums[WARPS * TILES * 16];
  float squares[WARPS];
  float head[3 * HEAD_DIM];
  float partial[WARPS * HEAD_DIM > DEP_DIM ? WARPS * HEAD_DIM : DEP_DIM];
  float scores[MAX_SCORES];
};

// A lane's weights of a tile's chunk: 16 bytes of two rows, and their scales and biases.
struct Unit {
  uint4 words[2];
  unsigned scale[2], bias[2];
};

__device__ inline unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Of a word's digits of four bits two, that begin SHIFT after bits 3 and 19: 1 + q / 16.
template <int SHIFT>
__device__ inline unsigned digits(unsigned word) {
  unsigned turned = SHIFT < 0 ? word << 3 : word >> SHIFT;
  unsigned both;  // an operation, of which the compiler makes two
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
      : "=r"(both)
      : "r"(turned), "r"(0x00780078u), "n"(0x3F803F80u));
  return both;
}

// The same number. What a loop makes of it, it makes anew each time: the compiler would
// else keep that for all phases, in registers that there are not.
__device__ inline int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ inline float rest(float x) { return x - to_float(to_bf16(x)); }

__device__ constexpr int share_of(int chunks) {  // warps that share the inner dimension
  int split = 1;
  while (2 * split <= WARPS && 2 * split <= chunks) split *= 2;
  return split;
}

// A matrix times a vector, on the tensor cores. A tile is 16 rows; SPLIT warps have a
// part of the inner dimension each, and GROUPS of them tiles of their own. ALL rows there
// are; PAIRED: of each half, and a tile is eight of the first and the same of the second.
//
// A lane's 16 bytes of a row meet their part of the vector only, in two columns: rounded
// to bfloat16, and what that left. So a lane has the sum of its own weights, to which its
// scale applies. Making one reads the first weights; then comes a wait, and `run`. One
// does TILES tiles of a group, from `begin` on.
template <class M, int ALL, bool PAIRED = false>
struct Product {
  static constexpr int PER = M::PER, SPLIT = share_of(M::CHUNKS);
  static constexpr int GROUPS = WARPS / SPLIT;
  static constexpr int EACH = (M::CHUNKS + SPLIT - 1) / SPLIT;  // chunks of a warp
  static constexpr int USED = (M::CHUNKS + EACH - 1) / EACH;  // warps that have some
  static constexpr int ROWS = PAIRED ? 8 : 16;
  static constexpr int ALL_TILES = (ALL + ROWS - 1) / ROWS;
  static constexpr int QUARTERS = EACH * PER, N = (QUARTERS + 31) / 32;
  static_assert(WARPS * 4 * QUARTERS <= STAGED, "too long");
  M m;
  int begin, count, each, block, thread, lane, quad, part, share, group;
  const float* norm;
  Unit ring[AHEAD] = {};  // not all is read, and what might be old takes registers
  // What is read next: how many tiles are left, which chunk, and where it lies.
  int left, next = 0, k;
  const char* words[2];
  unsigned row[2];
  float4 norms[N] = {};

  // `norm` is what the vector is normalised by, if it is.
  __device__ Product(M m, const float* norm, int begin) : m(m), begin(begin), norm(norm) {
    block = anew(blockIdx.x), thread = anew(threadIdx.x);
    lane = thread % 32, quad = lane / 4, part = lane % 4;
    share = thread / 32 % SPLIT, group = thread / 32 / SPLIT;
    int step = gridDim.x * GROUPS;
    count = min(TILES, (ALL_TILES - tile(0) + step - 1) / step);  // none if negative
    each = M::CHUNKS % EACH ? min(EACH, M::CHUNKS - share * EACH) : EACH;
    if (share >= USED) count = 0;
    left = count;
    aim(0);
#pragma unroll
    for (int u = 0; u < AHEAD; u++) fetch(ring[u]);
    if (!norm) return;
#pragma unroll
    for (int i = 0; i < N; i++)
      if (inside(i)) norms[i] = *(const float4*)(norm + place(i));
  }
  __device__ int tile(int t) const { return tile(t, group); }
  __device__ int tile(int t, int group) const {
    return begin + block + gridDim.x * (group + GROUPS * t);
  }
  // Where the lane's four numbers i of the warp's part of the vector are.
  __device__ int place(int i) const { return 4 * (share * QUARTERS + 32 * i + lane); }
  __device__ bool inside(int i) const {
    return 32 * i + lane < QUARTERS && place(i) < M::K;
  }

  __device__ void aim(int t) {
    k = (share * EACH * 4 + part) * PER;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int first = tile(t) * ROWS + quad + (PAIRED ? 0 : 8 * r);
      if (ALL % ROWS) first = min(first, ALL - 1);
      row[r] = first + (PAIRED && r ? ALL : 0);
      words[r] = m.words + (size_t)row[r] * (M::K * M::BITS / 8);
    }
  }
  // Read the next unit. Beyond the end the vector has zeros.
  __device__ void fetch(Unit& to) {
    if (left <= 0) return;
    int at = M::K % M::CHUNK ? min(k, M::K - PER) : k;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(to.words[r].x), "=r"(to.words[r].y), "=r"(to.words[r].z),
                     "=r"(to.words[r].w)
                   : "l"(words[r] + at * M::BITS / 8));
      if (M::BITS == 16) continue;
      unsigned group = row[r] * (M::K / M::GROUP) + at / M::GROUP;
      asm volatile("ld.global.nc.u16 %0, [%1];"
                   : "=r"(to.scale[r])
                   : "l"(m.scales + group));
      asm volatile("ld.global.nc.u16 %0, [%1];"
                   : "=r"(to.bias[r])
                   : "l"(m.biases + group));
    }
    k += M::CHUNK;
    if (++next == each) {
      next = 0, left--;
      aim(count - left);
    }
  }

  // Stage the warp's part of the vector `get(k)`, four from k on, as its lanes need it: of
  // a lane's part of a chunk pairs of what is rounded, then of the rest.
  template <class Get>
  __device__ void stage(Shared& sh, unsigned* x, float* x_sums, Get get) {
    float4 v[N];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = inside(i) ? get(place(i)) : float4{};
#pragma unroll
    for (int i = 0; i < N; i++) {
      squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
      if (norm) {
        v[i].x *= norms[i].x, v[i].y *= norms[i].y;
        v[i].z *= norms[i].z, v[i].w *= norms[i].w;
      }
      float a[4] = {v[i].x, v[i].y, v[i].z, v[i].w}, sum = 0;
      for (int j = 0; j < 4; j++)  // as it is multiplied, so that what is too much goes
        sum += to_float(to_bf16(a[j])) + to_float(to_bf16(rest(a[j])));
      int k = 4 * (32 * i + lane), quarter = k / PER;
      unsigned* to = x + quarter * PER;
      if (M::BITS < 16) {
        for (int d = 1; d < PER / 4; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (k % PER == 0 && 32 * i + lane < QUARTERS) x_sums[quarter] = sum;
      }
      unsigned pairs[4];
      if constexpr (M::BITS == 4) {  // digits j and j + 4 of a word, of two lanes
        bool second = lane & 1;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float other = __shfl_xor_sync(~0u, a[j], 1);
          pairs[j] = second ? pair(rest(other), rest(a[j])) : pair(a[j], other);
        }
        if (32 * i + lane < QUARTERS)
          *(uint4*)(to + second * PER / 2 + k % PER / 8 * 4) =
              make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      } else {
        constexpr int NEXT = M::BITS == 8 ? 2 : 1;  // bytes j and j + 2 of a word
        for (int j = 0; j < 2; j++) {
          float low = a[j * (3 - NEXT)], high = a[j * (3 - NEXT) + NEXT];
          pairs[j] = pair(low, high), pairs[2 + j] = pair(rest(low), rest(high));
        }
        if (32 * i + lane < QUARTERS) {
          *(uint2*)(to + k % PER / 2) = make_uint2(pairs[0], pairs[1]);
          *(uint2*)(to + PER / 2 + k % PER / 2) = make_uint2(pairs[2], pairs[3]);
        }
      }
    }
    squares = warp_sum(squares);
    if (group == 0 && lane == 0) sh.squares[share] = squares;
    __syncwarp();
  }

  // Add a lane's sums of two rows.
  __device__ void add(const Unit& u, const unsigned* x, const float* x_sums, int chunk,
                      float (&total)[2]) const {
    float acc[4] = {}, high[4] = {};
    const unsigned* mine = x + (chunk * 4 + part) * PER + quad % 2 * PER / 2;
    const uint4* from = (const uint4*)mine;
    uint4 b{};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      unsigned p = word(u.words[0], i), q = word(u.words[1], i);
      if constexpr (M::BITS == 4) {
        if (quad / 2 == part) b = from[i];
        unsigned first[4] = {digits<-1>(p), digits<-1>(q), digits<1>(p), digits<1>(q)};
        unsigned second[4] = {digits<5>(p), digits<5>(q), digits<9>(p), digits<9>(q)};
        multiply(acc, first, b.x, b.y);
        multiply(acc, second, b.z, b.w);
      } else if constexpr (M::BITS == 8) {
        if (i % 2 == 0 && quad / 2 == part) b = from[i / 2];
        unsigned first[4] = {digits<-1>(p), digits<-1>(q), digits<5>(p), digits<5>(q)};
        unsigned second[4] = {digits<1>(p), digits<1>(q), digits<9>(p), digits<9>(q)};
        multiply(acc, first, i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
        multiply(high, second, i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
      } else if (i % 2 == 0) {
        if (i == 0 && quad / 2 == part) b = from[0];
        unsigned both[4] = {p, q, word(u.words[0], i + 1), word(u.words[1], i + 1)};
        multiply(acc, both, i ? b.z : b.x, i ? b.w : b.y);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = acc[2 * r] + acc[2 * r + 1];
      if (M::BITS == 16) {
        total[r] += sum;
        continue;
      }
      sum *= 16;
      if (M::BITS == 8) sum += 256 * (high[2 * r] + high[2 * r + 1]);
      float scale = low(u.scale[r]), bias = low(u.bias[r]);
      bias -= (M::BITS == 8 ? 272 : 16) * scale;
      total[r] += scale * sum + bias * x_sums[chunk * 4 + part];
    }
  }

  // `out(row, sum)`, or of PAIRED `out(row, sum, sum of the second half)`; `to` has what
  // is added to.
  template <class Get, class Out>
  __device__ void run(Shared& sh, Get get, Out out, const float* to = nullptr) {
    unsigned* x = sh.x + thread / 32 * 4 * QUARTERS;
    float* x_sums = sh.x_sums + thread / 32 * 4 * EACH;
    stage(sh, x, x_sums, get);
    int t = 0, chunk = 0;
    float total[2] = {};
#pragma unroll 1
    while (t < count)
#pragma unroll
      for (int d = 0; d < AHEAD; d++)
        if (t < count) {
          add(ring[d], x, x_sums, chunk, total);
          fetch(ring[d]);
          if (++chunk == each) {
            float* sums = sh.sums + (thread / 32 * TILES + t) * 16;
            for (int r = 0; r < 2; r++) {
              for (int i = 1; i < 4; i *= 2)
                total[r] += __shfl_xor_sync(~0u, total[r], i);
              if (part == 0) sums[quad + 8 * r] = total[r];
              total[r] = 0;
            }
            chunk = 0, t++;
          }
        }
    __syncthreads();
    float scale = 1;
    if (norm) {
      float squares = 0;
      for (int i = 0; i < USED; i++) squares += sh.squares[i];
      scale = rsqrtf(squares / M::K + 1e-8f);
    }
#pragma unroll 1
    for (int i = thread; i < GROUPS * TILES * ROWS; i += THREADS) {
      int t = i / (GROUPS * ROWS), g = i / ROWS % GROUPS;
      int row = tile(t, g) * ROWS + i % ROWS;
      if (row >= ALL) break;
      float old = to ? __ldcg(to + row) : 0, first = 0, second = 0;
      const float* sums = sh.sums + (g * SPLIT * TILES + t) * 16 + i % ROWS;
#pragma unroll
      for (int s = 0; s < USED; s++) {
        first += sums[s * TILES * 16];
        if (PAIRED) second += sums[s * TILES * 16 + 8];
      }
      if constexpr (PAIRED)
        out(row, first * scale, second * scale);
      else
        out(row, old + first * scale);
    }
  }
};

// A phase. It waits if there is a `grid`; `before()` comes then.
template <int ALL, bool PAIRED, class M, class Before, class Get, class Out>
__device__ inline void multiply_by(Shared& sh, Grid* grid, M m, const float* norm,
                                   Before before, Get get, Out out,
                                   const float* to = nullptr) {
#pragma unroll 1
  for (int begin = 0; begin < Product<M, ALL, PAIRED>::ALL_TILES;
       begin += TILES * Product<M, ALL, PAIRED>::GROUPS * gridDim.x) {
    Product<M, ALL, PAIRED> product(m, norm, begin);
    if (begin)
      __syncthreads();
    else if (grid)
      grid->sync();
    if (!begin) before();
    product.run(sh, get, out, to);
  }
}

__device__ inline float4 load4(const float* p) { return __ldcg((const float4*)p); }

// Where the new position goes: see FrameCache.place.
struct Place {
  int position, slot, visible, capacity;
};

// What is kept of every layer (layers, heads, capacity, head_dim); scales at 8 bits.
struct Ring {
  void *keys, *key_scales, *values, *value_scales;
};
using Vectors = Kept<KV_BITS, HEAD_DIM>;

// Attention of one new position over a ring; its keys and values are written there.
//
// A head is shared by SPLITS blocks: `parts` (heads, SPLITS, head_dim) are their sums of
// values, and `weights` (heads, SPLITS) the largest score and the sum of weights of each.
__device__ void attend(Shared& sh, Grid& grid, const float* qkv, const Ring& ring,
                       int layer, const float* frequencies, Place where, float* parts,
                       float2* weights) {
  int block = anew(blockIdx.x), t = anew(threadIdx.x);
  int head = block / SPLITS, split = block % SPLITS;
  if (head >= HEADS) return grid.sync();
  constexpr int PAIRS = HEAD_DIM / 2;
  int slot = where.slot, visible = where.visible;
  size_t in_ring = ((size_t)layer * HEADS + head) * where.capacity;
  Vectors k(ring.keys, ring.key_scales, in_ring);
  Vectors v(ring.values, ring.value_scales, in_ring);
  int from = (long long)visible * split / SPLITS;
  int to = (long long)visible * (split + 1) / SPLITS;
  bool mine = slot >= from && slot < to;
  constexpr int PER = Vectors::PER, LANES = Vectors::LANES;  // lanes for a position
  constexpr int STRIDE = WARPS * (32 / LANES), U = 4;
  int lane = t % 32, part = lane % LANES, row = t / LANES;
  Vectors::Part keys[U] = {}, values[U] = {};  // the first ones, read before the wait
  auto load = [&](const Vectors& all, Vectors::Part(&some)[U], int first) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      int j = first + u * STRIDE + row;
      if (j < to && j != slot) some[u] = all.load(j, part);
    }
  };
  load(k, keys, from);
  load(v, values, from);
  float sine = 0, cosine = 0;
  if (t < 2 * PAIRS)
    sincosf((float)where.position * frequencies[t % PAIRS], &sine, &cosine);
  grid.sync();
  if (t < 2 * PAIRS) {
    int pair = t % PAIRS, key = t / PAIRS;
    const float* p = qkv + key * DIM + head * HEAD_DIM + 2 * pair;
    float re = __ldcg(p), im = __ldcg(p + 1);
    float a = re * cosine - im * sine, b = re * sine + im * cosine;
    float scale = key ? 1 : rsqrtf((float)HEAD_DIM);
    sh.head[key * HEAD_DIM + 2 * pair] = a * scale;
    sh.head[key * HEAD_DIM + 2 * pair + 1] = b * scale;
  } else if (t < 2 * PAIRS + HEAD_DIM) {
    int d = t - 2 * PAIRS;
    sh.head[2 * HEAD_DIM + d] = __ldcg(qkv + 2 * DIM + head * HEAD_DIM + d);
  }
  __syncthreads();
  if (t / 32 == 0) k.put(slot, sh.head + HEAD_DIM, mine);
  if (t / 32 == 1) v.put(slot, sh.head + 2 * HEAD_DIM, mine);
  __syncthreads();

  float q[PER], x[PER];
  for (int i = 0; i < PER; i++) q[i] = sh.head[part * PER + i];
  float most = LOWEST;
#pragma unroll 1
  for (int first = from; first < to; first += U * STRIDE) {
    if (first > from) load(k, keys, first);
#pragma unroll
    for (int u = 0; u < U; u++) {
      int j = first + u * STRIDE + row;
      float dot = 0;
      if (j == slot) {
        for (int i = 0; i < PER; i++) dot += q[i] * sh.head[HEAD_DIM + part * PER + i];
      } else if (j < to) {
        Vectors::unpack(keys[u], x);
        for (int i = 0; i < PER; i++) dot += q[i] * x[i];
        dot *= keys[u].scale;
      }
      for (int i = 1; i < LANES; i *= 2) dot += __shfl_xor_sync(~0u, dot, i);
      if (j < to) {
        if (part == 0) sh.scores[j - from] = dot;
        most = fmaxf(most, dot);
      }
    }
  }
  most = block_max(sh, most);
  float acc[PER] = {0}, sum = 0;
#pragma unroll 1
  for (int first = from; first < to; first += U * STRIDE) {
    if (first > from) load(v, values, first);
#pragma unroll
    for (int u = 0; u < U; u++) {
      int j = first + u * STRIDE + row;
      if (j >= to) continue;
      float p = expf(sh.scores[j - from] - most);
      sum += p;
      if (j == slot) {
        for (int i = 0; i < PER; i++)
          acc[i] += p * sh.head[2 * HEAD_DIM + part * PER + i];
      } else {
        Vectors::unpack(values[u], x);
        p *= values[u].scale;
        for (int i = 0; i < PER; i++) acc[i] += p * x[i];
      }
    }
  }
  for (int i = 0; i < PER; i++)
    for (int o = LANES; o < 32; o *= 2) acc[i] += __shfl_xor_sync(~0u, acc[i], o);
  if (lane < LANES)
    for (int i = 0; i < PER; i++)
      sh.partial[t / 32 * HEAD_DIM + part * PER + i] = acc[i];
  sum = block_sum(sh, part == 0 ? sum : 0.0f);
  if (t < HEAD_DIM) {
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += sh.partial[i * HEAD_DIM + t];
    parts[block * HEAD_DIM + t] = total;
  }
  if (t == 0) weights[block] = make_float2(most, sum);
}

// Four values from k on of what all heads attended to.
__device__ float4 attended(const float* parts, const float2* weights, int k) {
  int first = k / HEAD_DIM * SPLITS;
  float2 of[SPLITS];
  float4 x[SPLITS], y{};
#pragma unroll
  for (int i = 0; i < SPLITS; i++) {
    of[i] = __ldcg(weights + first + i);
    x[i] = load4(parts + (first + i) * HEAD_DIM + k % HEAD_DIM);
  }
  float most = LOWEST, weight = 0;
  for (int i = 0; i < SPLITS; i++) most = fmaxf(most, of[i].x);
#pragma unroll
  for (int i = 0; i < SPLITS; i++) {
    float e = of[i].y > 0 ? expf(of[i].x - most) : 0;  // an empty range has none
    y.x += e * x[i].x, y.y += e * x[i].y, y.z += e * x[i].z, y.w += e * x[i].w;
    weight += e * of[i].y;
  }
  return make_float4(y.x / weight, y.y / weight, y.z / weight, y.w / weight);
}

__device__ constexpr int lanes_of(int width) {  // for a head of the depformer
  int lanes = 32;
  while (width % lanes) lanes /= 2;
  return lanes;
}

// Attention within the depformer: every block does it for itself, into `y`. All that it
// reads is under way at once.
__device__ void attend_steps(const float* qkv, int step, int first, float* y) {
  constexpr int W = 3 * DEP_DIM, LANES = lanes_of(DEP_HEAD_DIM);
  constexpr int PER = DEP_HEAD_DIM / LANES;
  int t = anew(threadIdx.x), part = t % LANES;
  for (int begin = 0; begin < DEP_HEADS; begin += THREADS / LANES) {
    int head = begin + t / LANES;
    bool there = head < DEP_HEADS;
    const float* base = qkv + (there ? head : 0) * DEP_HEAD_DIM + part * PER;
    float q[PER], k[STEPS][PER], v[STEPS][PER], dots[STEPS], most = LOWEST, sum = 0;
    for (int i = 0; i < PER; i++) q[i] = __ldcg(base + step * W + i);
#pragma unroll
    for (int j = 0; j < STEPS; j++)
      for (int i = 0; i < PER; i++) {
        bool seen = j >= first && j <= step;
        k[j][i] = seen ? __ldcg(base + j * W + DEP_DIM + i) : 0;
        v[j][i] = seen ? __ldcg(base + j * W + 2 * DEP_DIM + i) : 0;
      }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float dot = 0;
      for (int i = 0; i < PER; i++) dot += q[i] * k[j][i];
      for (int i = 1; i < LANES; i *= 2) dot += __shfl_xor_sync(~0u, dot, i);
      dots[j] = dot * rsqrtf((float)DEP_HEAD_DIM);
      if (j >= first && j <= step) most = fmaxf(most, dots[j]);
    }
    float acc[PER] = {};
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float p = j >= first && j <= step ? expf(dots[j] - most) : 0;
      sum += p;
      for (int i = 0; i < PER; i++) acc[i] += p * v[j][i];
    }
    if (there)
      for (int i = 0; i < PER; i++)
        y[head * DEP_HEAD_DIM + part * PER + i] = acc[i] / sum;
  }
  __syncthreads();
}

using Text = Matrix<TEXT, DIM>;
using Audio = Matrix<AUDIO, DIM>;
using Qkv = Matrix<QKV, DIM>;
using Out = Matrix<OUT, DIM>;
using Up = Matrix<UP, DIM>;
using Down = Matrix<DOWN, HIDDEN>;
using Head = Matrix<HEAD, DIM>;
using DepIn = Matrix<DEP_IN, DIM>;
using DepText = Matrix<DEP_TEXT, DEP_DIM>;
using DepAudio = Matrix<DEP_AUDIO, DEP_DIM>;
using DepQkv = Matrix<DEP_QKV, DEP_DIM>;
using DepOut = Matrix<DEP_OUT, DEP_DIM>;
using DepUp = Matrix<DEP_UP, DEP_DIM>;
using DepDown = Matrix<DEP_DOWN, DEP_HIDDEN>;
using DepHead = Matrix<DEP_HEAD, DEP_DIM>;

struct Weights {
  Text text_emb;
  Audio audio_emb;
  Qkv qkv;
  Out out;
  Up up;
  Down down;
  Head head;
  DepIn dep_in;
  DepText dep_text_emb;
  DepAudio dep_audio_emb;
  DepQkv dep_qkv;
  DepOut dep_out;
  DepUp dep_up;
  DepDown dep_down;
  DepHead dep_head;
  const float *norm1, *norm2, *out_norm, *dep_norm1, *dep_norm2, *frequencies;
};

// How ids are drawn; of the frame's `noise_width` random numbers, `text_noise` are text's.
struct Sampling {
  uint2 key;
  float text_temperature, temperature;
  int text_top_k, top_k, text_noise, noise_width;
};

// `given` is text, then codes; `column` is that, then the user's codes as they came.
__device__ void frame(const Weights& w, const int* tokens, const int* user,
                      const int* given, Place where, Sampling sampling,
                      const Ring& ring, int* column, float* work) {
  extern __shared__ __align__(16) char memory[];
  Shared& sh = *(Shared*)memory;
  unsigned* counters = (unsigned*)work;
  Grid grid{counters, gridDim.x};
  float* x = work + WORK_X;
  float* qkv = work + WORK_QKV;
  float* hidden = work + WORK_HIDDEN;
  float* logits = work + WORK_LOGITS;
  float* parts = work + WORK_PARTS;
  float2* weights = (float2*)(parts + HEADS * SPLITS * HEAD_DIM);
  float* dep_in = work + WORK_DEP_IN;
  float* dep_x = work + WORK_DEP_X;
  float* dep_qkv = work + WORK_DEP_QKV;
  float* dep_hidden = work + WORK_DEP_HIDDEN;
  float* dep_logits = work + WORK_DEP_LOGITS;
  Noise noise{sampling.key, 0, (unsigned)sampling.noise_width};
  int everyone = blockIdx.x * THREADS + threadIdx.x;
  if (everyone < N_Q - STEPS) column[1 + STEPS + everyone] = user[everyone];

  for (int d = everyone; d < DIM; d += gridDim.x * THREADS) {
    float sum = 0;
    for (int i = 0; i <= N_Q; i++) {
      int stream = (i + 1) % (N_Q + 1);  // text last
      int id = tokens[stream];
      float value = id < 0        ? 0
                    : stream == 0 ? w.text_emb.value(id, d)
                                  : w.audio_emb.value((i * (CARD + 1)) + id, d);
      sum = i ? to_float(to_bf16(sum + value)) : value;
    }
    x[d] = sum;
  }

  auto nothing = [] {};
  auto read_x = [=](int k) { return load4(x + k); };
  auto write_x = [=](int row, float v) { x[row] = v; };
  auto read_hidden = [=](int k) { return load4(hidden + k); };
  auto write_hidden = [=](int row, float gate, float v) {
    hidden[row] = gate / (1 + expf(-gate)) * v;
  };
#pragma unroll 1
  for (int number = 0; number < LAYERS; number++) {
    int l = anew(number);
    multiply_by<3 * DIM, false>(sh, &grid, w.qkv.part((size_t)l * 3 * DIM),
                                w.norm1 + l * DIM, nothing, read_x,
                                [=](int row, float v) { qkv[row] = v; });
    attend(sh, grid, qkv, ring, l, w.frequencies, where, parts, weights);
    multiply_by<DIM, false>(sh, &grid, w.out.part((size_t)l * DIM), nullptr, nothing,
                            [=](int k) { return attended(parts, weights, k); }, write_x,
                            x);
    multiply_by<HIDDEN, true>(sh, &grid, w.up.part((size_t)l * 2 * HIDDEN),
                              w.norm2 + l * DIM, nothing, read_x, write_hidden);
    multiply_by<DIM, false>(sh, &grid, w.down.part((size_t)l * DIM), nullptr, nothing,
                            read_hidden, write_x, x);
  }
  multiply_by<TEXT_CARD, false>(sh, &grid, w.head, w.out_norm, nothing, read_x,
                                [=](int row, float v) { logits[row] = v; });
  __syncthreads();
  multiply_by<STEPS * DEP_DIM, false>(sh, nullptr, w.dep_in, w.out_norm, nothing, read_x,
                                      [=](int row, float v) { dep_in[row] = v; });
  grid.sync();
  int token = choose(sh, [=](int i) { return __ldcg(logits + i); }, TEXT_CARD, noise,
                     sampling.text_temperature, sampling.text_top_k);
  noise.first = sampling.text_noise;
  token = take_given(token, given[0]);
  if (everyone == 0) column[0] = token;

#pragma unroll 1
  for (int s = 0; s < STEPS; s++) {
    auto read = [=](int k) { return load4(dep_x + k); };
    auto write = [=](int row, float v) { dep_x[row] = v; };
    auto read_hidden = [=](int k) { return load4(dep_hidden + k); };
    auto write_hidden = [=](int row, float gate, float v) {
      dep_hidden[row] = gate / (1 + expf(-gate)) * v;
    };
    auto begin = [=, text = w.dep_text_emb, audio = w.dep_audio_emb](int k) {
      float4 v = load4(dep_in + s * DEP_DIM + k);
      if (token >= 0) {
        auto more = [&](int i) {
          return s ? audio.value((s - 1) * (CARD + 1) + token, k + i)
                   : text.value(token, k + i);
        };
        v.x += more(0), v.y += more(1), v.z += more(2), v.w += more(3);
      }
      if (blockIdx.x == 0) *(float4*)(dep_x + k) = v;
      return v;
    };
#pragma unroll 1
    for (int l = 0; l < DEP_LAYERS; l++) {
      size_t layer = anew(s * DEP_LAYERS + l);
      float* steps = dep_qkv + (size_t)l * STEPS * 3 * DEP_DIM;
      auto qkv = w.dep_qkv.part(layer * 3 * DEP_DIM);
      const float* norm = w.dep_norm1 + layer * DEP_DIM;
      auto write_steps = [=](int row, float v) { steps[s * 3 * DEP_DIM + row] = v; };
      if (l == 0)
        multiply_by<3 * DEP_DIM, false>(sh, nullptr, qkv, norm, nothing, begin,
                                        write_steps);
      else
        multiply_by<3 * DEP_DIM, false>(sh, &grid, qkv, norm, nothing, read,
                                        write_steps);
      float* y = sh.partial;
      multiply_by<DEP_DIM, false>(
          sh, &grid, w.dep_out.part(layer * DEP_DIM), nullptr,
          [=] { attend_steps(steps, s, s == HIDING_STEP, y); },
          [=](int k) { return *(const float4*)(y + k); }, write, dep_x);
      multiply_by<DEP_HIDDEN, true>(sh, &grid, w.dep_up.part(layer * 2 * DEP_HIDDEN),
                                    w.dep_norm2 + layer * DEP_DIM, nothing, read,
                                    write_hidden);
      multiply_by<DEP_DIM, false>(sh, &grid, w.dep_down.part(layer * DEP_DIM), nullptr,
                                  nothing, read_hidden, write, dep_x);
    }
    multiply_by<CARD, false>(sh, &grid, w.dep_head.part((size_t)s * CARD), nullptr,
                             nothing, read,
                             [=](int row, float v) { dep_logits[s * CARD + row] = v; });
    grid.sync();
    const float* found = dep_logits + s * CARD;
    token = choose(sh, [=](int i) { return __ldcg(found + i); }, CARD, noise,
                   sampling.temperature, sampling.top_k);
    noise.first += CARD;
    if (given[1 + s] != NOT_FORCED) token = given[1 + s];
    if (everyone == 0) column[1 + s] = token;
  }
}
