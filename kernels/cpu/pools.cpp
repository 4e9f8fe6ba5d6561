// Pooling 3x3 with padding 1, forward and backward, of one image per task.
//
// Forward is separable: every input row is reduced horizontally once into a ring of three row buffers, and an output
// row combines up to three of them. Taking the first maximum along the rows and then the first row with the largest
// value gives the first maximum in row-major order. Rows are flat arrays of pixels * channels wherever neighbours are a
// constant distance apart, so that any channel count fills the vectors. Backward walks along an output row, with the
// shares of the input pixels that later windows also contain in registers, and adds them to the three input rows.
#include "cpu/group.h"

namespace pn::PN_NAMESPACE {

namespace {

typedef uint8_t byte_vec __attribute__((vector_size(kLanes)));
typedef uint8_t unaligned_byte_vec __attribute__((vector_size(kLanes), aligned(1), may_alias));

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

PN_INLINE ivec load_positions(const uint8_t* p, int n) {
  if (n >= kLanes) return __builtin_convertvector(*reinterpret_cast<const unaligned_byte_vec*>(p), ivec);
  ivec v{};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}

// Calls f(i, lanes) for the vectors of 0..n-1; all but the last with a constant number of lanes.
template <class F>
PN_INLINE void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, int(n - i));
}

// Reduces `count` horizontally neighbouring pixels, `channels` floats apart, to their sum, or to the maximum and its
// column 0..2.
template <bool Max, bool Positions, int Count>
void reduce_columns(const float* x, int channels, int first, int64_t n, float* values, int32_t* columns) {
  for_vectors(n, [&](int64_t i, int lanes) {
    vec best = load_partial(x + i, lanes);
    ivec column = ivec{} + first;
    for (int k = 1; k < Count; k++) {
      const vec v = load_partial(x + i + k * channels, lanes);
      if constexpr (Max) {
        const ivec better = beats(v, best);
        best = better ? v : best;
        if constexpr (Positions) column = better ? ivec{} + (first + k) : column;
      } else {
        best += v;
      }
    }
    store_partial(values + i, best, lanes);
    if constexpr (Positions) store(columns + i, column);
  });
}

template <bool Max, bool Positions>
void reduce_row(const pn_pool* a, const float* x, float* values, int32_t* columns) {
  const int channels = a->channels, out_width = out_extent(a->width, a->stride);
  for (int ox = 0, run; ox < out_width; ox += run) {
    // With stride 1 all windows but the outer two are one flat run.
    run = a->stride == 1 && ox == 1 && out_width > 2 ? out_width - 2 : 1;
    const Taps taps = taps_inside(ox, a->width, a->stride);
    const float* first = x + int64_t(ox * a->stride - 1 + taps.first) * channels;
    const int64_t out = int64_t(ox) * channels, n = int64_t(run) * channels;
    const auto reduce = taps.count == 3   ? reduce_columns<Max, Positions, 3>
                        : taps.count == 2 ? reduce_columns<Max, Positions, 2>
                                          : reduce_columns<Max, Positions, 1>;
    reduce(first, channels, taps.first, n, values + out, columns + out);
  }
}

