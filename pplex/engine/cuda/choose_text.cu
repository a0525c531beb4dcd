// Choose a row's text id from `logits` (rows, card), unless `given` (rows, heads) has it,
// and begin its column (streams,) with it, zeros, and the codes of `user`.
extern "C" __global__ void choose_text(const bf16* logits, const unsigned* keys,
                                       const int* given, const int* user, int* column,
                                       int card, int streams, int codebooks, int heads,
                                       int has_keys, int has_given, int width,
                                       float temperature, int top_k) {
  __shared__ Scratch sh;
  int row = blockIdx.y, t = threadIdx.x;
  Noise noise{};
  if (has_keys) noise.key = make_uint2(keys[2 * row], keys[2 * row + 1]);
  noise.width = width;
  const bf16* own = logits + (size_t)row * card;
  int id = has_given ? given[row * heads] : NOT_FORCED;
  if (id <= NOT_FORCED)
    id = take_given(choose(sh, [=](int i) { return to_float(own[i]); }, card, noise,
                           temperature, top_k),
                    id);
  int users = streams - codebooks;
  if (t < streams)
    column[row * streams + t] =
        t >= users ? user[row * codebooks + t - users] : t ? 0 : id;
}
