// The matrix product over one tile, its transpose for weight gradients, and the passes around them. See matrix.h.
//
// Both products keep a block of rows x vectors of results in registers (enough to cover the latency of the
// multiply-add), take the other operand's vectors from memory once per block, and broadcast the rows' values from the
// tile.
#include "cpu/matrix.h"

#include <string.h>

namespace pn::PN_NAMESPACE {

namespace {

#if PN_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kAccumulators = 24, kMaxVectors = 4;  // of 32 registers
#elif PN_VECTOR_BYTES == 32
constexpr int kAccumulators = 12, kMaxVectors = 3;  // of 16 registers
#else
constexpr int kAccumulators = 8, kMaxVectors = 2;  // of 16 registers, with temporaries for lack of a fused multiply-add
#endif
constexpr int kMaxRows = 12;            // the offsets of more would not fit the general registers
constexpr int64_t kPanelFloats = 6144;  // weights that stay in the nearest cache while all pixels of a tile pass by

// Floats between reading or writing and prefetching: far enough for main memory, about the next tile. Tiles are read in
// runs that are too short for the hardware's prefetchers.
constexpr int kAhead = 1024;

constexpr int max_rows(int vectors) { return kAccumulators / vectors < kMaxRows ? kAccumulators / vectors : kMaxRows; }

// `total` in as few parts as possible of at most `largest` each, almost equal.
struct Parts {
  int count, smaller, larger_count;

