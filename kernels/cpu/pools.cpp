// The operations without weights on an image x, one image per task: the statistics of the pooled image (and, if asked
// for, the image itself), and the gradient of both pools and the skip connection. Backward goes by rows: the gradients
// of a row of outputs are added up over all nodes that take it, and once all windows that reach an input row are known,
// they are spread over its pixels, first along the columns and then along the row.
#include "cpu/group.h"
#include "cpu/pooled_rows.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int kPools[] = {PN_POOL_MAX_3X3, PN_POOL_AVG_3X3};

PN_INLINE ivec load_positions(const uint8_t* p, int n) {
  if (n >= kLanes) return __builtin_convertvector(*reinterpret_cast<const unaligned_byte_vec*>(p), ivec);
  ivec v{};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}

// sum, plus v where the positions at p equal `position`.
PN_INLINE vec add_where(const uint8_t* p, int position, vec sum, vec v, int n) {
#if PN_VECTOR_BYTES == 64
  if (n >= kLanes) {
    const __m128i positions = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return vec(_mm512_mask_add_ps(__m512(sum), _mm_cmpeq_epi8_mask(positions, _mm_set1_epi8(char(position))),
                                  __m512(sum), __m512(v)));
  }
#endif
  return sum + (load_positions(p, n) == position ? v : vec{});
}

// Adds a row of pixels to the statistics of the `before` pixels above it. The deviations are taken from the mean so far
// (first row: the first pixel), which keeps them small: with s and q their sums, the mean moves by s / (before +
// pixels), and the sum of squares about the new mean grows by q - s^2 / (before + pixels) (Chan et al. 1983).
void add_statistics(const float* y, int64_t before, int pixels, int channels, float* mean, float* squares) {
  const vec inverse = splat(1.0f / float(before + pixels));
  for_vectors(channels, [&](int64_t c, int lanes) {
    const vec shift = load_partial(before ? mean + c : y + c, lanes);
    vec s0{}, s1{}, q0{}, q1{};
    int p = 0;
    for (; p + 2 <= pixels; p += 2) {
      const vec d0 = load_partial(y + int64_t(p) * channels + c, lanes) - shift;
      const vec d1 = load_partial(y + int64_t(p + 1) * channels + c, lanes) - shift;
      s0 += d0, q0 += d0 * d0;
      s1 += d1, q1 += d1 * d1;
    }
    if (p < pixels) {
      const vec d = load_partial(y + int64_t(p) * channels + c, lanes) - shift;
      s0 += d, q0 += d * d;
    }
    s0 += s1, q0 += q1;
    const vec old = before ? load_partial(squares + c, lanes) : vec{};
    store_partial(mean + c, shift + s0 * inverse, lanes);
    store_partial(squares + c, old + relu(q0 - s0 * (s0 * inverse)),
                  lanes);  // relu: rounding must not make it negative
  });
}

PoolShape shape_of(const pn_pool* a) { return {a->height, a->width, a->channels, a->stride}; }

// A row of the pooled image, in whole cache lines.
int64_t pooled_floats(const PoolShape& shape) { return (shape.out_row() + 15) / 16 * 16; }

// Row oy of the pooled image x, of both kinds at once: `maxima` and `averages`, each null if not wanted.
void pooled_row(const PoolShape& shape, const float* x, int oy, float* maxima, float* averages) {
  const auto pool = [&](auto max) PN_LAMBDA_INLINE {
    with_rows(shape, oy, [&](auto rows, int64_t top) PN_LAMBDA_INLINE {
      for_vectors(shape.channels, [&](int64_t c, int lanes) PN_LAMBDA_INLINE {
        pool_row<rows.value, max.value>(shape, x + top, c, lanes,
                                        [&](int ox, vec maximum, vec sum, vec share) PN_LAMBDA_INLINE {
                                          const int64_t i = int64_t(ox) * shape.channels + c;
                                          if (max.value) store_partial(maxima + i, maximum, lanes);
                                          if (averages) store_partial(averages + i, sum * share, lanes);
                                        });
      });
    });
  };
  maxima ? pool(Constant<true>{}) : pool(Constant<false>{});
}

