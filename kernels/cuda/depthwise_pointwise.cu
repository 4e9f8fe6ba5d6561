// ReLU - depthwise convolution - pointwise convolution with statistics, in one pass over tiles of an image; and its
// gradients, in three: that of the depthwise result (dz, by pointwise_backward_input), from it that of x, and that of
// the weights.
//
// A tile is 8 rows of 8 or 16 pixels, as many as the block has threads. In shared memory lie a chunk of 16 channels of
// what the tile reads (the window: normalised, rectified, zero outside the image), the kernel's taps for them, the
// depthwise result, and a chunk of the pointwise weights. For the depthwise convolution a thread has one quad of
// channels and four pixels of a row, a dilation apart, so that each value it loads serves up to K taps; with dilation 2
// the window's even columns lie before the odd ones, so that those four are neighbours.
//
// A dilated convolution with stride 2 reads only the pixels with even coordinates (its padding is even): forward, it is
// an ordinary one on that grid, of which the host gives the extents and the `step`.
#include "cuda/matrix.h"

namespace {

using namespace pn;

constexpr int kTileRows = 8;

// How an image is covered, and where a tile's window lies in shared memory.
struct Tiles {
  int32_t width_shift;    // a tile is 1 << width_shift pixels wide
  int32_t across, count;  // tiles of a row, of an image
  int32_t rows, columns;  // of the window
  int32_t reciprocal;     // of columns: i / columns == i * reciprocal >> 20
  int32_t row_step;       // floats
  int32_t odd_columns;    // dilation 2: pixels from column 0 to column 1
};

// The arguments of all kernels of this file.
struct Launch {
  pn_depthwise_pointwise a;
  Tiles tiles;
  float* sums;                       // forward: statistics of every tile; backward: its gradient sums
  uint32_t* counters;                // a zero for every image and block y
  float* dz;                         // [N, OH, OW, Cin]
  float *d_depthwise, *d_pointwise;  // partial sums of every group of tiles
  int32_t out_height, out_width;
  int32_t height, width, step;                // grid
  int32_t dilation, dilation_shift, padding;  // on the grid; the shift is dilation - 1
  int32_t columns, groups;  // of a block: pointwise output channels; gradient of weights: groups of tiles
};

// The image and tile of a block.
struct Place {
  int64_t image;
  int row, column;   // of the tile's first pixel
  int rows, pixels;  // inside the image

  PN_DEVICE_METHOD Place(const Tiles& tiles, int64_t index, int height, int width) {
    image = index / tiles.count;
    const int tile = int(index - image * tiles.count);
    row = tile / tiles.across * kTileRows;
    column = tile % tiles.across << tiles.width_shift;
    rows = min(kTileRows, height - row);
    pixels = min(1 << tiles.width_shift, width - column);
  }
  PN_DEVICE_METHOD bool holds(int r, int c) const { return r < rows && c < pixels; }
};

// What a thread does in a depthwise convolution.
struct Strip {
  int quad, row, column;  // of the first of four pixels, which are a dilation apart
  int position;           // of that column in the window, for stride 1

