// ReLU - depthwise convolution - pointwise convolution in one pass over an image, and its gradients.
//
// An image is processed in tiles of a few output rows, so that everything between x and y stays in the first-level
// cache: normalised, rectified and zero-padded input rows live in a ring; the depthwise product of a tile goes to a
// buffer from which the pointwise product reads, and the statistics are gathered while y is written. The backward pass
// uses the same two products: the gradient dz of the depthwise output is a pointwise product with the transposed
// weights, and dx is a depthwise product over a ring of dz rows with the flipped kernel.
//
// All buffers hold planes of one vector of channels: [vectors][pixels][kLanes], so that a pixel is a constant distance
// from the next. Channels that fill up the last vector are zero everywhere.
#include "cpu/group.h"
#include "cpu/product.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int kMaxKernel = 7;
// Of a tile's depthwise output. Forward fits the first-level cache; backward holds too much for that anyway, and gains
// more from long tiles; but not where that cache has 32 KiB, as in processors without AVX-512.
constexpr int kForwardTileBytes = 8 << 10, kBackwardTileBytes = 16 << 10;
constexpr int kInputGradientTileBytes = (kManyRegisters ? 32 : 8) << 10;
// Vectors of a block of y's channels, at most: y goes past the cache in whole lines.
constexpr int kWidestOutput = PN_VECTOR_BYTES == 32 ? 2 : kWidest;
// Lines a step for the call beside forward; backward, whose product brings more of its own, takes two.
constexpr int kForwardLinesBeside = kManyRegisters ? 2 : 4;
constexpr int kRowsAhead = 2;  // between the row of dx being written and the one being prefetched

constexpr int kRowPixels = 8;  // of a depthwise product's register tile
// Short rows are given to the depthwise products several at a time, so that calls cost little.
constexpr int kRunPixels = 64, kRunRows = 8;
PN_INLINE int run_rows(int row_pixels) { return max(1, min(kRunPixels / row_pixels, kRunRows)); }

// A dilated convolution with stride 2 reads only the pixels with even coordinates (its padding is even): it is an
// ordinary one on that grid. After this, dilation is 2 only with stride 1.
struct Shape {
  int height, width, in_channels, out_channels;
  int step;            // grid pixel (i, j) is pixel (i * step, j * step) of x
  int grid_h, grid_w;  // extents of the grid
  int kernel, stride, dilation, padding;
  int out_h, out_w;
  int in_vectors, out_vectors;

  explicit Shape(const pn_depthwise_pointwise& a)
      : height(a.height), width(a.width), in_channels(a.in_channels), out_channels(a.out_channels) {
    const bool dilated_stride = a.stride == 2 && a.dilation == 2;
    step = dilated_stride ? 2 : 1;
    grid_h = (height + step - 1) / step;
    grid_w = (width + step - 1) / step;
    kernel = a.kernel;
    stride = dilated_stride ? 1 : a.stride;
    dilation = dilated_stride ? 1 : a.dilation;
    padding = dilation * (kernel / 2);
    out_h = (grid_h - 1) / stride + 1;
    out_w = (grid_w - 1) / stride + 1;
    in_vectors = (in_channels + L - 1) / L;
    out_vectors = (out_channels + L - 1) / L;
  }
  int64_t in_size() const { return int64_t(height) * width * in_channels; }
  int64_t out_size() const { return int64_t(out_h) * out_w * out_channels; }
  int tile_rows(int row_pixels, int vectors, int bytes) const {
    int rows = max(bytes / (row_pixels * vectors * L * 4), (31 + row_pixels) / row_pixels);
    return min(rows, out_h);
  }
};

// Rows of padded planes, row i of the image in slot i % rows: [vectors][rows][width][kLanes].
struct Ring {
  float* memory;
  int rows, width;  // rows: a power of two, so that finding a slot takes no division
  int left;         // padding columns before column 0

  static int rows_for(int rows) {
    int power = 1;
    while (power < rows) power *= 2;
    return power;
  }
  int64_t plane() const { return int64_t(rows) * width * L; }
  int64_t floats(int vectors) const { return vectors * plane(); }
  int64_t offset(int row) const { return int64_t(row & (rows - 1)) * width * L; }
  void clear_margins(int vectors, int columns) {
    for (int64_t row = 0; row < int64_t(vectors) * rows; row++) {
      float* p = memory + row * width * L;
      for (int i = 0; i < left; i++) store(p + i * L, vec{});
      for (int i = left + columns; i < width; i++) store(p + i * L, vec{});
    }
  }
};

// The rows of taps, first to end - 1, under which there are rows of the image: the others contribute nothing.
struct TapRows {
  int64_t offsets[kMaxKernel];  // of the image's row under each of them, in the ring
  int first, end;
  int weights_row;  // the row of weights of tap row 0

  // In place, because a copy would wait for all of these stores.
  PN_INLINE void set(const Ring& ring, int top, int taps, int dilation, int rows, int first_weights_row = 0) {
    weights_row = first_weights_row;
    first = top < 0 ? (dilation - 1 - top) / dilation : 0;
    int row = top + first * dilation;
    for (end = first; end < taps && row < rows; end++, row += dilation) offsets[end] = ring.offset(row);
  }
};

// Where taps are many and additions have units of their own, the depthwise products save a fifth of their
// multiply-adds: of two outputs and two taps that share an input,
//   out0 = x0 * w0 + x1 * w1, out1 = x1 * w0 + x2 * w1,
// take three products instead of four (a fast FIR algorithm; Winograd's F(2, 2)):
//   out0 = (x0 - x1) * w0 + shared, out1 = shared - (x1 - x2) * w1, shared = x1 * (w0 + w1).
// All taps use the same differences. The weights' gradient likewise:
//   g0 = x0 * d0 + x1 * d1 = (x0 - x1) * d0 + shared, g1 = x1 * d0 + x2 * d1 = shared - (x1 - x2) * d1,
//   shared = x1 * (d0 + d1).
// Taps 0 and 1, 2 and 3, ... are pairs, the last one stays alone; outputs are paired at the distance D of two taps.
template <bool kPaired, int K>
constexpr bool is_pair(int k) {  // that begins with tap k
  return kPaired && k % 2 == 0 && k + 1 < K;
}
template <int D>
constexpr bool is_first(int p) {
  return p / D % 2 == 0;
}
template <int D>
constexpr int pair_of(int p) {
  return p / (2 * D) * D + p % D;
}