int64_t forward_bytes(const PoolShape& shape) { return 2 * 4 * pooled_floats(shape); }

// memory: forward_bytes.
void forward_image(const pn_pool* a, int64_t image, char* memory) {
  const PoolShape shape = shape_of(a);
  float* rows[] = {nullptr, reinterpret_cast<float*>(memory), reinterpret_cast<float*>(memory) + pooled_floats(shape)};
  const int out_height = shape.out_height(), out_width = shape.out_width(), channels = a->channels;
  const float* x = a->x + image * a->height * shape.row();
  for (int oy = 0; oy < out_height; oy++) {
    float* y[3] = {};
    for (const int pooling : kPools)
      y[pooling] = a->y[pooling]            ? a->y[pooling] + (image * out_height + oy) * shape.out_row()
                   : a->statistics[pooling] ? rows[pooling]
                                            : nullptr;
    pooled_row(shape, x, oy, y[PN_POOL_MAX_3X3], y[PN_POOL_AVG_3X3]);
    for (const int pooling : kPools) {
      if (!a->statistics[pooling]) continue;
      float* mean = a->statistics[pooling] + image * 2 * channels;
      add_statistics(y[pooling], int64_t(oy) * out_width, out_width, channels, mean, mean + channels);
    }
  }
}

bool is_taken(const pn_pool* a, int pooling) {
  bool taken = false;
  for (int i = 0; i < a->gradient_count; i++) taken |= a->gradients[i].coefficients[pooling] != nullptr;
  return taken;
}

// A row of outputs of an image: of every y that some node takes, by pn_pooling, its values and where its gradient goes
// to; null otherwise.
struct GradientRow {
  const float* y[3];
  float* dy[3];
  float average_share;  // what the average's gradient is multiplied by
  bool accumulate;      // the skip connection's gradient
};

// For `Pixels` pixels and a vector of channels, from element i of the row on. g_row: where the row begins in every g.
// slope, constant: of every y the sums over the nodes of b and c.
template <int Pixels>
PN_INLINE void add_gradients(const pn_pool* a, const GradientRow& row, int64_t g_row, int64_t i, int64_t c,
                             const vec* slope, const vec* constant, int lanes) {
  const int channels = a->channels;
  vec sums[3][Pixels];
#pragma GCC unroll 3
  for (int k = 0; k < 3; k++)
    for (int p = 0; p < Pixels; p++)
      sums[k][p] = row.dy[k] ? slope[k] * load_partial(row.y[k] + i + p * channels, lanes) + constant[k] : vec{};
  for (int n = 0; n < a->gradient_count; n++) {
    const pn_pool_gradient& gradient = a->gradients[n];
    const float* from = gradient.g + g_row + i;
    vec g[Pixels];
    for (int p = 0; p < Pixels; p++) {
      __builtin_prefetch(from + p * channels + kPoolAhead);
      g[p] = load_partial(from + p * channels, lanes);
    }
#pragma GCC unroll 3
    for (int k = 0; k < 3; k++)
      if (gradient.coefficients[k]) {
        const vec factor = load_partial(gradient.coefficients[k] + c, lanes);
        for (int p = 0; p < Pixels; p++) sums[k][p] += factor * g[p];
      }
  }
#pragma GCC unroll 3
  for (int k = 0; k < 3; k++)
    for (int p = 0; p < Pixels && row.dy[k]; p++) {
      float* dy = row.dy[k] + i + p * channels;
      if (k == PN_POOL_AVG_3X3) sums[k][p] *= splat(row.average_share);
      if (k == PN_POOL_NONE && row.accumulate) sums[k][p] += load_partial(dy, lanes);
      store_partial(dy, sums[k][p], lanes);
    }
}

