// What the CUDA kernels use of the device, so that clang compiles them without the CUDA toolkit (nvcc brings its own).
// Intrinsics and inline PTX stay in this file.
#pragma once

#include <stdint.h>

#include "perturbnas_kernels.h"

#if defined(__clang__)
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
#else
#include <cuda_runtime.h>
#endif

// A kernel: extern "C", so that the driver finds it by its name. It takes one struct by value.
#define PN_KERNEL extern "C" __global__ void
#define PN_DEVICE static __device__ __forceinline__
#define PN_DEVICE_METHOD __device__ __forceinline__

// Asynchronous copies and TF32 tensor-core products exist from sm_80 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define PN_SM80 1
#else
#define PN_SM80 0
#endif

// The block's dynamic shared memory, as large as the launch says.
extern __shared__ __attribute__((aligned(16))) float pn_shared[];

namespace pn {

struct Index {
  int x, y, z;
};

#if defined(__clang__)
PN_DEVICE Index thread_index() {
  return {__nvvm_read_ptx_sreg_tid_x(), __nvvm_read_ptx_sreg_tid_y(), __nvvm_read_ptx_sreg_tid_z()};
}
PN_DEVICE Index block_index() {
  return {__nvvm_read_ptx_sreg_ctaid_x(), __nvvm_read_ptx_sreg_ctaid_y(), __nvvm_read_ptx_sreg_ctaid_z()};
}
PN_DEVICE Index block_extent() {
  return {__nvvm_read_ptx_sreg_ntid_x(), __nvvm_read_ptx_sreg_ntid_y(), __nvvm_read_ptx_sreg_ntid_z()};
}
PN_DEVICE Index grid_extent() {
  return {__nvvm_read_ptx_sreg_nctaid_x(), __nvvm_read_ptx_sreg_nctaid_y(), __nvvm_read_ptx_sreg_nctaid_z()};
}
// An address within its own space, as inline PTX takes it.
PN_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(uintptr_t((__attribute__((address_space(3))) const void*)p));
}
PN_DEVICE uint64_t global_address(const void* p) {
  return uint64_t(uintptr_t((__attribute__((address_space(1))) const void*)p));
}
#else
PN_DEVICE Index thread_index() { return {int(threadIdx.x), int(threadIdx.y), int(threadIdx.z)}; }
PN_DEVICE Index block_index() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
PN_DEVICE Index block_extent() { return {int(blockDim.x), int(blockDim.y), int(blockDim.z)}; }
PN_DEVICE Index grid_extent() { return {int(gridDim.x), int(gridDim.y), int(gridDim.z)}; }
PN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
PN_DEVICE uint64_t global_address(const void* p) { return __cvta_generic_to_global(p); }
#endif

// Waits for all threads of the block.
PN_DEVICE void barrier() { __syncthreads(); }

// The value of the lane whose number differs in the bits of the mask; all lanes of the warp must take part.
PN_DEVICE int32_t shuffle_xor(int32_t value, int mask) {
#if defined(__clang__)
  return __nvvm_shfl_sync_bfly_i32(~0u, value, mask, 31);
#else
  return __shfl_xor_sync(~0u, value, mask);
#endif
}

PN_DEVICE float shuffle_xor(float value, int mask) {
  return __builtin_bit_cast(float, shuffle_xor(__builtin_bit_cast(int32_t, value), mask));
}

PN_DEVICE double shuffle_xor(double value, int mask) {
  const int64_t bits = __builtin_bit_cast(int64_t, value);
  const uint32_t low = uint32_t(shuffle_xor(int32_t(bits), mask)),
                 high = uint32_t(shuffle_xor(int32_t(bits >> 32), mask));
  return __builtin_bit_cast(double, uint64_t(high) << 32 | low);
}

// Counts the blocks that come here, `blocks` of them, by a counter that is zero before and after: true in the last one,
// which sees all that the others wrote before they came. All threads of a block take part.
PN_DEVICE bool is_last_block(uint32_t* counter, int blocks) {
  static __shared__ uint32_t before;
#if defined(__clang__)
  __nvvm_membar_gl();
  barrier();
  if (thread_index().x == 0) before = __nvvm_atom_inc_gen_ui(counter, uint32_t(blocks - 1));
  barrier();
  __nvvm_membar_gl();
#else
  __threadfence();
  barrier();
  if (thread_index().x == 0) before = atomicInc(counter, uint32_t(blocks - 1));
  barrier();
  __threadfence();
#endif
  return before == uint32_t(blocks - 1);
}

