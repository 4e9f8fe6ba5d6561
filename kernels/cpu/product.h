// The products of the kernels with a pointwise convolution, over a tile of pixels that lies in the nearest cache, how
// gradients come into such a tile, and what is done with the products' sums while these are in registers.
//
// A tile holds planes of one vector of channels: [vectors][pixels][kLanes], so that a pixel is a constant distance from
// the next.
#pragma once

#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

constexpr int L = kLanes;

// Register tiles: input channels of a gradient's tile of one, two or three vectors of output channels, and pixels of a
// product's.
constexpr int tile_extent(int vectors) { return (vectors == 1 ? 8 : 4) * (kManyRegisters ? 2 : 1); }
constexpr int tile_pixels(int vectors) { return kManyRegisters || vectors != 2 ? tile_extent(vectors) : 6; }

// With few registers a step of arithmetic is short, and prefetching would be a large part of it: a product takes one
// for all rows of a plane.
constexpr int kStepRows = kManyRegisters ? 1 : kLanes, kStepPixels = kManyRegisters ? 1 : 4;

constexpr int kWidest = 3;  // vectors of a block of a pointwise product's columns, at most

// How a number of vectors is divided into blocks: the width of the next one.
template <int Widest>
PN_INLINE int block_width(int vectors) {
  return Widest == 3 && (vectors == 3 || vectors > 4) ? 3 : min(vectors, 2);
}

// Calls f(Constant<width>, first vector) for every block.
template <int Widest = kWidest, class F>
PN_INLINE void for_blocks(int vectors, F f) {
  for (int v = 0; v < vectors;) {
    const int width = block_width<Widest>(vectors - v);
    if (width == 3)
      f(Constant<Widest>{}, v);
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
  // f(count, pixel) for runs of channels; pixel(p) points to the first of `count` channels of pixel p < P.
  template <int P, class F>
  PN_INLINE void for_each_run(F f) const {
    const float* run = a;
    for (int k = 0; k < depth; k += L, run += plane)
      f(min(L, depth - k), [run](int p) PN_LAMBDA_INLINE { return run + p * L; });
  }
};

// The product of P pixels and V vectors of columns of w [depth][V * kLanes], in registers; finish(sums) takes it.
// step() is called for every kStepRows rows of w: a place for prefetching.
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
        if (moved(p)) four[p] = load_four(pixel(p) + k);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++, w += L) {
        step();
        const vec b = load(w);
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) sum[p][0] += (moved(p) ? one_of_four(four[p], i) : splat(pixel(p)[k + i])) * b;
      }
    }
    // Without steps there is nothing to save by taking several rows at a time, and the compiler leaves the sums of such
    // a loop where they are.
    constexpr int rows = __is_empty(Step) ? 1 : kStepRows;
    const auto add_row = [&](int i) PN_LAMBDA_INLINE {
      vec b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) b[v] = load(w + (i * V + v) * L);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        const vec x = splat(pixel(p)[k + i]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
          if (rows > 1)
            multiply_add(sum[p][v], x, b[v]);
          else
            sum[p][v] += x * b[v];
      }
    };
    // Where it knows that there are two rounds at most, the compiler makes two loops of it, with the sums in other
    // registers.
    if (rows > 1) asm("" : "+r"(count));
    for (; k + rows <= count; k += rows, w += rows * V * L) {
      step();
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) add_row(i);
    }
    if (unlikely(rows > 1 && k < count))
      for (; k < count; k++, w += V * L) add_row(0);
  });
  finish(sum);
}

// For all blocks of pixels and of columns: finish(sums[P][V], first pixel, first vector). Pixels beyond the last are
// computed with whatever the input's memory holds.
template <int Widest = kWidest, class Input, class Step, class Finish>
PN_INLINE void product(const Input& input, int pixels, const float* w, int vectors, Step step, Finish finish) {
  for_blocks<Widest>(vectors, [&](auto width, int v0) PN_LAMBDA_INLINE {
    constexpr int V = decltype(width)::value, P = tile_pixels(V), small = P == 6 ? 4 : min(P, 8);
    const float* columns = w + int64_t(v0) * input.depth * L;
    int p0 = 0;
    const auto tile = [&](auto extent) PN_LAMBDA_INLINE {
      product_tile<extent.value, V>(input.from(p0), columns, step,
                                    [&](const auto& sum) PN_LAMBDA_INLINE { finish(sum, p0, v0); });
      p0 += extent.value;
    };
    // A multiple of four is covered exactly by tiles of 6 and 4.
    const auto takes_large = [](int left) PN_LAMBDA_INLINE { return left > small && !(P == 6 && left == 8); };
    if constexpr (P > small)
      while (takes_large(pixels - p0)) tile(Constant<P>{});
    while (p0 < pixels) tile(Constant<small>{});
  });
}

template <bool kRelu>
PN_INLINE vec rectified(vec x) {
  return kRelu ? relu(x) : x;
}