// The gradient of every y is the sum over the nodes that take it of a * g + b * y + c. oy: which row of outputs.
void gradient_row(const pn_pool* a, int64_t image, int oy, const GradientRow& row) {
  constexpr int kPixels = 4;
  const int channels = a->channels, out_width = out_extent(a->width, a->stride);
  const int64_t g_row = (image * out_extent(a->height, a->stride) + oy) * out_width * channels;
  for_vectors(channels, [&](int64_t c, int lanes) PN_LAMBDA_INLINE {
    vec slope[3]{}, constant[3]{};
    for (int n = 0; n < a->gradient_count; n++)
      for (int k = 0; k < 3; k++)
        if (const float* coefficients = a->gradients[n].coefficients[k]) {
          slope[k] += load_partial(coefficients + channels + c, lanes);
          constant[k] += load_partial(coefficients + 2 * channels + c, lanes);
        }
    int ox = 0;
    for (; ox + kPixels <= out_width; ox += kPixels)
      add_gradients<kPixels>(a, row, g_row, int64_t(ox) * channels + c, c, slope, constant, lanes);
    for (; ox < out_width; ox++) add_gradients<1>(a, row, g_row, int64_t(ox) * channels + c, c, slope, constant, lanes);
    // The share is that of the inner columns.
    for (ox = 0; row.dy[PN_POOL_AVG_3X3] && ox < out_width; ox += max(1, out_width - 1)) {
      float* edge = row.dy[PN_POOL_AVG_3X3] + int64_t(ox) * channels + c;
      store_partial(edge, load_partial(edge, lanes) * splat(3 / float(taps_inside(ox, a->width, a->stride).count)),
                    lanes);
    }
  });
}

// The windows that contain position i of one dimension: outputs first .. first + count - 1. Position i is tap `tap` of
// the first window, and `stride` less in each one after.
struct Containing {
  int first, count, tap;
};
PN_INLINE Containing windows_of(int i, int out, int stride) {
  const int first = max(0, (i + stride - 2) / stride);
  return {first, min(out - 1, (i + 1) / stride) - first + 1, i + 1 - first * stride};
}

// sum = the sum over Rows rows of windows of the gradients that go to an input row: of the maximum, those that were
// taken from it.
template <bool Max, int Rows>
void add_rows(const float* const* dy, const uint8_t* const* rows, int tap, int stride, int64_t n, float* sums) {
  const float* dys[Rows];
  const uint8_t* rows_of[Rows];
  for (int k = 0; k < Rows; k++) dys[k] = dy[k], rows_of[k] = rows[k];
  for_vectors(n, [&](int64_t i, int lanes) PN_LAMBDA_INLINE {
    vec sum{};
    for (int k = 0; k < Rows; k++) {
      const vec v = load_partial(dys[k] + i, lanes);
      sum = Max ? add_where(rows_of[k] + i, tap - k * stride, sum, v, lanes) : sum + v;
    }
    store_partial(sums + i, sum, lanes);
  });
}

// dx (+)= the same along the row, over Columns windows: for every stride-th of `pixels` pixels. sums, columns: at the
// first window of the first pixel.
template <bool Max, int Columns>
void add_columns(const float* sums, const uint8_t* columns, int tap, int stride, int channels, int pixels,
                 bool accumulate, float* dx) {
  // With stride 1 the row is flat.
  const int64_t n = int64_t(stride == 1 ? pixels : 1) * channels;
  for (int64_t pixel = 0; pixel < int64_t(pixels) * channels; pixel += n)
    for_vectors(n, [&](int64_t i, int lanes) PN_LAMBDA_INLINE {
      float* to = dx + pixel * stride + i;
      vec sum = accumulate ? load_partial(to, lanes) : vec{};
      for (int k = 0; k < Columns; k++) {
        const int64_t at = pixel + i + k * channels;
        const vec v = load_partial(sums + at, lanes);
        sum = Max ? add_where(columns + at, tap - k * stride, sum, v, lanes) : sum + v;
      }
      store_partial(to, sum, lanes);
    });
}

// The gradients of the last three rows of windows of one pool, on their way to the rows of the input.
template <bool Max>
class Windows {
 public:
  static int64_t bytes(const PoolShape& shape) {
    return 4 * (3 * pooled_floats(shape) + padded_floats(shape)) + (Max ? 3 * pooled_floats(shape) : 0);
  }

  Windows(const PoolShape& shape, char* memory)
      : shape_(shape),
        sums_(reinterpret_cast<float*>(memory)),
        dy_(sums_ + padded_floats(shape)),
        rows_(reinterpret_cast<uint8_t*>(dy_ + 3 * pooled_floats(shape))) {
    memset(sums_, 0, size_t(4 * padded_floats(shape)));
  }