// What pixel i of a row gives to the P outputs. In pairs, with x1 pixel i, it calls shared(p, k) for output p and tap
// k, which come first in theirs, first(p, k) for the same, which take the difference of pixels i - D and i, and
// second(p, k) for those second in theirs, which lose that difference; else single(p, k).
template <bool kPaired, int K, int S, int D, int P, class Single, class Shared, class First, class Second>
PN_INLINE void for_products(int i, Single single, Shared shared, First first, Second second) {
  // The output to which pixel j gives by tap k; -1: none.
  const auto output = [](int j, int k) PN_LAMBDA_INLINE {
    const int p = j - k * D;
    return p >= 0 && p % S == 0 && p / S < P ? p / S : -1;
  };
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) {
    if (is_pair<kPaired, K>(k)) {
      const int p = output(i - D, k), q = output(i - D, k + 1);
      if (p >= 0 && is_first<D>(p)) shared(p, k), first(p, k);
      if (q >= 0 && is_first<D>(q)) second(q + D, k + 1);
    } else if ((!kPaired || k + 1 == K) && output(i, k) >= 0) {
      single(output(i, k), k);
    }
  }
}

// The depthwise product, for every one of `rows` output rows with its rows of taps r:
// sum[p] = sum over r and taps k of in_r[p * S + k * D] * weights_r[k],
// given to finish(sums, row, p) for kRowPixels outputs from p on at a time, 0 <= p < count.
template <int K, int S, int D, class Finish>
PN_INLINE void for_depthwise_tiles(const float* in, const TapRows* taps, int rows, const float* weights, int count,
                                   Finish finish) {
  constexpr int P = kRowPixels, span = (P - 1) * S + (K - 1) * D + 1;
  constexpr bool kPaired = kSpareUnits && K >= 5 && S == 1;
  for (int y = 0; y < rows; y++) {
    const int64_t* offsets = taps[y].offsets + taps[y].first;
    const int tap_rows = taps[y].end - taps[y].first;
    const float* row_weights = weights + (taps[y].weights_row + taps[y].first) * K * L;
    for (int p0 = 0; p0 < count; p0 += P) {
      vec sum[P] = {}, shared[P / 2] = {};
      for (int r = 0; r < tap_rows; r++) {
        const float* row = in + offsets[r] + p0 * S * L;
        vec w[K], w_shared[K], v[span];
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) w[k] = load(row_weights + (r * K + k) * L);
#pragma GCC unroll 8
        for (int k = 0; k < K; k++)
          if (is_pair<kPaired, K>(k)) w_shared[k] = w[k] + w[k + 1];
#pragma GCC unroll 32
        for (int i = 0; i < span; i++) {
          v[i] = load(row + i * L);
          const vec difference = i >= D ? v[i - D] - v[i] : vec{};
          for_products<kPaired, K, S, D, P>(
              i, [&](int p, int k) PN_LAMBDA_INLINE { multiply_add(sum[p], v[i], w[k]); },
              [&](int p, int k) PN_LAMBDA_INLINE { shared[pair_of<D>(p)] += v[i] * w_shared[k]; },
              [&](int p, int k) PN_LAMBDA_INLINE { sum[p] += difference * w[k]; },
              [&](int p, int k) PN_LAMBDA_INLINE { sum[p] -= difference * w[k]; });
        }
      }
#pragma GCC unroll 16
      for (int p = 0; p < P; p++)
        if (kPaired) sum[p] += shared[pair_of<D>(p)];
      finish(sum, y, p0);
    }
  }
}

// Writes the product: rows out_row floats apart, pixels out_step vectors; up to the next multiple of kRowPixels.
typedef void DepthwiseRows(const float* in, const TapRows* taps, int rows, const float* weights, float* out,
                           int64_t out_row, int out_step, int count);

template <int K, int S, int D>
__attribute__((noinline)) void depthwise_rows(const float* in, const TapRows* taps, int rows, const float* weights,
                                              float* out, int64_t out_row, int out_step, int count) {
  for_depthwise_tiles<K, S, D>(in, taps, rows, weights, count,
                               [&](const vec(&sum)[kRowPixels], int row, int p0) PN_LAMBDA_INLINE {
                                 float* to = out + row * out_row + int64_t(p0) * out_step * L;
#pragma GCC unroll 16
                                 for (int p = 0; p < kRowPixels; p++) store(to + int64_t(p) * out_step * L, sum[p]);
                               });
}

// A depthwise product and its weights' gradient, which read the same pixels, for every one of `rows` output rows:
// out[p] = sum over r and taps k of in_r[p * S + k * D] * weights_r[k],
// gradient_r[k] += sum over p of in_r[p * S + k * D] * dz[p]
// for 0 <= p < count, a multiple of kRowPixels; dz is zero where there is no pixel. Rows of out follow one another, the
// rows of dz begin with row dz_row of its ring. Meanwhile it takes a step of `ahead` for every pixel, about.
typedef void DepthwiseWithGradient(const float* in, const TapRows* taps, int rows, const float* weights, float* out,
                                   const float* dz, const Ring& dz_ring, int dz_row, float* gradient, int count,
                                   Ahead* ahead);

template <int K, int S, int D>
void depthwise_with_gradient(const float* in, const TapRows* taps, int rows, const float* weights, float* out,
                             const float* dz, const Ring& dz_ring, int dz_row, float* gradient, int count,
                             Ahead* ahead) {
  // Together they keep two vectors for every tap in registers: few registers do not hold those of five taps.
  constexpr bool together = kManyRegisters || K == 3;
  if (!together) depthwise_rows<K, S, D>(in, taps, rows, weights, out, int64_t(count) * L, 1, count);
  // With seven taps the pairs would take more registers than there are.
  constexpr bool kPaired = kSpareUnits && K == 5 && S == 1;
  constexpr int P = kManyRegisters && !kPaired ? kRowPixels : 4, span = (P - 1) * S + (K - 1) * D + 1;
  constexpr int sets = (K == 3 && kManyRegisters) || (K == 5 && !kManyRegisters) ? 2 : 1;  // covers the FMA latency
  Ahead reads = *ahead;
  for (int r = 0; r < K; r++, weights += K * L, gradient += K * L) {
    vec w[K], w_shared[K], total[K][sets] = {}, total_shared[K] = {};
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      w[k] = load(weights + k * L);
      total[k][0] = load(gradient + k * L);
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; k++)
      if (is_pair<kPaired, K>(k)) w_shared[k] = w[k] + w[k + 1];
    for (int i = 0; i < rows; i++) {
      if (r < taps[i].first || r >= taps[i].end) continue;
      const bool add = r > taps[i].first;
      const float* row_in = in + taps[i].offsets[r];
      const float* row_dz = dz + dz_ring.offset(dz_row + i);
      float* row_out = out + int64_t(i) * count * L;
      for (int p0 = 0; p0 < count; p0 += P, row_in += P * S * L, row_out += P * L, row_dz += P * L) {
        for (int i = 0; i < P; i += K) reads.step();
        vec sum[P], shared[P / 2] = {}, d[P], d_shared[P / 2], v[span];
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) {
          if (together) sum[p] = add ? load(row_out + p * L) : vec{};
          d[p] = load(row_dz + p * L);
        }
#pragma GCC unroll 16
        for (int p = 0; p < P; p++)
          if (kPaired && is_first<D>(p)) d_shared[pair_of<D>(p)] = d[p] + d[p + D];
#pragma GCC unroll 32
        for (int i = 0; i < span; i++) {
          v[i] = load(row_in + i * L);
          const vec difference = i >= D ? v[i - D] - v[i] : vec{};
          for_products<kPaired, K, S, D, P>(
              i,
              [&](int p, int k) PN_LAMBDA_INLINE {
                if (together) sum[p] += v[i] * w[k];
                multiply_add(total[k][p % sets], v[i], d[p]);
              },
              [&](int p, int k) PN_LAMBDA_INLINE {
                shared[pair_of<D>(p)] += v[i] * w_shared[k];
                total_shared[k] += v[i] * d_shared[pair_of<D>(p)];
              },
              [&](int p, int k) PN_LAMBDA_INLINE {
                sum[p] += difference * w[k];
                total[k][p % sets] += difference * d[p];
              },
              [&](int p, int k) PN_LAMBDA_INLINE {
                sum[p] -= difference * w[k];
                total[k][p % sets] -= difference * d[p];
              });
        }
#pragma GCC unroll 16
        for (int p = 0; p < P && together; p++)
          store(row_out + p * L, kPaired ? sum[p] + shared[pair_of<D>(p)] : sum[p]);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      vec sum = total[k][0];
      if (sets > 1) sum += total[k][sets - 1];
      if (is_pair<kPaired, K>(k)) sum += total_shared[k];
      if (k > 0 && is_pair<kPaired, K>(k - 1)) sum += total_shared[k - 1];
      store(gradient + k * L, sum);
    }
  }
  *ahead = reads;
}

