// Groups of calls that pass over the images together, and the single calls of the same kernels as groups of one.
//
// A task is one variant of a fixed group of images: single images, or the groups whose gradients are summed together if
// a call has such sums. All calls of the group treat a task's images before the next task begins, so that what calls
// share stays in this core's cache.
#include "cpu/group.h"

#include <stdio.h>

namespace pn::PN_NAMESPACE {

namespace {

const GroupKernel* const kKernels[] = {
    &depthwise_pointwise_forward_kernel,
    &depthwise_pointwise_backward_kernel,
    &pool_3x3_forward_kernel,
    &pool_3x3_backward_kernel,
};

struct PreparedCall {
  const GroupKernel* kernel;
  const void* args;
  void* shared;
  CallNeeds needs;
  int64_t first_finish_task;
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int32_t run_calls(pn_context* context, const pn_call* calls, int count, int* failed) {
  int images = 0, variants = 0;
  bool partial_sums = false;
  int64_t shared_bytes = aligned(count * int64_t(sizeof(PreparedCall))), local_bytes = 0, finish_tasks = 0;
  for (int i = 0; i < count; i++) {
    *failed = i;
    CallNeeds needs{};
    const GroupKernel& kernel = *kKernels[calls[i].kernel];
    if (const int32_t status = kernel.check(kernel.name, calls[i].args, &needs)) return status;
    if (i == 0) images = needs.images;
    PN_REQUIRE(needs.images == images, "%s: has %d images, but the group's first call has %d", kernel.name,
               needs.images, images);
    variants = max(variants, needs.variants);
    partial_sums |= needs.partial_sums;
    shared_bytes += aligned(needs.shared_bytes);
    local_bytes = max(local_bytes, needs.local_bytes);
  }
  const int threads = context->pool.threads();
  bool memory = context->shared.get(shared_bytes);
  for (int thread = 0; thread < threads; thread++) memory = memory && context->local[thread].get(local_bytes);
  if (!memory) return fail(PN_OUT_OF_MEMORY, "%s: no memory for its tiles", kKernels[calls[0].kernel]->name);

  PreparedCall* prepared = static_cast<PreparedCall*>(context->shared.get(shared_bytes));
  char* shared = reinterpret_cast<char*>(prepared) + aligned(count * int64_t(sizeof(PreparedCall)));
  for (int i = 0; i < count; i++) {
    PreparedCall& call = prepared[i];
    call = {kKernels[calls[i].kernel], calls[i].args, shared, {}, finish_tasks};
    call.kernel->check(call.kernel->name, call.args, &call.needs);
    shared += aligned(call.needs.shared_bytes);
    finish_tasks += call.needs.finish_tasks;
  }
  parallel_for(context, count, [&](int64_t i, int) {
    const PreparedCall& call = prepared[i];
    if (call.needs.shared_bytes) call.kernel->prepare(call.args, call.shared);
  });

  const int64_t groups = partial_sums ? min(images, kPartialSums) : images;
  const auto first_image = [&](int64_t group) { return group * images / groups; };
  parallel_for(context, variants * groups, [&](int64_t task, int thread) {
    const int64_t variant = task / groups, group = task % groups;
    const int64_t begin = first_image(group), end = first_image(group + 1);
    void* local = context->local[thread].get(local_bytes);
    for (int64_t image = begin; image < end; image++)
      for (int i = 0; i < count; i++) {
        const PreparedCall& call = prepared[i];
        if (variant >= call.needs.variants) continue;
        CallImage run{call.args, call.shared, local, variant * images + image, group, image == begin, {}};
        // Next is this image in the next call, else the next image in the first call.
        int64_t next_image = variant * images + image;
        if (i + 1 == count) {
          const int64_t next_task = task + 1;
          next_image = image + 1 < end                 ? next_image + 1
                       : next_task < variants * groups ? next_task / groups * images + first_image(next_task % groups)
                                                       : -1;
        }
        const PreparedCall& next = prepared[(i + 1) % count];
        if (next_image >= 0 && next_image < int64_t(next.needs.variants) * images && next.kernel->reads_first)
          next.kernel->reads_first(next.args, next.shared, next_image, run.next);
        call.kernel->run(run);
      }
  });
  parallel_for(context, finish_tasks, [&](int64_t task, int) {
    int i = 0;
    while (i + 1 < count && prepared[i + 1].first_finish_task <= task) i++;
    const PreparedCall& call = prepared[i];
    call.kernel->finish(call.args, call.shared, task - call.first_finish_task);
  });
  return PN_OK;
}

int32_t run_call(pn_context* context, int32_t kernel, const void* args) {
  const pn_call call{args, kernel, 0};
  int failed;
  return run_calls(context, &call, 1, &failed);
}

}  // namespace

int32_t run_group(pn_context* context, const pn_call* calls, int32_t count) {
  int failed = 0;
  const int32_t status = run_calls(context, calls, count, &failed);
  if (status == PN_INVALID_ARGUMENT) {
    char message[400];
    snprintf(message, sizeof(message), "%s", pn_last_error());
    return fail(status, "call %d of the group: %s", failed, message);
  }
  return status;
}

int32_t depthwise_pointwise_forward(pn_context* context, const pn_depthwise_pointwise* a) {
  return run_call(context, PN_KERNEL_DEPTHWISE_POINTWISE_FORWARD, a);
}
int32_t depthwise_pointwise_backward(pn_context* context, const pn_depthwise_pointwise* a) {
  return run_call(context, PN_KERNEL_DEPTHWISE_POINTWISE_BACKWARD, a);
}
int32_t pool_3x3_forward(pn_context* context, const pn_pool* a) {
  return run_call(context, PN_KERNEL_POOL_3X3_FORWARD, a);
}
int32_t pool_3x3_backward(pn_context* context, const pn_pool* a) {
  return run_call(context, PN_KERNEL_POOL_3X3_BACKWARD, a);
}

}  // namespace pn::PN_NAMESPACE
