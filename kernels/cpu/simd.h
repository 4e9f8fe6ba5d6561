// Portable vectors: the compiler's vector extension in the width of the instruction set that this file is compiled for.
// Everything here is in PN_NAMESPACE, and per-ISA files use no inline functions from elsewhere: one that the linker
// shared between instruction sets could crash an older processor.
#pragma once

#include <stdint.h>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#define PN_INLINE __attribute__((always_inline)) inline
#define PN_LAMBDA_INLINE __attribute__((always_inline))

namespace pn::PN_NAMESPACE {

constexpr int kLanes = PN_VECTOR_BYTES / 4;

// AVX-512 has 32 registers, the narrower x86 sets have 16 (NEON's 32 are not worth a third set of numbers).
constexpr bool kManyRegisters = PN_VECTOR_BYTES == 64;

// Whether additions, and moves between lanes, have units of their own beside those of the multiply-adds: so on AMD's
// Zen; on Intel's processors they take the place of multiply-adds.
#if defined(PN_SPARE_UNITS)
constexpr bool kSpareUnits = true;
#else
constexpr bool kSpareUnits = false;
#endif

typedef float vec __attribute__((vector_size(PN_VECTOR_BYTES)));
typedef float unaligned_vec __attribute__((vector_size(PN_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(PN_VECTOR_BYTES)));
typedef int32_t unaligned_ivec __attribute__((vector_size(PN_VECTOR_BYTES), aligned(4), may_alias));

PN_INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
PN_INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
// Past the cache, for what is read only much later; p is aligned to the vector. stream_fence() before another thread
// reads.
PN_INLINE void stream(float* p, vec v) {
#if PN_VECTOR_BYTES == 64
  _mm512_stream_ps(p, __m512(v));
#elif PN_VECTOR_BYTES == 32
  _mm256_stream_ps(p, __m256(v));
#elif defined(__SSE__)
  _mm_stream_ps(p, __m128(v));
#else
  store(p, v);
#endif
}
PN_INLINE void stream_fence() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}
PN_INLINE vec splat(float x) { return x - vec{}; }  // x + 0 would cost an addition: it turns -0 into 0

// sum += a * b. With few registers in the register of the sum, where the compiler would not leave it in long loops:
// it would move sums between registers and memory.
PN_INLINE void multiply_add(vec& sum, vec a, vec b) {
#if PN_VECTOR_BYTES == 32
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum += a * b;
#endif
}

// Four floats, in every quarter of the vector, and number i of them (a constant) in all lanes.
PN_INLINE vec load_four(const float* p) {
#if PN_VECTOR_BYTES == 64
  return vec(_mm512_maskz_broadcast_f32x4(__mmask16(-1), _mm_loadu_ps(p)));
#else
  vec four;
  for (int i = 0; i < kLanes; i++) four[i] = p[i % 4];
  return four;
#endif
}
PN_INLINE vec one_of_four(vec four, int i) {
#if PN_VECTOR_BYTES == 64
  const __m512 v(four);
  const __mmask16 all(-1);
  return vec(i == 0   ? _mm512_maskz_permute_ps(all, v, 0x00)
             : i == 1 ? _mm512_maskz_permute_ps(all, v, 0x55)
             : i == 2 ? _mm512_maskz_permute_ps(all, v, 0xaa)
                      : _mm512_maskz_permute_ps(all, v, 0xff));
#else
  return splat(four[i]);
#endif
}

PN_INLINE ivec load(const int32_t* p) { return *reinterpret_cast<const unaligned_ivec*>(p); }
PN_INLINE void store(int32_t* p, ivec v) { *reinterpret_cast<unaligned_ivec*>(p) = v; }

// The first n (0..kLanes, or more: all) lanes; the others are zero, and their memory is not touched.
PN_INLINE vec load_partial(const float* p, int n) {
  if (n >= kLanes) return load(p);
#if PN_VECTOR_BYTES == 64
  return vec(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
#elif PN_VECTOR_BYTES == 32
  const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return vec(_mm256_maskload_ps(p, __m256i(lane < n)));
#else
  vec v{};
  for (int i = 0; i < kLanes - 1; i++)
    if (i < n) v[i] = p[i];
  return v;
#endif
}
PN_INLINE void store_partial(float* p, vec v, int n) {
  if (n >= kLanes) return store(p, v);
#if PN_VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v));
#elif PN_VECTOR_BYTES == 32
  // In halves, because masked stores are microcode on several processors.
  __m128 part = _mm256_castps256_ps128(__m256(v));
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(__m256(v), 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
#else
  for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

// The larger one; not-a-number if either is. x86's maximum gives its second operand then.
PN_INLINE vec maximum(vec a, vec b) {
#if PN_VECTOR_BYTES == 64
  const __mmask16 ordered = _mm512_cmp_ps_mask(__m512(a), __m512(a), _CMP_ORD_Q);
  return vec(_mm512_mask_max_ps(__m512(a), ordered, __m512(a), __m512(b)));
#elif PN_VECTOR_BYTES == 32
  const __m256 unordered = _mm256_cmp_ps(__m256(a), __m256(a), _CMP_UNORD_Q);
  return vec(_mm256_or_ps(_mm256_max_ps(__m256(a), __m256(b)), unordered));
#elif defined(__SSE__)
  return vec(_mm_or_ps(_mm_max_ps(__m128(a), __m128(b)), _mm_cmpunord_ps(__m128(a), __m128(a))));
#else
  return (b >= a) | (b != b) ? b : a;
#endif
}

// n < 0 ? 0 : n, so that not-a-number passes through: x86's maximum gives its second operand then.
PN_INLINE vec relu(vec v) {
#if PN_VECTOR_BYTES == 64
  return vec(_mm512_maskz_max_ps(__mmask16(-1), __m512{}, __m512(v)));
#elif PN_VECTOR_BYTES == 32
  return vec(_mm256_max_ps(__m256{}, __m256(v)));
#elif defined(__SSE__)
  return vec(_mm_max_ps(__m128{}, __m128(v)));
#else
  return v < 0.0f ? vec{} : v;
#endif
}

// One bit, or all bits of a lane, for every lane: ~, & and | work with both.
#if PN_VECTOR_BYTES == 64
typedef __mmask16 mask;
PN_INLINE mask equal(vec a, vec b) { return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_EQ_OQ); }
PN_INLINE mask is_nan(vec v) { return _mm512_cmp_ps_mask(__m512(v), __m512(v), _CMP_UNORD_Q); }
PN_INLINE vec add_where(mask m, vec sum, vec v) {
  return vec(_mm512_mask_add_ps(__m512(sum), m, __m512(sum), __m512(v)));
}
#else
typedef ivec mask;
PN_INLINE mask equal(vec a, vec b) { return a == b; }
PN_INLINE mask is_nan(vec v) { return v != v; }
PN_INLINE vec add_where(mask m, vec sum, vec v) { return sum + vec(m & ivec(v)); }
#endif

// A condition that seldom holds: what it guards must not cost the other code registers.
PN_INLINE bool unlikely(bool condition) { return __builtin_expect(condition, 0); }

template <auto V>
struct Constant {
  static constexpr auto value = V;
};

PN_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
template <class T>
PN_INLINE constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
PN_INLINE T max(T a, T b) {
  return a < b ? b : a;
}

}  // namespace pn::PN_NAMESPACE