DepthwiseRows* select_rows(int taps, int stride, int dilation) {
  if (stride == 2)
    return taps == 3 ? depthwise_rows<3, 2, 1> : taps == 5 ? depthwise_rows<5, 2, 1> : depthwise_rows<7, 2, 1>;
  if (dilation == 2)
    return taps == 3 ? depthwise_rows<3, 1, 2> : taps == 5 ? depthwise_rows<5, 1, 2> : depthwise_rows<7, 1, 2>;
  switch (taps) {
    case 1:
      return depthwise_rows<1, 1, 1>;
    case 2:
      return depthwise_rows<2, 1, 1>;
    case 3:
      return depthwise_rows<3, 1, 1>;
    case 4:
      return depthwise_rows<4, 1, 1>;
    case 5:
      return depthwise_rows<5, 1, 1>;
    default:
      return depthwise_rows<7, 1, 1>;
  }
}

template <int S, int D>
DepthwiseWithGradient* select_with_gradient(int kernel) {
  return kernel == 3   ? depthwise_with_gradient<3, S, D>
         : kernel == 5 ? depthwise_with_gradient<5, S, D>
                       : depthwise_with_gradient<7, S, D>;
}
DepthwiseWithGradient* select_with_gradient(const Shape& s) {
  return s.stride == 2     ? select_with_gradient<2, 1>(s.kernel)
         : s.dilation == 2 ? select_with_gradient<1, 2>(s.kernel)
                           : select_with_gradient<1, 1>(s.kernel);
}

// x's row of grid pixels into the ring: rectified, after the pending normalisation if there is one.
void fill_row(const Shape& s, const float* x, const float* normalization, int row, const Ring& ring) {
  const int64_t stride = int64_t(s.step) * s.in_channels;
  x += int64_t(row) * s.step * s.width * s.in_channels;
  for (int v = 0; v < s.in_vectors; v++) {
    const int n = min(L, s.in_channels - v * L);
    const float* from = x + v * L;
    float* to = ring.memory + v * ring.plane() + ring.offset(row) + ring.left * L;
    with_lanes(n, [&](auto full) PN_LAMBDA_INLINE {
      if (normalization) {
        const vec scale = load_partial(normalization + v * L, n);
        const vec shift = load_partial(normalization + s.in_channels + v * L, n);
#pragma GCC unroll 4
        for (int i = 0; i < s.grid_w; i++, from += stride) {
          store(to + i * L, relu(scale * load_lanes<full.value>(from, n) + shift));
        }
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < s.grid_w; i++, from += stride) {
          store(to + i * L, relu(load_lanes<full.value>(from, n)));
        }
      }
    });
  }
}

// Calls f(taps, row, rows) for output rows oy to end - 1, some at a time, with their rows of taps in the ring of x.
template <class F>
PN_INLINE void for_runs(const Shape& s, const Ring& ring, int oy, int end, F f) {
  TapRows taps[kRunRows];
  for (int row = oy, rows; row < end; row += rows) {
    rows = min(run_rows(round_up(s.out_w, kRowPixels)), end - row);
    for (int i = 0; i < rows; i++) taps[i].set(ring, (row + i) * s.stride - s.padding, s.kernel, s.dilation, s.grid_h);
    f(taps, row, rows);
  }
}

// Output rows oy to end - 1 of the depthwise product, for all channels: rows that follow one another in every plane of
// `out`.
void depthwise(const Shape& s, const Ring& ring, DepthwiseRows* kernel, const float* weights, int oy, int end,
               float* out, int64_t plane) {
  for_runs(s, ring, oy, end, [&](const TapRows* taps, int row, int rows) PN_LAMBDA_INLINE {
    for (int v = 0; v < s.in_vectors; v++)
      kernel(ring.memory + v * ring.plane() + (ring.left - s.padding) * L, taps, rows,
             weights + v * s.kernel * s.kernel * L, out + v * plane + int64_t(row - oy) * s.out_w * L,
             int64_t(s.out_w) * L, 1, s.out_w);
  });
}

Ring input_ring(const Shape& s, int tile_rows) {
  Ring ring{};
  ring.rows = Ring::rows_for(min(s.grid_h, (tile_rows - 1) * s.stride + s.dilation * (s.kernel - 1) + 1));
  ring.left = s.padding;
  ring.width =
      max((round_up(s.out_w, kRowPixels) - 1) * s.stride + s.dilation * (s.kernel - 1) + 1, s.padding + s.grid_w);
  return ring;
}

// All rows, with room for the padding of any kernel, so that calls of different kernels can share them.
Ring whole_input(const Shape& s) {
  constexpr int padding = 2 * (kMaxKernel / 2);
  return {nullptr, Ring::rows_for(s.grid_h),
          padding + max(round_up(s.out_w, kRowPixels) * s.stride, s.grid_w) + padding, padding};
}
SharedInput shared_input(const Shape& s, const pn_depthwise_pointwise& a) {
  const int64_t bytes = 4 * whole_input(s).floats(s.in_vectors);
  return bytes > kSharedInputBytes ? SharedInput{} : SharedInput{a.x, a.x_normalization, bytes};
}

