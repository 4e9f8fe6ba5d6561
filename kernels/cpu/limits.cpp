// Measures what this machine can do at most with this instruction set, so that every kernel time can be given as a
// share of it.
#include <time.h>

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// 12 independent chains: enough to cover the FMA latency on every processor that we know.
__attribute__((noinline)) float multiply_add(int64_t rounds) {
  vec a0 = splat(1), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0, a8 = a0, a9 = a0, a10 = a0,
      a11 = a0;
  vec m = splat(0.999f), b = splat(0.001f);
  // Opaque and distinct starting values: equal chains would be computed only once.
  asm volatile("" : "+x"(m), "+x"(b), "+x"(a0), "+x"(a1), "+x"(a2), "+x"(a3), "+x"(a4), "+x"(a5));
  asm volatile("" : "+x"(a6), "+x"(a7), "+x"(a8), "+x"(a9), "+x"(a10), "+x"(a11));
  for (int64_t i = 0; i < rounds; i++) {
    a0 = a0 * m + b, a1 = a1 * m + b, a2 = a2 * m + b, a3 = a3 * m + b, a4 = a4 * m + b, a5 = a5 * m + b;
    a6 = a6 * m + b, a7 = a7 * m + b, a8 = a8 * m + b, a9 = a9 * m + b, a10 = a10 * m + b, a11 = a11 * m + b;
  }
  vec sum = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + a10 + a11;
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += sum[i];
  return total;
}

}  // namespace

int32_t measure_limits(pn_context* context, pn_limits* limits) {
  const int threads = context->pool.threads();
  constexpr int64_t rounds = 4'000'000;
  constexpr int64_t count = 8 << 20;  // floats per array and thread: 32 MiB, far beyond the caches
  volatile float sink = 0;
  double best_fma = 1e30, best_triad = 1e30;

  float* memory = static_cast<float*>(context->shared.get(3 * count * 4 * threads));
  if (!memory) return fail(PN_OUT_OF_MEMORY, "measure_limits: no memory for the triad's arrays");
  for (int repeat = 0; repeat < 5; repeat++) {
    double start = seconds();
    parallel_for(context, threads, [&](int64_t, int) { sink = multiply_add(rounds); });
    best_fma = min(best_fma, seconds() - start);
    start = seconds();
    parallel_for(context, threads, [&](int64_t task, int) {
      float* a = memory + task * 3 * count;
      float *b = a + count, *c = b + count;
      if (repeat == 0)
        for (int64_t i = 0; i < 3 * count; i++) a[i] = 1;
      for (int64_t i = 0; i < count; i += kLanes) store(a + i, load(b + i) + splat(3) * load(c + i));
    });
    if (repeat > 0) best_triad = min(best_triad, seconds() - start);
  }
  limits->gigaflops = threads * double(rounds) * 12 * kLanes * 2 / best_fma * 1e-9;
  limits->gigabytes_per_second = threads * double(count) * 12 / best_triad * 1e-9;
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