  PN_DEVICE_METHOD Strip(const Launch& l) {
    const int t = fresh_thread_index(), s = t >> 5, shift = l.dilation_shift;
    quad = t & 3;
    row = t >> 2 & 7;
    column = (s >> shift << (2 + shift)) + (s & shift);
    position = (s & shift) * l.tiles.odd_columns + (s >> shift) * 4;
  }
};

// window = the pixels from (top, left) on of an image [height, width] of which neighbours in a row are `pixel_step` and
// in a column `line_step` floats apart, `count` channels, as f(quad) makes them, zero outside of the image.
template <class F>
PN_DEVICE void load_window(float* window, const Tiles& tiles, int dilation_shift, const float* image, int top, int left,
                           int height, int width, int64_t line_step, int pixel_step, int count, bool aligned, F f) {
  constexpr int kAtOnce = 4;
  const int t = fresh_thread_index(), quad = t & 3, step = block_extent().x >> 2;
  const int pixels = tiles.rows * tiles.columns;
  for (int first = t >> 2; first < pixels; first += kAtOnce * step) {
    float4 v[kAtOnce];
    int to[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; u++) {
      const int i = first + u * step, row = i * tiles.reciprocal >> 20, column = i - row * tiles.columns;
      const int y = top + row, x = left + column;
      const bool inside = i < pixels && y >= 0 && y < height && x >= 0 && x < width;
      v[u] = zero4();
      if (inside)
        v[u] = f(load_channels(image + y * line_step + int64_t(x) * pixel_step + quad * 4, count - quad * 4, aligned));
      to[u] = row * tiles.row_step +
              ((column & dilation_shift) * tiles.odd_columns + (column >> dilation_shift)) * kDepth + quad * 4;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; u++)
      if (first + u * step < pixels) store4_shared(window + to[u], v[u]);
  }
}

// A chunk of x as the depthwise convolution reads it.
PN_DEVICE void load_input(float* window, const Launch& l, const Place& place, int stride, int channel) {
  const int channels = l.a.in_channels, count = channels - channel, quad = thread_index().x & 3;
  const float* x = l.a.x + place.image * l.a.height * l.a.width * channels + channel;
  const bool aligned = (channels & 3) == 0 && is_aligned16(l.a.x) && is_aligned16(l.a.x_normalization);
  const int top = place.row * stride - l.padding, left = place.column * stride - l.padding;
  float4 scale = make4(1.0f, 1.0f, 1.0f, 1.0f), shift = zero4();
  if (l.a.x_normalization) {
    const float* rows = l.a.x_normalization + place.image / l.a.images * 4 * channels + channel + quad * 4;
    scale = load_channels(rows, count - quad * 4, aligned);
    shift = load_channels(rows + channels, count - quad * 4, aligned);
  }
  load_window(window, l.tiles, l.dilation_shift, x, top, left, l.height, l.width,
              int64_t(l.step) * l.a.width * channels, l.step * channels, count, aligned, [=](float4 v) {
                return make4(relu(scale.x * v.x + shift.x), relu(scale.y * v.y + shift.y),
                             relu(scale.z * v.z + shift.z), relu(scale.w * v.w + shift.w));
              });
}

// taps [K*K][kDepth] = a chunk of the depthwise weights, in reverse order where `flipped`.
PN_DEVICE void load_taps(float* taps, const Launch& l, int count, int channel, bool flipped) {
  const int channels = l.a.in_channels, left = channels - channel;
  const bool aligned = (channels & 3) == 0 && is_aligned16(l.a.depthwise);
  for (int i = fresh_thread_index(); i < count * 4; i += block_extent().x) {
    const int tap = i >> 2, quad = i & 3;
    const float* from = l.a.depthwise + tap * channels + channel;
    float* to = taps + (flipped ? count - 1 - tap : tap) * kDepth + quad * 4;
    if (aligned)
      copy4(to, quad * 4 < left ? from + quad * 4 : from, quad * 4 < left);
    else
      store4(to, load_channels(from + quad * 4, left - quad * 4, false));
  }
}

// sum[i] = the depthwise convolution at the strip's pixel i.
template <int K, int S>
PN_DEVICE void depthwise(float4 (&sum)[4], const Launch& l, const Strip& strip, const float* window,
                         const float* taps) {
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] = zero4();
  const float* row = window + strip.row * S * l.tiles.row_step + strip.position * S * kDepth + strip.quad * 4;
  taps += strip.quad * 4;
#pragma unroll 1
  for (int ky = 0; ky < K; ky++, row += l.dilation * l.tiles.row_step, taps += K * kDepth) {
    float4 w[K];
#pragma unroll
    for (int kx = 0; kx < K; kx++) w[kx] = load4(taps + kx * kDepth);
#pragma unroll
    for (int j = 0; j < 3 * S + K; j++) {
      const float4 v = load4(row + j * kDepth);
#pragma unroll
      for (int kx = 0; kx < K; kx++)
        if (j >= kx && (j - kx) % S == 0 && (j - kx) / S < 4) add_product4(sum[(j - kx) / S], v, w[kx]);
    }
  }
}

