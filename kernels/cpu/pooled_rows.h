// Pooling 3x3 with padding 1, for the pools and for the mixed sum: values of both kinds, row by row, and of the maximum
// also the place that it was taken from.
#pragma once

#include <string.h>

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

typedef uint8_t byte_vec __attribute__((vector_size(kLanes)));
typedef uint8_t unaligned_byte_vec __attribute__((vector_size(kLanes), aligned(1), may_alias));

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

// Where v is a later candidate that beats the best so far; once not-a-number, the best stays.
PN_INLINE ivec beats(vec v, vec best) { return ~(best >= v) & (best == best); }

PN_INLINE void store_positions(uint8_t* p, ivec v, int n) {
  const byte_vec narrow = __builtin_convertvector(v, byte_vec);
  if (n >= kLanes)
    *reinterpret_cast<unaligned_byte_vec*>(p) = narrow;
  else
    for (int i = 0; i < n; i++) p[i] = narrow[i];
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
  int64_t row() const { return int64_t(width) * channels; }  // floats of an input row
  int64_t out_row() const { return int64_t(out_width()) * channels; }
};

// Reduces `Count` horizontally neighbouring pixels, `channels` floats apart, to the maximum and its column 0..2.
template <int Count>
void reduce_columns(const float* x, int channels, int first, int64_t n, float* values, uint8_t* columns) {
  for_vectors(n, [&](int64_t i, int lanes) {
    __builtin_prefetch(x + i + kPoolAhead);
    vec best = load_partial(x + i, lanes);
    ivec column = ivec{} + first;
    for (int k = 1; k < Count; k++) {
      const vec v = load_partial(x + i + k * channels, lanes);
      const ivec better = beats(v, best);
      best = better ? v : best;
      column = better ? ivec{} + (first + k) : column;
    }
    store_partial(values + i, best, lanes);
    store_positions(columns + i, column, lanes);
  });
}

// Combines `Count` rows of reduced columns to n maxima and their rows 0..2.
template <int Count>
void combine_rows(const float* const* values, int first, int64_t n, float* y, uint8_t* rows) {
  for_vectors(n, [&](int64_t i, int lanes) {
    vec best = load_partial(values[0] + i, lanes);
    ivec row = ivec{} + first;
    for (int k = 1; k < Count; k++) {
      const vec v = load_partial(values[k] + i, lanes);
      const ivec better = beats(v, best);
      best = better ? v : best;
      row = better ? ivec{} + (first + k) : row;
    }
    store_partial(y + i, best, lanes);
    store_positions(rows + i, row, lanes);
  });
}

// The rows of the maxima of one image from row `first` on, not-a-number included. It is separable: every input row is
// reduced horizontally once into a ring of three row buffers, and an output row combines up to three of them. Taking
// the first maximum along the rows and then the first row with the largest value gives the first maximum in row-major
// order. Rows are flat arrays of pixels * channels wherever neighbours are a constant distance apart, so that any
// channel count fills the vectors.
class MaximumRows {
 public:
  static int64_t bytes(const PoolShape& shape) {
    return 12 * pitch_of(shape) + round_up(int(3 * column_pitch_of(shape)), 64);
  }

  // x: the image. memory: bytes() of it.
  MaximumRows(const PoolShape& shape, const float* x, int first, void* memory)
      : shape_(shape),
        x_(x),
        values_(static_cast<float*>(memory)),
        columns_(static_cast<uint8_t*>(memory) + 12 * pitch_of(shape)),
        next_(first),
        reduced_(max(0, first * shape.stride - 1)) {
    memset(columns_, 0, size_t(3 * column_pitch_of(shape)));
  }

  // y: a row of pixels, [OW, C]. rows [OW, C]: that of the maximum in its window, 0..2.
  void next(float* y, uint8_t* rows) {
    const Taps taps = taps_inside(next_, shape_.height, shape_.stride);
    const int top = next_++ * shape_.stride - 1 + taps.first;
    for (; reduced_ < top + taps.count; reduced_++) reduce_row(reduced_);
    const float* values[3];
    for (int k = 0; k < taps.count; k++) values[k] = values_ + (top + k) % 3 * pitch_of(shape_);
    const auto combine = taps.count == 3 ? combine_rows<3> : taps.count == 2 ? combine_rows<2> : combine_rows<1>;
    combine(values, taps.first, shape_.out_row(), y, rows);
  }

  // [OW, C]: for every column of windows that of the maximum along input row `row`, 0..2; with a pixel to spare on
  // either side. Kept until the first row of windows that begins below `row` has been made.
  uint8_t* columns(int row) const { return columns_ + row % 3 * column_pitch_of(shape_) + shape_.channels; }

 private:
  static int64_t pitch_of(const PoolShape& shape) { return (shape.out_row() + 15) / 16 * 16; }
  static int64_t column_pitch_of(const PoolShape& shape) { return shape.out_row() + 2 * shape.channels; }

  void reduce_row(int row) {
    const int channels = shape_.channels, stride = shape_.stride, out_width = shape_.out_width();
    float* values = values_ + row % 3 * pitch_of(shape_);
    for (int ox = 0, run; ox < out_width; ox += run) {
      // With stride 1 all windows but the outer two are one flat run.
      run = stride == 1 && ox == 1 && out_width > 2 ? out_width - 2 : 1;
      const Taps taps = taps_inside(ox, shape_.width, stride);
      const float* first = x_ + row * shape_.row() + int64_t(ox * stride - 1 + taps.first) * channels;
      const int64_t out = int64_t(ox) * channels, n = int64_t(run) * channels;
      const auto reduce = taps.count == 3 ? reduce_columns<3> : taps.count == 2 ? reduce_columns<2> : reduce_columns<1>;
      reduce(first, channels, taps.first, n, values + out, columns(row) + out);
    }
  }

  const PoolShape shape_;
  const float* const x_;
  float* const values_;
  uint8_t* const columns_;
  int next_, reduced_;  // output row, and input row, that come next
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
  const int inner = (width - 2) / stride;  // last output with three columns
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
