// The node's mixed sum over all incoming edges and operations in one pass, and its backward sums. Bound by memory: the
// normalisation is applied while a term is loaded, and what all variants share is loaded once for all of them. A term
// is pooled while it is loaded, too: a thread has pixels one below the other, whose windows overlap.
#include "cuda/pooled_column.h"

namespace pn {

namespace {

constexpr int kMaxTerms = 96;

struct MixedSum {
  pn_mixed_sum call;  // its `terms` is the host's array
  int32_t unit;       // channels of a thread, 4 or 1
  int32_t width;      // of the rows that an image's pixels are divided into: where something is pooled, the output's
  pn_term terms[kMaxTerms];
};

constexpr int kThreads = 256;
constexpr int kPixels = 4;  // of a strip, but where there are variants
constexpr int kGroup = 4;   // terms whose sums a thread of backward keeps

// Pixels of an image one below the other, `count` of them, from (row, column) on.
template <int Pixels>
struct Strip {
  int row, column, count, width;

  // The number of strips of an image.
  PN_DEVICE_METHOD static int count_of(int pixels, int width) {
    const int rows = (pixels + width - 1) / width;
    return (rows + Pixels - 1) / Pixels * width;
  }

  PN_DEVICE_METHOD Strip(int index, int pixels, int width)
      : row(index / width * Pixels), column(index % width), count(0), width(width) {
    for (int k = 0; k < Pixels; k++) count += pixel(k) < pixels;
  }

  PN_DEVICE_METHOD int pixel(int k) const { return (row + k) * width + column; }
};

// Two terms that pool the same values differently, as those of an edge do: they are loaded once for both.
PN_DEVICE bool is_pair(const pn_term& a, const pn_term& b) {
  return a.pooling == PN_POOL_MAX_3X3 && b.pooling == PN_POOL_AVG_3X3 && a.y == b.y && a.variants == b.variants &&
         a.height == b.height && a.width == b.width && a.stride == b.stride;
}

// f(k, value) for the raw values of a term in a strip, and f_second(k, value) for those of the second of a pair; what
// is beyond strip.count is undefined. image: counted over variants and images; c: the thread's first channel.
template <int W, int Pixels, class F, class FSecond>
PN_DEVICE void for_values(const pn_mixed_sum& a, const pn_term& term, bool pair, int64_t image, int c,
                          const Strip<Pixels>& strip, F f, FSecond f_second) {
  if (term.pooling == PN_POOL_NONE || !term.y) {
    const float* y = term.y + image * a.pixels * a.channels + c;
#pragma unroll
    for (int k = 0; k < Pixels; k++) {
      const float* at = y + int64_t(strip.pixel(k < strip.count ? k : 0)) * a.channels;
      f(k, term.y ? load<W>(at) : splat<W>(__builtin_nanf("")));
    }
    return;
  }
  const float* x = term.y + image * term.height * term.width * a.channels + c;
  PooledColumn<W> pool({term.height, term.width, a.channels, term.stride}, x, strip.row, strip.column);
#pragma unroll
  for (int k = 0; k < Pixels; k++) {
    const Pooled<W> pooled = pool.next();
    // By elements: nvcc puts what is chosen as a whole into local memory.
    Floats<W> value;
    for (int i = 0; i < W; i++) value[i] = term.pooling == PN_POOL_MAX_3X3 ? pooled.maximum[i] : pooled.average[i];
    f(k, value);
    if (pair) f_second(k, pooled.average);
  }
}

// What a block's variants take of a term.
template <int Variants>
struct Share {
  float weights[Variants];
  uint32_t takers;      // a bit for every variant whose weight is not zero: for others the operation may not have run
  int32_t begins_pair;  // the term after it is loaded with it
};

// Of all terms, for the variants from `first` on.
template <int Variants>
PN_DEVICE void load_shares(const MixedSum& launch, int first, Share<Variants> (&shares)[kMaxTerms]) {
  const pn_mixed_sum& a = launch.call;
  const Index thread = thread_index(), extent = block_extent();
  for (int t = thread.y * extent.x + thread.x; t < a.term_count; t += extent.x * extent.y) {
    const pn_term& term = launch.terms[t];
    Share<Variants>& share = shares[t];
    share.takers = 0;
    for (int v = 0; v < Variants; v++) {
      const bool inside = first + v < a.variants;
      const float weight = !inside     ? 0
                           : a.weights ? a.weights[int64_t(first + v) * a.weight_stride + term.weight_index]
                                       : 1;
      share.weights[v] = weight;
      share.takers |= uint32_t(weight != 0) << v;
    }
    share.begins_pair = t + 1 < a.term_count && is_pair(term, launch.terms[t + 1]);
  }
  barrier();
}

// n = scale * y + shift.
template <int W>
struct Normalization {
  Floats<W> scale, shift;