// The depthwise convolution of the whole tile: pixel p's result to place p + (p >> width_shift) of z.
template <int K, int S>
PN_DEVICE void depthwise_tile(float* z, const Launch& l, const float* window, const float* taps) {
  const Strip strip(l);
  float4 sum[4];
  depthwise<K, S>(sum, l, strip, window, taps);
  const int place = strip.row * ((1 << l.tiles.width_shift) + 1) + strip.column;
#pragma unroll
  for (int i = 0; i < 4; i++) store4_shared(z + tile_offset(place + i * l.dilation, strip.quad), sum[i]);
}

PN_DEVICE int window_floats(const Launch& l) { return l.tiles.rows * l.tiles.row_step; }
PN_DEVICE int tile_floats() { return (block_extent().x + kTileRows) * kDepth; }

template <int K, int S, int kColumns, bool kTf32>
PN_DEVICE void forward(const Launch& l) {
  float* window = pn_shared;
  float* taps = window + window_floats(l);
  float* z = taps + K * K * kDepth;
  float* weights = z + tile_floats();
  const Place place(l.tiles, block_index().x, l.out_height, l.out_width);
  const int column0 = block_index().y * kColumns, columns = min(kColumns, l.a.out_channels - column0);
  Product<kColumns, kTf32> product;
  product.clear();
  for (int channel = 0, buffer = 0; channel < l.a.in_channels; channel += kDepth, buffer ^= 1) {
    float* w = weights + buffer * kWeightFloats<kColumns>;  // the last chunk's may still be in use
    load_weights<kColumns>(w, l.a.pointwise + int64_t(channel) * l.a.out_channels + column0, l.a.out_channels,
                           l.a.in_channels - channel, columns);
    load_taps(taps, l, K * K, channel, false);
    load_input(window, l, place, S, channel);
    copies_done();
    barrier();
    depthwise_tile<K, S>(z, l, window, taps);
    barrier();
    product.add(z, l.tiles.width_shift, w, kDepth);
  }

  const bool aligned = (l.a.out_channels & 3) == 0 && is_aligned16(l.a.y);
  float* y = l.a.y + place.image * l.out_height * l.out_width * l.a.out_channels + column0;
  const int t = fresh_thread_index();
  uint32_t valid = 0;
#pragma unroll
  for (int i = 0; i < product.kPixels; i++) {
    const int p = product.pixel(t, i), row = p >> l.tiles.width_shift, column = p & ((1 << l.tiles.width_shift) - 1);
    if (!place.holds(row, column)) continue;
    valid |= 1u << i;
    float* out = y + (int64_t(place.row + row) * l.out_width + place.column + column) * l.a.out_channels;
#pragma unroll
    for (int j = 0; j < product.kOwn; j += product.kVector) product.store(out, t, i, j, columns, aligned);
  }
  if (!l.a.statistics) return;
  const int channels = l.a.out_channels;
  float* tile = l.sums + int64_t(block_index().x) * 2 * channels + column0;
  statistics(product, valid, place.rows * place.pixels, columns, window, tile, tile + channels);
  if (l.tiles.count == 1) return;
  const Cover cover = {l.out_height, l.out_width, kTileRows, 1 << l.tiles.width_shift};
  float* mean = l.a.statistics + place.image * 2 * channels + column0;
  merge_statistics<kColumns>(l.sums + place.image * l.tiles.count * 2 * channels + column0, cover, channels, columns,
                             l.counters + place.image * grid_extent().y + block_index().y, mean, mean + channels);
}