// Rows of the grid that tiles up to output row `end` read.
PN_INLINE int input_end(const Shape& s, int end) {
  return min(s.grid_h, (end - 1) * s.stride - s.padding + s.dilation * (s.kernel - 1) + 1);
}

// The rows of x that a tile up to output row `end` will read, if `filled` have been read.
PN_INLINE Ahead input_ahead(const Shape& s, const float* x, int filled, int end) {
  const int64_t row_size = int64_t(s.step) * s.width * s.in_channels;
  return {x + filled * row_size, x + (input_end(s, end) - 1) * row_size + int64_t(s.width) * s.in_channels};
}

// depthwise [K*K][C] to [vectors][K*K][kLanes].
void pack_depthwise(const Shape& s, const float* weights, float* packed) {
  const int taps = s.kernel * s.kernel;
  for (int v = 0; v < s.in_vectors; v++)
    for (int t = 0; t < taps; t++)
      store(packed + (v * taps + t) * L,
            load_partial(weights + int64_t(t) * s.in_channels + v * L, min(L, s.in_channels - v * L)));
}

int32_t check(const char* name, const pn_depthwise_pointwise* a) {
  PN_REQUIRE(
      a->variants > 0 && a->images > 0 && a->height > 0 && a->width > 0 && a->in_channels > 0 && a->out_channels > 0,
      "%s: every extent must be positive, not V %d, N %d, H %d, W %d, Cin %d, Cout %d", name, a->variants, a->images,
      a->height, a->width, a->in_channels, a->out_channels);
  PN_REQUIRE(a->kernel == 3 || a->kernel == 5 || a->kernel == 7, "%s: the kernel must be 3, 5 or 7, not %d", name,
             a->kernel);
  PN_REQUIRE(a->stride == 1 || a->stride == 2, "%s: the stride must be 1 or 2, not %d", name, a->stride);
  PN_REQUIRE(a->dilation == 1 || a->dilation == 2, "%s: the dilation must be 1 or 2, not %d", name, a->dilation);
  PN_REQUIRE(a->x && a->depthwise && a->pointwise, "%s: x, depthwise and pointwise must not be null", name);
  return PN_OK;
}

// A forward call: how it is tiled, and its packed weights.
struct ForwardCall {
  Shape s;
  DepthwiseRows* kernel;
  int tile_rows;
  bool streamed;  // y goes past the cache
  Ring ring;
  // A tile's output rows follow one another without padding; the slack takes what the register tiles compute beyond the
  // last pixel.
  int64_t plane;
  int64_t ring_size, tile_size, statistics_size, depthwise_size;
  float *depthwise, *pointwise;

  explicit ForwardCall(const pn_depthwise_pointwise& a) : s(a) {
    kernel = select_rows(s.kernel, s.stride, s.dilation);
    tile_rows = s.tile_rows(s.out_w, s.in_vectors, kForwardTileBytes);
    ring = input_ring(s, tile_rows);
    plane = (int64_t(tile_rows) * s.out_w + 16) * L;
    streamed = is_streamed(a.y, a.out_channels, a.variants * a.images * s.out_size());
    ring_size = ring.floats(s.in_vectors);
    tile_size = plane * s.in_vectors;
    statistics_size = Statistics::floats(int64_t(tile_rows) * s.out_w, s.out_vectors);
    depthwise_size = int64_t(s.in_vectors) * s.kernel * s.kernel * L;
  }
};

int32_t check_forward(const char* name, const void* args, CallNeeds* needs) {
  const pn_depthwise_pointwise* a = static_cast<const pn_depthwise_pointwise*>(args);
  if (const int32_t status = check(name, a)) return status;
  PN_REQUIRE(a->y, "%s: y must not be null", name);
  const ForwardCall call(*a);
  *needs = {a->images,
            a->variants,
            false,
            kPlanBytes<ForwardCall> + 4 * (call.depthwise_size + a->in_channels * int64_t(call.s.out_vectors) * L),
            4 * (call.ring_size + call.tile_size + call.statistics_size),
            0,
            shared_input(call.s, *a)};
  return PN_OK;
}

void prepare_forward(const void* args, void* shared) {
  const pn_depthwise_pointwise& a = *static_cast<const pn_depthwise_pointwise*>(args);
  ForwardCall& call = *static_cast<ForwardCall*>(shared);
  call = ForwardCall(a);
  call.depthwise = after_plan<ForwardCall>(shared);
  call.pointwise = call.depthwise + call.depthwise_size;
  pack_depthwise(call.s, a.depthwise, call.depthwise);
  pack_pointwise<kWidestOutput>(a.pointwise, a.in_channels, a.out_channels, false, call.pointwise);
}

void forward_reads_first(const void* args, const void* shared, int64_t image, Ahead* next) {
  const ForwardCall& call = *static_cast<const ForwardCall*>(shared);
  const pn_depthwise_pointwise& a = *static_cast<const pn_depthwise_pointwise*>(args);
  next[0] = input_ahead(call.s, a.x + image * call.s.in_size(), 0, call.tile_rows);
}

void forward_image(const CallImage& run) {
  const pn_depthwise_pointwise* a = static_cast<const pn_depthwise_pointwise*>(run.args);
  const ForwardCall& call = *static_cast<const ForwardCall*>(run.shared);
  const Shape& s = call.s;
  const int64_t image = run.image, plane = call.plane;
  const int tile_rows = call.tile_rows;
  Ring ring = run.input ? whole_input(s) : call.ring;
  ring.memory = run.input ? run.input : static_cast<float*>(run.local);
  float* tile = static_cast<float*>(run.local) + call.ring_size;
  Statistics statistics(tile + call.tile_size, s.out_vectors);
  const float* x = a->x + image * s.in_size();
  const float* normalization =
      a->x_normalization ? a->x_normalization + image / a->images * 4 * s.in_channels : nullptr;
  float* y = a->y + image * s.out_size();
  if (!run.input_is_ready) ring.clear_margins(s.in_vectors, s.grid_w);
  AheadList beside = run.beside;
  int filled = run.input_is_ready ? s.grid_h : 0;
  Ahead ahead = run.next[0];
  for (int oy = 0; oy < s.out_h; oy += tile_rows) {
    const int end = min(oy + tile_rows, s.out_h), pixels = (end - oy) * s.out_w;
    for (const int needed = input_end(s, end); filled < needed; filled++) fill_row(s, x, normalization, filled, ring);
    depthwise(s, ring, call.kernel, call.depthwise, oy, end, tile, plane);
    float* y_tile = y + int64_t(oy) * s.out_w * s.out_channels;
    if (!run.input_is_ready)
      ahead = end < s.out_h ? input_ahead(s, x, filled, min(end + tile_rows, s.out_h)) : run.next[0];
    product<kWidestOutput>(
        Planes{tile, plane, s.in_channels}, pixels, call.pointwise, s.out_vectors,
        [&]() PN_LAMBDA_INLINE {
          ahead.step();
          beside.step<kForwardLinesBeside>();
        },
        [&]<int P, int V>(const vec(&sum)[P][V], int p0, int v0) PN_LAMBDA_INLINE {
          const int count = pixels - p0;
          write_tile(sum, y_tile + int64_t(p0) * s.out_channels + v0 * L, s.out_channels, count,
                     s.out_channels - (v0 + V - 1) * L, call.streamed);
          if (a->statistics) statistics.add(sum, oy * s.out_w, p0, pixels, v0);
        });
  }
  if (call.streamed) stream_fence();
  if (a->statistics) {
    float* to = a->statistics + image * 2 * s.out_channels;
    for (int c = 0; c < s.out_channels; c += L) {
      store_partial(to + c, load(statistics.mean + c), s.out_channels - c);
      store_partial(to + s.out_channels + c, load(statistics.squares + c), s.out_channels - c);
    }
  }
}