  // Of a row of windows: the gradients, and of the maximum the rows of the windows that it was taken from.
  float* dy(int oy) { return dy_ + oy % 3 * pooled_floats(shape_); }
  uint8_t* rows(int oy) { return rows_ + oy % 3 * pooled_floats(shape_); }

  // dx (+)= the share of row iy of the input, once all windows that contain it are there. columns: of the maxima along
  // this row (see MaximumRows).
  void spread(int iy, const uint8_t* columns, bool accumulate, float* dx) {
    const int channels = shape_.channels, stride = shape_.stride, width = shape_.width;
    const Containing windows = windows_of(iy, shape_.out_height(), stride);
    const float* dys[3];
    const uint8_t* rows_of[3];
    for (int k = 0; k < windows.count; k++) {
      dys[k] = dy(windows.first + k);
      rows_of[k] = rows(windows.first + k);
    }
    const auto add = windows.count == 3 ? add_rows<Max, 3> : windows.count == 2 ? add_rows<Max, 2> : add_rows<Max, 1>;
    add(dys, rows_of, windows.tap, stride, shape_.out_row(), sums_ + channels);
    for (int phase = 0; phase < min(stride, width); phase++) {
      // The windows of a pixel far from the edges; the zeros beside the sums make them those of the others.
      const Containing inner = windows_of(2 + phase, 4, stride);
      const int64_t column = int64_t(inner.first - 2 / stride) * channels;
      const auto add = inner.count == 3   ? add_columns<Max, 3>
                       : inner.count == 2 ? add_columns<Max, 2>
                                          : add_columns<Max, 1>;
      add(sums_ + channels + column, Max ? columns + column : nullptr, inner.tap, stride, channels,
          (width - phase + stride - 1) / stride, accumulate, dx + phase * channels);
    }
  }

 private:
  static int64_t padded_floats(const PoolShape& shape) { return (shape.out_row() + 2 * shape.channels + 15) / 16 * 16; }

  const PoolShape shape_;
  float* const sums_;  // of the windows that contain a row, by column of windows; a pixel of zeros on either side
  float* const dy_;
  uint8_t* const rows_;
};

int64_t backward_bytes(const PoolShape& shape) {
  return 2 * 4 * pooled_floats(shape) + MaximumRows::bytes(shape) + Windows<true>::bytes(shape) +
         Windows<false>::bytes(shape);
}

// memory: backward_bytes.
void backward_image(const pn_pool* a, int64_t image, char* memory) {
  const PoolShape shape = shape_of(a);
  const bool max_taken = is_taken(a, PN_POOL_MAX_3X3), avg_taken = is_taken(a, PN_POOL_AVG_3X3),
             skip_taken = is_taken(a, PN_POOL_NONE);
  const float* x = a->x + image * a->height * shape.row();
  float* dx = a->dx + image * a->height * shape.row();
  float* maximum_row = reinterpret_cast<float*>(memory);
  float* average_row = maximum_row + pooled_floats(shape);
  memory += 2 * 4 * pooled_floats(shape);
  MaximumRows maxima(shape, x, 0, memory);
  memory += MaximumRows::bytes(shape);
  Windows<true> max_windows(shape, memory);
  Windows<false> avg_windows(shape, memory + Windows<true>::bytes(shape));
  int ready = 0;  // rows of outputs whose gradients are known
  for (int iy = 0; iy < a->height; iy++) {
    const Containing rows = windows_of(iy, shape.out_height(), a->stride);
    for (; ready < rows.first + rows.count; ready++) {
      GradientRow row{};
      if (max_taken) {
        maxima.next(maximum_row, max_windows.rows(ready));
        row.y[PN_POOL_MAX_3X3] = maximum_row;
        row.dy[PN_POOL_MAX_3X3] = max_windows.dy(ready);
      }
      if (avg_taken) {
        pooled_row(shape, x, ready, nullptr, average_row);
        row.y[PN_POOL_AVG_3X3] = average_row;
        row.dy[PN_POOL_AVG_3X3] = avg_windows.dy(ready);
        row.average_share = 1 / float(3 * taps_inside(ready, a->height, a->stride).count);
      }
      if (skip_taken) {
        row.y[PN_POOL_NONE] = x + ready * shape.row();
        row.dy[PN_POOL_NONE] = dx + ready * shape.row();
        row.accumulate = a->accumulate;
      }
      gradient_row(a, image, ready, row);
    }
    bool accumulate = a->accumulate || skip_taken;
    if (max_taken) max_windows.spread(iy, maxima.columns(iy), accumulate, dx + iy * shape.row());
    accumulate |= max_taken;
    if (avg_taken) avg_windows.spread(iy, nullptr, accumulate, dx + iy * shape.row());
  }
}

