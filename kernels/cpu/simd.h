// Portable vectors: the compiler's vector extension in the width of the instruction set that this file is compiled for.
// Everything here is in PN_NAMESPACE, and per-ISA files use no inline functions from elsewhere: one that the linker
// shared between instruction sets could crash an older processor.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>  // always-inline intrinsics only, so no symbol of theirs is emitted
#endif

#define PN_INLINE __attribute__((always_inline)) inline

namespace pn::PN_NAMESPACE {

constexpr int kLanes = PN_VECTOR_BYTES / 4;

typedef float vec __attribute__((vector_size(PN_VECTOR_BYTES)));
typedef float unaligned_vec __attribute__((vector_size(PN_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(PN_VECTOR_BYTES)));
typedef int32_t unaligned_ivec __attribute__((vector_size(PN_VECTOR_BYTES), aligned(4), may_alias));

PN_INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
PN_INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
PN_INLINE vec splat(float x) { return x - vec{}; }  // x + 0 would cost an addition, which turns -0 into 0

PN_INLINE ivec load(const int32_t* p) { return *reinterpret_cast<const unaligned_ivec*>(p); }
PN_INLINE void store(int32_t* p, ivec v) { *reinterpret_cast<unaligned_ivec*>(p) = v; }

// The first n (0 or more; at most kLanes count) lanes; the others are zero, and their memory is not touched.
#if PN_VECTOR_BYTES == 64
PN_INLINE __mmask16 first_lanes(int n) { return n >= kLanes ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }
PN_INLINE vec load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
PN_INLINE void store_partial(float* p, vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
#elif PN_VECTOR_BYTES == 32
PN_INLINE __m256i first_lanes(int n) { return __m256i(ivec{0, 1, 2, 3, 4, 5, 6, 7} < n); }
PN_INLINE vec load_partial(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
PN_INLINE void store_partial(float* p, vec v, int n) {
  n >= kLanes ? store(p, v) : _mm256_maskstore_ps(p, first_lanes(n), v);
}
#else
PN_INLINE vec load_partial(const float* p, int n) {
  if (n >= kLanes) return load(p);
  vec v{};
  for (int i = 0; i < kLanes - 1; i++)
    if (i < n) v[i] = p[i];
  return v;
}
PN_INLINE void store_partial(float* p, vec v, int n) {
  if (n >= kLanes) return store(p, v);
  for (int i = 0; i < kLanes - 1; i++)
    if (i < n) p[i] = v[i];
}
#endif

// n < 0 ? 0 : n, so that not-a-number passes through.
PN_INLINE vec relu(vec v) { return v < 0.0f ? vec{} : v; }

PN_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
template <class T>
PN_INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
PN_INLINE T max(T a, T b) {
  return a < b ? b : a;
}

}  // namespace pn::PN_NAMESPACE