// The gradient with respect to the grid as depthwise products over dz: grid coordinate u - padding with u = stride * t
// + phase gets sum over m of dz[t - m * dilation] * weights[phase + m * stride]: one product for every phase of rows
// and of columns.
struct Phase {
  int taps;   // of this phase
  int t;      // of its first coordinate inside the grid
  int first;  // that coordinate
  int count;  // of such coordinates
};
PN_INLINE Phase phase_of(const Shape& s, int phase, int extent) {
  const int taps = (s.kernel - phase + s.stride - 1) / s.stride;
  const int t = (s.padding - phase + s.stride - 1) / s.stride;
  const int first = t * s.stride + phase - s.padding;
  return {taps, t, first, max(0, (extent - first + s.stride - 1) / s.stride)};
}

// depthwise [K*K][C] to [vectors][column phase][row phase][row taps][column taps][kLanes], taps in reverse order.
void pack_flipped(const Shape& s, const float* weights, float* packed) {
  for (int v = 0; v < s.in_vectors; v++)
    for (int q = 0; q < s.stride; q++)
      for (int r = 0; r < s.stride; r++)
        for (int i = phase_of(s, r, 0).taps - 1; i >= 0; i--)
          for (int j = phase_of(s, q, 0).taps - 1; j >= 0; j--, packed += L) {
            const int tap = (r + i * s.stride) * s.kernel + q + j * s.stride;
            store(packed, load_partial(weights + int64_t(tap) * s.in_channels + v * L, min(L, s.in_channels - v * L)));
          }
}

// Where pixels of dx go, for one vector of channels.
struct DxPixels {
  const float* x;
  float* dx;
  int64_t step, row;           // floats from one pixel, and from one row, to the next
  int64_t ahead;               // floats from the pixel being written to the one being prefetched
  const float* normalization;  // [scale, shift, inverse deviation, mean][kLanes]
  float* sums;                 // of dx, of dx * xhat

  template <bool kSums>
  PN_INLINE void add_sums(vec sum, vec product) const {
    if (!kSums) return;
    store(sums, load(sums) + sum);
    store(sums + L, load(sums + L) + load(normalization + 2 * L) * product);
  }
};

// The same pointer, of which the compiler knows nothing: else it keeps one for every pixel of a tile.
template <class T>
PN_INLINE T* opaque(T* p) {
  asm("" : "+r"(p));
  return p;
}

enum class Dx { kAssigned, kStreamed, kAdded };  // how it is written; streamed: past the cache

// One pixel of dx: the contribution where n > 0; adds to the sums of dx and of dx * (x - mean).
template <bool kNormalized, Dx kDx, bool kSums, bool kFull>
PN_INLINE void finish_pixel(const float* x, float* dx, int64_t ahead, int lanes, const float* normalization,
                            vec contribution, vec* sum, vec* product) {
  const vec value = load_lanes<kFull>(x, lanes);
  const vec n = kNormalized ? load(normalization) * value + load(normalization + L) : value;
  vec d = n > 0.0f ? contribution : vec{};
  __builtin_prefetch(x + ahead);
  if (kDx == Dx::kStreamed) {
    stream(dx, d);
  } else {
    __builtin_prefetch(dx + ahead, 1);
    if (kDx == Dx::kAdded) d += load_lanes<kFull>(dx, lanes);
    store_lanes<kFull>(dx, d, lanes);
  }
  if (kSums) {
    *sum += d;
    *product += d * (value - load(normalization + 3 * L));
  }
}

typedef void FinishPixels(const float* contribution, int pixels, int lanes, const DxPixels& to);

template <bool kNormalized, Dx kDx, bool kSums>
void finish_pixels(const float* contribution, int pixels, int lanes, const DxPixels& to) {
  constexpr int U = 4;  // independent sums, to cover the latency of additions
  vec sum[U] = {}, product[U] = {};
  const float *x = to.x, *normalization = to.normalization;
  float* dx = to.dx;
  const int64_t step = to.step, ahead = to.ahead;
  with_lanes(lanes, [&](auto full) PN_LAMBDA_INLINE {
    const auto pixel = [&](int u) PN_LAMBDA_INLINE {
      finish_pixel<kNormalized, kDx, kSums, full.value>(x, dx, ahead, lanes, normalization, load(contribution), &sum[u],
                                                        &product[u]);
      contribution += L, x += step, dx += step;
    };
    int i = 0;
    for (; i + U <= pixels; i += U)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) pixel(u);
    for (; i < pixels; i++) pixel(0);
  });
  to.add_sums<kSums>((sum[0] + sum[1]) + (sum[2] + sum[3]), (product[0] + product[1]) + (product[2] + product[3]));
}

template <Dx kDx>
FinishPixels* select_finish(bool normalized, bool sums) {
  if (sums) return finish_pixels<true, kDx, true>;
  return normalized ? finish_pixels<true, kDx, false> : finish_pixels<false, kDx, false>;
}

// Rows of dx at once, where stride is 1: the contributions, each kRowPixels of them finished while they are in
// registers and the next are computed. Count is a multiple of kRowPixels, and the vector of channels is full.
typedef void DxRows(const float* in, const TapRows* taps, int rows, const float* weights, int count,
                    const DxPixels& to);

