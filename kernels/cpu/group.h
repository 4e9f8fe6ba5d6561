// What a kernel gives so that its calls can run in groups (pn_run_group): group.cpp drives these functions.
#pragma once

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

// Of a gradient over images: one per fixed group of images, or per image if fewer. More would keep more threads busy,
// but those of 64 channels take more of the caches than the images do.
constexpr int kPartialSums = 16;

// Lines of the cache that a step brings: with few registers, arithmetic takes fewer steps (kStepRows, kStepPixels).
constexpr int kStepLines = kManyRegisters ? 1 : 2;

// Memory that will be read soon, brought into the cache step by step during arithmetic.
struct Ahead {
  const float *next, *end;
  PN_INLINE void step() {
    if (next < end) {
#pragma GCC unroll 2
      for (int i = 0; i < kStepLines; i++, next += 16) __builtin_prefetch(next);
    }
  }
};

// What a part of a call beside this one reads, brought into the second-level cache, some lines a step.
struct AheadList {
  const Ahead *rest = nullptr, *end = nullptr;
  Ahead now{};
  template <int Lines>
  PN_INLINE void step() {
    if (now.next < now.end) {
#pragma GCC unroll 4
      for (int i = 0; i < Lines; i++, now.next += 16) __builtin_prefetch(now.next, 0, 2);
    } else if (rest < end) {
      now = *rest++;
    }
  }
};

// A call's shared memory: its plan, then its weights.
template <class Plan>
constexpr int64_t kPlanBytes = (sizeof(Plan) + 63) / 64 * 64;
template <class Plan>
float* after_plan(void* shared) {
  return reinterpret_cast<float*>(static_cast<char*>(shared) + kPlanBytes<Plan>);
}

// What a call makes of an image of x before it begins, and other calls could use as it is.
constexpr int64_t kSharedInputBytes = 256 << 10;  // at most, of all images at once: it stays in the second-level cache
struct SharedInput {
  const void *x = nullptr, *normalization = nullptr;
  int64_t bytes = 0;  // 0: nothing
  bool operator==(const SharedInput& other) const {
    return x == other.x && normalization == other.normalization && bytes == other.bytes;
  }
};

// What a call with valid arguments needs.
struct CallNeeds {
  int images;
  int variants;       // 0: there is nothing to do
  bool partial_sums;  // over the images of each of min(images, kPartialSums) groups
  int64_t shared_bytes, local_bytes;
  int64_t finish_tasks;
  SharedInput input = {};
};

// One image of one variant of a call.
struct CallImage {
  const void* args;
  void* shared;                 // shared_bytes of this call, 64-byte aligned
  void* local;                  // local_bytes of this thread
  int64_t image;                // variant * images + index
  int64_t group;                // of images, if the call has partial sums
  bool begins_group;            // the first image of its group
  float* input = nullptr;       // the image's shared input; null: no other call uses it
  bool input_is_ready = false;  // an earlier call has made it; else this one makes all of it
  Ahead next[3] = {};           // what is read after this image
  AheadList beside = {};        // what the call beside this one reads after this image
  int part = 0, parts = 1;      // of the image, if the call runs beside others
};

constexpr int kPartReads = 40;

struct GroupKernel {
  const char* name;
  int32_t (*check)(const char* name, const void* args, CallNeeds* needs);
  void (*prepare)(const void* args, void* shared);  // null if there are no shared_bytes
  void (*run)(const CallImage& image);
  // What run reads first. Null: not worth prefetching.
  void (*reads_first)(const void* args, const void* shared, int64_t image, Ahead* next);
  void (*finish)(const void* args, const void* shared, int64_t task);  // null if there are no finish_tasks
  // Null, or the kernel is bound by memory: in a group it runs beside the calls that follow, a part of the image after
  // each of them. Gives what it will read for a part, kPartReads of them at most, and returns how many.
  int (*reads_part)(const CallImage& part, Ahead* reads) = nullptr;
};

extern const GroupKernel depthwise_pointwise_forward_kernel, depthwise_pointwise_backward_kernel;
extern const GroupKernel pool_3x3_forward_kernel, pool_3x3_backward_kernel;
extern const GroupKernel mixed_sum_forward_kernel, mixed_sum_backward_kernel;

}  // namespace pn::PN_NAMESPACE
