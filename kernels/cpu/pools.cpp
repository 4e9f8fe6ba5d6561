// The operations without weights on an image x, one image per task: the statistics of the pooled image (and, if asked
// for, the image itself), and the gradient of both pools and the skip connection.
//
// Backward goes by rows of windows. Pooling is separable: every input row is reduced along itself once, and a window
// combines up to three of them. The gradients of a row of windows are added up over all nodes that take it, and those
// of maxima given to the first of the three rows that has the maximum; once all windows that reach an input row are
// known, its gradients go to its pixels, those of maxima to the first of the three that has the row's. So they go to
// the first maximum in row-major order.
#include <string.h>

#include "cpu/group.h"
#include "cpu/pooled_rows.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int kPools[] = {PN_POOL_MAX_3X3, PN_POOL_AVG_3X3};

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

// Whether v, which takes part in a maximum, is the maximum, unless one before it is: not-a-number wins.
PN_INLINE mask is_maximum(vec v, vec maximum) { return equal(v, maximum) | is_nan(v); }

// A row of windows, and rows of the input that it reaches, the first of them first. Of what no node takes the pointers
// are null.
struct WindowRow {
  int64_t g;                 // where it begins in every g
  const float* maxima[3];    // of the windows' columns, along each of the rows
  const float* averages[3];  // the same
  const float* before[3];    // gradients of the rows' maxima, from the rows of windows above,
  float* with[3];            // and with this row's
  float* average_gradient;   // of every pixel of the window
  const float* x;            // of the skip connection: the row itself,
  float* dx;                 // and where its gradient goes
};

// For `Pixels` windows and a vector of channels, from element i of the row on, and `Rows` rows of the input. The
// gradient of every y is the sum over the nodes that take it of a * g + b * y + c; slope and constant are the sums of b
// and c. share: the reciprocal of the number of pixels in a window.
template <int Rows, int Pixels>
PN_INLINE void add_gradients(const pn_pool* a, const WindowRow& row, int64_t i, int64_t c, const vec* slope,
                             const vec* constant, vec share, int lanes) {
  const int channels = a->channels;
  const bool taken[] = {row.dx != nullptr, row.maxima[0] != nullptr, row.average_gradient != nullptr};
  vec maxima[Pixels] = {}, gradients[3][Pixels] = {};
#pragma GCC unroll 4
  for (int p = 0; p < Pixels; p++) {
    const int64_t at = i + p * channels;
    if (taken[PN_POOL_NONE])
      gradients[PN_POOL_NONE][p] = slope[PN_POOL_NONE] * load_partial(row.x + at, lanes) + constant[PN_POOL_NONE];
    if (taken[PN_POOL_MAX_3X3]) {
      maxima[p] = load_partial(row.maxima[0] + at, lanes);
      for (int r = 1; r < Rows; r++) maxima[p] = maximum(maxima[p], load_partial(row.maxima[r] + at, lanes));
      gradients[PN_POOL_MAX_3X3][p] = slope[PN_POOL_MAX_3X3] * maxima[p] + constant[PN_POOL_MAX_3X3];
    }
    if (taken[PN_POOL_AVG_3X3]) {
      vec sum = load_partial(row.averages[0] + at, lanes);
      for (int r = 1; r < Rows; r++) sum += load_partial(row.averages[r] + at, lanes);
      gradients[PN_POOL_AVG_3X3][p] = slope[PN_POOL_AVG_3X3] * (sum * splat(1.0f / Rows)) + constant[PN_POOL_AVG_3X3];
    }
  }
  for (int n = 0; n < a->gradient_count; n++) {
    const pn_pool_gradient& gradient = a->gradients[n];
    const float* from = gradient.g + row.g + i;
    vec g[Pixels];
#pragma GCC unroll 4
    for (int p = 0; p < Pixels; p++) {
      __builtin_prefetch(from + p * channels + kPoolAhead);
      g[p] = load_partial(from + p * channels, lanes);
    }
#pragma GCC unroll 3
    for (int k = 0; k < 3; k++)
      if (gradient.coefficients[k]) {
        const vec factor = load_partial(gradient.coefficients[k] + c, lanes);
#pragma GCC unroll 4
        for (int p = 0; p < Pixels; p++) gradients[k][p] += factor * g[p];
      }
  }
#pragma GCC unroll 4
  for (int p = 0; p < Pixels; p++) {
    const int64_t at = i + p * channels;
    if (taken[PN_POOL_NONE]) {
      vec d = gradients[PN_POOL_NONE][p];
      if (a->accumulate) d += load_partial(row.dx + at, lanes);
      store_partial(row.dx + at, d, lanes);
    }
    if (taken[PN_POOL_AVG_3X3]) store_partial(row.average_gradient + at, gradients[PN_POOL_AVG_3X3][p] * share, lanes);
    if (taken[PN_POOL_MAX_3X3]) {
      mask left = ~mask{};
      for (int r = 0; r < Rows; r++) {
        mask here = left;  // in the last row whatever was not in the others
        if (r + 1 < Rows) here &= is_maximum(load_partial(row.maxima[r] + at, lanes), maxima[p]);
        left &= ~here;
        const vec before = load_partial(row.before[r] + at, lanes);
        store_partial(row.with[r] + at, add_where(here, before, gradients[PN_POOL_MAX_3X3][p]), lanes);
      }
    }
  }
}

