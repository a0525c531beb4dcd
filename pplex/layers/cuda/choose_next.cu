constexpr int NOT_FORCED = -2;

// Row `id` of a table, or zeros for an id that is absent.
__device__ inline void embed(const bf16* table, size_t first, int id, int dim, bf16* y) {
  const Eight* from = (const Eight*)(table + (first + (id < 0 ? 0 : id)) * dim);
  for (int i = threadIdx.x; 8 * i < dim; i += THREADS)
    ((Eight*)y)[i] = id < 0 ? Eight{} : from[i];
}

// Choose the id of head `head`, unless `given` (rows, heads) has one, and put it into the
// row's column of `streams` tokens, whose last `known` are those of `column` already;
// `more` is its embedding for the next head, if `dim`.
extern "C" __global__ void choose_next(const bf16* logits, const unsigned* keys,
                                       const int* given, const int* column,
                                       const bf16* table, int* next_column, bf16* more,
                                       int card, int streams, int known, int head,
                                       int heads, int draws, int first, int width,
                                       float temperature, int top_k, int is_given,
                                       int table_first, int dim) {
  __shared__ Scratch sh;
  int row = blockIdx.y, t = threadIdx.x;
  Noise noise{};
  if (draws) {
    noise.key = make_uint2(keys[2 * row], keys[2 * row + 1]);
    noise.first = first, noise.width = width;
  }
  const bf16* own = logits + (size_t)row * card;
  int id = is_given ? given[row * heads + head] : NOT_FORCED;
  if (id == NOT_FORCED)
    id = choose(sh, [=](int i) { return to_float(own[i]); }, card, noise, temperature,
                top_k);
  int unknown = streams - known;
  if (t < streams)
    next_column[row * streams + t] = t == head      ? id
                                     : t >= unknown ? column[row * known + t - unknown]
                                                    : 0;
  if (dim) embed(table, table_first, id, dim, more + (size_t)row * dim);
}
