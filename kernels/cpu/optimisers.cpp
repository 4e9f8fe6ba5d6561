// SGD with momentum and gradient clipping, and Adam, over flat parameter arrays in chunks of a fixed size.
#include <math.h>

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int64_t kChunk = 16384;  // elements per task

int64_t chunks_of(int64_t count) { return (count + kChunk - 1) / kChunk; }

// Sixteen accumulators whatever the vector width: enough to hide the latency.
double sum_of_squares(const float* x, int64_t n) {
  constexpr int kSums = 16;
  double sums[kSums]{};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; k++) sums[k] += double(x[i + k]) * double(x[i + k]);
  for (; i < n; i++) sums[i % kSums] += double(x[i]) * double(x[i]);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

int32_t sgd_step(pn_context* context, const pn_sgd* a) {
  PN_REQUIRE(a->count >= 0, "sgd_step: count must not be negative: %lld", static_cast<long long>(a->count));
  PN_REQUIRE((a->parameters && a->gradients && a->momentum_buffer) || a->count == 0,
             "sgd_step: parameters, gradients or momentum buffer is null");
  PN_REQUIRE(a->norm, "sgd_step: norm is null");
  const int64_t chunks = chunks_of(a->count);
  double* squares = static_cast<double*>(context->shared.get(chunks * 8));
  if (!squares && chunks > 0) return fail(PN_OUT_OF_MEMORY, "sgd_step: no memory for the partial norms");
  parallel_for(context, chunks, [&](int64_t task, int) {
    squares[task] = sum_of_squares(a->gradients + task * kChunk, min(kChunk, a->count - task * kChunk));
  });
  double total = 0;
  for (int64_t i = 0; i < chunks; i++) total += squares[i];
  *a->norm = sqrt(total);
  // A norm that is not a number goes on into the parameters, where it is noticed.
  const double ratio = double(a->max_norm) / (*a->norm + 1e-6);
  const float clip = a->max_norm <= 0 || ratio > 1 ? 1 : float(ratio);

  parallel_for(context, chunks, [&](int64_t task, int) {
    float* __restrict parameters = a->parameters + task * kChunk;
    float* __restrict momentum_buffer = a->momentum_buffer + task * kChunk;
    const float* __restrict gradients = a->gradients + task * kChunk;
    const float rate = a->rate, momentum = a->momentum, weight_decay = a->weight_decay;
    const int64_t n = min(kChunk, a->count - task * kChunk);
    for (int64_t i = 0; i < n; i++) {
      const float m = momentum * momentum_buffer[i] + (clip * gradients[i] + weight_decay * parameters[i]);
      momentum_buffer[i] = m;
      parameters[i] -= rate * m;
    }
  });
  return PN_OK;
}

int32_t adam_step(pn_context* context, const pn_adam* a) {
  PN_REQUIRE(a->count >= 0, "adam_step: count must not be negative: %lld", static_cast<long long>(a->count));
  PN_REQUIRE((a->parameters && a->gradients && a->first_moment && a->second_moment) || a->count == 0,
             "adam_step: parameters, gradients or a moment is null");
  PN_REQUIRE(a->step >= 1, "adam_step: step counts from 1, not %lld", static_cast<long long>(a->step));
  PN_REQUIRE(a->beta1 >= 0 && a->beta1 < 1 && a->beta2 >= 0 && a->beta2 < 1,
             "adam_step: betas must be in [0, 1), not %g, %g", double(a->beta1), double(a->beta2));
  const double correction1 = 1 - pow(double(a->beta1), double(a->step)),
               correction2 = 1 - pow(double(a->beta2), double(a->step));
  const float step_size = float(double(a->rate) / correction1), root = float(1 / sqrt(correction2));
  const float rest1 = float(1 - double(a->beta1)), rest2 = float(1 - double(a->beta2));
  parallel_for(context, chunks_of(a->count), [&](int64_t task, int) {
    float* __restrict parameters = a->parameters + task * kChunk;
    float* __restrict first_moment = a->first_moment + task * kChunk;
    float* __restrict second_moment = a->second_moment + task * kChunk;
    const float* __restrict gradients = a->gradients + task * kChunk;
    const float beta1 = a->beta1, beta2 = a->beta2, epsilon = a->epsilon, weight_decay = a->weight_decay;
    const int64_t n = min(kChunk, a->count - task * kChunk);
    for (int64_t i = 0; i < n; i++) {
      const float g = gradients[i] + weight_decay * parameters[i];
      const float m = beta1 * first_moment[i] + rest1 * g;
      const float v = beta2 * second_moment[i] + rest2 * (g * g);
      first_moment[i] = m;
      second_moment[i] = v;
      parameters[i] -= step_size * m / (sqrtf(v) * root + epsilon);
    }
  });
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
