// The node's mixed sum over all incoming edges and operations in one pass, and its backward sums. Bound by memory: the
// normalisation is applied while a term is loaded, and what all variants share is loaded once for all of them.
#include "cuda/channels.h"

namespace pn {

namespace {

constexpr int kMaxTerms = 128;

struct MixedSum {
  pn_mixed_sum call;  // its `terms` is the host's array
  int32_t unit;       // channels of a thread, 4 or 1
  pn_term terms[kMaxTerms];
};

constexpr int kThreads = 256;
constexpr int kGroup = 4;  // terms whose sums a thread of backward keeps

// n = scale * y + shift for `Pixels` pixels of one channel unit.
template <int W, int Pixels>
struct Term {
  Floats<W> n[Pixels];

  PN_DEVICE_METHOD Term(const float* y, const float* normalization, int channels, const int64_t* at) {
    if (!y) {  // an operation that did not run, but has a weight
      for (int k = 0; k < Pixels; k++) n[k] = splat<W>(__builtin_nanf(""));
      return;
    }
    for (int k = 0; k < Pixels; k++) n[k] = load<W>(y + at[k]);
    if (!normalization) return;
    const Floats<W> scale = load<W>(normalization), shift = load<W>(normalization + channels);
    for (int k = 0; k < Pixels; k++)
      for (int i = 0; i < W; i++) n[k][i] = scale[i] * n[k][i] + shift[i];
  }
};

// Grid: (blocks of pixels of all images, groups of channels, groups of variants).
template <int W, int Variants, int Pixels>
PN_DEVICE void forward(const MixedSum& launch) {
  const pn_mixed_sum& a = launch.call;
  const int c = first_channel<W>(block_index().y), rows = block_extent().y, channels = a.channels;
  const int64_t pixels = int64_t(a.images) * a.pixels, elements = pixels * channels;
  const int64_t first = int64_t(block_index().x) * rows * Pixels + thread_index().y;
  const int variant = block_index().z * Variants;
  if (c >= channels || first >= pixels) return;
  int64_t at[Pixels];  // beyond the last pixel the first again, which is not stored then
  for (int k = 0; k < Pixels; k++) {
    const int64_t pixel = first + int64_t(k) * rows;
    at[k] = (pixel < pixels ? pixel : first) * channels + c;
  }

  Floats<W> sum[Variants][Pixels] = {};
  for (int t = 0; t < a.term_count; t++) {
    const pn_term& term = launch.terms[t];
    // A term is not read where its weight is zero: its operation did not run.
    float weight[Variants];
    bool live = false;
    const float* weights = a.weights + int64_t(variant) * a.weight_stride + term.weight_index;
    for (int v = 0; v < Variants; v++) {
      const bool inside = variant + v < a.variants;
      weight[v] = !inside ? 0 : a.weights ? weights[v * a.weight_stride] : 1;
      live |= weight[v] != 0;
    }
    if (!live) continue;
    const auto add = [&](int v, const Term<W, Pixels>& value) {
      for (int k = 0; k < Pixels; k++)
        for (int i = 0; i < W; i++) sum[v][k][i] += weight[v] * value.n[k][i];
    };
    const float* normalization = term.normalization ? term.normalization + c : nullptr;
    if (Variants == 1 || term.variants == 1) {
      const Term<W, Pixels> value(term.y, normalization, channels, at);
      for (int v = 0; v < Variants; v++)
        if (weight[v] != 0) add(v, value);
    } else {
      for (int v = 0; v < Variants; v++)
        if (weight[v] != 0)
          add(v, Term<W, Pixels>(term.y ? term.y + (variant + v) * elements : nullptr,
                                 normalization ? normalization + int64_t(variant + v) * 4 * channels : nullptr,
                                 channels, at));
    }
  }
  for (int v = 0; v < Variants; v++)
    for (int k = 0; k < Pixels; k++)
      if (variant + v < a.variants && (k == 0 || at[k] != at[0]))
        store<W>(a.out + (variant + v) * elements + at[k], sum[v][k]);
}

// What a thread of backward sums: g, and its products with the terms of the group.
template <int W>
struct Sums {
  Floats<W> g, product[kGroup];

