// The products of the kernels with a pointwise convolution, over a tile of pixels that lies in the nearest cache, how
// gradients come into such a tile, and what is done with the products' sums while these are in registers.
//
// A tile holds planes of one vector of channels: [vectors][pixels][kLanes], so that a pixel is a constant distance from
// the next.
#pragma once

#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

constexpr int L = kLanes;

// Register tiles. AVX-512 has 32 registers, the narrower x86 sets have 16 (NEON's 32 are not worth a third set of
// numbers).
constexpr bool kManyRegisters = PN_VECTOR_BYTES == 64;
// Pixels (in the gradient: input channels) of a product's tile of one, two or three vectors of output channels.
constexpr int tile_extent(int vectors) { return (vectors == 1 ? 8 : 4) * (kManyRegisters ? 2 : 1); }

// How a number of vectors is divided for the pointwise products: the width of the next block.
PN_INLINE int block_width(int vectors) { return vectors == 3 || vectors > 4 ? 3 : min(vectors, 2); }

// Calls f(Constant<width>, first vector) for every block.
template <class F>
PN_INLINE void for_blocks(int vectors, F f) {
  for (int v = 0; v < vectors;) {
    const int width = block_width(vectors - v);
    if (width == 3)
      f(Constant<3>{}, v);
    else if (width == 2)
      f(Constant<2>{}, v);
    else
      f(Constant<1>{}, v);
    v += width;
  }
}

// Calls f with a constant that tells whether the vector is full; for f's loads and stores of `lanes` lanes.
template <class F>
PN_INLINE void with_lanes(int lanes, F f) {
  if (lanes >= L)
    f(Constant<true>{});
  else
    f(Constant<false>{});
}
template <bool kFull>
PN_INLINE vec load_lanes(const float* p, int lanes) {
  return kFull ? load(p) : load_partial(p, lanes);
}
template <bool kFull>
PN_INLINE void store_lanes(float* p, vec v, int lanes) {
  kFull ? store(p, v) : store_partial(p, v, lanes);
}

// What a product reads: planes of a tile, of which `depth` channels are in use.
struct Planes {
  const float* a;
  int64_t plane;
  int depth;

  PN_INLINE Planes from(int pixel) const { return {a + int64_t(pixel) * L, plane, depth}; }
  static constexpr bool kRelu = false;  // the product is of the values through ReLU
  // f(count, pixel) for runs of channels; pixel(p) points to the first of `count` channels of pixel p < P.
  template <int P, class F>
  PN_INLINE void for_each_run(F f) const {
    const float* run = a;
    for (int k = 0; k < depth; k += L, run += plane)
      f(min(L, depth - k), [run](int p) PN_LAMBDA_INLINE { return run + p * L; });
  }
};

template <bool kRelu>
PN_INLINE vec rectified(vec x) {
  return kRelu ? relu(x) : x;
}

// The product of P pixels and V vectors of columns of w [depth][V * kLanes], in registers; finish(sums) takes it.
// step() is called for every row of w: a place for prefetching.
//
// With one vector of columns every multiply-add takes a value of its own, in all lanes, so that loads limit the
// product: there, if moves have a unit of their own, every third pixel loads four values at once and moves each to all
// lanes in registers. The gradient below does so for half of its values.
template <int P, int V, class Input, class Step, class Finish>
PN_INLINE void product_tile(const Input& input, const float* w, Step step, Finish finish) {
  vec sum[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[p][v] = vec{};
  input.template for_each_run<P>([&](int count, auto pixel) PN_LAMBDA_INLINE {
    int k = 0;
    for (; kSpareUnits && V == 1 && k + 4 <= count; k += 4) {
      const auto moved = [](int p) PN_LAMBDA_INLINE { return p % 3 == 2; };
      vec four[P];
#pragma GCC unroll 16
      for (int p = 0; p < P; p++)
        if (moved(p)) four[p] = rectified<Input::kRelu>(load_four(pixel(p) + k));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++, w += L) {
        step();
        const vec b = load(w);
#pragma GCC unroll 16
        for (int p = 0; p < P; p++)
          sum[p][0] += (moved(p) ? one_of_four(four[p], i) : rectified<Input::kRelu>(splat(pixel(p)[k + i]))) * b;
      }
    }
    for (; k < count; k++, w += V * L) {
      step();
      vec b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) b[v] = load(w + v * L);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        const vec x = rectified<Input::kRelu>(splat(pixel(p)[k]));
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[p][v] += x * b[v];
      }
    }
  });
  finish(sum);
}

