// What the convolutions share: the product of a tile of pixels with a block of weights, the gradient of such weights,
// and the passes between a tile and the activations.
//
// A thread block works on as many pixels as it has threads (64 or 128). Depth (input channels, or taps times channels)
// is taken in chunks of kDepth; a chunk of a tile lies in shared memory as [pixel][kDepth] floats, with the four quads
// (of channels) of a pixel permuted so that eight neighbouring pixels' quads of the same number, and all quads of two
// neighbouring pixels, lie in different banks. Whatever fills up a tile or a chunk is zero.
#pragma once

#include "cuda/device.h"

namespace pn {

constexpr int kDepth = 16;
constexpr int kMaxThreads = 128;

// Blocks that a multiprocessor shall hold, which bounds a thread's registers: as many as go without spilling any. sm_70
// copies through registers.
constexpr int blocks_of(int columns) { return (columns == 64 ? 3 : columns == 32 ? 4 : 5) - (PN_SM80 ? 0 : 1); }

// Where quad `q` of a tile's pixel lies.
PN_DEVICE int tile_offset(int pixel, int q) { return pixel * kDepth + ((q ^ (pixel >> 1)) & 3) * 4; }

// Rows of weights are padded so that the tensor cores' loads of four rows and eight columns meet no bank twice.
template <int kColumns>
constexpr int kWeightStep = kColumns + 8;
template <int kColumns>
constexpr int kWeightFloats = kDepth* kWeightStep<kColumns>;

// weights [kDepth][kWeightStep] = `rows` x `columns` of source (row k at source + k * step), the rest zero.
template <int kColumns>
PN_DEVICE void load_weights(float* weights, const float* source, int step, int rows, int columns) {
  const bool aligned = ((step | columns) & 3) == 0 && is_aligned16(source);
#pragma unroll 1
  for (int i = fresh_thread_index(); i < kDepth * kColumns / 4; i += block_extent().x) {
    const int k = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
    float* to = weights + k * kWeightStep<kColumns> + column;
    const bool inside = k < rows && column < columns;
    if (aligned)
      copy4(to, inside ? source + int64_t(k) * step + column : source, inside);
    else
      store4(to, load_channels(source + int64_t(k) * step + column, inside ? columns - column : 0, false));
  }
}

// The same of the transposed source: column c at source + c * step.
template <int kColumns>
PN_DEVICE void load_transposed_weights(float* weights, const float* source, int step, int rows, int columns) {
  const bool aligned = ((step | rows) & 3) == 0 && is_aligned16(source);
#pragma unroll 1
  for (int i = fresh_thread_index(); i < kColumns * kDepth / 4; i += block_extent().x) {
    // A warp takes 16 columns and two neighbouring quads, a whole sector, of each.
    const int column = (i >> 1) % kColumns, k = ((i >> 1) / kColumns * 2 + (i & 1)) * 4;
    float* to = weights + k * kWeightStep<kColumns> + column;
    const float4 v = load_channels(source + int64_t(column) * step + k, column < columns ? rows - k : 0, aligned);
    to[0] = v.x;
    to[kWeightStep<kColumns>] = v.y;
    to[2 * kWeightStep<kColumns>] = v.z;
    to[3 * kWeightStep<kColumns>] = v.w;
  }
}

// A tile's product with kColumns columns of weights: every thread holds kPixels x kOwn sums, kColumns in all, by
// float32 multiply-adds or, with kTf32, by the tensor cores. Lanes whose numbers are equal modulo kGroups hold the same
// columns.
template <int kColumns, bool kTf32>
struct Product {
  static constexpr int kGroups = kTf32 || kColumns < 64 ? 4 : 8;
  static constexpr int kOwn = kTf32 ? kColumns / 4 : kColumns == 16 ? 4 : 8;
  static constexpr int kPixels = kColumns / kOwn;
  static constexpr int kVector = kTf32 ? 2 : 4;  // neighbouring columns

  float sum[kPixels][kOwn];

  PN_DEVICE_METHOD void clear() {
#pragma unroll
    for (int i = 0; i < kPixels; i++)
#pragma unroll
      for (int j = 0; j < kOwn; j++) sum[i][j] = 0.0f;
  }

