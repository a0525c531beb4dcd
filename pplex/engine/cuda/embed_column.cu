// Summed rows of a column of tokens (streams,), text first: the audio streams' in their
// order, then the text's, rounded after each sum. A thread has two dimensions.
extern "C" __global__ void embed_column(const int* column, const bf16* text,
                                        const bf16* audio, bf16* x, int streams,
                                        int rows_each, int dim) {
  constexpr int MOST = 64;  // streams
  __shared__ int ids[MOST];
  size_t row = blockIdx.y;
  if (threadIdx.x < streams) ids[threadIdx.x] = column[row * streams + threadIdx.x];
  __syncthreads();
  int d = blockIdx.x * THREADS + threadIdx.x;
  if (2 * d >= dim) return;
  float first = 0, second = 0;
#pragma unroll 8
  for (int i = 1; i <= streams; i++) {
    int stream = i == streams ? 0 : i, id = ids[stream];
    const bf16* table = stream ? audio + (size_t)(i - 1) * rows_each * dim : text;
    unsigned v = id < 0 ? 0 : ((const unsigned*)(table + (size_t)id * dim))[d];
    first = to_float(to_bf16(first + low(v)));
    second = to_float(to_bf16(second + high(v)));
  }
  ((unsigned*)(x + row * dim))[d] = pair(first, second);
}