  PN_DEVICE_METHOD Normalization(const pn_term& term, int variant, int channels, int c)
      : scale(splat<W>(1)), shift(splat<W>(0)) {
    if (!term.normalization) return;
    const float* rows = term.normalization + int64_t(variant) * 4 * channels + c;
    scale = load<W>(rows), shift = load<W>(rows + channels);
  }
};

// Adds a term's value of a pixel to the sums of the variants in `takers`.
template <int W, int Variants>
PN_DEVICE void add_value(const Floats<W>& y, const Normalization<W>& normalization, const Share<Variants>& share,
                         uint32_t takers, Floats<W> (&sum)[Variants]) {
  Floats<W> n;
  for (int i = 0; i < W; i++) n[i] = normalization.scale[i] * y[i] + normalization.shift[i];
  for (int v = 0; v < Variants; v++)
    if (takers >> v & 1)
      for (int i = 0; i < W; i++) sum[v][i] += share.weights[v] * n[i];
}

// Grid: (blocks of strips of all images, groups of channels, groups of variants).
template <int W, int Variants, int Pixels>
PN_DEVICE void forward(const MixedSum& launch) {
  __shared__ Share<Variants> shares[kMaxTerms];
  const pn_mixed_sum& a = launch.call;
  const int c = first_channel<W>(block_index().y), channels = a.channels;
  const int strips = Strip<Pixels>::count_of(a.pixels, launch.width);
  const int64_t item = int64_t(block_index().x) * block_extent().y + thread_index().y;
  const int64_t image = item / strips;
  const int first = block_index().z * Variants;
  load_shares(launch, first, shares);
  if (c >= channels || image >= a.images) return;
  const Strip<Pixels> strip(int(item - image * strips), a.pixels, launch.width);

  Floats<W> sum[Pixels][Variants] = {};
  for (int t = 0, second; t < a.term_count; t = second + 1) {
    const pn_term& term = launch.terms[t];
    const bool pair = shares[t].begins_pair;
    second = pair ? t + 1 : t;
    const uint32_t takers = shares[t].takers, second_takers = pair ? shares[second].takers : 0;
    // What the variants have in common is loaded once for all of them.
    const bool common = term.variants == 1;
#pragma unroll 1
    for (int v = 0; v < (common ? 1 : Variants); v++) {
      const uint32_t mask = common ? ~0u : 1u << v;
      if (((takers | second_takers) & mask) == 0) continue;
      const int variant = common ? 0 : first + v;
      const Normalization<W> normalization(term, variant, channels, c);
      const auto add = [&](int k, const Floats<W>& value) {
        add_value(value, normalization, shares[t], takers & mask, sum[k]);
      };
      // Its normalisation is loaded for every pixel anew: there are no registers left to keep it in.
      const auto add_second = [&](int k, const Floats<W>& value) {
        add_value(value, Normalization<W>(launch.terms[second], variant, channels, c), shares[second],
                  second_takers & mask, sum[k]);
      };
      for_values<W>(a, term, pair, int64_t(variant) * a.images + image, c, strip, add, add_second);
    }
  }
  for (int v = 0; v < Variants; v++)
    for (int k = 0; k < Pixels; k++)
      if (first + v < a.variants && k < strip.count)
        store<W>(a.out + (((first + v) * int64_t(a.images) + image) * a.pixels + strip.pixel(k)) * channels + c,
                 sum[k][v]);
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

template <int W>
PN_DEVICE Floats<W> load_mean(const pn_term& term, int channels, int c) {
  return term.normalization ? load<W>(term.normalization + 3 * channels + c) : splat<W>(0);
}

// Grid: (images, groups of channels, groups of terms).
template <int W>
PN_DEVICE void backward(const MixedSum& launch) {
  __shared__ Exchange<Sums<W>, kThreads> exchange;
  const pn_mixed_sum& a = launch.call;
  const int c = first_channel<W>(block_index().y), channels = a.channels;
  const int first = block_index().z * kGroup;
  const int64_t image = block_index().x;
  const int count = min(kGroup, a.term_count - first), strips = Strip<kPixels>::count_of(a.pixels, launch.width);
  Sums<W> sums{};
  for (int item = thread_index().y; item < strips && c < channels; item += block_extent().y) {
    const Strip<kPixels> strip(item, a.pixels, launch.width);
    Floats<W> g[kPixels];
#pragma unroll
    for (int p = 0; p < kPixels; p++) {
      g[p] = p < strip.count ? load<W>(a.g + (image * a.pixels + strip.pixel(p)) * channels + c) : splat<W>(0);
      sums.g += g[p];
    }
    bool done = false;  // the term was the second of a pair
#pragma unroll
    for (int k = 0; k < kGroup; k++) {
      if (k >= count || done) {
        done = false;
        continue;
      }
      const int second = min(k + 1, kGroup - 1);
      const pn_term& term = launch.terms[first + k];
      const bool pair = second > k && second < count && is_pair(term, launch.terms[first + second]);
      const Floats<W> mean = load_mean<W>(term, channels, c);
      const Floats<W> second_mean = pair ? load_mean<W>(launch.terms[first + second], channels, c) : splat<W>(0);
      const auto add = [&](int p, const Floats<W>& value) {
        for (int i = 0; i < W && p < strip.count; i++) sums.product[k][i] += g[p][i] * (value[i] - mean[i]);
      };
      const auto add_second = [&](int p, const Floats<W>& value) {
        for (int i = 0; i < W && p < strip.count; i++) sums.product[second][i] += g[p][i] * (value[i] - second_mean[i]);
      };
      for_values<W>(a, term, pair, image, c, strip, add, add_second);
      done = pair;
    }
  }
  sums = sum_rows(sums, exchange);
  if (thread_index().y != 0 || c >= channels) return;
  float* rows = a.gradient_sums + image * (1 + a.term_count) * channels + c;
  if (first == 0) store<W>(rows, sums.g);
  for (int k = 0; k < kGroup; k++) {
    if (k >= count) continue;
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
    pn::forward<4, 1, pn::kPixels>(a);
  else
    pn::forward<1, 1, pn::kPixels>(a);
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