  // The pixel and the column of sum[i][j] of thread t.
  static PN_DEVICE_METHOD int pixel(int t, int i) {
    if (kTf32) return (t & ~31) + i * 8 + (t >> 2 & 7);
    return t / kGroups + i * (block_extent().x / kGroups);
  }
  static PN_DEVICE_METHOD int column(int t, int j) {
    const int group = t % kGroups;
    if (kTf32) return (j >> 1) * 8 + group * 2 + (j & 1);
    return (j >> 2) * (kColumns / 2) + group * 4 + (j & 3);
  }

  // Adds the product of a chunk of the tile and of the weights. Pixel p lies at place p + (p >> row_shift) of the tile
  // (a tile of rows may have one place between them).
  PN_DEVICE_METHOD void add(const float* tile, int row_shift, const float* weights, int depth) {
    const int t = fresh_thread_index();
    if constexpr (kTf32) {
#if PN_SM80
      const int lane = t & 31, row = lane >> 2, place = lane & 3;
      int pixels[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; i++) pixels[i] = pixel(t, i) + (pixel(t, i) >> row_shift);
#pragma unroll 1
      for (int k = 0; k < depth; k += 8) {
        uint32_t a[kPixels / 2][4];
#pragma unroll
        for (int i = 0; i < kPixels; i++) {
          a[i / 2][i % 2] = to_tf32(tile[tile_offset(pixels[i], k / 4) + place]);
          a[i / 2][i % 2 + 2] = to_tf32(tile[tile_offset(pixels[i], k / 4 + 1) + place]);
        }
        const float* w = weights + (k + place) * kWeightStep<kColumns> + row;
#pragma unroll
        for (int n = 0; n < kColumns / 8; n++) {
          const uint32_t b[2] = {to_tf32(w[n * 8]), to_tf32(w[n * 8 + 4 * kWeightStep<kColumns>])};
#pragma unroll
          for (int m = 0; m < kPixels / 2; m++)
            multiply_tf32(sum[2 * m][2 * n], sum[2 * m][2 * n + 1], sum[2 * m + 1][2 * n], sum[2 * m + 1][2 * n + 1],
                          a[m], b);
        }
      }
#endif
    } else {
      int pixels[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; i++) pixels[i] = pixel(t, i) + (pixel(t, i) >> row_shift);
#pragma unroll 1
      for (int k = 0; k < depth; k += 4) {
        float a[kPixels][4];
#pragma unroll
        for (int i = 0; i < kPixels; i++) {
          const float4 v = load4(tile + tile_offset(pixels[i], k / 4));
          a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float w[kOwn];
#pragma unroll
          for (int j = 0; j < kOwn; j += 4) {
            const float4 v = load4(weights + (k + r) * kWeightStep<kColumns> + column(t, j));
            w[j] = v.x, w[j + 1] = v.y, w[j + 2] = v.z, w[j + 3] = v.w;
          }
#pragma unroll
          for (int i = 0; i < kPixels; i++)
#pragma unroll
            for (int j = 0; j < kOwn; j++) sum[i][j] += a[i][r] * w[j];
        }
      }
    }
  }

  // v = kVector neighbouring values of a row, of which `columns` (from column 0 on, which lies at `row`) exist, at the
  // place of sum[..][j].
  static PN_DEVICE_METHOD void load(float (&v)[kVector], const float* row, int t, int j, int columns, bool aligned) {
    const int first = column(t, j);
    const float* from = row + first;
    if (aligned && first < columns) {
      if constexpr (kTf32) {
        const float2 two = *reinterpret_cast<const float2*>(from);
        v[0] = two.x, v[1] = two.y;
      } else {
        const float4 four = load4(from);
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kVector; e++) v[e] = first + e < columns ? from[e] : 0.0f;
    }
  }

