// The exported functions: context, errors, and the choice of the instruction set at run time.
#include <sched.h>
#include <stdio.h>

#include <new>

#include "cpu/context.h"
#include "cpu/denormals.h"

namespace pn {

namespace portable {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_zen {
extern const KernelTable table;
}
#endif

namespace {

thread_local char last_error[512];

int available_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return CPU_COUNT(&set);
}

bool has_isa(int32_t isa) {
#if defined(__x86_64__)
  if (isa == PN_ISA_AVX512 || isa == PN_ISA_AVX512_ZEN)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (isa == PN_ISA_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == PN_ISA_PORTABLE;
}

int32_t best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("amd") && has_isa(PN_ISA_AVX512_ZEN)) return PN_ISA_AVX512_ZEN;
#endif
  int32_t isa = PN_ISA_AVX512;
  while (!has_isa(isa)) isa--;
  return isa;
}

}  // namespace

int32_t fail(int32_t status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace pn

extern "C" {

int32_t pn_abi_version(void) { return PN_ABI_VERSION; }

const char* pn_last_error(void) { return pn::last_error; }

int32_t pn_context_create(int32_t threads, int32_t isa, pn_context** context) {
  PN_REQUIRE(context, "pn_context_create: context is null");
  PN_REQUIRE(threads >= 0 && threads <= 256, "threads must be 0 to 256, not %d", threads);
  PN_REQUIRE(isa >= PN_ISA_BEST && isa <= PN_ISA_AVX512_ZEN, "unknown instruction set %d", isa);
  if (isa == PN_ISA_BEST) isa = pn::best_isa();
  if (!pn::has_isa(isa))
    return pn::fail(PN_NOT_SUPPORTED, "this processor lacks the instruction set that was asked for (%d)", isa);
  if (threads == 0) threads = pn::available_processors();
  try {
    pn_context* c = new pn_context(threads);
    c->local = new pn::Scratch[size_t(threads)];
    c->kernels = &pn::portable::table;
    c->isa = "portable";
#if defined(__x86_64__)
    if (isa == PN_ISA_AVX2) c->kernels = &pn::avx2::table, c->isa = "avx2";
    if (isa == PN_ISA_AVX512) c->kernels = &pn::avx512::table, c->isa = "avx512";
    if (isa == PN_ISA_AVX512_ZEN) c->kernels = &pn::avx512_zen::table, c->isa = "avx512-zen";
#endif
    *context = c;
    return PN_OK;
  } catch (const std::exception& e) {
    return pn::fail(PN_OUT_OF_MEMORY, "cannot start %d threads: %s", threads, e.what());
  }
}

void pn_context_destroy(pn_context* context) {
  if (!context) return;
  delete[] context->local;
  delete context;
}

int32_t pn_context_threads(const pn_context* context) { return context->pool.threads(); }

const char* pn_context_isa(const pn_context* context) { return context->isa; }

int32_t pn_measure_limits(pn_context* context, pn_limits* limits) {
  PN_REQUIRE(context && limits, "pn_measure_limits: a null argument");
  return context->kernels->measure_limits(context, limits);
}

int32_t pn_run_group(pn_context* context, const pn_call* calls, int32_t count) {
  PN_REQUIRE(context && calls, "pn_run_group: a null argument");
  PN_REQUIRE(count >= 1 && count <= 1024, "pn_run_group: a group has 1 to 1024 calls, not %d", count);
  for (int i = 0; i < count; i++) {
    PN_REQUIRE(calls[i].kernel >= 0 && calls[i].kernel <= PN_KERNEL_MIXED_SUM_BACKWARD,
               "pn_run_group: call %d has the unknown kernel %d", i, calls[i].kernel);
    PN_REQUIRE(calls[i].args, "pn_run_group: call %d has no arguments", i);
  }
  pn::FlushDenormals flush;
  return context->kernels->run_group(context, calls, count);
}

#define KERNEL(name, args)                                    \
  int32_t pn_##name(pn_context* context, const args* a) {     \
    PN_REQUIRE(context&& a, "pn_" #name ": a null argument"); \
    pn::FlushDenormals flush;                                 \
    return context->kernels->name(context, a);                \
  }
#include "cpu/kernel_list.h"
#undef KERNEL

}  // extern "C"