// dx at four pixels of a row, `apart` from each other, from (row, column) of the tile on, and gradient sums. d is their
// gradient before ReLU.
PN_DEVICE void finish_input_gradient(const float4 (&d)[4], const Launch& l, const Place& place, int row, int column,
                                     int apart, int channel, float* memory) {
  const int channels = l.a.in_channels, t = thread_index().x, quad = t & 3, count = channels - channel - quad * 4;
  const bool aligned =
      (channels & 3) == 0 && is_aligned16(l.a.x) && is_aligned16(l.a.dx) && is_aligned16(l.a.x_normalization);
  float4 scale = make4(1.0f, 1.0f, 1.0f, 1.0f), shift = zero4(), deviation = zero4(), mean = zero4();
  if (l.a.x_normalization) {
    const float* rows = l.a.x_normalization + channel + quad * 4;
    scale = load_channels(rows, count, aligned);
    shift = load_channels(rows + channels, count, aligned);
    deviation = load_channels(rows + 2 * channels, count, aligned);
    mean = load_channels(rows + 3 * channels, count, aligned);
  }
  float s1[4] = {}, s2[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (!place.holds(row, column + i * apart)) continue;
    const int64_t at =
        ((place.image * l.a.height + place.row + row) * l.a.width + place.column + column + i * apart) * channels +
        channel + quad * 4;
    const float4 x = load_channels(l.a.x + at, count, aligned);
    float4 v = make4(scale.x * x.x + shift.x > 0.0f ? d[i].x : 0.0f, scale.y * x.y + shift.y > 0.0f ? d[i].y : 0.0f,
                     scale.z * x.z + shift.z > 0.0f ? d[i].z : 0.0f, scale.w * x.w + shift.w > 0.0f ? d[i].w : 0.0f);
    if (l.a.dx) {
      if (l.a.accumulate) {
        const float4 before = load_channels(l.a.dx + at, count, aligned);
        v = make4(before.x + v.x, before.y + v.y, before.z + v.z, before.w + v.w);
      }
      store_channels(l.a.dx + at, v, count, aligned);
    }
    s1[0] += v.x, s1[1] += v.y, s1[2] += v.z, s1[3] += v.w;
    s2[0] += v.x * (deviation.x * (x.x - mean.x)), s2[1] += v.y * (deviation.y * (x.y - mean.y));
    s2[2] += v.z * (deviation.z * (x.z - mean.z)), s2[3] += v.w * (deviation.w * (x.w - mean.w));
  }
  if (!l.a.gradient_sums) return;
#pragma unroll
  for (int e = 0; e < 4; e++)
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      s1[e] += shuffle_xor(s1[e], mask);
      s2[e] += shuffle_xor(s2[e], mask);
    }
  barrier();  // the memory was another's
  if ((t & 31) < 4)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      memory[(t >> 5) * 2 * kDepth + quad * 4 + e] = s1[e];
      memory[((t >> 5) * 2 + 1) * kDepth + quad * 4 + e] = s2[e];
    }
  barrier();
  if (t < 2 * kDepth && channel + t % kDepth < channels) {
    float total = 0.0f;
    for (int w = 0; w < block_extent().x >> 5; w++) total += memory[w * 2 * kDepth + t];
    l.sums[(int64_t(block_index().x) * 2 + t / kDepth) * channels + channel + t % kDepth] = total;
  }
  if (l.tiles.count == 1 ||
      !is_last_block(l.counters + place.image * grid_extent().y + block_index().y, l.tiles.count) || t >= 2 * kDepth ||
      channel + t % kDepth >= channels)
    return;
  const int64_t at = int64_t(t / kDepth) * channels + channel + t % kDepth;
  const float* tiles = l.sums + place.image * l.tiles.count * 2 * channels + at;
  float total = 0.0f;
  for (int tile = 0; tile < l.tiles.count; tile++) total += tiles[int64_t(tile) * 2 * channels];
  l.a.gradient_sums[place.image * 2 * channels + at] = total;
}

