/* SOURCE, a file's name, compiled for each instruction set, and which of them to use.

   In that file NAME(x) gives a name the set's suffix, TARGET is its functions' attribute
   and VECTOR_BYTES the width of its vectors. */

#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NAME(x) x##_base
#define TARGET
#define VECTOR_BYTES 16
#include SOURCE
#undef NAME
#undef TARGET
#undef VECTOR_BYTES

#ifdef __x86_64__
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
#include SOURCE
#undef NAME
#undef TARGET
#undef VECTOR_BYTES
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")))
#define VECTOR_BYTES 64
#include SOURCE
#define OF_EACH_CPU(x) {x##_base, x##_avx2, x##_avx512}
#else
#define OF_EACH_CPU(x) {x##_base}
#endif

/* The place in OF_EACH_CPU of the best set there is up to `level`: 0 any, 1 AVX2,
   2 AVX-512. */
static int best_set(int level) {
#ifdef __x86_64__
  if (level >= 2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  /* Whatever has AVX2 has F16C, which not every compiler can ask for. */
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return 1;
#endif
  (void)level;
  return 0;
}