  PN_INLINE Parts(int total, int largest) {
    count = (total + largest - 1) / largest;
    smaller = count ? total / count : 0;
    larger_count = total - count * smaller;
  }
  PN_INLINE int size(int i) const { return smaller + (i < larger_count); }
};

struct MultiplyArguments {
  const float* a;
  int64_t pixel_step;
  int segments;
  int64_t segment_step;
  int length;
  const float* weights;
  float* out;
  int64_t out_step;
  bool accumulate;
};

template <int kRows, int kVectors>
void multiply_block(const MultiplyArguments& m) {
  vec sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int p = 0; p < kRows; p++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[p][v] = m.accumulate ? load(m.out + p * m.out_step + v * kLanes) : vec{};
  const float* weights = m.weights;
  for (int s = 0; s < m.segments; s++) {
    const float* a = m.a + s * m.segment_step;
    for (int k = 0; k < m.length; k++, a++, weights += kVectors * kLanes) {
      vec w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 12
      for (int p = 0; p < kRows; p++) {
        const vec x = splat(a[p * m.pixel_step]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[p][v] += x * w[v];
      }
    }
  }
#pragma GCC unroll 12
  for (int p = 0; p < kRows; p++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(m.out + p * m.out_step + v * kLanes, sum[p][v]);
}

struct TransposedArguments {
  const float* a;
  int rows, columns;
  int64_t row_step, pixel_step;
  const float* d;
  int step;
  float* sums;
};

template <int kRows, int kVectors>
void multiply_transposed_block(const TransposedArguments& m) {
  vec sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[i][v] = load(m.sums + i * m.step + v * kLanes);
  const float* d_pixel = m.d;
  for (int r = 0; r < m.rows; r++) {
    const float* a = m.a + r * m.row_step;
    for (int p = 0; p < m.columns; p++, a += m.pixel_step, d_pixel += m.step) {
      vec d[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) d[v] = load(d_pixel + v * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; i++) {
        const vec x = splat(a[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[i][v] += x * d[v];
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(m.sums + i * m.step + v * kLanes, sum[i][v]);
}

// multiply_block<rows, kVectors>, for rows 1..max_rows(kVectors).
template <int kVectors, int kRows = max_rows(kVectors)>
void multiply_rows(int rows, const MultiplyArguments& m) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply_block<kRows, kVectors>(m);
    multiply_rows<kVectors, kRows - 1>(rows, m);
  }
}

template <int kVectors, int kRows = max_rows(kVectors)>
void multiply_transposed_rows(int rows, const TransposedArguments& m) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply_transposed_block<kRows, kVectors>(m);
    multiply_transposed_rows<kVectors, kRows - 1>(rows, m);
  }
}

template <int kVectors>
struct Width {
  static constexpr int value = kVectors;
};

// f(Width<vectors>), so that f knows `vectors` as a constant.
template <class F>
PN_INLINE void with_width(int vectors, F f) {
  if (vectors == 1) return f(Width<1>{});
  if (vectors == 2) return f(Width<2>{});
  if constexpr (kMaxVectors >= 3)
    if (vectors == 3) return f(Width<3>{});
  if constexpr (kMaxVectors >= 4)
    if (vectors == 4) return f(Width<4>{});
}

struct AllLanes {
  static PN_INLINE vec load(const float* p) { return PN_NAMESPACE::load(p); }
  static PN_INLINE void store(float* p, vec v) { PN_NAMESPACE::store(p, v); }
};

struct FirstLanes {
  int count;
  PN_INLINE vec load(const float* p) const { return load_partial(p, count); }
  PN_INLINE void store(float* p, vec v) const { store_partial(p, v, count); }
};

// f(c, lanes) for the vectors at c = 0, kLanes, ... of `count` floats; lanes loads and stores no more than belongs to
// them.
template <class F>
PN_INLINE void for_each_vector(int64_t count, F f) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) f(c, AllLanes{});
  if (c < count) f(c, FirstLanes{int(count - c)});
}

// One row where rows follow one another without a gap: longer rows divide into register blocks with less waste.
Windows collapsed(Windows w) {
  if (w.row_step == w.columns * w.pixel_step) w.columns *= w.rows, w.rows = 1;
  return w;
}

}  // namespace

bool reserve(pn_context* context, int64_t shared, int64_t local) {
  if (shared > 0 && !context->shared.get(shared * 4)) return false;
  for (int thread = 0; thread < context->pool.threads(); thread++)
    if (local > 0 && !context->local[thread].get(local * 4)) return false;
  return true;
}

void pack(const PackedMatrix& matrix, int64_t row0, int column0, int64_t depth, int columns, const float* source,
          int64_t step_k, int64_t step_n) {
  const int vectors = padded(matrix.columns) / kLanes;
  const Parts blocks(vectors, kMaxVectors);
  for (int block = 0, first = 0; block < blocks.count; block++) {
    const int width = blocks.size(block) * kLanes;
    float* panel = matrix.data + first * matrix.depth + row0 * width - first;
    const int begin = max(first, column0), end = min(first + width, column0 + columns);
    for (int64_t k = 0; k < depth; k++)
      for (int n = begin; n < end; n++) panel[k * width + n] = source[k * step_k + (n - column0) * step_n];
    first += width;
  }
}

void multiply(const Windows& windows, const PackedMatrix& matrix, float* out) {
  const Windows w = collapsed(windows);
  const int step = padded(matrix.columns), vectors = step / kLanes;
  const Parts blocks(vectors, kMaxVectors);
  for (int block = 0, first = 0; block < blocks.count; block++) {
    const int width = blocks.size(block);
    with_width(width, [&](auto constant) {
      constexpr int kVectors = decltype(constant)::value;
      const Parts parts(w.columns, max_rows(kVectors));
      const float* panel = matrix.data + first * kLanes * matrix.depth;

      // One piece of the depth for all pixels.
      auto run = [&](const float* a, int segments, int length, const float* weights, bool accumulate) {
        for (int r = 0; r < w.rows; r++) {
          for (int part = 0, column = 0; part < parts.count; part++) {
            const int size = parts.size(part);
            multiply_rows<kVectors>(
                size, {a + r * w.row_step + column * w.pixel_step, w.pixel_step, segments, w.segment_step, length,
                       weights, out + (int64_t(r) * w.columns + column) * step + first * kLanes, step, accumulate});
            column += size;
          }
        }
      };
      constexpr int kFloats = kVectors * kLanes, kPiece = int(kPanelFloats / kFloats);
      if (matrix.depth <= kPiece) return run(w.a, w.segments, w.length, panel, false);
      bool accumulate = false;
      for (int s = 0; s < w.segments; s++) {
        for (int k = 0; k < w.length; k += kPiece) {
          run(w.a + s * w.segment_step + k, 1, min(kPiece, w.length - k), panel, accumulate);
          panel += min(kPiece, w.length - k) * kFloats;
          accumulate = true;
        }
      }
    });
    first += width;
  }
}

void multiply_transposed(const Windows& windows, const float* d, int step, float* sums) {
  const Windows w = collapsed(windows);
  const int vectors = step / kLanes;
  const Parts blocks(vectors, kMaxVectors);
  for (int block = 0, first = 0; block < blocks.count; block++) {
    const int width = blocks.size(block);
    with_width(width, [&](auto constant) {
      constexpr int kVectors = decltype(constant)::value;
      const Parts parts(w.length, max_rows(kVectors));
      for (int s = 0; s < w.segments; s++) {
        for (int part = 0, row = 0; part < parts.count; part++) {
          const int size = parts.size(part);
          multiply_transposed_rows<kVectors>(
              size, {w.a + s * w.segment_step + row, w.rows, w.columns, w.row_step, w.pixel_step, d + first * kLanes,
                     step, sums + (int64_t(s) * w.length + row) * step + first * kLanes});
          row += size;
        }
      }
    });
    first += width;
  }
}

void combine(pn_context* context, const float* partial, int groups, int64_t group_floats, int64_t depth, int columns,
             float* out) {
  const int step = padded(columns);
  const int64_t chunk = max<int64_t>(1, 4096 / step);
  parallel_for(context, (depth + chunk - 1) / chunk, [=](int64_t task, int) {
    for (int64_t k = task * chunk; k < min(depth, (task + 1) * chunk); k++) {
      for (int n = 0; n < columns; n += kLanes) {
        const float* p = partial + k * step + n;
        vec sum = load(p);
        for (int g = 1; g < groups; g++) sum += load(p + g * group_floats);
        store_partial(out + k * columns + n, sum, columns - n);
      }
    }
  });
}

int gradient_groups(int images, int64_t depth, int columns) {
  constexpr int64_t kMemory = 4 << 20;  // floats
  return min(images, int(min<int64_t>(32, max<int64_t>(4, kMemory / (depth * padded(columns))))));
}

void copy_pixels(float* dst, int64_t dst_step, const float* src, int64_t src_step, int channels, int64_t pixels,
                 bool relu) {
  int64_t count = channels;
  if (dst_step == channels && src_step == channels) count *= pixels, pixels = 1;
  for_each_vector(count, [&](int64_t c, auto lanes) {
    for (int64_t p = 0; p < pixels; p++) {
      __builtin_prefetch(src + p * src_step + c + kAhead);
      const vec x = lanes.load(src + p * src_step + c);
      lanes.store(dst + p * dst_step + c, relu ? PN_NAMESPACE::relu(x) : x);
    }
  });
}

void Gradient::load_pixels(float* dst, int64_t dst_step, int64_t first, int64_t pixels) const {
  if (!coefficients) return copy_pixels(dst, dst_step, g + first * step, step, channels, pixels, false);
  for_each_vector(channels, [&](int64_t c, auto lanes) {
    const float *g_pixel = g + first * step + c, *y_pixel = y + first * step + c;
    const vec ca = lanes.load(coefficients + c), cb = lanes.load(coefficients + coefficient_step + c),
              cc = lanes.load(coefficients + 2 * coefficient_step + c);
    for (int64_t p = 0; p < pixels; p++) {
      __builtin_prefetch(g_pixel + p * step + kAhead);
      __builtin_prefetch(y_pixel + p * step + kAhead);
      lanes.store(dst + p * dst_step + c,
                  ca * lanes.load(g_pixel + p * step) + (cb * lanes.load(y_pixel + p * step) + cc));
    }
  });
}

void write_gradient(float* dst, const float* x, int64_t dst_step, const float* src, int64_t src_step, int channels,
                    int64_t pixels, bool accumulate) {
  for_each_vector(channels, [&](int64_t c, auto lanes) {
    for (int64_t p = 0; p < pixels; p++) {
      vec d = lanes.load(src + p * src_step + c);
      __builtin_prefetch(dst + p * dst_step + c + kAhead, 1);
      if (x) __builtin_prefetch(x + p * dst_step + c + kAhead);
      if (x) d = lanes.load(x + p * dst_step + c) > 0.0f ? d : vec{};
      if (accumulate) d += lanes.load(dst + p * dst_step + c);
      lanes.store(dst + p * dst_step + c, d);
    }
  });
}

void ImageOutput::write(float* y, int64_t y_step, const float* tile, int pixels) {
  const int step = padded(channels_);
  if (!statistics_) return copy_pixels(y, y_step, tile, step, channels_, pixels, false);
  const float inverse = 1.0f / float(pixels);
  const double total = double(count_) + pixels;
  const vec of_mean = splat(float(pixels / total)), of_delta = splat(float(double(count_) * pixels / total));
  for_each_vector(channels_, [&](int64_t c, auto lanes) {
    float *shift_row = memory_ + c, *mean_row = shift_row + step, *square_row = mean_row + step;
    const float* t = tile + c;
    float* out = y + c;
    if (count_ == 0) store(shift_row, load(t)), store(mean_row, vec{}), store(square_row, vec{});
    const vec shift = load(shift_row);
    vec sum[4] = {}, square[4] = {};
    int p = 0;
    for (; p + 4 <= pixels; p += 4) {
      for (int i = 0; i < 4; i++) {
        const vec value = load(t + int64_t(p + i) * step);
        __builtin_prefetch(out + (p + i) * y_step + kAhead, 1);
        lanes.store(out + (p + i) * y_step, value);
        sum[i] += value - shift;
      }
    }
    for (; p < pixels; p++) {
      const vec value = load(t + int64_t(p) * step);
      lanes.store(out + p * y_step, value);
      sum[0] += value - shift;
    }
    const vec mean = (sum[0] + sum[1] + (sum[2] + sum[3])) * inverse;
    for (p = 0; p + 4 <= pixels; p += 4) {
      for (int i = 0; i < 4; i++) {
        const vec d = load(t + int64_t(p + i) * step) - shift - mean;
        square[i] += d * d;
      }
    }
    for (; p < pixels; p++) {
      const vec d = load(t + int64_t(p) * step) - shift - mean;
      square[0] += d * d;
    }
    const vec delta = mean - load(mean_row);
    store(mean_row, load(mean_row) + delta * of_mean);
    store(square_row, load(square_row) + (square[0] + square[1] + (square[2] + square[3])) + delta * delta * of_delta);
  });
  count_ += pixels;
}

void ImageOutput::finish(float* out, int64_t step) const {
  const float *shift = memory_, *mean = shift + padded(channels_), *square = mean + padded(channels_);
  for (int c = 0; c < channels_; c += kLanes) {
    store_partial(out + c, load(shift + c) + load(mean + c), channels_ - c);
    store_partial(out + step + c, load(square + c), channels_ - c);
  }
}

}  // namespace pn::PN_NAMESPACE