// Stride 1: the depthwise convolution of dz with the flipped kernel.
template <int K>
PN_DEVICE void backward_input(const Launch& l) {
  float* window = pn_shared;
  float* taps = window + window_floats(l);
  const Place place(l.tiles, block_index().x, l.a.height, l.a.width);
  const int channel = block_index().y * kDepth, channels = l.a.in_channels;
  load_taps(taps, l, K * K, channel, true);
  load_window(window, l.tiles, l.dilation_shift, l.dz + place.image * l.out_height * l.out_width * channels + channel,
              place.row - l.padding, place.column - l.padding, l.out_height, l.out_width,
              int64_t(l.out_width) * channels, channels, channels - channel, (channels & 3) == 0,
              [](float4 v) { return v; });
  copies_done();
  barrier();
  const Strip strip(l);
  float4 sum[4];
  depthwise<K, 1>(sum, l, strip, window, taps);
  finish_input_gradient(sum, l, place, strip.row, strip.column, l.dilation, channel, window);
}

// Stride 2: coordinate u of x (counted from the padding) gets dz[(u - k * dilation) / 2] through tap k wherever that is
// even.
struct StridedTaps {
  int first, step, end;

  PN_DEVICE_METHOD StridedTaps(int u, int kernel, int dilation) {
    first = dilation == 1 ? u & 1 : 0;
    step = 3 - dilation;
    end = dilation == 2 && (u & 1) ? 0 : kernel;
  }
};

PN_DEVICE void backward_strided_input(const Launch& l) {
  const int kernel = l.a.kernel, dilation = l.a.dilation, padding = dilation * (kernel / 2);
  float* window = pn_shared;
  float* taps = window + window_floats(l);
  const Place place(l.tiles, block_index().x, l.a.height, l.a.width);
  const int channel = block_index().y * kDepth, channels = l.a.in_channels;
  const int top = (place.row + padding - (kernel - 1) * dilation) >> 1;
  const int left = (place.column + padding - (kernel - 1) * dilation) >> 1;
  load_taps(taps, l, kernel * kernel, channel, false);
  load_window(window, l.tiles, 0, l.dz + place.image * l.out_height * l.out_width * channels + channel, top, left,
              l.out_height, l.out_width, int64_t(l.out_width) * channels, channels, channels - channel,
              (channels & 3) == 0, [](float4 v) { return v; });
  copies_done();
  barrier();
  const int t = thread_index().x, quad = t & 3, row = t >> 2 & 7, column = (t >> 5) * 4;
  const int u = place.row + row + padding;
  const StridedTaps rows(u, kernel, dilation);
  float4 sum[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int v = place.column + column + i + padding;
    const StridedTaps columns(v, kernel, dilation);
    sum[i] = zero4();
    for (int ky = rows.first; ky < rows.end; ky += rows.step)
      for (int kx = columns.first; kx < columns.end; kx += columns.step) {
        const int y = ((u - ky * dilation) >> 1) - top, x = ((v - kx * dilation) >> 1) - left;
        add_product4(sum[i], load4(window + y * l.tiles.row_step + x * kDepth + quad * 4),
                     load4(taps + (ky * kernel + kx) * kDepth + quad * 4));
      }
  }
  finish_input_gradient(sum, l, place, row, column, 1, channel, window);
}

// The gradient of a chunk's taps. A thread has one quad of channels, one row of the kernel, and a share of the tile's
// rows and strips of four pixels.
template <int K, int S>
struct TapGradient {
  float4 sum[K];

  PN_DEVICE_METHOD void clear() {
#pragma unroll
    for (int kx = 0; kx < K; kx++) sum[kx] = zero4();
  }
  // Threads are numbered quad first, then odd and even rows, then rows of the kernel; those left over do nothing.
  static PN_DEVICE_METHOD int parts() { return (block_extent().x >> 3) / K; }