// Combines the rows of reduced columns to n outputs.
template <bool Max, bool Positions, int Count>
void combine_rows(const float* const* values, const int32_t* const* columns, int first, int64_t n, float factor,
                  float* y, uint8_t* argmax) {
  for_vectors(n, [&](int64_t i, int lanes) {
    vec best = load_partial(values[0] + i, lanes);
    ivec position{};
    if constexpr (Positions) position = load(columns[0] + i) + 3 * first;
    for (int k = 1; k < Count; k++) {
      const vec v = load_partial(values[k] + i, lanes);
      if constexpr (Max) {
        const ivec better = beats(v, best);
        best = better ? v : best;
        if constexpr (Positions) position = better ? load(columns[k] + i) + 3 * (first + k) : position;
      } else {
        best += v;
      }
    }
    if constexpr (!Max) best *= splat(factor);
    store_partial(y + i, best, lanes);
    if constexpr (Positions) store_positions(argmax + i, position, lanes);
  });
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

// A thread's three rows of floats and of positions. Positions are stored in whole vectors, so a row has one to spare.
struct Rows {
  float* values;
  int32_t* positions;
  int64_t pitch;
  static int64_t pitch_of(int64_t row) { return (row + 2 * kLanes - 1) / kLanes * kLanes; }
  static int64_t bytes(int64_t row) { return 6 * pitch_of(row) * 4; }
  Rows(void* memory, int64_t row)
      : values(static_cast<float*>(memory)),
        positions(static_cast<int32_t*>(memory) + 3 * pitch_of(row)),
        pitch(pitch_of(row)) {}
};

template <bool Max, bool Positions>
void forward_image(const pn_pool* a, int64_t image, const Rows& rows) {
  const int channels = a->channels, out_height = out_extent(a->height, a->stride);
  const int out_width = out_extent(a->width, a->stride);
  const int64_t row = int64_t(a->width) * channels, out_row = int64_t(out_width) * channels;
  const float* x = a->x + image * a->height * row;
  float* y = a->y + image * out_height * out_row;
  uint8_t* argmax = Positions ? a->argmax + image * out_height * out_row : nullptr;
  int reduced = 0;  // input rows in the ring so far
  for (int oy = 0; oy < out_height; oy++, y += out_row) {
    const Taps taps = taps_inside(oy, a->height, a->stride);
    const int top = oy * a->stride - 1 + taps.first;
    const float* values[3];
    const int32_t* columns[3];
    for (int k = 0; k < taps.count; k++) {
      const int64_t slot = (top + k) % 3 * rows.pitch;
      values[k] = rows.values + slot;
      columns[k] = rows.positions + slot;
    }
    for (; reduced < top + taps.count; reduced++) {
      const int64_t slot = reduced % 3 * rows.pitch;
      reduce_row<Max, Positions>(a, x + reduced * row, rows.values + slot, rows.positions + slot);
    }
    const auto combine = taps.count == 3   ? combine_rows<Max, Positions, 3>
                         : taps.count == 2 ? combine_rows<Max, Positions, 2>
                                           : combine_rows<Max, Positions, 1>;
    if (Max) {
      combine(values, columns, taps.first, out_row, 1, y, argmax);
    } else {
      for (int ox = 0, run; ox < out_width; ox += run) {
        run = ox == 1 && out_width > 2 ? out_width - 2 : 1;  // all inner windows have three columns
        const int count = taps.count * taps_inside(ox, a->width, a->stride).count;
        combine(values, columns, taps.first, int64_t(run) * channels, 1.0f / float(count), y + int64_t(ox) * channels,
                argmax);
        for (int k = 0; k < taps.count; k++) values[k] += int64_t(run) * channels;
      }
    }
    if (a->statistics) {
      float* mean = a->statistics + image * 2 * channels;
      add_statistics(y, int64_t(oy) * out_width, out_width, channels, mean, mean + channels);
    }
    if (Positions) argmax += out_row;
  }
}

// What one output row adds to the three input rows that its windows cover.
struct RowGradient {
  const float* g;
  const float* y;           // null without coefficients
  const uint8_t* argmax;    // null for the average
  float* dx[3];             // a row outside the image is one of scratch memory
  bool add[3];              // else the row is assigned
  float inverse_counts[4];  // average: 1 / pixels of a window with 1..3 columns
};

template <bool Max, int Stride>
void scatter_row(const pn_pool* a, const RowGradient& row) {
  const int channels = a->channels, width = a->width, out_width = out_extent(width, Stride);
  for_vectors(channels, [&](int64_t c, int lanes) {
    vec factor = splat(1), slope{}, constant{};
    if (row.y) {
      factor = load_partial(a->coefficients + c, lanes);
      slope = load_partial(a->coefficients + channels + c, lanes);
      constant = load_partial(a->coefficients + 2 * channels + c, lanes);
    }
    const auto put = [&](int ky, int ix, vec share) {
      float* to = row.dx[ky] + int64_t(ix) * channels + c;
      store_partial(to, row.add[ky] ? share + load_partial(to, lanes) : share, lanes);
    };
    vec left[3]{};   // stride 1: shares of input pixel ox - 1 so far
    vec right[3]{};  // shares of the last input pixel of the window before
    for (int ox = 0; ox < out_width; ox++) {
      const int64_t at = int64_t(ox) * channels + c;
      vec dy = load_partial(row.g + at, lanes);
      if (row.y) dy = factor * dy + slope * load_partial(row.y + at, lanes) + constant;
      ivec position{};
      if constexpr (Max)
        position = load_positions(row.argmax + at, lanes);
      else
        dy *= splat(row.inverse_counts[taps_inside(ox, width, Stride).count]);
      for (int ky = 0; ky < 3; ky++) {
        vec share[3];
        for (int kx = 0; kx < 3; kx++) share[kx] = !Max ? dy : position == 3 * ky + kx ? dy : vec{};
        if constexpr (Stride == 1) {
          if (ox > 0) put(ky, ox - 1, left[ky] + share[0]);
          left[ky] = right[ky] + share[1];
        } else {
          if (ox > 0) put(ky, 2 * ox - 1, right[ky] + share[0]);
          put(ky, 2 * ox, share[1]);
        }
        right[ky] = share[2];
      }
    }
    for (int ky = 0; ky < 3; ky++) {
      if (Stride == 1)
        put(ky, width - 1, left[ky]);
      else if (width % 2 == 0)
        put(ky, width - 1, right[ky]);
    }
  });
}

template <bool Max>
void backward_image(const pn_pool* a, int64_t image, float* outside) {
  const int out_height = out_extent(a->height, a->stride), out_width = out_extent(a->width, a->stride);
  const int64_t in_row = int64_t(a->width) * a->channels, out_row = int64_t(out_width) * a->channels;
  float* dx = a->dx + image * a->height * in_row;
  int begun = 0;  // input rows that have been assigned
  for (int oy = 0; oy < out_height; oy++) {
    const int64_t out = (image * out_height + oy) * out_row;
    RowGradient row{a->g + out, a->coefficients ? a->y + out : nullptr, Max ? a->argmax + out : nullptr, {}, {}, {}};
    for (int ky = 0; ky < 3; ky++) {
      const int iy = oy * a->stride - 1 + ky;
      const bool inside = iy >= 0 && iy < a->height;
      row.dx[ky] = inside ? dx + iy * in_row : outside;
      row.add[ky] = inside && (a->accumulate || iy < begun);
    }
    begun = oy * a->stride + 2;
    const int taps = taps_inside(oy, a->height, a->stride).count;
    for (int columns = 1; columns <= 3; columns++) row.inverse_counts[columns] = 1.0f / float(taps * columns);
    if (a->stride == 1)
      scatter_row<Max, 1>(a, row);
    else
      scatter_row<Max, 2>(a, row);
  }
}

int32_t check(const pn_pool* a, const char* name) {
  PN_REQUIRE(a->variants >= 1 && a->images >= 1 && a->height >= 1 && a->width >= 1 && a->channels >= 1,
             "%s: every extent must be positive, not V %d, N %d, H %d, W %d, C %d", name, a->variants, a->images,
             a->height, a->width, a->channels);
  PN_REQUIRE(a->stride == 1 || a->stride == 2, "%s: stride must be 1 or 2, not %d", name, a->stride);
  return PN_OK;
}

int64_t row_bytes(const pn_pool* a) { return Rows::bytes(int64_t(out_extent(a->width, a->stride)) * a->channels); }

int32_t check_forward(const char* name, const void* args, CallNeeds* needs) {
  const pn_pool* a = static_cast<const pn_pool*>(args);
  if (const int32_t status = check(a, name)) return status;
  PN_REQUIRE(a->x && a->y, "%s: x or y is null", name);
  *needs = {a->images, a->variants, false, 0, row_bytes(a), 0};
  return PN_OK;
}

template <bool Max>
void run_forward(const CallImage& run) {
  const pn_pool* a = static_cast<const pn_pool*>(run.args);
  const Rows rows(run.local, int64_t(out_extent(a->width, a->stride)) * a->channels);
  if (Max && a->argmax)
    forward_image<Max, Max>(a, run.image, rows);
  else
    forward_image<Max, false>(a, run.image, rows);
}

template <bool Max>
int32_t check_backward(const char* name, const void* args, CallNeeds* needs) {
  const pn_pool* a = static_cast<const pn_pool*>(args);
  if (const int32_t status = check(a, name)) return status;
  PN_REQUIRE(a->variants == 1, "%s: takes one variant, not %d", name, a->variants);
  PN_REQUIRE(a->g, "%s: g is null", name);
  PN_REQUIRE(!Max || a->argmax, "%s: argmax is null", name);
  PN_REQUIRE(!a->coefficients || a->y, "%s: y is null, but the gradient's coefficients need it", name);
  *needs = {a->images, a->dx ? 1 : 0, false, 0, int64_t(a->width) * a->channels * 4, 0};
  return PN_OK;
}

template <bool Max>
void run_backward(const CallImage& run) {
  backward_image<Max>(static_cast<const pn_pool*>(run.args), run.image, static_cast<float*>(run.local));
}

}  // namespace

const GroupKernel max_pool_3x3_forward_kernel = {"max_pool_3x3_forward", check_forward, nullptr,
                                                 run_forward<true>,      nullptr,       nullptr};
const GroupKernel max_pool_3x3_backward_kernel = {
    "max_pool_3x3_backward", check_backward<true>, nullptr, run_backward<true>, nullptr, nullptr};
const GroupKernel avg_pool_3x3_forward_kernel = {"avg_pool_3x3_forward", check_forward, nullptr,
                                                 run_forward<false>,     nullptr,       nullptr};
const GroupKernel avg_pool_3x3_backward_kernel = {
    "avg_pool_3x3_backward", check_backward<false>, nullptr, run_backward<false>, nullptr, nullptr};

}  // namespace pn::PN_NAMESPACE