// The thread's number, of which the compiler does not know that it is the same as before: what is computed from it in a
// loop is computed anew in every round, not kept in registers that the rest of the loop lacks.
PN_DEVICE int fresh_thread_index() {
  int t = thread_index().x;
  asm volatile("" : "+r"(t));
  return t;
}

template <class T>
PN_DEVICE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PN_DEVICE T max(T a, T b) {
  return a > b ? a : b;
}

// The larger value, or not-a-number if either is.
PN_DEVICE float max_or_nan(float a, float b) {
#if PN_SM80
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
#else
  return a >= b || a != a ? a : b;
#endif
}

// n < 0 ? 0 : n, so that not-a-number passes through.
PN_DEVICE float relu(float n) { return n < 0.0f ? 0.0f : n; }

// Four neighbouring floats in one access of 16 bytes; the address must be a multiple of 16.
PN_DEVICE float4 make4(float x, float y, float z, float w) {
  float4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}
PN_DEVICE float4 zero4() { return make4(0.0f, 0.0f, 0.0f, 0.0f); }
PN_DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
// The same from global and from shared memory, where the compiler would rather take elements one by one.
PN_DEVICE float4 load4_global(const float* p) {
  float x, y, z, w;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
               : "l"(global_address(p))
               : "memory");
  return make4(x, y, z, w);
}
PN_DEVICE float4 load4_shared(const float* p) {
  float x, y, z, w;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
               : "r"(shared_address(p))
               : "memory");
  return make4(x, y, z, w);
}
PN_DEVICE void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
// The same to shared memory, where nvcc would take what has just been computed one by one.
PN_DEVICE void store4_shared(float* p, float4 v) {
#if defined(__clang__)
  store4(p, v);
#else
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
#endif
}
PN_DEVICE bool is_aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }
// sum += a * b, element by element.
PN_DEVICE void add_product4(float4& sum, float4 a, float4 b) {
  sum.x += a.x * b.x, sum.y += a.y * b.y, sum.z += a.z * b.z, sum.w += a.w * b.w;
}

// The first `count` (0 to 4; more counts as 4) of four neighbouring channels in global memory, the others zero.
// `aligned`: the address is a multiple of 16 and count is 0 or 4.
PN_DEVICE float4 load_channels(const float* p, int count, bool aligned) {
  if (aligned) return count > 0 ? load4_global(p) : zero4();
  float4 v = zero4();
  if (count > 0) v.x = p[0];
  if (count > 1) v.y = p[1];
  if (count > 2) v.z = p[2];
  if (count > 3) v.w = p[3];
  return v;
}
PN_DEVICE void store_channels(float* p, float4 v, int count, bool aligned) {
  if (aligned) {
    if (count > 0) store4(p, v);
    return;
  }
  if (count > 0) p[0] = v.x;
  if (count > 1) p[1] = v.y;
  if (count > 2) p[2] = v.z;
  if (count > 3) p[3] = v.w;
}

// Copies 16 bytes from global to shared memory, or zeros where `present` is false (the source address must be valid
// memory's all the same). What a thread copied so, it sees after copies_done(), the others after a barrier that
// follows.
PN_DEVICE void copy4(float* shared, const float* global, bool present) {
#if PN_SM80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global_address(global)), "r"(present ? 16 : 0)
               : "memory");
#else
  store4(shared, present ? load4(global) : zero4());
#endif
}
PN_DEVICE void copies_done() {
#if PN_SM80
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#if PN_SM80
// A float32 rounded to TF32 (10 bits of mantissa), as the tensor cores take it.
PN_DEVICE uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}
// c [16][8] += a [16][8] * b [8][8] by a warp. With row = lane / 4 and column = lane % 4, a lane holds
// a (row, column), (row + 8, column), (row, column + 4), (row + 8, column + 4); b (column, row), (column + 4, row);
// c (row, 2 column), (row, 2 column + 1), (row + 8, 2 column), (row + 8, 2 column + 1).
PN_DEVICE void multiply_tf32(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                             const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace pn
