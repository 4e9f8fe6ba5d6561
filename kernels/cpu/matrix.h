// What the dense kernels (convolution, linear) share: a matrix product and its weight gradient over one tile
// that lies in the nearest cache, and the passes that fill such a tile from activations and empty it into them.
//
// A tile holds pixels whose window (the values that one output pixel reads) consists of `segments` contiguous runs, so
// that a convolution needs no copy of every window: its runs are the rows of the kernel, found in a tile of padded
// image rows. Tile rows of results are padded to whole vectors: padded(channels) floats a pixel.
#pragma once

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

PN_INLINE int padded(int channels) { return round_up(channels, kLanes); }

// Floats that the input and the result of one tile take together: about what the nearest cache holds.
constexpr int64_t kTileFloats = 12288;

// Makes sure that the context's shared scratch and that of every thread hold so many floats, so that tasks cannot run
// out of memory.
bool reserve(pn_context* context, int64_t shared, int64_t local);
PN_INLINE float* local_scratch(pn_context* context, int thread, int64_t floats) {
  return static_cast<float*>(context->local[thread].get(floats * 4));
}

// pixel (row, column)'s window: for s < segments, the `length` floats at a + row * row_step + column * pixel_step + s *
// segment_step.
struct Windows {
  const float* a;
  int rows, columns;
  int64_t row_step, pixel_step;
  int segments;
  int64_t segment_step;
  int length;
};

// A weight matrix [depth][columns] in the order in which multiply() reads it; depth = segments * length.
struct PackedMatrix {
  float* data;  // size() floats
  int64_t depth;
  int columns;

  int64_t size() const { return depth * padded(columns); }
};

// Copies element (k, n) = source[k * step_k + n * step_n], k < depth, n < columns, to row row0 + k and column column0 +
// n. Whoever packs fewer than all columns clears the data first.
void pack(const PackedMatrix& matrix, int64_t row0, int column0, int64_t depth, int columns, const float* source,
          int64_t step_k, int64_t step_n);

// out [rows * columns][padded(matrix.columns)] = windows * matrix.
void multiply(const Windows& windows, const PackedMatrix& matrix, float* out);

// sums [segments * length][step] += transposed windows * d, with d [rows * columns][step] and step a multiple of
// kLanes.
void multiply_transposed(const Windows& windows, const float* d, int step, float* sums);

// out [depth][columns] = the sum over g < groups, in that order, of [depth][padded(columns)] at partial + g *
// group_floats.
void combine(pn_context* context, const float* partial, int groups, int64_t group_floats, int64_t depth, int columns,
             float* out);

// How many groups of images get a partial sum of [depth][padded(columns)] each: enough for many threads, bounded in
// memory, and depending on the shape alone.
int gradient_groups(int images, int64_t depth, int columns);

// dst pixels (dst_step floats apart) = src pixels (src_step floats apart), through ReLU if asked for.
void copy_pixels(float* dst, int64_t dst_step, const float* src, int64_t src_step, int channels, int64_t pixels,
                 bool relu);

// A gradient with its pending coefficients: pixel i is a * g + b * y + c at g + i * step, y + i * step.
struct Gradient {
  const float* g;
  const float* y;             // used only with coefficients
  const float* coefficients;  // null, or of the first channel; rows are coefficient_step apart
  int64_t step, coefficient_step;
  int channels;

  // dst pixels (dst_step floats apart) = pixels first.. of the gradient.
  void load_pixels(float* dst, int64_t dst_step, int64_t first, int64_t pixels) const;
};

// dst pixels (=, or += with accumulate) src pixels, zero where x <= 0; x lies like dst and may be null (no mask).
void write_gradient(float* dst, const float* x, int64_t dst_step, const float* src, int64_t src_step, int channels,
                    int64_t pixels, bool accumulate);

// Writes the results of an image to where they belong, and takes on the way the mean and the sum of squared deviations
// of each channel, merged tile by tile (Chan, Golub & LeVeque 1979). Values are taken relative to the image's first
// pixel, so that a large common mean costs no digits.
class ImageOutput {
 public:
  static int64_t size(int channels) { return int64_t(3) * padded(channels); }
  ImageOutput(float* memory, int channels, bool statistics)
      : memory_(memory), channels_(channels), statistics_(statistics) {}
  // y pixels (y_step floats apart) = tile [pixels][padded(channels)].
  void write(float* y, int64_t y_step, const float* tile, int pixels);
  // Channel c's mean goes to out[c], its sum of squares to out[step + c].
  void finish(float* out, int64_t step) const;

 private:
  float* memory_;  // rows shift, mean - shift, sum of squares
  int channels_;
  bool statistics_;
  int64_t count_ = 0;
};

}  // namespace pn::PN_NAMESPACE