template <int K, int D, bool kNormalized, Dx kDx>
void dx_rows(const float* in, const TapRows* taps, int rows, const float* weights, int count, const DxPixels& to) {
  const float *x_row = to.x, *normalization = to.normalization;
  float* dx_row = to.dx;
  const int64_t step = to.step, row_size = to.row, ahead = to.ahead;
  for_depthwise_tiles<K, 1, D>(
      in, taps, rows, weights, count, [&](const vec(&contribution)[kRowPixels], int row, int p0) PN_LAMBDA_INLINE {
        const float* x = opaque(x_row + row * row_size + p0 * step);
        float* dx = opaque(dx_row + row * row_size + p0 * step);
        vec sum = vec{}, product = vec{};
#pragma GCC unroll 16
        for (int p = 0; p < kRowPixels; p++)
          finish_pixel<kNormalized, kDx, kNormalized, true>(x + p * step, dx + p * step, ahead, L, normalization,
                                                            contribution[p], &sum, &product);
        to.add_sums<kNormalized>(sum, product);
      });
}

// Null: there is none for this combination.
template <int K, int D>
DxRows* select_dx_rows(bool normalized, Dx dx) {
  if (normalized)
    return dx == Dx::kAdded      ? nullptr
           : dx == Dx::kStreamed ? dx_rows<K, D, true, Dx::kStreamed>
                                 : dx_rows<K, D, true, Dx::kAssigned>;
  return dx == Dx::kAdded ? dx_rows<K, D, false, Dx::kAdded> : dx_rows<K, D, false, Dx::kAssigned>;
}
DxRows* select_dx_rows(const Shape& s, bool normalized, Dx dx, bool sums) {
  if (s.stride != 1 || s.step != 1 || s.width % kRowPixels != 0 || s.kernel > 5 || normalized != sums) return nullptr;
  if (s.dilation == 1)
    return s.kernel == 3 ? select_dx_rows<3, 1>(normalized, dx) : select_dx_rows<5, 1>(normalized, dx);
  return s.kernel == 3 ? select_dx_rows<3, 2>(normalized, dx) : select_dx_rows<5, 2>(normalized, dx);
}

// A tile of dy: rows of `row_pixels` pixels, those beyond the image's width zero.
void load_gradient(const Shape& s, const pn_depthwise_pointwise& a, int64_t image, int oy, int end, int row_pixels,
                   float* tile, int64_t plane) {
  for (int v = 0; v < s.out_vectors; v++) {
    const int n = min(L, s.out_channels - v * L);
    vec c[3] = {};
    if (a.coefficients)
      for (int i = 0; i < 3; i++) c[i] = load_partial(a.coefficients + i * s.out_channels + v * L, n);
    with_lanes(n, [&](auto full) PN_LAMBDA_INLINE {
      for (int row = oy; row < end; row++) {
        const int64_t offset = image * s.out_size() + int64_t(row) * s.out_w * s.out_channels + v * L;
        float* out = tile + v * plane + int64_t(row - oy) * row_pixels * L;
        load_gradient_pixels<full.value, false>(a.g + offset, a.coefficients ? a.y + offset : nullptr, c,
                                                s.out_channels, 0, s.out_w, n, out);
        for (int i = s.out_w; i < row_pixels; i++) store(out + i * L, vec{});
      }
    });
  }
}

// What a backward call computes, the memory it needs for that, and its packed weights.
struct BackwardCall {
  Shape s;
  bool want_dx, want_weights;
  int tile_rows, row_pixels;
  int dx_run;     // rows of dx that are computed at a time
  int64_t plane;  // of dy and z
  Ring x_ring, dz_ring;
  Phase columns[2];  // of phase 0 and of the last one
  DepthwiseWithGradient* forward;
  DepthwiseRows* backward[2];
  FinishPixels* finish;
  DxRows* dx_at_once;  // null: the contributions first, then finish
  bool dx_streamed;
  int64_t dy_size, z_size, x_size, dz_size, contribution_size, sums_size;
  int64_t unwanted_size;  // rows of dx that nobody asked for (only their sums)
  int64_t local_size;
  int64_t taps_size, matrix_size;  // gradients of one group
  int64_t kernel_size, transposed_size;
  float *depthwise, *flipped, *transposed, *partial_sums;

  explicit BackwardCall(const pn_depthwise_pointwise& a)
      : s(a), columns{phase_of(s, 0, s.grid_w), phase_of(s, s.stride - 1, s.grid_w)} {
    want_dx = a.dx || a.gradient_sums;
    want_weights = a.d_depthwise;
    row_pixels = round_up(s.out_w, 8);
    tile_rows = s.tile_rows(row_pixels, max(s.in_vectors, s.out_vectors),
                            want_weights ? kBackwardTileBytes : kInputGradientTileBytes);
    plane = int64_t(tile_rows) * row_pixels * L;
    forward = select_with_gradient(s);
    const bool added = a.accumulate && a.dx;
    finish = added ? select_finish<Dx::kAdded>(a.x_normalization, a.gradient_sums)
                   : select_finish<Dx::kAssigned>(a.x_normalization, a.gradient_sums);
    // Who asks for sums reads dx only when those of all images are known: if these are many, it is not in the cache
    // then. It is written vector by vector, and past the cache only whole lines are written well.
    const bool large = L * 4 == 64 && a.gradient_sums && is_streamed(a.dx, s.in_channels, a.images * s.in_size());
    const Dx dx = added ? Dx::kAdded : large ? Dx::kStreamed : Dx::kAssigned;
    dx_at_once = a.dx ? select_dx_rows(s, a.x_normalization, dx, a.gradient_sums) : nullptr;
    dx_streamed = dx_at_once && dx == Dx::kStreamed;
    x_ring = input_ring(s, tile_rows);
    dz_ring.rows = Ring::rows_for(min(s.out_h, tile_rows + (phase_of(s, 0, 0).taps - 1) * s.dilation));
    dz_ring.left = 0;
    for (int q = 0; q < s.stride; q++) {
      const Phase& c = columns[q];
      backward[q] = select_rows(c.taps, 1, s.dilation);
      dz_ring.left = max(dz_ring.left, (c.taps - 1) * s.dilation - c.t);
    }
    dz_ring.width = dz_ring.left + row_pixels;
    for (int q = 0; q < s.stride; q++)
      dz_ring.width = max(dz_ring.width, dz_ring.left + columns[q].t + round_up(columns[q].count, kRowPixels));
    dy_size = plane * s.out_vectors;
    z_size = want_weights ? plane * s.in_vectors : 0;
    x_size = want_weights ? x_ring.floats(s.in_vectors) : 0;
    dz_size = dz_ring.floats(s.in_vectors);
    // What the register tiles compute beyond a row's last pixel must not fall on the next row.
    dx_run = s.width % (kRowPixels * s.stride * s.step) == 0 ? run_rows(s.width) : 1;
    contribution_size = want_dx ? int64_t(dx_run * s.width + 2 * kRowPixels * s.step) * L : 0;
    sums_size = want_dx ? int64_t(s.in_vectors) * (2 + 4) * L : 0;
    unwanted_size = want_dx && !a.dx ? int64_t(dx_run) * s.width * s.in_channels : 0;
    local_size = dy_size + z_size + x_size + dz_size + contribution_size + sums_size + unwanted_size;
    taps_size = want_weights ? int64_t(s.in_vectors) * s.kernel * s.kernel * L : 0;
    matrix_size = want_weights ? int64_t(s.in_vectors) * L * s.out_vectors * L : 0;
    kernel_size = int64_t(s.in_vectors) * s.kernel * s.kernel * L;
    transposed_size = int64_t(s.out_channels) * s.in_vectors * L;
  }
  // Where the taps of dx's first column of phase q begin in a row of dz.
  int64_t dx_column(int q) const { return (dz_ring.left + columns[q].t - (columns[q].taps - 1) * s.dilation) * L; }
  int gradient_rows() const { return want_weights ? s.kernel * s.kernel + s.in_channels : 0; }
  int64_t gradient_size() const { return taps_size + matrix_size; }
};

