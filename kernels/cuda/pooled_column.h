// Pooling 3x3 with padding 1 as a walk down a column of outputs, for the pools and for the mixed sum: every row that a
// window covers is first reduced along its three columns, and three such rows stay in registers, so that a pixel is
// loaded by the threads of three columns and not by nine windows. Taking the first maximum along the rows and then the
// first row with the largest value gives the first maximum in row-major order.
#pragma once

#include "cuda/channels.h"

namespace pn {

struct PoolShape {
  int height, width, channels, stride;

  PN_DEVICE_METHOD int out_height() const { return (height - 1) / stride + 1; }
  PN_DEVICE_METHOD int out_width() const { return (width - 1) / stride + 1; }
};

// How many of the three taps of the window at `out` lie inside the image.
PN_DEVICE int taps_inside(int out, int extent, int stride) {
  const int start = out * stride - 1;
  return (start < 0 ? 2 : 3) - (start + 3 > extent ? 1 : 0);
}

// An output: the average, the maximum (not-a-number, if there is one), and the tap where it is first, 3 * row + column
// of the window. What the caller does not use is not computed.
template <int W>
struct Pooled {
  Floats<W> average, maximum;
  int tap[W];
};

template <int W>
class PooledColumn {
 public:
  // Before row `oy` of column `ox`. x: the image, from the thread's first channel on.
  PN_DEVICE_METHOD PooledColumn(const PoolShape& shape, const float* x, int oy, int ox)
      : shape_(shape),
        oy_(oy),
        iy_(oy * shape.stride - 1),
        left_(ox > 0),
        right_(ox * shape.stride + 1 < shape.width),
        x_(x + (int64_t(iy_) * shape.width + ox * shape.stride) * shape.channels) {
    if (shape.stride == 1) middle_ = read_row();
    bottom_ = read_row();
  }

  // The output of the next row. Below the last row it is of no use, but may be asked for.
  PN_DEVICE_METHOD Pooled<W> next() {
    // With stride 1 the window keeps two rows of the one before, else one.
    Row top = bottom_;
    if (shape_.stride == 1) {
      top = middle_;
      middle_ = bottom_;
    } else {
      middle_ = read_row();
    }
    bottom_ = read_row();
    const float share = 1.0f / float((1 + left_ + right_) * taps_inside(oy_, shape_.height, shape_.stride));
    Pooled<W> y;
    for (int i = 0; i < W; i++) {
      y.average[i] = (top.sum[i] + middle_.sum[i] + bottom_.sum[i]) * share;
      y.maximum[i] = top.maximum[i];
      y.tap[i] = top.column[i] + (oy_ == 0 ? 3 : 0);  // there is no row above the image
      take(middle_.maximum[i], 3 + middle_.column[i], y.maximum[i], y.tap[i]);
      take(bottom_.maximum[i], 6 + bottom_.column[i], y.maximum[i], y.tap[i]);
    }
    oy_++;
    return y;
  }

 private:
  // A row of a window, reduced along its columns.
  struct Row {
    Floats<W> sum, maximum;
    int column[W];
  };

  // The first maximum so far and its place, with one value more.
  PN_DEVICE_METHOD static void take(float value, int place, float& maximum, int& first) {
    if (!(maximum >= value) && maximum == maximum) first = place;
    maximum = max_or_nan(maximum, value);
  }

  PN_DEVICE_METHOD Row read_row() {
    Row row;
    for (int i = 0; i < W; i++) {
      row.sum[i] = 0;
      row.maximum[i] = -__builtin_inff();  // in whose place every value of another row is taken
      row.column[i] = left_ ? 0 : 1;
    }
    if (iy_ >= 0 && iy_ < shape_.height) {
      // In place of a column outside the image stands the middle one, which is no other maximum.
      const Floats<W> left = load<W>(x_ - (left_ ? shape_.channels : 0)), middle = load<W>(x_);
      const Floats<W> right = load<W>(x_ + (right_ ? shape_.channels : 0));
      for (int i = 0; i < W; i++) {
        row.sum[i] = (left_ ? left[i] : 0) + middle[i] + (right_ ? right[i] : 0);
        row.maximum[i] = left[i];
        take(middle[i], 1, row.maximum[i], row.column[i]);
        take(right[i], 2, row.maximum[i], row.column[i]);
      }
    }
    iy_++;
    x_ += int64_t(shape_.width) * shape_.channels;
    return row;
  }

  const PoolShape shape_;
  int oy_, iy_;        // the next output row, and the next row to be read
  bool left_, right_;  // whether the window has these columns
  const float* x_;     // in the next row, the middle column
  Row middle_, bottom_;
};

}  // namespace pn
