// Batch norm on per-channel numbers only: merges the statistics and the gradient sums of the images, in double. The
// activations themselves are normalised by whoever loads them next.
#include "cuda/channels.h"

namespace pn {

namespace {

constexpr int kThreads = 256;
constexpr int kCalls = 56;  // what the arguments of a launch have room for

struct Pair {
  double first, second;

  PN_DEVICE_METHOD void operator+=(const Pair& other) {
    first += other.first;
    second += other.second;
  }
};

}  // namespace

// Calls of the same extents that do not need one another: a launch of its own would be longer than the work.
template <class Arguments>
struct BatchNormCalls {
  Arguments calls[kCalls];
};

}  // namespace pn

// Grid: (groups of channels, variants, calls). A block's rows share the images. The mean is that of the means (all
// images have the same number of pixels), the squares about it are the sum of M2_n + pixels * (mean_n - mean)^2 (Chan
// et al. 1983).
PN_KERNEL __launch_bounds__(pn::kThreads) batch_norm_forward(const pn::BatchNormCalls<pn_batch_norm_forward_args> l) {
  const pn_batch_norm_forward_args& a = l.calls[pn::block_index().z];
  __shared__ pn::Exchange<double, pn::kThreads> exchange;
  const int c = pn::first_channel<1>(pn::block_index().x), channels = a.channels;
  const int64_t variant = pn::block_index().y;
  const bool inside = c < channels;
  double mean = 0, squares = 0, variance = 0;
  if (a.statistics) {
    const float* statistics = a.statistics + variant * a.images * 2 * channels + c;
    const int rows = pn::block_extent().y;
    for (int image = pn::thread_index().y; image < a.images && inside; image += rows)
      mean += double(statistics[int64_t(image) * 2 * channels]);
    mean = pn::sum_rows(mean, exchange) / a.images;
    for (int image = pn::thread_index().y; image < a.images && inside; image += rows) {
      const float* own = statistics + int64_t(image) * 2 * channels;
      const double distance = double(own[0]) - mean;
      squares += double(own[channels]) + a.pixels * (distance * distance);
    }
    squares = pn::sum_rows(squares, exchange);
    variance = squares / (double(a.images) * a.pixels);
  } else if (inside) {
    mean = double(a.running_mean[c]);
    variance = double(a.running_variance[c]);
  }
  if (!inside || pn::thread_index().y != 0) return;
  const double inverse_deviation = 1 / __builtin_sqrt(variance + double(a.epsilon));
  const double scale = a.gamma ? double(a.gamma[c]) * inverse_deviation : inverse_deviation;
  float* normalization = a.normalization + variant * 4 * channels + c;
  normalization[0] = float(scale);
  normalization[channels] = float((a.beta ? double(a.beta[c]) : 0) - mean * scale);
  normalization[2 * channels] = float(inverse_deviation);
  normalization[3 * channels] = float(mean);
  if (a.statistics && a.running_mean) {
    const double momentum = double(a.momentum), unbiased = double(a.images) * a.pixels - 1;
    a.running_mean[c] = float((1 - momentum) * double(a.running_mean[c]) + momentum * mean);
    a.running_variance[c] = float((1 - momentum) * double(a.running_variance[c]) + momentum * (squares / unbiased));
  }
}

// Grid: (groups of channels, 1, calls).
PN_KERNEL __launch_bounds__(pn::kThreads) batch_norm_backward(const pn::BatchNormCalls<pn_batch_norm_backward_args> l) {
  const pn_batch_norm_backward_args& a = l.calls[pn::block_index().z];
  __shared__ pn::Exchange<pn::Pair, pn::kThreads> exchange;
  const int c = pn::first_channel<1>(pn::block_index().x), channels = a.channels;
  const bool inside = c < channels, batch_statistics = a.normalization && a.training;
  const double weight = a.weight ? double(*a.weight) : 1;
  pn::Pair sums{};  // of w g, and of w g yhat
  if (a.d_gamma || a.d_beta || (a.coefficients && batch_statistics)) {
    for (int image = pn::thread_index().y; image < a.images && inside; image += pn::block_extent().y) {
      const float* rows = a.gradient_sums + int64_t(image) * a.rows * channels + c;
      sums += {double(rows[0]), double(rows[int64_t(a.row) * channels])};
    }
    sums = pn::sum_rows(sums, exchange);
    sums = {weight * sums.first, weight * sums.second};
  }
  if (!inside || pn::thread_index().y != 0) return;
  if (a.coefficients) {
    double factor = weight, slope = 0, constant = 0;
    if (a.normalization) {
      const float* normalization = a.normalization + c;
      const double scale = double(normalization[0]), inverse_deviation = double(normalization[2 * channels]);
      factor = weight * scale;
      if (batch_statistics) {
        const double values = double(a.images) * a.pixels;
        slope = -scale * inverse_deviation * (sums.second / values);
        constant = -scale * (sums.first / values) - slope * double(normalization[3 * channels]);
      }
    }
    a.coefficients[c] = float(factor);
    a.coefficients[channels + c] = float(slope);
    a.coefficients[2 * channels + c] = float(constant);
  }
  if (a.d_gamma) a.d_gamma[c] = float(sums.second);
  if (a.d_beta) a.d_beta[c] = float(sums.first);
}