// Rows of dx from `row` on as far as the dz rows before `end` allow; returns the first row not done.
int emit_dx(const BackwardCall& call, const pn_depthwise_pointwise& a, int64_t image, int row, int end, const Ring& dz,
            float* contribution, float* sums, const float* normalization) {
  const Shape& s = call.s;
  const int64_t row_size = int64_t(s.width) * s.in_channels;
  float* unwanted = sums + call.sums_size;
  TapRows taps[kRunRows];
  for (int rows; row < s.height; row += rows) {
    for (rows = 0; rows < call.dx_run && row + rows < s.height; rows++) {
      const int u = (row + rows) / s.step + s.padding, t = u / s.stride, r = u % s.stride;
      if (t >= end && end < s.out_h) break;
      const bool on_grid = (row + rows) % s.step == 0;
      const int row_taps = on_grid ? (s.kernel - r + s.stride - 1) / s.stride : 0;
      taps[rows].set(dz, t - (row_taps - 1) * s.dilation, row_taps, s.dilation, s.out_h,
                     r == 0 ? 0 : (s.kernel + 1) / 2);
    }
    if (rows == 0) break;
    for (int v = 0; v < s.in_vectors; v++) {
      const int lanes = min(L, s.in_channels - v * L);
      const int64_t offset = image * s.in_size() + row * row_size + v * L;
      const DxPixels to{a.x + offset,          a.dx ? a.dx + offset : unwanted + v * L,
                        s.in_channels,         row_size,
                        kRowsAhead * row_size, normalization + v * 4 * L,
                        sums + v * 2 * L};
      const float* plane = dz.memory + v * dz.plane();
      const float* w = call.flipped + int64_t(v) * s.kernel * s.kernel * L;
      if (call.dx_at_once && lanes == L) {
        call.dx_at_once(plane + call.dx_column(0), taps, rows, w, s.width, to);
        continue;
      }
      for (int q = 0; q < s.stride; q++) {
        const Phase& c = call.columns[q];
        call.backward[q](plane + call.dx_column(q), taps, rows, w, contribution + c.first * s.step * L,
                         int64_t(s.width) * L, s.stride * s.step, c.count);
        w += s.kernel * c.taps * L;
      }
      call.finish(contribution, rows * s.width, lanes, to);
    }
  }
  return row;
}

// What the tile that begins with output row oy reads: g, y and the rows of x that tiles before it have not read.
// Without weight gradients x is read where dx is written; a call that adds to dx finds both where an earlier one left
// them.
void tile_reads(const BackwardCall& call, const pn_depthwise_pointwise& a, int64_t image, int oy, Ahead* ahead) {
  const Shape& s = call.s;
  const int end = min(oy + call.tile_rows, s.out_h);
  const int64_t offset = image * s.out_size() + int64_t(oy) * s.out_w * s.out_channels;
  const int64_t size = int64_t(end - oy) * s.out_w * s.out_channels;
  ahead[0] = {a.g + offset, a.g + offset + size};
  ahead[1] = a.coefficients ? Ahead{a.y + offset, a.y + offset + size} : Ahead{};
  const float* x = a.x + image * s.in_size();
  const int64_t rows_size = int64_t(s.stride) * s.step * s.width * s.in_channels;
  ahead[2] = call.want_weights ? input_ahead(s, x, oy == 0 ? 0 : input_end(s, oy), end)
             : a.accumulate    ? Ahead{}
                               : Ahead{x + oy * rows_size, x + min(end * rows_size, s.in_size())};
}

void backward_reads_first(const void* args, const void* shared, int64_t image, Ahead* next) {
  tile_reads(*static_cast<const BackwardCall*>(shared), *static_cast<const pn_depthwise_pointwise*>(args), image, 0,
             next);
}

