// Groups of calls that pass over the images together, and the single calls of the same kernels as groups of one.
//
// A task is one variant of a fixed group of images: single images, or the groups whose gradients are summed together if
// a call has such sums. All calls of the group treat a few of a task's images, one call after the other, before they go
// on, so that what calls share stays in this core's cache: also the input of convolutions, which the first of them pads
// and rectifies. That they treat a few and not just one keeps a call's weights and their gradients there meanwhile. A
// kernel that waits for memory most of the time runs beside the others, bit by bit, on what these have prefetched
// meanwhile.
#include "cpu/group.h"

#include <stdio.h>

namespace pn::PN_NAMESPACE {

namespace {

const GroupKernel* const kKernels[] = {
    &depthwise_pointwise_forward_kernel,
    &depthwise_pointwise_backward_kernel,
    &pool_3x3_forward_kernel,
    &pool_3x3_backward_kernel,
    &mixed_sum_forward_kernel,
    &mixed_sum_backward_kernel,
};

struct PreparedCall {
  const GroupKernel* kernel;
  const void* args;
  void* shared;
  CallNeeds needs;
  int64_t first_finish_task;
  bool shares_input;
  int next;  // call that does not run beside others; the first such call after the last one
};

// The call that runs beside those that follow it.
class Beside {
 public:
  explicit operator bool() const { return kernel_; }

  void begin(const GroupKernel* kernel, const CallImage& first, int64_t images, int parts) {
    run_rest();
    kernel_ = kernel, image_ = first, end_ = first.image + images;
    image_.parts = parts;
  }
  // What the next part reads.
  AheadList reads() { return {reads_, reads_ + kernel_->reads_part(image_, reads_)}; }
  void run_part() {
    kernel_->run(image_);
    if (++image_.part < image_.parts) return;
    image_.part = 0;
    if (++image_.image == end_) kernel_ = nullptr;
  }
  void run_rest() {
    while (kernel_) run_part();
  }

 private:
  const GroupKernel* kernel_ = nullptr;
  CallImage image_;
  int64_t end_;
  Ahead reads_[kPartReads];
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int32_t run_calls(pn_context* context, const pn_call* calls, int count, int* failed) {
  int images = 0, variants = 0;
  bool partial_sums = false;
  int64_t shared_bytes = aligned(count * int64_t(sizeof(PreparedCall))), local_bytes = 0, finish_tasks = 0;
  int64_t input_bytes = 0;
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
    input_bytes = max(input_bytes, aligned(needs.input.bytes));
  }
  const int64_t groups = partial_sums ? min(images, kPartialSums) : images;
  const int64_t most_images = (images + groups - 1) / groups;
  const int64_t at_once =
      input_bytes ? max(int64_t(1), min(kSharedInputBytes / input_bytes, most_images)) : most_images;
  local_bytes += at_once * input_bytes;
  const int threads = context->pool.threads();
  bool memory = context->shared.get(shared_bytes);
  for (int thread = 0; thread < threads; thread++) memory = memory && context->local[thread].get(local_bytes);
  if (!memory) return fail(PN_OUT_OF_MEMORY, "%s: no memory for its tiles", kKernels[calls[0].kernel]->name);

  PreparedCall* prepared = static_cast<PreparedCall*>(context->shared.get(shared_bytes));
  char* shared = reinterpret_cast<char*>(prepared) + aligned(count * int64_t(sizeof(PreparedCall)));
  for (int i = 0; i < count; i++) {
    PreparedCall& call = prepared[i];
    call = {kKernels[calls[i].kernel], calls[i].args, shared, {}, finish_tasks, false, 0};
    call.kernel->check(call.kernel->name, call.args, &call.needs);
    for (int j = 0; j < i && call.needs.input.bytes; j++)
      if (prepared[j].needs.input == call.needs.input) call.shares_input = prepared[j].shares_input = true;
    shared += aligned(call.needs.shared_bytes);
    finish_tasks += call.needs.finish_tasks;
  }
  // From the last call on, twice: the second time the last call knows the first one.
  for (int i = 2 * count - 1, next = 0; i >= 0; i--) {
    PreparedCall& call = prepared[i % count];
    call.next = next;
    if (!call.kernel->reads_part) next = i % count;
  }
  parallel_for(context, count, [&](int64_t i, int) {
    const PreparedCall& call = prepared[i];
    if (call.needs.shared_bytes) call.kernel->prepare(call.args, call.shared);
  });

  const auto first_image = [&](int64_t group) { return group * images / groups; };
  const int64_t tasks = variants * groups;
  parallel_for(context, tasks, [&](int64_t task, int thread) {
    const int64_t group = task / variants, variant = task % variants;
    const int64_t begin = first_image(group), end = first_image(group + 1);
    float* input = static_cast<float*>(context->local[thread].get(local_bytes));
    void* local = reinterpret_cast<char*>(input) + at_once * input_bytes;
    // Calls that take part, from number `i` on to the next one that runs beside others.
    const auto takes_part = [&](int i) { return variant < prepared[i].needs.variants; };
    const auto followers = [&](int i) {
      int n = 0;
      for (; i < count && !prepared[i].kernel->reads_part; i++) n += takes_part(i);
      return n;
    };
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t n = min(at_once, end - first);
      Beside beside;
      SharedInput ready;
      for (int i = 0; i < count; i++) {
        if (!takes_part(i)) continue;
        const PreparedCall& call = prepared[i];
        CallImage run{call.args, call.shared, local, variant * images + first, group, first == begin};
        if (call.kernel->reads_part) {
          beside.begin(call.kernel, run, n, max(1, followers(i + 1)));
          continue;
        }
        const bool is_ready = call.shares_input && call.needs.input == ready;
        if (call.shares_input) ready = call.needs.input;
        for (int64_t k = 0; k < n; k++) {
          // Next is the next image in this call, else the first one in the next call, else the next ones in the first
          // call.
          const PreparedCall& next = k + 1 < n ? call : prepared[call.next];
          const int64_t next_image = k + 1 < n         ? run.image + 1
                                     : call.next > i   ? variant * images + first
                                     : first + n < end ? variant * images + first + n
                                     : task + 1 < tasks
                                         ? (task + 1) % variants * images + first_image((task + 1) / variants)
                                         : -1;
          for (Ahead& reads : run.next) reads = {};
          if (next_image >= 0 && next_image < int64_t(next.needs.variants) * images && next.kernel->reads_first)
            next.kernel->reads_first(next.args, next.shared, next_image, run.next);
          if (call.shares_input) {
            run.input = input + k * (input_bytes / 4);
            run.input_is_ready = is_ready;
          }
          run.beside = beside ? beside.reads() : AheadList{};
          call.kernel->run(run);
          if (beside) beside.run_part();
          run.image++;
          run.begins_group = false;
        }
      }
      beside.run_rest();
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
int32_t mixed_sum_forward(pn_context* context, const pn_mixed_sum* a) {
  return run_call(context, PN_KERNEL_MIXED_SUM_FORWARD, a);
}
int32_t mixed_sum_backward(pn_context* context, const pn_mixed_sum* a) {
  return run_call(context, PN_KERNEL_MIXED_SUM_BACKWARD, a);
}

}  // namespace pn::PN_NAMESPACE