  // Stores sum[i][j] and its neighbours likewise.
  PN_DEVICE_METHOD void store(float* row, int t, int i, int j, int columns, bool aligned) const {
    const int first = column(t, j);
    float* to = row + first;
    if (aligned && first < columns) {
      if constexpr (kTf32) {
        float2 v;
        v.x = sum[i][j], v.y = sum[i][j + 1];
        *reinterpret_cast<float2*>(to) = v;
      } else {
        store4(to, make4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]));
      }
    } else {
#pragma unroll
      for (int e = 0; e < kVector; e++)
        if (first + e < columns) to[e] = sum[i][j + e];
    }
  }

  // Stores pixel i's sums as the gradient of an activation: zero where x <= 0 (x may be null: no ReLU), added to where
  // `accumulate` is set.
  PN_DEVICE_METHOD void store_gradient(float* dx, const float* x, int t, int i, int columns, bool aligned,
                                       bool accumulate) {
#pragma unroll
    for (int j = 0; j < kOwn; j += kVector) {
      float v[kVector];
      if (x) {
        load(v, x, t, j, columns, aligned);
#pragma unroll
        for (int e = 0; e < kVector; e++)
          if (!(v[e] > 0.0f)) sum[i][j + e] = 0.0f;
      }
      if (accumulate) {
        load(v, dx, t, j, columns, aligned);
#pragma unroll
        for (int e = 0; e < kVector; e++) sum[i][j + e] += v[e];
      }
      store(dx, t, i, j, columns, aligned);
    }
  }
};

// The tile's pixels that a thread loads, four of them: pixel(u) for u < kLoads, one quad of each.
constexpr int kLoads = 4;
PN_DEVICE int loaded_pixel(int u) { return (thread_index().x >> 2) + u * (block_extent().x >> 2); }
PN_DEVICE int loaded_quad() { return thread_index().x & 3; }

PN_DEVICE void store_tile(float* tile, const float4 (&v)[kLoads]) {
  const int t = fresh_thread_index();
#pragma unroll
  for (int u = 0; u < kLoads; u++)
    store4_shared(tile + tile_offset((t >> 2) + u * (block_extent().x >> 2), t & 3), v[u]);
}

// product = the product of all chunks that the source has (one at least): source.next() goes on to the next one and
// tells whether there is one, source.load_pixels(v) gives the thread's quads of the tile, source.load_weights(w) fills
// the weights. The next chunk is loaded while one is multiplied. Returns shared memory that nobody uses any more, of
// kDepth floats a thread.
template <int kColumns, bool kTf32, class Source>
PN_DEVICE float* multiply_chunks(Product<kColumns, kTf32>& product, Source& source) {
  const int tile_floats = block_extent().x * kDepth;
  float* tiles = pn_shared;
  float* weights = tiles + 2 * tile_floats;
  product.clear();
  bool more = source.next();
  for (int buffer = 0, loaded = 0;; buffer ^= 1, loaded = 1) {
    float4 v[kLoads];
    if (more) {
      source.load_weights(weights + buffer * kWeightFloats<kColumns>);
      if (kColumns < 64) source.load_pixels(v);
    }
    if (loaded)
      product.add(tiles + (buffer ^ 1) * tile_floats, 31, weights + (buffer ^ 1) * kWeightFloats<kColumns>, kDepth);
    if (!more) return tiles + buffer * tile_floats;
    if (kColumns == 64) source.load_pixels(v);  // its sums leave no registers for what is loaded ahead
    store_tile(tiles + buffer * tile_floats, v);
    copies_done();
    barrier();
    more = source.next();
  }
}

// Shared memory that statistics() takes.
template <int kColumns>
constexpr int kStatisticsFloats = kColumns*(1 + 2 * kMaxThreads / 32);