void backward_image(const CallImage& run) {
  const pn_depthwise_pointwise& a = *static_cast<const pn_depthwise_pointwise*>(run.args);
  const BackwardCall& call = *static_cast<const BackwardCall*>(run.shared);
  const Shape& s = call.s;
  const int64_t image = run.image;
  float* memory = static_cast<float*>(run.local);
  float* d_depthwise = call.partial_sums + run.group * call.gradient_size();
  float* d_pointwise = d_depthwise + call.taps_size;
  if (run.begins_group)
    for (int64_t i = 0; i < call.gradient_size(); i += L) store(d_depthwise + i, vec{});
  const int kernel_taps = s.kernel * s.kernel;
  float* dy = memory;
  float* z = dy + call.dy_size;
  Ring x = call.x_ring, dz = call.dz_ring;
  x.memory = z + call.z_size;
  dz.memory = x.memory + call.x_size;
  if (run.input) {
    x = whole_input(s);
    x.memory = run.input;
  }
  float* contribution = dz.memory + call.dz_size;
  float* sums = contribution + call.contribution_size;
  float* normalization = sums + s.in_vectors * 2 * L;
  if (call.want_weights && !run.input_is_ready) x.clear_margins(s.in_vectors, s.grid_w);
  dz.clear_margins(s.in_vectors, call.row_pixels);
  for (int64_t i = 0; i < call.contribution_size + call.sums_size; i += L) store(contribution + i, vec{});
  if (call.want_dx && a.x_normalization)
    for (int v = 0; v < s.in_vectors; v++)
      for (int i = 0; i < 4; i++)
        store(normalization + (v * 4 + i) * L,
              load_partial(a.x_normalization + i * s.in_channels + v * L, min(L, s.in_channels - v * L)));

  AheadList beside = run.beside;
  int filled = run.input_is_ready ? s.grid_h : 0, emitted = 0;
  for (int oy = 0; oy < s.out_h; oy += call.tile_rows) {
    const int end = min(oy + call.tile_rows, s.out_h), rows = end - oy;
    load_gradient(s, a, image, oy, end, call.row_pixels, dy, call.plane);
    // Brought in during the product; with weight gradients, one after the other during the product, the taps and the
    // other product: all at once, lines would queue before what the arithmetic itself reads.
    Ahead ahead[3] = {run.next[0], run.next[1], run.next[2]};
    if (end < s.out_h) tile_reads(call, a, image, end, ahead);
    const bool at_once = !call.want_weights;
    for (int row = oy; row < end; row++)
      product(
          Planes{dy + int64_t(row - oy) * call.row_pixels * L, call.plane, s.out_channels}, call.row_pixels,
          call.transposed, s.in_vectors,
          [&]() PN_LAMBDA_INLINE {
            ahead[0].step();
            if (at_once) ahead[1].step(), ahead[2].step();
            beside.step<2>();
          },
          [&]<int P, int V>(const vec(&sum)[P][V], int p0, int v0) PN_LAMBDA_INLINE {
            float* out = dz.memory + v0 * dz.plane() + dz.offset(row) + (dz.left + p0) * L;
#pragma GCC unroll 16
            for (int p = 0; p < P; p++)
#pragma GCC unroll 4
              for (int v = 0; v < V; v++) store(out + v * dz.plane() + p * L, sum[p][v]);
          });
    if (call.want_weights) {
      for (const int needed = input_end(s, end); filled < needed; filled++)
        fill_row(s, a.x + image * s.in_size(), a.x_normalization, filled, x);
      for_runs(s, x, oy, end, [&](const TapRows* taps, int row, int n) PN_LAMBDA_INLINE {
        for (int v = 0; v < s.in_vectors; v++)
          call.forward(x.memory + v * x.plane() + (x.left - s.padding) * L, taps, n,
                       call.depthwise + int64_t(v) * kernel_taps * L,
                       z + v * call.plane + int64_t(row - oy) * call.row_pixels * L,
                       dz.memory + v * dz.plane() + dz.left * L, dz, row, d_depthwise + int64_t(v) * kernel_taps * L,
                       call.row_pixels, &ahead[2]);
      });
      for (int v = 0; v < s.in_vectors; v++)
        product_gradient<false>(
            z + v * call.plane, L, min(L, s.in_channels - v * L),
            [&](const float*) PN_LAMBDA_INLINE { ahead[1].step(), ahead[2].step(); }, dy, call.plane,
            rows * call.row_pixels, s.out_vectors, d_pointwise + int64_t(v) * L * s.out_vectors * L);
    }
    if (call.want_dx) emitted = emit_dx(call, a, image, emitted, end, dz, contribution, sums, normalization);
  }
  if (call.dx_streamed) stream_fence();
  if (a.gradient_sums)
    for (int v = 0; v < s.in_vectors; v++)
      for (int i = 0; i < 2; i++)
        store_partial(a.gradient_sums + (image * 2 + i) * s.in_channels + v * L, load(sums + (v * 2 + i) * L),
                      s.in_channels - v * L);
}

int32_t check_backward(const char* name, const void* args, CallNeeds* needs) {
  const pn_depthwise_pointwise* a = static_cast<const pn_depthwise_pointwise*>(args);
  if (const int32_t status = check(name, a)) return status;
  PN_REQUIRE(a->variants == 1, "%s: there must be one variant, not %d", name, a->variants);
  PN_REQUIRE(a->g, "%s: g must not be null", name);
  PN_REQUIRE(!a->coefficients || a->y, "%s: coefficients need y, which is null", name);
  PN_REQUIRE(!a->d_depthwise == !a->d_pointwise,
             "%s: needs d_depthwise and d_pointwise or neither, but only one is null", name);
  PN_REQUIRE(!a->gradient_sums || a->x_normalization, "%s: gradient_sums need x_normalization, which is null", name);
  const BackwardCall call(*a);
  const int64_t partial_size = min(a->images, kPartialSums) * call.gradient_size();
  *needs = {a->images,
            call.want_dx || call.want_weights ? 1 : 0,
            partial_size > 0,
            kPlanBytes<BackwardCall> + 4 * (2 * call.kernel_size + call.transposed_size + partial_size),
            4 * call.local_size,
            call.gradient_rows(),
            call.want_weights ? shared_input(call.s, *a) : SharedInput{}};
  return PN_OK;
}

void prepare_backward(const void* args, void* shared) {
  const pn_depthwise_pointwise& a = *static_cast<const pn_depthwise_pointwise*>(args);
  BackwardCall& call = *static_cast<BackwardCall*>(shared);
  call = BackwardCall(a);
  call.depthwise = after_plan<BackwardCall>(shared);
  call.flipped = call.depthwise + call.kernel_size;
  call.transposed = call.flipped + call.kernel_size;
  call.partial_sums = call.transposed + call.transposed_size;
  pack_depthwise(call.s, a.depthwise, call.depthwise);
  pack_flipped(call.s, a.depthwise, call.flipped);
  pack_pointwise(a.pointwise, a.out_channels, a.in_channels, true, call.transposed);
}

// Adds up the groups' gradients of one depthwise tap, or of one input channel of the pointwise weights.
void finish_gradient_row(const void* args, const void* shared, int64_t row) {
  const pn_depthwise_pointwise& a = *static_cast<const pn_depthwise_pointwise*>(args);
  const BackwardCall& call = *static_cast<const BackwardCall*>(shared);
  const Shape& s = call.s;
  const int kernel_taps = s.kernel * s.kernel, groups = min(a.images, kPartialSums);
  const auto sum_groups = [&](const float* from, float* to, int n) {
    vec sum = vec{};
    for (int g = 0; g < groups; g++) sum += load(from + g * call.gradient_size());
    store_partial(to, sum, n);
  };
  if (row < kernel_taps) {
    for (int v = 0; v < s.in_vectors; v++)
      sum_groups(call.partial_sums + (v * kernel_taps + row) * L, a.d_depthwise + row * s.in_channels + v * L,
                 s.in_channels - v * L);
    return;
  }
  row -= kernel_taps;
  for (int v = 0; v < s.out_vectors; v++)
    sum_groups(call.partial_sums + call.taps_size + (row * s.out_vectors + v) * L,
               a.d_pointwise + row * s.out_channels + v * L, s.out_channels - v * L);
}

}  // namespace

const GroupKernel depthwise_pointwise_forward_kernel = {
    "depthwise_pointwise_forward", check_forward, prepare_forward, forward_image, forward_reads_first, nullptr};
const GroupKernel depthwise_pointwise_backward_kernel = {
    "depthwise_pointwise_backward", check_backward,     prepare_backward, backward_image,
    backward_reads_first,           finish_gradient_row};

}  // namespace pn::PN_NAMESPACE