template <int Rows>
void add_gradients(const pn_pool* a, const PoolShape& shape, const WindowRow& row) {
  constexpr int kPixels = kManyRegisters ? 4 : 2;
  const int channels = a->channels, out_width = shape.out_width(), inner = shape.last_inner();
  for_vectors(channels, [&](int64_t c, int lanes) PN_LAMBDA_INLINE {
    vec slope[3]{}, constant[3]{};
    for (int n = 0; n < a->gradient_count; n++)
      for (int k = 0; k < 3; k++)
        if (const float* coefficients = a->gradients[n].coefficients[k]) {
          slope[k] += load_partial(coefficients + channels + c, lanes);
          constant[k] += load_partial(coefficients + 2 * channels + c, lanes);
        }
    const auto add = [&](auto pixels, int ox) PN_LAMBDA_INLINE {
      const int columns = ox == 0 || ox > inner ? taps_inside(ox, shape.width, shape.stride).count : 3;
      add_gradients<Rows, pixels.value>(a, row, int64_t(ox) * channels + c, c, slope, constant,
                                        splat(1.0f / float(Rows * columns)), lanes);
    };
    add(Constant<1>{}, 0);
    int ox = 1;
    for (; ox + kPixels - 1 <= inner; ox += kPixels) add(Constant<kPixels>{}, ox);
    for (; ox < out_width; ox++) add(Constant<1>{}, ox);
  });
}

// The windows that contain position i of one dimension: outputs first .. first + count - 1.
struct Containing {
  int first, count;
};
PN_INLINE Containing windows_of(int i, int out, int stride) {
  const int first = max(0, (i + stride - 2) / stride);
  return {first, min(out - 1, (i + 1) / stride) - first + 1};
}

// dx (+)= the gradients of an input row x, once all windows that reach it are known: of its maxima along the row, and
// of the averages of up to three rows of windows. maxima, averages[0]: null if no node takes them.
template <int Stride>
void spread_row(const PoolShape& shape, const float* x, const float* maxima, const float* gradients,
                const float* const* averages, bool accumulate, float* dx) {
  const int channels = shape.channels, width = shape.width, out_width = shape.out_width();
  const auto spread = [&](auto of_maxima, auto of_averages, int64_t c, int lanes) PN_LAMBDA_INLINE {
    const auto at = [&](const float* row, int i)
                        PN_LAMBDA_INLINE { return load_partial(row + int64_t(i) * channels + c, lanes); };
    const auto put = [&](int ix, vec d) PN_LAMBDA_INLINE {
      if (accumulate) d += at(dx, ix);
      store_partial(dx + int64_t(ix) * channels + c, d, lanes);
    };
    vec before{}, here{};  // of the pixels left and in the middle of a window, from the windows before
    vec x_left{};
    const auto window = [&](auto has_left, auto has_right, int ox) PN_LAMBDA_INLINE {
      vec left{}, middle{}, right{};
      if (of_averages.value) left = middle = right = at(averages[0], ox) + at(averages[1], ox) + at(averages[2], ox);
      if (of_maxima.value) {
        const vec largest = at(maxima, ox), gradient = at(gradients, ox), x_middle = at(x, ox * Stride);
        if (Stride == 2 && has_left.value) x_left = at(x, ox * Stride - 1);
        mask in_left{}, in_middle = ~mask{};
        if (has_left.value) in_left = is_maximum(x_left, largest);
        if (has_right.value) in_middle = is_maximum(x_middle, largest);
        in_middle &= ~in_left;
        left = add_where(in_left, left, gradient);
        middle = add_where(in_middle, middle, gradient);
        right = add_where(~(in_left | in_middle), right, gradient);
        x_left = x_middle;
      }
      if (has_left.value) put(ox * Stride - 1, before + left);
      if (Stride == 1) {
        before = here + middle, here = right;
      } else {
        put(ox * Stride, middle);
        before = right;
      }
    };
    const Constant<true> there{};
    const Constant<false> missing{};
    if (width == 1) {
      window(missing, missing, 0);
    } else {
      window(missing, there, 0);
      const int inner = shape.last_inner();
      for (int ox = 1; ox <= inner; ox++) window(there, there, ox);
      if (inner + 1 < out_width) window(there, missing, inner + 1);
    }
    if (Stride == 1 || width % 2 == 0) put(width - 1, before);
  };
  for_vectors(channels, [&](int64_t c, int lanes) PN_LAMBDA_INLINE {
    if (maxima && averages[0])
      spread(Constant<true>{}, Constant<true>{}, c, lanes);
    else if (maxima)
      spread(Constant<true>{}, Constant<false>{}, c, lanes);
    else
      spread(Constant<false>{}, Constant<true>{}, c, lanes);
  });
}

