// Pooling 3x3 with padding 1, one image per task: the statistics of the pooled image (and, if asked for, the image
// itself), and the gradient. Backward goes by rows of the input: it keeps the gradients of three output rows, and every
// input pixel gathers its share from the windows that contain it, so that each row of dx is touched once.
#include <string.h>

#include "cpu/group.h"
#include "cpu/pooled_rows.h"

namespace pn::PN_NAMESPACE {

namespace {

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

template <bool Max>
void forward_image(const pn_pool* a, int64_t image, float* memory) {
  const PoolShape shape = shape_of(a);
  const int out_height = shape.out_height(), out_width = shape.out_width(), channels = a->channels;
  const float* x = a->x + image * a->height * shape.row();
  for (int oy = 0; oy < out_height; oy++) {
    float* y = a->y ? a->y + (image * out_height + oy) * shape.out_row() : memory;
    pool_rows(shape, x, oy, 1, memory + pooled_floats(shape), Max ? y : nullptr, Max ? nullptr : y);
    if (!a->statistics) continue;
    float* mean = a->statistics + image * 2 * channels;
    add_statistics(y, int64_t(oy) * out_width, out_width, channels, mean, mean + channels);
  }
}

// The gradients of three output rows, and for the maximum the positions that they go to: whole rows with a pixel of
// zeros on either side, so that all input pixels of a row lie in windows alike.
struct GradientRing {
  float* dy;
  uint8_t* argmax;
  int64_t pitch;
  static int64_t pitch_of(const pn_pool* a) { return int64_t(out_extent(a->width, a->stride) + 2) * a->channels; }
  static int64_t bytes(const pn_pool* a) { return round_up(int(3 * 5 * pitch_of(a)), 64); }
  GradientRing(const pn_pool* a, void* memory)
      : dy(static_cast<float*>(memory)), argmax(static_cast<uint8_t*>(memory) + 12 * pitch_of(a)), pitch(pitch_of(a)) {
    memset(memory, 0, size_t(bytes(a)));
  }
};

bool any_coefficients(const pn_pool* a) {
  bool any = false;
  for (int i = 0; i < a->gradient_count; i++) any |= a->gradients[i].coefficients != nullptr;
  return any;
}

// dy = the sum over the consumers of a * g + b * y + c, of output row oy; for the average divided by the number of
// pixels in the window. y: the pooled row, null if nobody needs it.
template <bool Max>
void gradient_row(const pn_pool* a, int64_t image, int oy, const float* y, const GradientRing& ring) {
  const int channels = a->channels, out_width = out_extent(a->width, a->stride);
  const int64_t out = (image * out_extent(a->height, a->stride) + oy) * out_width * channels;
  float* dy = ring.dy + oy % 3 * ring.pitch + channels;
  // The average divides the inner columns of a row by one number and the outer ones, if they have fewer taps, by
  // another.
  const float taps = float(taps_inside(oy, a->height, a->stride).count);
  const vec share = splat(Max ? 1 : 1 / (3 * taps));
  for_vectors(channels, [&](int64_t c, int lanes) {
    vec slope{}, constant{};
    for (int i = 0; y && i < a->gradient_count; i++)
      if (const float* coefficients = a->gradients[i].coefficients) {
        slope += load_partial(coefficients + channels + c, lanes);
        constant += load_partial(coefficients + 2 * channels + c, lanes);
      }
    slope *= share, constant *= share;
    for (int k = 0; k < a->gradient_count; k++) {
      const float* coefficients = a->gradients[k].coefficients;
      const vec factor = coefficients ? share * load_partial(coefficients + c, lanes) : share;
      const float* g = a->gradients[k].g + out + c;
      const auto add = [&](auto value) PN_LAMBDA_INLINE {
        for (int ox = 0; ox < out_width; ox++) {
          const int64_t i = int64_t(ox) * channels;
          __builtin_prefetch(g + i + kPoolAhead);
          store_partial(dy + c + i, value(i) + factor * load_partial(g + i, lanes), lanes);
        }
      };
      if (k > 0)
        add([&](int64_t i) PN_LAMBDA_INLINE { return load_partial(dy + c + i, lanes); });
      else if (y)
        add([&](int64_t i) PN_LAMBDA_INLINE { return slope * load_partial(y + c + i, lanes) + constant; });
      else
        add([](int64_t) PN_LAMBDA_INLINE { return vec{}; });
    }
    if (!Max) {
      for (int ox = 0; ox < out_width; ox += max(1, out_width - 1)) {
        float* edge = dy + int64_t(ox) * channels + c;
        store_partial(edge, load_partial(edge, lanes) * splat(3 / float(taps_inside(ox, a->width, a->stride).count)),
                      lanes);
      }
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

// Row by row of the input. memory: backward_bytes.
template <bool Max>
void backward_image(const pn_pool* a, int64_t image, char* memory) {
  const PoolShape shape = shape_of(a);
  const int channels = a->channels, stride = a->stride, width = a->width, out_height = shape.out_height();
  const GradientRing ring(a, memory);
  float* y = reinterpret_cast<float*>(memory + GradientRing::bytes(a));
  float* pool_memory = y + pooled_floats(shape);
  const float* x = a->x + image * a->height * shape.row();
  MaximumRows<true> maxima(shape, x, 0, pool_memory);
  const bool needs_y = any_coefficients(a);
  float* dx = a->dx + image * a->height * width * channels;
  int ready = 0;  // output rows whose gradients have been in the ring
  for (int iy = 0; iy < a->height; iy++) {
    const Containing rows = windows_of(iy, out_height, stride);
    for (; ready < rows.first + rows.count; ready++) {
      if (Max)
        maxima.next(y, ring.argmax + ready % 3 * ring.pitch + channels);
      else if (needs_y)
        pool_rows(shape, x, ready, 1, pool_memory, nullptr, y);
      gradient_row<Max>(a, image, ready, needs_y ? y : nullptr, ring);
    }
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
  const PoolShape shape = shape_of(a);
  *needs = {a->images,
            a->y || a->statistics ? a->variants : 0,
            false,
            0,
            4 * pooled_floats(shape) + MaximumRows<false>::bytes(shape),
            0};
  return PN_OK;
}

template <bool Max>
void run_forward(const CallImage& run) {
  forward_image<Max>(static_cast<const pn_pool*>(run.args), run.image, static_cast<float*>(run.local));
}

template <bool Max>
int32_t check_backward(const char* name, const void* args, CallNeeds* needs) {
  const pn_pool* a = static_cast<const pn_pool*>(args);
  if (const int32_t status = check(a, name)) return status;
  PN_REQUIRE(a->variants == 1, "%s: takes one variant, not %d", name, a->variants);
  PN_REQUIRE(a->x, "%s: x is null", name);
  PN_REQUIRE(a->gradients && a->gradient_count >= 1, "%s: there are no gradients", name);
  for (int i = 0; i < a->gradient_count; i++) PN_REQUIRE(a->gradients[i].g, "%s: g of gradient %d is null", name, i);
  const PoolShape shape = shape_of(a);
  *needs = {a->images,
            a->dx ? 1 : 0,
            false,
            0,
            GradientRing::bytes(a) + 4 * pooled_floats(shape) + MaximumRows<true>::bytes(shape),
            0};
  return PN_OK;
}

template <bool Max>
void run_backward(const CallImage& run) {
  backward_image<Max>(static_cast<const pn_pool*>(run.args), run.image, static_cast<char*>(run.local));
}

}  // namespace

const GroupKernel max_pool_3x3_forward_kernel = {"max_pool_3x3_forward", check_forward, nullptr,
                                                 run_forward<true>,      reads_first,   nullptr};
const GroupKernel max_pool_3x3_backward_kernel = {"max_pool_3x3_backward", check_backward<true>, nullptr,
                                                  run_backward<true>,      reads_first,          nullptr};
const GroupKernel avg_pool_3x3_forward_kernel = {"avg_pool_3x3_forward", check_forward, nullptr,
                                                 run_forward<false>,     reads_first,   nullptr};
const GroupKernel avg_pool_3x3_backward_kernel = {"avg_pool_3x3_backward", check_backward<false>, nullptr,
                                                  run_backward<false>,     reads_first,           nullptr};

}  // namespace pn::PN_NAMESPACE
