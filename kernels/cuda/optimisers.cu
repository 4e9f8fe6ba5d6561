// SGD with momentum and gradient clipping, and Adam, over flat arrays in chunks of a fixed size, a chunk per block.
#include "cuda/channels.h"

namespace pn {

namespace {

constexpr int kThreads = 256, kChunk = 4096;

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

// f(i, n) for the thread's units of the block's chunk: elements i to i + W, of which the first n exist.
template <int W, class F>
PN_DEVICE void for_units(int64_t count, F f) {
  const int64_t begin = int64_t(block_index().x) * kChunk + thread_index().x * W;
  for (int k = 0; k < kChunk / (kThreads * W); k++) {
    const int64_t i = begin + k * (kThreads * W);
    if (i < count) f(i, count - i);
  }
}

template <int W>
PN_DEVICE double sum_squares(const pn_sgd& a) {
  double sum = 0;
  for_units<W>(a.count, [&](int64_t i, int64_t n) {
    const Floats<W> gradient = load_partial<W>(a.gradients + i, n);
    for (int l = 0; l < W; l++) sum += double(gradient[l]) * double(gradient[l]);
  });
  return sum;
}

// The sum of the block's values, in a fixed order; thread 0 gets it.
PN_DEVICE double sum_block(double value, double* buffer) {
  const int thread = thread_index().x;
  buffer[thread] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    barrier();
    if (thread < half) buffer[thread] = value += buffer[thread + half];
  }
  return value;
}

template <int W>
PN_DEVICE void step(const pn_sgd& a) {
  // A norm that is not a number goes on into the parameters, where it is noticed.
  const double ratio = double(a.max_norm) / (*a.norm + 1e-6);
  const float clip = a.max_norm <= 0 || ratio > 1 ? 1 : float(ratio);
  for_units<W>(a.count, [&](int64_t i, int64_t n) {
    const Floats<W> gradient = load_partial<W>(a.gradients + i, n);
    Floats<W> parameter = load_partial<W>(a.parameters + i, n), m = load_partial<W>(a.momentum_buffer + i, n);
    for (int l = 0; l < W; l++) {
      m[l] = a.momentum * m[l] + (clip * gradient[l] + a.weight_decay * parameter[l]);
      parameter[l] -= a.rate * m[l];
    }
    store_partial<W>(a.momentum_buffer + i, m, n);
    store_partial<W>(a.parameters + i, parameter, n);
  });
}

template <int W>
PN_DEVICE void step(const Adam& launch) {
  const pn_adam& a = launch.call;
  for_units<W>(a.count, [&](int64_t i, int64_t n) {
    const Floats<W> gradient = load_partial<W>(a.gradients + i, n);
    Floats<W> parameter = load_partial<W>(a.parameters + i, n);
    Floats<W> first = load_partial<W>(a.first_moment + i, n), second = load_partial<W>(a.second_moment + i, n);
    for (int l = 0; l < W; l++) {
      const float g = gradient[l] + a.weight_decay * parameter[l];
      first[l] = a.beta1 * first[l] + launch.rest1 * g;
      second[l] = a.beta2 * second[l] + launch.rest2 * (g * g);
      parameter[l] -= launch.step_size * first[l] / (__builtin_sqrtf(second[l]) * launch.root + a.epsilon);
    }
    store_partial<W>(a.first_moment + i, first, n);
    store_partial<W>(a.second_moment + i, second, n);
    store_partial<W>(a.parameters + i, parameter, n);
  });
}

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kThreads) sgd_sum_squares(const pn::Sgd a) {
  __shared__ double buffer[pn::kThreads];
  const double sum = a.unit == 4 ? pn::sum_squares<4>(a.call) : pn::sum_squares<1>(a.call);
  const double total = pn::sum_block(sum, buffer);
  if (pn::thread_index().x == 0) a.squares[pn::block_index().x] = total;
}

// One block.
PN_KERNEL __launch_bounds__(pn::kThreads) sgd_norm(const pn::Sgd a) {
  __shared__ double buffer[pn::kThreads];
  const int64_t chunks = (a.call.count + pn::kChunk - 1) / pn::kChunk;
  double sum = 0;
  for (int64_t i = pn::thread_index().x; i < chunks; i += pn::kThreads) sum += a.squares[i];
  const double total = pn::sum_block(sum, buffer);
  if (pn::thread_index().x == 0) *a.call.norm = __builtin_sqrt(total);
}

PN_KERNEL __launch_bounds__(pn::kThreads) sgd_step(const pn::Sgd a) {
  if (a.unit == 4)
    pn::step<4>(a.call);
  else
    pn::step<1>(a.call);
}

PN_KERNEL __launch_bounds__(pn::kThreads) adam_step(const pn::Adam a) {
  if (a.unit == 4)
    pn::step<4>(a);
  else
    pn::step<1>(a);
}