  PN_DEVICE_METHOD void add(const Launch& l, const float* window, const float* dz) {
    const int t = thread_index().x, quad = t & 3, odd = t >> 2 & 1, ky = (t >> 3) % K, part = (t >> 3) / K;
    const int shift = l.dilation_shift, step = (1 << l.tiles.width_shift) + 1;
    if (part >= parts()) return;
    for (int item = part; item < block_extent().x >> 3; item += parts()) {
      const int row = (item & 3) * 2 + odd, s = item >> 2;
      const int place = row * step + (s >> shift << (2 + shift)) + (s & shift);
      float4 d[4];
#pragma unroll
      for (int i = 0; i < 4; i++) d[i] = load4(dz + tile_offset(place + i * l.dilation, quad));
      const float* x = window + (row * S + ky * l.dilation) * l.tiles.row_step +
                       ((s & shift) * l.tiles.odd_columns + (s >> shift) * 4 * S) * kDepth + quad * 4;
#pragma unroll
      for (int j = 0; j < 3 * S + K; j++) {
        const float4 v = load4(x + j * kDepth);
#pragma unroll
        for (int kx = 0; kx < K; kx++)
          if (j >= kx && (j - kx) % S == 0 && (j - kx) / S < 4) add_product4(sum[kx], v, d[(j - kx) / S]);
      }
    }
  }

  // out [K*K][channels] = the block's sum. Takes 4 * K floats of shared memory a thread.
  PN_DEVICE_METHOD void finish(float* memory, float* out, int channels, int count) const {
    const int t = thread_index().x;
#pragma unroll
    for (int kx = 0; kx < K; kx++) store4(memory + ((t >> 2) * K + kx) * kDepth + (t & 3) * 4, sum[kx]);
    barrier();
    for (int e = t; e < K * K * kDepth; e += block_extent().x) {
      const int c = e % kDepth, tap = e / kDepth, ky = tap / K, kx = tap % K;
      float total = 0.0f;
      for (int part = 0; part < parts(); part++)
        for (int odd = 0; odd < 2; odd++) total += memory[(((part * K + ky) * 2 + odd) * K + kx) * kDepth + c];
      if (c < count) out[int64_t(tap) * channels + c] = total;
    }
  }
};

template <int K, int S>
PN_DEVICE void backward_weights(const Launch& l) {
  float* window = pn_shared;
  float* taps = window + window_floats(l);
  float* z = taps + K * K * kDepth;
  float* dz = z + tile_floats();
  float* dy = dz + tile_floats();
  const int channel = block_index().y * kDepth, channels = l.a.in_channels, out_channels = l.a.out_channels;
  const int column0 = block_index().z * l.columns, columns = min(l.columns, out_channels - column0);
  const bool want_taps = block_index().z == 0;
  const PendingGradient gradient = {
      l.a.g, l.a.y, l.a.coefficients, out_channels,
      (out_channels & 3) == 0 && is_aligned16(l.a.g) && is_aligned16(l.a.y) && is_aligned16(l.a.coefficients)};
  const int t = thread_index().x, threads = block_extent().x;
  TapGradient<K, S> tap_gradient;
  WeightGradient matrix;
  tap_gradient.clear();
  matrix.clear();
  load_taps(taps, l, K * K, channel, false);
  const int64_t count = int64_t(l.a.images) * l.tiles.count, group = block_index().x;
  for (int64_t tile = group * count / l.groups; tile < (group + 1) * count / l.groups; tile++) {
    const Place place(l.tiles, tile, l.out_height, l.out_width);
    const int64_t first = (place.image * l.out_height + place.row) * l.out_width + place.column;
    load_input(window, l, place, S, channel);
    if (want_taps)
      for (int i = t; i < threads * 4; i += threads) {
        const int p = i >> 2, quad = i & 3, row = p >> l.tiles.width_shift, column = p - (row << l.tiles.width_shift);
        const bool inside = place.holds(row, column);
        const float* from = l.dz + (first + int64_t(row) * l.out_width + column) * channels + channel + quad * 4;
        const int left = inside ? channels - channel - quad * 4 : 0;
        store4(dz + tile_offset(p + row, quad), load_channels(from, left, (channels & 3) == 0));
      }
    gradient.load_tile(dy, l.columns, column0, columns, threads, [&](int p) {
      const int row = p >> l.tiles.width_shift, column = p - (row << l.tiles.width_shift);
      return place.holds(row, column) ? (first + int64_t(row) * l.out_width + column) * out_channels : -1;
    });
    copies_done();
    barrier();
    depthwise_tile<K, S>(z, l, window, taps);
    if (want_taps) tap_gradient.add(l, window, dz);
    barrier();
    matrix.add(z, l.tiles.width_shift, dy, l.columns);
    barrier();
  }
  const int64_t rows = min(kDepth, channels - channel);
  matrix.finish(pn_shared, l.columns, l.d_pointwise + (group * channels + channel) * out_channels + column0,
                out_channels, rows, columns);
  if (!want_taps) return;
  barrier();
  tap_gradient.finish(pn_shared, l.d_depthwise + group * K * K * channels + channel, channels, rows);
}

}  // namespace