int32_t check(const pn_pool* a, const char* name) {
  PN_REQUIRE(a->variants >= 1 && a->images >= 1 && a->height >= 1 && a->width >= 1 && a->channels >= 1,
             "%s: every extent must be positive, not V %d, N %d, H %d, W %d, C %d", name, a->variants, a->images,
             a->height, a->width, a->channels);
  PN_REQUIRE(a->stride == 1 || a->stride == 2, "%s: stride must be 1 or 2, not %d", name, a->stride);
  return PN_OK;
}

// What the first rows are computed from, as far as pooling prefetches nothing itself.
void reads_first(const void* args, const void*, int64_t image, Ahead* next) {
  const pn_pool* a = static_cast<const pn_pool*>(args);
  const int64_t size = int64_t(a->height) * a->width * a->channels;
  next[0] = {a->x + image * size, a->x + image * size + min<int64_t>(size, kPoolAhead)};
}

int32_t check_forward(const char* name, const void* args, CallNeeds* needs) {
  const pn_pool* a = static_cast<const pn_pool*>(args);
  if (const int32_t status = check(a, name)) return status;
  PN_REQUIRE(a->x, "%s: x is null", name);
  PN_REQUIRE(!a->y[PN_POOL_NONE] && !a->statistics[PN_POOL_NONE], "%s: what is not pooled has no y and no statistics",
             name);
  bool wanted = false;
  for (const int pooling : kPools) wanted |= a->y[pooling] || a->statistics[pooling];
  *needs = {a->images, wanted ? a->variants : 0, false, 0, forward_bytes(shape_of(a)), 0};
  return PN_OK;
}

void run_forward(const CallImage& run) {
  forward_image(static_cast<const pn_pool*>(run.args), run.image, static_cast<char*>(run.local));
}

int32_t check_backward(const char* name, const void* args, CallNeeds* needs) {
  const pn_pool* a = static_cast<const pn_pool*>(args);
  if (const int32_t status = check(a, name)) return status;
  PN_REQUIRE(a->variants == 1, "%s: takes one variant, not %d", name, a->variants);
  PN_REQUIRE(a->x, "%s: x is null", name);
  PN_REQUIRE(a->gradients && a->gradient_count >= 1, "%s: there are no gradients", name);
  for (int i = 0; i < a->gradient_count; i++) {
    const pn_pool_gradient& gradient = a->gradients[i];
    PN_REQUIRE(gradient.g, "%s: g of gradient %d is null", name, i);
    PN_REQUIRE(gradient.coefficients[0] || gradient.coefficients[1] || gradient.coefficients[2],
               "%s: gradient %d has no coefficients", name, i);
    PN_REQUIRE(!gradient.coefficients[PN_POOL_NONE] || a->stride == 1,
               "%s: a skip connection has stride 1, but gradient %d is of stride %d", name, i, a->stride);
  }
  *needs = {a->images, a->dx ? 1 : 0, false, 0, backward_bytes(shape_of(a)), 0};
  return PN_OK;
}

void run_backward(const CallImage& run) {
  backward_image(static_cast<const pn_pool*>(run.args), run.image, static_cast<char*>(run.local));
}

}  // namespace

const GroupKernel pool_3x3_forward_kernel = {"pool_3x3_forward", check_forward, nullptr,
                                             run_forward,        reads_first,   nullptr};
const GroupKernel pool_3x3_backward_kernel = {"pool_3x3_backward", check_backward, nullptr,
                                              run_backward,        reads_first,    nullptr};

}  // namespace pn::PN_NAMESPACE