// Three rows each of an input row's maxima, averages and gradients of maxima, and of gradients of averages; one of
// zeros.
int64_t backward_bytes(const PoolShape& shape) { return (4 * 3 + 1) * 4 * pooled_floats(shape); }

// memory: backward_bytes.
void backward_image(const pn_pool* a, int64_t image, char* memory) {
  const PoolShape shape = shape_of(a);
  const int height = shape.height, stride = shape.stride, out_height = shape.out_height();
  const bool max_taken = is_taken(a, PN_POOL_MAX_3X3), avg_taken = is_taken(a, PN_POOL_AVG_3X3),
             skip_taken = is_taken(a, PN_POOL_NONE);
  const float* x = a->x + image * height * shape.row();
  float* dx = a->dx + image * height * shape.row();
  const int64_t pitch = pooled_floats(shape);
  float *maxima = reinterpret_cast<float*>(memory), *averages = maxima + 3 * pitch, *gradients = averages + 3 * pitch,
        *average_gradients = gradients + 3 * pitch, *zeros = average_gradients + 3 * pitch;
  const auto in_ring = [pitch](float* ring, int row) { return ring + row % 3 * pitch; };
  memset(zeros, 0, size_t(4 * pitch));
  const PoolShape one_row{1, shape.width, shape.channels, stride};
  const auto spread = stride == 1 ? spread_row<1> : spread_row<2>;
  int reached = 0, done = 0;  // rows of the input: by windows so far, and that have got all of their gradient
  for (int oy = 0; oy < out_height; oy++) {
    const Taps taps = taps_inside(oy, height, stride);
    const int top = oy * stride - 1 + taps.first;
    WindowRow row{};
    row.g = (image * out_height + oy) * shape.out_row();
    for (int r = 0; r < taps.count && (max_taken || avg_taken); r++) {
      const int iy = top + r;
      float* row_maxima = max_taken ? in_ring(maxima, iy) : nullptr;
      float* row_averages = avg_taken ? in_ring(averages, iy) : nullptr;
      if (iy >= reached) pooled_row(one_row, x + iy * shape.row(), 0, row_maxima, row_averages);
      row.maxima[r] = row_maxima;
      row.averages[r] = row_averages;
      row.with[r] = in_ring(gradients, iy);
      row.before[r] = iy >= reached ? zeros : row.with[r];
    }
    reached = top + taps.count;
    if (avg_taken) row.average_gradient = in_ring(average_gradients, oy);
    if (skip_taken) {
      row.x = x + oy * shape.row();
      row.dx = dx + oy * shape.row();
    }
    with_rows(shape, oy, [&](auto rows, int64_t) { add_gradients<rows.value>(a, shape, row); });
    if (!max_taken && !avg_taken) continue;
    for (const int known = oy + 1 < out_height ? (oy + 1) * stride - 1 : height; done < known; done++) {
      const Containing windows = windows_of(done, out_height, stride);
      const float* of_averages[3]{};
      for (int k = 0; k < 3 && avg_taken; k++)
        of_averages[k] = k < windows.count ? in_ring(average_gradients, windows.first + k) : zeros;
      spread(shape, x + done * shape.row(), max_taken ? in_ring(maxima, done) : nullptr, in_ring(gradients, done),
             of_averages, a->accumulate || skip_taken, dx + done * shape.row());
    }
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