// mean[c] and squares[c] = the mean of column c over the tile's `count` pixels and the sum of squared deviations from
// it; bit i of `valid` tells whether the thread's pixel i counts, pixel 0 of the tile does. Values are taken relative
// to the tile's first pixel, so that a large common mean costs no digits. All threads take part.
template <int kColumns, bool kTf32>
PN_DEVICE void statistics(const Product<kColumns, kTf32>& product, uint32_t valid, int count, int columns,
                          float* memory, float* mean, float* squares) {
  typedef Product<kColumns, kTf32> P;
  const int t = fresh_thread_index(), lane = t & 31, warp = t >> 5;
  if (P::pixel(t, 0) == 0)
#pragma unroll
    for (int j = 0; j < P::kOwn; j++) memory[P::column(t, j)] = product.sum[0][j];
  barrier();
  float* partial = memory + kColumns;
#pragma unroll
  for (int j = 0; j < P::kOwn; j++) {
    const float shift = memory[P::column(t, j)];
    float s1 = 0.0f, s2 = 0.0f;
#pragma unroll
    for (int i = 0; i < P::kPixels; i++) {
      const float d = valid >> i & 1 ? product.sum[i][j] - shift : 0.0f;
      s1 += d;
      s2 += d * d;
    }
#pragma unroll
    for (int mask = P::kGroups; mask < 32; mask *= 2) {
      s1 += shuffle_xor(s1, mask);
      s2 += shuffle_xor(s2, mask);
    }
    if (lane < P::kGroups) {
      partial[warp * 2 * kColumns + P::column(t, j)] = s1;
      partial[(warp * 2 + 1) * kColumns + P::column(t, j)] = s2;
    }
  }
  barrier();
  if (t < min(kColumns, columns)) {
    float s1 = 0.0f, s2 = 0.0f;
    for (int w = 0; w < block_extent().x / 32; w++) {
      s1 += partial[w * 2 * kColumns + t];
      s2 += partial[(w * 2 + 1) * kColumns + t];
    }
    const float step = s1 / float(count);
    mean[t] = memory[t] + step;
    squares[t] = relu(s2 - s1 * step);
  }
}

// How an image is covered with tiles, row by row of them; those at its right and lower edge are smaller.
struct Cover {
  int height, width, tile_height, tile_width;

  PN_DEVICE_METHOD int across() const { return (width + tile_width - 1) / tile_width; }
  PN_DEVICE_METHOD int count() const { return across() * ((height + tile_height - 1) / tile_height); }
  PN_DEVICE_METHOD int pixels(int tile) const {
    const int row = tile / across() * tile_height, column = tile % across() * tile_width;
    return min(tile_height, height - row) * min(tile_width, width - column);
  }
};

// The statistics of the tiles of an image, of which the first one's lie at `tiles` and the next one's 2 * channels
// floats further, to those of the image, by the last of the blocks that made them. Merged in the order of the tiles
// (Chan, Golub & LeVeque 1979). All threads take part.
template <int kColumns>
PN_DEVICE void merge_statistics(const float* tiles, const Cover& cover, int channels, int columns, uint32_t* counter,
                                float* mean, float* squares) {
  const int count = cover.count(), t = fresh_thread_index();
  if (!is_last_block(counter, count) || t >= min(kColumns, columns)) return;
  float m = tiles[t], s = tiles[channels + t], before = float(cover.pixels(0));
  for (int tile = 1; tile < count; tile++) {
    tiles += 2 * channels;
    const float pixels = float(cover.pixels(tile)), all = before + pixels, d = tiles[t] - m;
    m += d * (pixels / all);
    s += tiles[channels + t] + d * d * (before * pixels / all);
    before = all;
  }
  mean[t] = m;
  squares[t] = s;
}

// A pending gradient: a * g + b * y + c, or g itself where there are no coefficients. Rows of coefficients are `step`
// apart.
struct PendingGradient {
  const float *g, *y, *coefficients;
  int step;
  bool aligned;

  // Channels [channel, channel + count) of the pixel that begins at `at`.
  PN_DEVICE_METHOD float4 load(int64_t at, int channel, int count) const {
    const float4 v = load_channels(g + at + channel, count, aligned);
    if (!coefficients) return v;
    const float4 a = load_channels(coefficients + channel, count, aligned);
    const float4 b = load_channels(coefficients + step + channel, count, aligned);
    float4 sum = load_channels(coefficients + 2 * step + channel, count, aligned);
    add_product4(sum, b, load_channels(y + at + channel, count, aligned));
    add_product4(sum, a, v);
    return sum;
  }

  // tile [pixels][step] = `columns` channels from `channel` on of pixels that begin at place(p), zero where that is
  // negative.
  template <class Place>
  PN_DEVICE_METHOD void load_tile(float* tile, int step, int channel, int columns, int pixels, Place place) const {
    const int quads = step >> 2;
    for (int i = thread_index().x; i < pixels * quads; i += block_extent().x) {
      const int p = i / quads, c = (i - p * quads) * 4;
      const int64_t at = place(p);
      store4(tile + p * step + c, at >= 0 && c < columns ? load(at, channel + c, columns - c) : zero4());
    }
  }
};