#define PN_FORWARD(K, S, COLUMNS)                                            \
  PN_KERNEL __launch_bounds__(kMaxThreads, blocks_of(COLUMNS) - (K == 7))    \
      depthwise_pointwise_forward_k##K##_s##S##_c##COLUMNS(const Launch l) { \
    forward<K, S, COLUMNS, false>(l);                                        \
  }
#if PN_SM80
#define PN_FORWARD_TF32(K, S, COLUMNS)                                              \
  PN_KERNEL __launch_bounds__(kMaxThreads, blocks_of(COLUMNS) - (K == 7))           \
      depthwise_pointwise_forward_k##K##_s##S##_c##COLUMNS##_tf32(const Launch l) { \
    forward<K, S, COLUMNS, true>(l);                                                \
  }
#else
#define PN_FORWARD_TF32(K, S, COLUMNS)
#endif
#define PN_KERNELS(K, S)                                                                                         \
  PN_FORWARD(K, S, 16)                                                                                           \
  PN_FORWARD(K, S, 32)                                                                                           \
  PN_FORWARD(K, S, 64)                                                                                           \
  PN_FORWARD_TF32(K, S, 16)                                                                                      \
  PN_FORWARD_TF32(K, S, 32)                                                                                      \
  PN_FORWARD_TF32(K, S, 64)                                                                                      \
  PN_KERNEL __launch_bounds__(kMaxThreads, 3) depthwise_pointwise_backward_weights_k##K##_s##S(const Launch l) { \
    backward_weights<K, S>(l);                                                                                   \
  }
PN_KERNELS(3, 1)
PN_KERNELS(3, 2)
PN_KERNELS(5, 1)
PN_KERNELS(5, 2)
PN_KERNELS(7, 1)
PN_KERNELS(7, 2)

PN_KERNEL __launch_bounds__(kMaxThreads, 4) depthwise_pointwise_backward_input_k3(const Launch l) {
  backward_input<3>(l);
}
PN_KERNEL __launch_bounds__(kMaxThreads, 4) depthwise_pointwise_backward_input_k5(const Launch l) {
  backward_input<5>(l);
}
PN_KERNEL __launch_bounds__(kMaxThreads, 4) depthwise_pointwise_backward_input_k7(const Launch l) {
  backward_input<7>(l);
}
PN_KERNEL __launch_bounds__(kMaxThreads, 4) depthwise_pointwise_backward_strided_input(const Launch l) {
  backward_strided_input(l);
}