// gradient rows r < R (`row` floats apart) += the product of channels r of x (through ReLU, if asked for) and V planes
// of dy over pixels, of which those of x are x_step floats apart. step(x) is called for every kStepPixels pixels: a
// place for prefetching.
template <int R, int V, bool kRelu, class Step>
PN_INLINE void gradient_tile(const float* x, int64_t x_step, Step& step, const float* dy, int64_t plane, int pixels,
                             float* gradient, int64_t row) {
  vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = load(gradient + r * row + v * L);
  const auto add_pixel = [&](const float* x, const float* dy) PN_LAMBDA_INLINE {
    vec d[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) d[v] = load(dy + v * plane);
    // Values are rectified together: one by one, there would be a maximum for every multiply-add or two.
    constexpr bool kAtOnce = kRelu && R >= 8 && R <= L, kEach = kRelu && !kAtOnce;
    alignas(PN_VECTOR_BYTES) float block[L];
    if (kAtOnce) {
      store(block, relu(load_partial(x, R)));
      asm volatile("" ::: "memory");  // single values are loaded, instead of moved out of the vector
      x = block;
    }
    vec four{};
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const bool moved = kSpareUnits && V == 1 && R >= 8 && r / 4 % 2 == 1;
      if (moved && r % 4 == 0) four = rectified<kEach>(load_four(x + r));
      const vec value = !moved ? rectified<kEach>(splat(x[r])) : one_of_four(four, r % 4);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) multiply_add(sum[r][v], value, d[v]);
    }
  };
  int p = 0;
  for (; p + kStepPixels <= pixels; p += kStepPixels, x += kStepPixels * x_step, dy += kStepPixels * L) {
    step(x);
#pragma GCC unroll 4
    for (int i = 0; i < kStepPixels; i++) add_pixel(x + i * x_step, dy + i * L);
  }
  for (; kStepPixels > 1 && p < pixels; p++, x += x_step, dy += L) add_pixel(x, dy);
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
template <int Widest = kWidest>
void pack_pointwise(const float* weights, int rows, int columns, bool transpose, float* packed) {
  for_blocks<Widest>((columns + L - 1) / L, [&](auto width, int v0) {
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

// The statistics of an image's pixels, from one product after the other. Sums are of deviations from the mean of the
// products before (in the first one: from the first pixel), because sums of the values themselves would lose the
// variance where the mean is large. Mean and squares change once a product, so that its register tiles do not wait for
// one another, and there are few divisions.
struct Statistics {
  float *mean, *squares;  // [vectors][kLanes]; squares: sums of squared deviations from the mean
  float* sums;            // [tiles of a product][2][most vectors of a tile][kLanes]
  int tiles = 0;

  static constexpr int64_t floats(int64_t pixels, int vectors) {
    return int64_t(vectors) * 2 * L + (pixels / 4 + 1) * 2 * 3 * L;
  }
  Statistics(float* memory, int vectors)
      : mean(memory), squares(mean + int64_t(vectors) * L), sums(squares + int64_t(vectors) * L) {}

  // A register tile, from pixel p0 and vector v0 on, of a product of `pixels`, which follow `before` pixels of the
  // image.
  template <int P, int V>
  PN_INLINE void add(const vec (&sum)[P][V], int before, int p0, int pixels, int v0) {
    if (unlikely(p0 == 0)) {
      tiles = 0;
      if (before == 0) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          store(mean + (v0 + v) * L, sum[0][v]);
          store(squares + (v0 + v) * L, vec{});
        }
      }
    }
    const int count = pixels - p0;
    float* to = sums + int64_t(tiles++) * 2 * V * L;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const vec shift = load(mean + (v0 + v) * L);
      vec s[2] = {}, t[2] = {};  // two chains each, to cover the latency of additions
      if (!unlikely(count < P)) {
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) {
          const vec d = sum[p][v] - shift;
          s[p % 2] = p < 2 ? d : s[p % 2] + d;
          t[p % 2] = p < 2 ? d * d : t[p % 2] + d * d;
        }
      } else {
#pragma GCC unroll 16
        for (int p = 0; p < P; p++)
          if (p < count) {
            const vec d = sum[p][v] - shift;
            s[0] += d, t[0] += d * d;
          }
      }
      store(to + v * L, s[0] + s[1]);
      store(to + (V + v) * L, t[0] + t[1]);
    }
    if (unlikely(count <= P)) merge<V>(before + pixels, v0);
  }

 private:
  template <int V>
  void merge(int pixels, int v0) {
    const float weight = 1.0f / float(pixels);
    for (int v = 0; v < V; v++) {
      vec s{}, t{};
      const float* from = sums + v * L;
      for (int i = 0; i < tiles; i++, from += 2 * V * L) s += load(from), t += load(from + V * L);
      const vec step = s * weight;
      float *m = mean + (v0 + v) * L, *q = squares + (v0 + v) * L;
      store(m, load(m) + step);
      store(q, load(q) + relu(t - s * step));
    }
  }
};

// Writes a register tile's first `count` pixels, `step` floats apart, of the last vector `lanes` channels.
template <int P, int V>
PN_INLINE void write_tile(const vec (&sum)[P][V], float* out, int64_t step, int count, int lanes, bool streamed) {
  if (unlikely(count < P || lanes < L)) {
#pragma GCC unroll 16
    for (int p = 0; p < P; p++, out += step)
      if (p < count) {
#pragma GCC unroll 4
        for (int v = 0; v < V - 1; v++) store(out + v * L, sum[p][v]);
        store_partial(out + (V - 1) * L, sum[p][V - 1], lanes);
      }
  } else if (streamed) {
#pragma GCC unroll 16
    for (int p = 0; p < P; p++, out += step)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) stream(out + v * L, sum[p][v]);
  } else {
#pragma GCC unroll 16
    for (int p = 0; p < P; p++, out += step)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store(out + v * L, sum[p][v]);
  }
}

// An output of more than half a MiB has left the second-level caches before anyone reads it, with what else is read and
// written until then.
constexpr int64_t kStreamedFloats = 1 << 17;
PN_INLINE bool is_streamed(const float* p, int channels, int64_t floats) {
  return floats > kStreamedFloats && channels % L == 0 && reinterpret_cast<uintptr_t>(p) % (L * 4) == 0;
}

}  // namespace pn::PN_NAMESPACE
