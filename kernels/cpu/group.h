// What a kernel gives so that its calls can run in groups (pn_run_group): group.cpp drives these functions.
#pragma once

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

constexpr int kPartialSums = 32;  // of a gradient over images: one per fixed group of images, or per image if fewer

// Memory that will be read soon, brought into the cache step by step during arithmetic.
struct Ahead {
  const float *next, *end;
  PN_INLINE void step() {
    if (next < end) {
      __builtin_prefetch(next);
      next += 16;
    }
  }
};

// What a call with valid arguments needs.
struct CallNeeds {
  int images;
  int variants;       // 0: there is nothing to do
  bool partial_sums;  // over the images of each of min(images, kPartialSums) groups
  int64_t shared_bytes, local_bytes;
  int64_t finish_tasks;
};

// One image of one variant of a call.
struct CallImage {
  const void* args;
  void* shared;       // shared_bytes of this call, 64-byte aligned
  void* local;        // local_bytes of this thread
  int64_t image;      // variant * images + index
  int64_t group;      // of images, if the call has partial sums
  bool begins_group;  // the first image of its group
  Ahead next[3];      // what is read after this image
};

struct GroupKernel {
  const char* name;
  int32_t (*check)(const char* name, const void* args, CallNeeds* needs);
  void (*prepare)(const void* args, void* shared);  // null if there are no shared_bytes
  void (*run)(const CallImage& image);
  // What run reads first. Null: not worth prefetching.
  void (*reads_first)(const void* args, const void* shared, int64_t image, Ahead* next);
  void (*finish)(const void* args, const void* shared, int64_t task);  // null if there are no finish_tasks
};

extern const GroupKernel depthwise_pointwise_forward_kernel, depthwise_pointwise_backward_kernel;
extern const GroupKernel pool_3x3_forward_kernel, pool_3x3_backward_kernel;

}  // namespace pn::PN_NAMESPACE
