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
#else
#include <cuda_runtime.h>
#endif

// A kernel: extern "C", so that the driver finds it by its name. It takes one struct by value.
#define PN_KERNEL extern "C" __global__ void
#define PN_DEVICE static __device__ __forceinline__
#define PN_DEVICE_MEMBER __device__ __forceinline__

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
#else
PN_DEVICE Index thread_index() { return {int(threadIdx.x), int(threadIdx.y), int(threadIdx.z)}; }
PN_DEVICE Index block_index() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
PN_DEVICE Index block_extent() { return {int(blockDim.x), int(blockDim.y), int(blockDim.z)}; }
PN_DEVICE Index grid_extent() { return {int(gridDim.x), int(gridDim.y), int(gridDim.z)}; }
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

}  // namespace pn