  PN_DEVICE_METHOD void operator+=(const Sums& other) {
    g += other.g;
    for (int k = 0; k < kGroup; k++) product[k] += other.product[k];
  }
};

// Grid: (images, groups of channels, groups of terms).
template <int W>
PN_DEVICE void backward(const MixedSum& launch) {
  __shared__ Exchange<Sums<W>, kThreads> exchange;
  const pn_mixed_sum& a = launch.call;
  const int c = first_channel<W>(block_index().y), channels = a.channels;
  const int first = block_index().z * kGroup;
  const int64_t image = block_index().x;
  Sums<W> sums{};
  if (c < channels) {
    const int64_t offset = image * a.pixels * channels + c;
    const float* y[kGroup];
    Floats<W> mean[kGroup];
    for (int k = 0; k < kGroup; k++) {
      const pn_term& term = launch.terms[first + k < a.term_count ? first + k : 0];
      y[k] = term.y + offset;
      mean[k] = term.normalization ? load<W>(term.normalization + 3 * channels + c) : splat<W>(0);
    }
    for (int p = thread_index().y; p < a.pixels; p += block_extent().y) {
      const int64_t at = int64_t(p) * channels;
      const Floats<W> g = load<W>(a.g + offset + at);
      sums.g += g;
      for (int k = 0; k < kGroup; k++) {
        if (first + k >= a.term_count) continue;
        const Floats<W> value = load<W>(y[k] + at);
        for (int i = 0; i < W; i++) sums.product[k][i] += g[i] * (value[i] - mean[k][i]);
      }
    }
  }
  sums = sum_rows(sums, exchange);
  if (thread_index().y != 0 || c >= channels) return;
  float* rows = a.gradient_sums + image * (1 + a.term_count) * channels + c;
  if (first == 0) store<W>(rows, sums.g);
  for (int k = 0; k < kGroup; k++) {
    if (first + k >= a.term_count) continue;
    if (const float* normalization = launch.terms[first + k].normalization) {
      const Floats<W> inverse_deviation = load<W>(normalization + 2 * channels + c);
      for (int i = 0; i < W; i++) sums.product[k][i] *= inverse_deviation[i];
    }
    store<W>(rows + int64_t(1 + first + k) * channels, sums.product[k]);
  }
}

// The sum of g * n over everything, for one term, from the sums of the images:
// n = scale * y + shift = scale / inverse_deviation * yhat + shift + scale * mean.
PN_DEVICE double weight_gradient(const MixedSum& launch, int t, Exchange<double, kThreads>& exchange) {
  const pn_mixed_sum& a = launch.call;
  const int channels = a.channels;
  const float* normalization = launch.terms[t].normalization;
  double total = 0;
  for (int i = thread_index().y; i < a.images * channels; i += block_extent().y) {
    const int image = i / channels, c = i - image * channels;
    const float* rows = a.gradient_sums + int64_t(image) * (1 + a.term_count) * channels + c;
    double product = double(rows[int64_t(1 + t) * channels]);
    if (normalization) {
      const double scale = double(normalization[c]), shift = double(normalization[channels + c]);
      const double inverse_deviation = double(normalization[2 * channels + c]);
      product = scale / inverse_deviation * product +
                (shift + scale * double(normalization[3 * channels + c])) * double(rows[0]);
    }
    total += product;
  }
  return sum_rows(total, exchange);
}

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kThreads) mixed_sum_forward(const pn::MixedSum a) {
  if (a.unit == 4)
    pn::forward<4, 1, 4>(a);
  else
    pn::forward<1, 1, 4>(a);
}

PN_KERNEL __launch_bounds__(pn::kThreads, 2) mixed_sum_forward_variants(const pn::MixedSum a) {
  if (a.unit == 4)
    pn::forward<4, 8, 1>(a);
  else
    pn::forward<1, 8, 1>(a);
}

PN_KERNEL __launch_bounds__(pn::kThreads) mixed_sum_backward(const pn::MixedSum a) {
  if (a.unit == 4)
    pn::backward<4>(a);
  else
    pn::backward<1>(a);
}

// Grid: the terms. Terms may share an element of the weight gradients: the first of them adds for all, in their order.
PN_KERNEL __launch_bounds__(pn::kThreads, 4) mixed_sum_weight_gradients(const pn::MixedSum a) {
  __shared__ pn::Exchange<double, pn::kThreads> exchange;
  const int first = pn::block_index().x, index = a.terms[first].weight_index;
  for (int t = 0; t < first; t++)
    if (a.terms[t].weight_index == index) return;
  for (int t = first; t < a.call.term_count; t++) {
    if (a.terms[t].weight_index != index) continue;
    const double gradient = pn::weight_gradient(a, t, exchange);
    if (pn::thread_index().y == 0) a.call.weight_gradients[index] += float(gradient);
  }
}
