// Pooling 3x3 with padding 1, forward and backward, of one image per task.
//
// Forward is separable: every input row is reduced horizontally once into a ring of three row buffers, and an output
// row combines up to three of them. Taking the first maximum along the rows and then the first row with the largest
// value gives the first maximum in row-major order. Rows are flat arrays of pixels * channels wherever neighbours are a
// constant distance apart, so that any channel count fills the vectors. Backward goes
// by rows of the input as well: it keeps the gradients of three output rows, and every input pixel gathers its share
// from the windows that contain it, so that each row of dx is touched once.
#include <string.h>

#include "cpu/group.h"

namespace pn::PN_NAMESPACE {

namespace {

typedef uint8_t byte_vec __attribute__((vector_size(kLanes)));
typedef uint8_t unaligned_byte_vec __attribute__((vector_size(kLanes), aligned(1), may_alias));

constexpr int kAhead = 1024;  // floats between reading and prefetching

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
    __builtin_prefetch(x + i + kAhead);
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
    __builtin_prefetch(y + i + kAhead, 1);
    if (Positions) __builtin_prefetch(argmax + i + kAhead, 1);
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

// The gradients of three output rows, and for the maximum the positions that they go to: whole rows with a pixel of
// zeros on either side, so that all input pixels of a row lie in windows alike.
struct GradientRing {
  float* dy;
  uint8_t* argmax;
  int64_t pitch;
  static int64_t pitch_of(const pn_pool* a) { return int64_t(out_extent(a->width, a->stride) + 2) * a->channels; }
  static int64_t bytes(const pn_pool* a) { return 3 * 5 * pitch_of(a); }
  GradientRing(const pn_pool* a, void* memory)
      : dy(static_cast<float*>(memory)), argmax(static_cast<uint8_t*>(memory) + 12 * pitch_of(a)), pitch(pitch_of(a)) {
    memset(memory, 0, size_t(bytes(a)));
  }
};

// dy = a * g + b * y + c of output row oy, for the average divided by the number of pixels in the window.
template <bool Max>
void gradient_row(const pn_pool* a, int64_t image, int oy, const GradientRing& ring, Ahead (&next)[3]) {
  const int channels = a->channels, out_width = out_extent(a->width, a->stride);
  const int64_t out = (image * out_extent(a->height, a->stride) + oy) * out_width * channels;
  const float *g = a->g + out, *y = a->coefficients ? a->y + out : nullptr;
  const int64_t slot = oy % 3 * ring.pitch + channels;
  float* dy = ring.dy + slot;
  // The average divides the inner columns of a row by one number and the outer ones, if they have fewer taps, by
  // another.
  const float taps = float(taps_inside(oy, a->height, a->stride).count);
  const vec share = splat(Max ? 1 : 1 / (3 * taps));
  for_vectors(channels, [&](int64_t c, int lanes) {
    vec factor = share, slope{}, constant{};
    if (y) {
      factor *= load_partial(a->coefficients + c, lanes);
      slope = share * load_partial(a->coefficients + channels + c, lanes);
      constant = share * load_partial(a->coefficients + 2 * channels + c, lanes);
    }
    for (int ox = 0; ox < out_width; ox++) {
      const int64_t i = int64_t(ox) * channels + c;
      vec value = factor * load_partial(g + i, lanes);
      if (y) {
        __builtin_prefetch(y + i + kAhead);
        value += slope * load_partial(y + i, lanes) + constant;
      }
      store_partial(dy + i, value, lanes);
    }
    if (!Max) {
      for (int ox = 0; ox < out_width; ox += max(1, out_width - 1)) {
        float* edge = dy + int64_t(ox) * channels + c;
        store_partial(edge, load_partial(edge, lanes) * splat(3 / float(taps_inside(ox, a->width, a->stride).count)),
                      lanes);
      }
    }
  });
  for (int ox = 0; ox < out_width; ox++)
    for (Ahead& ahead : next) ahead.step();
  if (Max) {
    for (int64_t i = 0; i < int64_t(out_width) * channels; i += 64) __builtin_prefetch(a->argmax + out + kAhead + i);
    memcpy(ring.argmax + slot, a->argmax + out, size_t(out_width) * channels);
  }
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

// Where the gradients of every stride-th input pixel of a row come from.
struct Sources {
  const float* dy[3];        // rows, at the first window of the first pixel
  const uint8_t* argmax[3];  // the same; null for the average
  int position;  // of the pixel in that window; `stride` less in the next column, 3 * stride less in the next row
  int stride, channels;
  bool accumulate;
};

// dx (+)= the sum over Rows x Columns windows of dy, for the maximum only of those that have taken it from this pixel.
template <bool Max, int Rows, int Columns>
void gather(const Sources& sources, int64_t pixels, float* dx) {
  const Sources from = sources;
  // With stride 1 the row is flat.
  const int64_t channels = from.channels, n = from.stride == 1 ? pixels * channels : channels;
  for (int64_t pixel = 0; pixel < pixels * channels; pixel += n)
    for_vectors(n, [&](int64_t i, int lanes) {
      float* to = dx + pixel * from.stride + i;
      vec sum = from.accumulate ? load_partial(to, lanes) : vec{};
      for (int row = 0; row < Rows; row++)
        for (int column = 0; column < Columns; column++) {
          const int64_t at = pixel + i + column * channels;
          const vec dy = load_partial(from.dy[row] + at, lanes);
          if constexpr (Max)
            sum = add_where(from.argmax[row] + at, from.position - (3 * row + column) * from.stride, sum, dy, lanes);
          else
            sum += dy;
        }
      store_partial(to, sum, lanes);
    });
}

template <bool Max>
constexpr decltype(&gather<Max, 1, 1>) gather_functions[3][3] = {
    {gather<Max, 1, 1>, gather<Max, 1, 2>, gather<Max, 1, 3>},
    {gather<Max, 2, 1>, gather<Max, 2, 2>, gather<Max, 2, 3>},
    {gather<Max, 3, 1>, gather<Max, 3, 2>, gather<Max, 3, 3>}};

// Row by row of the input.
template <bool Max>
void backward_image(const pn_pool* a, int64_t image, const GradientRing& ring, const Ahead* after) {
  Ahead next[3] = {after[0], after[1], after[2]};
  const int channels = a->channels, stride = a->stride, width = a->width, out_height = out_extent(a->height, stride);
  float* dx = a->dx + image * a->height * width * channels;
  int ready = 0;  // output rows whose gradients have been in the ring
  for (int iy = 0; iy < a->height; iy++) {
    const Containing rows = windows_of(iy, out_height, stride);
    for (; ready < rows.first + rows.count; ready++) gradient_row<Max>(a, image, ready, ring, next);
    for (int phase = 0; phase < min(stride, width); phase++, dx += channels) {
      // The windows of a pixel far from the edges; the ring's zeros make them those of the others.
      const Containing columns = windows_of(2 + phase, 4, stride);
      const int64_t column = int64_t(columns.first - 2 / stride + 1) * channels;
      Sources from{{}, {}, 3 * rows.tap + columns.tap, stride, channels, a->accumulate != 0};
      for (int k = 0; k < rows.count; k++) {
        const int64_t at = (rows.first + k) % 3 * ring.pitch + column;
        from.dy[k] = ring.dy + at;
        from.argmax[k] = ring.argmax + at;
      }
      gather_functions<Max>[rows.count - 1][columns.count - 1](from, (width - phase + stride - 1) / stride, dx);
    }
    dx += int64_t(width - min(stride, width)) * channels;
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

// The first rows of y and argmax, as far as backward_image's own prefetching begins after them.
template <bool Max>
void backward_reads_first(const void* args, const void*, int64_t image, Ahead* next) {
  const pn_pool* a = static_cast<const pn_pool*>(args);
  const int64_t size = int64_t(out_extent(a->height, a->stride)) * out_extent(a->width, a->stride) * a->channels;
  if (a->coefficients) next[0] = {a->y + image * size, a->y + image * size + min<int64_t>(size, kAhead)};
  if (Max) {
    const float* argmax = reinterpret_cast<const float*>(a->argmax + image * size);
    next[1] = {argmax, argmax + min<int64_t>(size, kAhead) / 4};
  }
}

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
  *needs = {a->images, a->dx ? 1 : 0, false, 0, GradientRing::bytes(a), 0};
  return PN_OK;
}

template <bool Max>
void run_backward(const CallImage& run) {
  const pn_pool* a = static_cast<const pn_pool*>(run.args);
  backward_image<Max>(a, run.image, GradientRing(a, run.local), run.next);
}

}  // namespace

const GroupKernel max_pool_3x3_forward_kernel = {"max_pool_3x3_forward", check_forward, nullptr,
                                                 run_forward<true>,      nullptr,       nullptr};
const GroupKernel max_pool_3x3_backward_kernel = {"max_pool_3x3_backward", check_backward<true>,       nullptr,
                                                  run_backward<true>,      backward_reads_first<true>, nullptr};
const GroupKernel avg_pool_3x3_forward_kernel = {"avg_pool_3x3_forward", check_forward, nullptr,
                                                 run_forward<false>,     nullptr,       nullptr};
const GroupKernel avg_pool_3x3_backward_kernel = {"avg_pool_3x3_backward", check_backward<false>,       nullptr,
                                                  run_backward<false>,     backward_reads_first<false>, nullptr};

}  // namespace pn::PN_NAMESPACE