// For all blocks of pixels and of columns: finish(sums[P][V], first pixel, first vector). Pixels beyond the last are
// computed with whatever the input's memory holds.
template <class Input, class Step, class Finish>
PN_INLINE void product(const Input& input, int pixels, const float* w, int vectors, Step step, Finish finish) {
  for_blocks(vectors, [&](auto width, int v0) PN_LAMBDA_INLINE {
    constexpr int V = decltype(width)::value, P = tile_extent(V);
    const float* columns = w + int64_t(v0) * input.depth * L;
    int p0 = 0;
    for (; p0 < pixels && (P < 16 || pixels - p0 > 8); p0 += P)
      product_tile<P, V>(input.from(p0), columns, step, [&](const auto& sum) PN_LAMBDA_INLINE { finish(sum, p0, v0); });
    if (P == 16 && p0 < pixels)
      product_tile<8, V>(input.from(p0), columns, step, [&](const auto& sum) PN_LAMBDA_INLINE { finish(sum, p0, v0); });
  });
}

// gradient rows r < R (`row` floats apart) += the product of channels r of x (through ReLU, if asked for) and V planes
// of dy over pixels, of which those of x are x_step floats apart. step(x) is called for every pixel: a place for
// prefetching.
template <int R, int V, bool kRelu, class Step>
PN_INLINE void gradient_tile(const float* x, int64_t x_step, Step& step, const float* dy, int64_t plane, int pixels,
                             float* gradient, int64_t row) {
  vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = load(gradient + r * row + v * L);
  for (int p = 0; p < pixels; p++, x += x_step, dy += L) {
    step(x);
    vec d[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) d[v] = load(dy + v * plane);
    vec four{};
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const bool moved = kSpareUnits && V == 1 && R >= 8 && r / 4 % 2 == 1;
      if (moved && r % 4 == 0) four = rectified<kRelu>(load_four(x + r));
      const vec value = !moved ? rectified<kRelu>(splat(x[r])) : one_of_four(four, r % 4);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] += value * d[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(gradient + r * row + v * L, sum[r][v]);
}

// gradient [channels][vectors * kLanes] += the product of x (transposed), whose pixels are x_step floats apart, and the
// planes of dy over pixels. step as in gradient_tile.
template <bool kRelu, class Step>
PN_INLINE void product_gradient(const float* x, int64_t x_step, int channels, Step step, const float* dy, int64_t plane,
                                int pixels, int vectors, float* gradient) {
  const int64_t row = int64_t(vectors) * L;
  for_blocks(vectors, [&](auto width, int v0) PN_LAMBDA_INLINE {
    constexpr int V = decltype(width)::value, R = tile_extent(V);
    const float* d = dy + v0 * plane;
    float* g = gradient + v0 * L;
    int k = 0;
    for (; k + R <= channels; k += R)
      gradient_tile<R, V, kRelu>(x + k, x_step, step, d, plane, pixels, g + k * row, row);
    if constexpr (R > 4)
      for (; k + 4 <= channels; k += 4)
        gradient_tile<4, V, kRelu>(x + k, x_step, step, d, plane, pixels, g + k * row, row);
    for (; k < channels; k++) gradient_tile<1, V, kRelu>(x + k, x_step, step, d, plane, pixels, g + k * row, row);
  });
}

// [rows][columns] to [blocks][rows][V * kLanes], or with `transpose` from [columns][rows].
inline void pack_pointwise(const float* weights, int rows, int columns, bool transpose, float* packed) {
  for_blocks((columns + L - 1) / L, [&](auto width, int v0) {
    constexpr int V = decltype(width)::value;
    for (int r = 0; r < rows; r++)
      for (int v = v0; v < v0 + V; v++, packed += L) {
        const int n = min(L, columns - v * L);
        if (!transpose) {
          store(packed, load_partial(weights + int64_t(r) * columns + v * L, n));
        } else {
          for (int i = 0; i < L; i++) packed[i] = i < n ? weights[int64_t(v * L + i) * rows + r] : 0.0f;
        }
      }
  });
}

// to = `pixels` pixels of one vector of channels of a pending gradient c0 * g + c1 * y + c2, or of g where y is null.
// Those of g and y are `step` floats apart; with kAhead, those `ahead` floats further are prefetched.
template <bool kFull, bool kAhead>
PN_INLINE void load_gradient_pixels(const float* g, const float* y, const vec (&c)[3], int64_t step, int64_t ahead,
                                    int64_t pixels, int lanes, float* to) {
  if (y) {
#pragma GCC unroll 4
    for (int64_t p = 0; p < pixels; p++, to += L, g += step, y += step) {
      if (kAhead) __builtin_prefetch(g + ahead);
      if (kAhead) __builtin_prefetch(y + ahead);
      store(to, c[0] * load_lanes<kFull>(g, lanes) + (c[1] * load_lanes<kFull>(y, lanes) + c[2]));
    }
  } else {
#pragma GCC unroll 4
    for (int64_t p = 0; p < pixels; p++, to += L, g += step) {
      if (kAhead) __builtin_prefetch(g + ahead);
      store(to, load_lanes<kFull>(g, lanes));
    }
  }
}

// Merges a register tile's `count` valid pixels into the statistics of the `before` pixels of the image that came
// first. Sums are of deviations from the mean so far (at first: from the first pixel), because sums of the values
// themselves would lose the variance where the mean is large.
template <int P, int V>
PN_INLINE void add_statistics(const vec (&sum)[P][V], int before, int count, float* mean, float* squares) {
  const float weight = 1.0f / float(before + min(count, P));
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const vec shift = before == 0 ? sum[0][v] : load(mean + v * L);
    vec s1 = vec{}, s2 = vec{};
    if (count >= P) {
      vec t1 = vec{}, t2 = vec{};  // two chains each, to cover the latency of additions
#pragma GCC unroll 16
      for (int p = 0; p < P; p += 2) {
        const vec d = sum[p][v] - shift, e = sum[p + 1][v] - shift;
        s1 += d, t1 += e;
        s2 += d * d, t2 += e * e;
      }
      s1 += t1, s2 += t2;
    } else {
#pragma GCC unroll 16
      for (int p = 0; p < P; p++)
        if (p < count) {
          const vec d = sum[p][v] - shift;
          s1 += d;
          s2 += d * d;
        }
    }
    const vec step = s1 * weight;
    store(mean + v * L, shift + step);
    store(squares + v * L, (before == 0 ? vec{} : load(squares + v * L)) + relu(s2 - s1 * step));
  }
}

// Writes a register tile's first `count` pixels, `step` floats apart, of the last vector `lanes` channels.
template <int P, int V>
PN_INLINE void write_tile(const vec (&sum)[P][V], float* out, int64_t step, int count, int lanes, bool streamed) {
  if (streamed) {
#pragma GCC unroll 16
    for (int p = 0; p < P; p++, out += step)
      if (p < count) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) stream(out + v * L, sum[p][v]);
      }
  } else {
#pragma GCC unroll 16
    for (int p = 0; p < P; p++, out += step)
      if (p < count) {
#pragma GCC unroll 4
        for (int v = 0; v < V - 1; v++) store(out + v * L, sum[p][v]);
        store_partial(out + (V - 1) * L, sum[p][V - 1], lanes);
      }
  }
}

// An output larger than the second-level cache has left it before anyone reads it.
constexpr int64_t kStreamedFloats = 1 << 18;
PN_INLINE bool is_streamed(const float* p, int channels, int64_t floats) {
  return floats > kStreamedFloats && channels % L == 0 && reinterpret_cast<uintptr_t>(p) % (L * 4) == 0;
}

}  // namespace pn::PN_NAMESPACE
