// Pooling 3x3 with padding 1. A thread walks down a strip of rows in one column: every row that a window covers is
// first reduced (forward) or gathered (backward) along its three columns, and three such rows stay in registers, so
// that a pixel is loaded by three threads and not by nine windows. Taking the first maximum along the rows and then the
// first row with the largest value gives the first maximum in row-major order.
#include "cuda/channels.h"

namespace pn {

namespace {

struct Pool {
  pn_pool call;
  int32_t unit;  // channels of a thread, 4 or 1
};

constexpr int kForwardThreads = 512;  // at most
constexpr int kBackwardRows = 4;      // input rows of a strip in backward

PN_DEVICE int out_extent(int extent, int stride) { return (extent - 1) / stride + 1; }

// How many of the three taps of the window at `out` lie inside the image.
PN_DEVICE int taps_inside(int out, int extent, int stride) {
  const int start = out * stride - 1;
  return (start < 0 ? 2 : 3) - (start + 3 > extent ? 1 : 0);
}

// Does a later value beat the best so far? Not-a-number beats every number and is beaten by nothing.
PN_DEVICE bool beats(float value, float best) { return !(best >= value) && best == best; }

constexpr float kLowest = -__builtin_inff();

// A row of a window, reduced along its columns: the sum, or the maximum and the column where it is.
template <int W>
struct Row {
  Floats<W> value;
  int column[W];
};

template <bool Max, int W>
PN_DEVICE Row<W> reduce_row(const pn_pool& a, const float* x, int iy, int ox) {
  const int first = ox * a.stride - 1;
  Row<W> row;
  for (int i = 0; i < W; i++) {
    row.value[i] = Max ? kLowest : 0;
    row.column[i] = first < 0 ? 1 : 0;
  }
  if (iy < 0 || iy >= a.height) return row;  // never chosen: nothing is beaten by the lowest value
  for (int k = 0; k < 3; k++) {
    if (first + k < 0 || first + k >= a.width) continue;
    const Floats<W> value = load<W>(x + (iy * a.width + first + k) * a.channels);
    for (int i = 0; i < W; i++) {
      if (!Max) {
        row.value[i] += value[i];
      } else if (beats(value[i], row.value[i])) {
        row.value[i] = value[i];
        row.column[i] = k;
      }
    }
  }
  return row;
}

template <int W>
PN_DEVICE void store_positions(uint8_t* p, const int* position) {
  if (W == 4)
    *reinterpret_cast<uint32_t*>(p) =
        uint32_t(position[0] | position[W > 1 ? 1 : 0] << 8 | position[W > 2 ? 2 : 0] << 16 | position[W - 1] << 24);
  else
    for (int i = 0; i < W; i++) p[i] = uint8_t(position[i]);
}

template <int W>
PN_DEVICE void load_positions(const uint8_t* p, int* position) {
  const uint32_t packed = W == 4 ? *reinterpret_cast<const uint32_t*>(p) : uint32_t(*p);
  for (int i = 0; i < W; i++) position[i] = packed >> 8 * i & 255;
}

// Grid: (variants * images, groups of channels). A block has all pixels of its image and channels, so that the
// statistics need no second pass.
template <bool Max, int W>
PN_DEVICE void forward(const pn_pool& a) {
  __shared__ Exchange<Moments<W>, kForwardThreads> exchange;
  const int c = first_channel<W>(block_index().y), rows = block_extent().y;
  const int out_height = out_extent(a.height, a.stride), out_width = out_extent(a.width, a.stride);
  const int64_t image = block_index().x, out = image * out_height * out_width * a.channels + c;
  const float* x = a.x + image * a.height * a.width * a.channels + c;
  const int strips = rows < out_width ? 1 : rows / out_width < out_height ? rows / out_width : out_height;
  const int strip_rows = (out_height + strips - 1) / strips;

  MomentSums<W> sums;
  for (int item = thread_index().y; item < out_width * strips && c < a.channels; item += rows) {
    const int ox = item % out_width, begin = item / out_width * strip_rows;
    const int end = begin + strip_rows < out_height ? begin + strip_rows : out_height;
    const int columns = taps_inside(ox, a.width, a.stride);
    // Before row oy of the output: with stride 1 the last two rows of the window before, else its last row.
    Row<W> middle = reduce_row<Max, W>(a, x, begin - 1, ox);
    Row<W> bottom = reduce_row<Max, W>(a, x, begin * a.stride - (a.stride - 1), ox);
    for (int oy = begin; oy < end; oy++) {
      const Row<W> top = a.stride == 1 ? middle : bottom;
      middle = a.stride == 1 ? bottom : reduce_row<Max, W>(a, x, 2 * oy, ox);
      bottom = reduce_row<Max, W>(a, x, oy * a.stride + 1, ox);
      Floats<W> y;
      int position[W];
      for (int i = 0; i < W; i++) {
        y[i] = top.value[i];
        if (Max) {
          position[i] = top.column[i] + (oy == 0 ? 3 : 0);
          if (beats(middle.value[i], y[i])) y[i] = middle.value[i], position[i] = 3 + middle.column[i];
          if (beats(bottom.value[i], y[i])) y[i] = bottom.value[i], position[i] = 6 + bottom.column[i];
        } else {
          const int count = columns * taps_inside(oy, a.height, a.stride);
          y[i] = (y[i] + middle.value[i] + bottom.value[i]) * (1.0f / float(count));
        }
      }
      const int64_t at = out + int64_t(oy * out_width + ox) * a.channels;
      store<W>(a.y + at, y);
      if (Max && a.argmax) store_positions<W>(a.argmax + at, position);
      sums.add(y);
    }
  }
  if (!a.statistics) return;
  const Moments<W> moments = combine_rows(
      sums.moments(), exchange, [](const Moments<W>& first, const Moments<W>& second) { return merge(first, second); });
  if (thread_index().y == 0 && c < a.channels) {
    float* mean = a.statistics + image * 2 * a.channels + c;
    store<W>(mean, moments.mean);
    store<W>(mean + a.channels, moments.squares);
  }
}

template <bool Max>
PN_DEVICE void forward(const Pool& a) {
  if (a.unit == 4)
    forward<Max, 4>(a.call);
  else
    forward<Max, 1>(a.call);
}

// Grid: (images, groups of channels, blocks of (strip, column)).
template <bool Max, int W>
PN_DEVICE void backward(const pn_pool& a) {
  const int c = first_channel<W>(block_index().y);
  const int item = block_index().z * block_extent().y + thread_index().y;
  const int ix = item % a.width, begin = item / a.width * kBackwardRows;
  if (c >= a.channels || begin >= a.height) return;
  const int end = begin + kBackwardRows < a.height ? begin + kBackwardRows : a.height;
  const int out_height = out_extent(a.height, a.stride), out_width = out_extent(a.width, a.stride);
  const int64_t image = block_index().x, out = image * out_height * out_width * a.channels + c;
  float* dx = a.dx + (image * a.height * a.width + ix) * a.channels + c;

  Floats<W> factor = splat<W>(1), slope{}, constant{};
  if (a.coefficients) {
    factor = load<W>(a.coefficients + c);
    slope = load<W>(a.coefficients + a.channels + c);
    constant = load<W>(a.coefficients + 2 * a.channels + c);
  }
  Floats<W> share[3] = {};  // of the three input rows that the windows of row oy cover, so far
  // From the first row of windows that reaches the strip to the one after which its last row is complete.
  for (int oy = begin == 0 ? 0 : (begin + a.stride - 2) / a.stride; oy <= end / a.stride; oy++) {
    for (int kx = 0; kx < 3 && oy < out_height; kx++) {
      const int ox = (ix + 1 - kx) / a.stride;
      if (ix + 1 - kx < 0 || ox * a.stride != ix + 1 - kx || ox >= out_width) continue;
      const int64_t at = out + int64_t(oy * out_width + ox) * a.channels;
      Floats<W> dy = load<W>(a.g + at);
      if (a.coefficients) {
        const Floats<W> y = load<W>(a.y + at);
        for (int i = 0; i < W; i++) dy[i] = factor[i] * dy[i] + (slope[i] * y[i] + constant[i]);
      }
      if (Max) {
        int position[W];
        load_positions<W>(a.argmax + at, position);
        for (int ky = 0; ky < 3; ky++)
          for (int i = 0; i < W; i++)
            if (position[i] == 3 * ky + kx) share[ky][i] += dy[i];
      } else {
        const float inverse = 1.0f / float(taps_inside(oy, a.height, a.stride) * taps_inside(ox, a.width, a.stride));
        for (int ky = 0; ky < 3; ky++)
          for (int i = 0; i < W; i++) share[ky][i] += dy[i] * inverse;
      }
    }
    // No window after this one covers its first `stride` rows.
    for (int k = 0; k < a.stride; k++) {
      const int iy = oy * a.stride - 1 + k;
      if (iy >= begin && iy < end) {
        float* to = dx + int64_t(iy) * a.width * a.channels;
        if (a.accumulate) share[0] += load<W>(to);
        store<W>(to, share[0]);
      }
      share[0] = share[1];
      share[1] = share[2];
      share[2] = {};
    }
  }
}

template <bool Max>
PN_DEVICE void backward(const Pool& a) {
  if (a.unit == 4)
    backward<Max, 4>(a.call);
  else
    backward<Max, 1>(a.call);
}

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kForwardThreads) max_pool_3x3_forward(const pn::Pool a) { pn::forward<true>(a); }

PN_KERNEL __launch_bounds__(pn::kForwardThreads) avg_pool_3x3_forward(const pn::Pool a) { pn::forward<false>(a); }

PN_KERNEL __launch_bounds__(256) max_pool_3x3_backward(const pn::Pool a) { pn::backward<true>(a); }

PN_KERNEL __launch_bounds__(256) avg_pool_3x3_backward(const pn::Pool a) { pn::backward<false>(a); }
