// Pooling 3x3 with padding 1, for the pools and for the mixed sum: values of both kinds, row by row.
#pragma once

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

constexpr int kPoolAhead = 1024;  // floats between reading and prefetching

PN_INLINE int out_extent(int extent, int stride) { return (extent - 1) / stride + 1; }

// The part [first, first + count) of a window's three taps that lies inside the image.
struct Taps {
  int first, count;
};
PN_INLINE Taps taps_inside(int out, int extent, int stride) {
  const int start = out * stride - 1, first = start < 0 ? 1 : 0;
  return {first, min(3, extent - start) - first};
}

// Calls f(i, lanes) for the vectors of 0..n-1; all but the last with a constant number of lanes.
template <class F>
PN_INLINE void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, int(n - i));
}

struct PoolShape {
  int height, width, channels, stride;

  int out_height() const { return out_extent(height, stride); }
  int out_width() const { return out_extent(width, stride); }
  int last_inner() const { return (width - 2) / stride; }    // output with three columns; one more follows at most
  int64_t row() const { return int64_t(width) * channels; }  // floats of an input row
  int64_t out_row() const { return int64_t(out_width()) * channels; }
};

// The pooled values of one output row for `lanes` channels from channel c on: for every output column ox,
// finish(ox, maximum, sum, share) with the sum of the window's pixels and the reciprocal of their number. x: the first
// of the `Rows` input rows that the windows reach. Without Max the maximum is not computed.
template <int Rows, bool Max, class Finish>
PN_INLINE void pool_row(const PoolShape& shape, const float* x, int64_t c, int lanes, Finish finish) {
  struct Column {
    vec maximum, sum;
  };
  const int channels = shape.channels, width = shape.width, stride = shape.stride, out_width = shape.out_width();
  const int64_t row = shape.row();
  const auto larger = [](vec a, vec b) PN_LAMBDA_INLINE { return Max ? maximum(a, b) : a; };
  const auto column = [&](int ix) PN_LAMBDA_INLINE {
    const float* p = x + int64_t(ix) * channels + c;
    __builtin_prefetch(p + (Rows - 1) * row + kPoolAhead);
    Column total{load_partial(p, lanes), load_partial(p, lanes)};
    for (int r = 1; r < Rows; r++) {
      const vec v = load_partial(p + r * row, lanes);
      total.maximum = larger(v, total.maximum);
      total.sum += v;
    }
    return total;
  };
  const vec two = splat(1.0f / (2 * Rows)), three = splat(1.0f / (3 * Rows));
  Column before = column(0);
  if (width == 1) return finish(0, before.maximum, before.sum, splat(1.0f / Rows));
  Column here = column(1);
  finish(0, larger(before.maximum, here.maximum), before.sum + here.sum, two);
  const int inner = shape.last_inner();
  for (int ox = 1; ox <= inner; ox++) {
    if (stride == 2) before = here, here = column(2 * ox);
    const Column after = column(ox * stride + 1);
    finish(ox, larger(larger(before.maximum, here.maximum), after.maximum), before.sum + here.sum + after.sum, three);
    before = here, here = after;
  }
  if (inner + 1 < out_width) {
    if (stride == 2) before = here, here = column(2 * (inner + 1));
    finish(inner + 1, larger(before.maximum, here.maximum), before.sum + here.sum, two);
  }
}

// Calls f(Constant<Rows>, x, first row that the windows of output row oy reach).
template <class F>
PN_INLINE void with_rows(const PoolShape& shape, int oy, F f) {
  const Taps taps = taps_inside(oy, shape.height, shape.stride);
  const int64_t top = (oy * shape.stride - 1 + taps.first) * shape.row();
  if (taps.count == 3)
    f(Constant<3>{}, top);
  else if (taps.count == 2)
    f(Constant<2>{}, top);
  else
    f(Constant<1>{}, top);
}

}  // namespace pn::PN_NAMESPACE