// The gradient of kDepth x `columns` (16, 32 or 64) weights: the product of the transposed tile of inputs
// [pixel][kDepth] and a tile of output gradients [pixel][columns]. `columns` threads share the result, 4 x 4 each; the
// block's threads take turns in the pixels, and what they have is added up at the end.
struct WeightGradient {
  float sum[4][4];

  PN_DEVICE_METHOD void clear() {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i][j] = 0.0f;
  }
  PN_DEVICE_METHOD void add(const float* tile, int row_shift, const float* gradient, int columns) {
    const int t = thread_index().x, place = t % columns, q = place / (columns / 4);
    const float* d = gradient + place % (columns / 4) * 4;
    const int threads = block_extent().x;
    for (int p = t / columns; p < threads; p += threads / columns) {
      const float4 x = load4(tile + tile_offset(p + (p >> row_shift), q)), v = load4_shared(d + p * columns);
      const float a[4] = {x.x, x.y, x.z, x.w}, b[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] += a[i] * b[j];
    }
  }
  // out [rows][step] = the block's sum, of which `rows` and `limit` columns are wanted. Takes kDepth floats of shared
  // memory a thread.
  PN_DEVICE_METHOD void finish(float* memory, int columns, float* out, int step, int rows, int limit) const {
    const int t = thread_index().x, place = t % columns, q = place / (columns / 4), c = place % (columns / 4) * 4;
    // Rows in the order 0, 4, 8, 12, 1, ..., so that threads that store at the same time meet different banks.
    float* own = memory + t / columns * kDepth * columns + q * columns + c;
#pragma unroll
    for (int i = 0; i < 4; i++) store4(own + i * 4 * columns, make4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
    barrier();
    for (int e = t; e < kDepth * columns; e += block_extent().x) {
      float total = 0.0f;
      for (int s = 0; s < block_extent().x / columns; s++) total += memory[s * kDepth * columns + e];
      const int at = e / columns, row = (at & 3) * 4 + (at >> 2), column = e % columns;
      if (row < rows && column < limit) out[int64_t(row) * step + column] = total;
    }
  }
};

}  // namespace pn

// The kernels of a convolution's forward<columns, TF32> and backward_input<columns, TF32> on its Launch, by columns of
// a block: operator_forward_c16, with tensor cores operator_forward_c16_tf32, and so on.
#define PN_PRODUCT_KERNEL(OPERATOR, COLUMNS, SUFFIX, TF32)           \
  PN_KERNEL __launch_bounds__(kMaxThreads, blocks_of(COLUMNS) - 1)   \
      OPERATOR##_forward_c##COLUMNS##SUFFIX(const Launch l) {        \
    forward<COLUMNS, TF32>(l);                                       \
  }                                                                  \
  PN_KERNEL __launch_bounds__(kMaxThreads, blocks_of(COLUMNS) - 1)   \
      OPERATOR##_backward_input_c##COLUMNS##SUFFIX(const Launch l) { \
    backward_input<COLUMNS, TF32>(l);                                \
  }
#define PN_PRODUCT_KERNELS_FLOAT(OPERATOR) \
  PN_PRODUCT_KERNEL(OPERATOR, 16, , false) \
  PN_PRODUCT_KERNEL(OPERATOR, 32, , false) \
  PN_PRODUCT_KERNEL(OPERATOR, 64, , false)
#if PN_SM80
#define PN_PRODUCT_KERNELS(OPERATOR)           \
  PN_PRODUCT_KERNELS_FLOAT(OPERATOR)           \
  PN_PRODUCT_KERNEL(OPERATOR, 16, _tf32, true) \
  PN_PRODUCT_KERNEL(OPERATOR, 32, _tf32, true) \
  PN_PRODUCT_KERNEL(OPERATOR, 64, _tf32, true)
#else
#define PN_PRODUCT_KERNELS(OPERATOR) PN_PRODUCT_KERNELS_FLOAT(OPERATOR)
#endif
