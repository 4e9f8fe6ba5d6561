// SGD with momentum and gradient clipping, and Adam, over flat arrays, a chunk per block.
#include "cuda/flat.h"

namespace pn {

namespace {

struct Sgd {
  pn_sgd call;
  double* squares;  // the sum of squares of every chunk of the gradients
  int32_t unit;     // elements of a thread, 4 or 1
};

struct Adam {
  pn_adam call;
  float step_size, root, rest1, rest2;  // rate / (1 - beta1^step), 1 / sqrt(1 - beta2^step), 1 - beta1, 1 - beta2
  int32_t unit;                         // elements of a thread, 4 or 1
};

// The sum of the block's values, in a fixed order; thread 0 gets it.
PN_DEVICE double sum_block(double value, double* buffer) {
  const int thread = thread_index().x;
  buffer[thread] = value;
  for (int half = kFlatThreads / 2; half > 0; half /= 2) {
    barrier();
    if (thread < half) buffer[thread] = value += buffer[thread + half];
  }
  return value;
}

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kFlatThreads) sgd_sum_squares(const pn::Sgd a) {
  __shared__ double buffer[pn::kFlatThreads];
  double sum = 0;
  pn::for_units(a.call.count, a.unit, [&](auto width, int64_t i) {
    constexpr int W = decltype(width)::value;
    const pn::Floats<W> gradient = pn::load<W>(a.call.gradients + i);
    for (int l = 0; l < W; l++) sum += double(gradient[l]) * double(gradient[l]);
  });
  const double total = pn::sum_block(sum, buffer);
  if (pn::thread_index().x == 0) a.squares[pn::block_index().x] = total;
}

// One block.
PN_KERNEL __launch_bounds__(pn::kFlatThreads) sgd_norm(const pn::Sgd a) {
  __shared__ double buffer[pn::kFlatThreads];
  const int64_t chunks = (a.call.count + pn::kChunk - 1) / pn::kChunk;
  double sum = 0;
  for (int64_t i = pn::thread_index().x; i < chunks; i += pn::kFlatThreads) sum += a.squares[i];
  const double total = pn::sum_block(sum, buffer);
  if (pn::thread_index().x == 0) *a.call.norm = __builtin_sqrt(total);
}

PN_KERNEL __launch_bounds__(pn::kFlatThreads) sgd_step(const pn::Sgd launch) {
  const pn_sgd& a = launch.call;
  // A norm that is not a number goes on into the parameters, where it is noticed.
  const double ratio = double(a.max_norm) / (*a.norm + 1e-6);
  const float clip = a.max_norm <= 0 || ratio > 1 ? 1 : float(ratio);
  pn::for_units(a.count, launch.unit, [&](auto width, int64_t i) {
    constexpr int W = decltype(width)::value;
    const pn::Floats<W> gradient = pn::load<W>(a.gradients + i);
    pn::Floats<W> parameter = pn::load<W>(a.parameters + i), m = pn::load<W>(a.momentum_buffer + i);
    for (int l = 0; l < W; l++) {
      m[l] = a.momentum * m[l] + (clip * gradient[l] + a.weight_decay * parameter[l]);
      parameter[l] -= a.rate * m[l];
    }
    pn::store<W>(a.momentum_buffer + i, m);
    pn::store<W>(a.parameters + i, parameter);
  });
}

PN_KERNEL __launch_bounds__(pn::kFlatThreads) adam_step(const pn::Adam launch) {
  const pn_adam& a = launch.call;
  pn::for_units(a.count, launch.unit, [&](auto width, int64_t i) {
    constexpr int W = decltype(width)::value;
    const pn::Floats<W> gradient = pn::load<W>(a.gradients + i);
    pn::Floats<W> parameter = pn::load<W>(a.parameters + i);
    pn::Floats<W> first = pn::load<W>(a.first_moment + i), second = pn::load<W>(a.second_moment + i);
    for (int l = 0; l < W; l++) {
      const float g = gradient[l] + a.weight_decay * parameter[l];
      first[l] = a.beta1 * first[l] + launch.rest1 * g;
      second[l] = a.beta2 * second[l] + launch.rest2 * (g * g);
      parameter[l] -= launch.step_size * first[l] / (__builtin_sqrtf(second[l]) * launch.root + a.epsilon);
    }
    pn::store<W>(a.first_moment + i, first);
    pn::store<W>(a.second_moment + i, second);
    pn::store<W>(a.parameters + i, parameter);
  });
}
