// Optional ReLU - dense convolution with statistics, and its gradients, as products of matrices whose rows (the values
// that an output pixel reads, or an input pixel's gradient comes from) are gathered chunk by chunk. Forward, a tile is
// a run of output pixels of one image, backward of all images.
#include "cuda/matrix.h"

namespace {

using namespace pn;

struct Launch {
  pn_convolution a;
  float* sums;                           // forward: statistics of every tile
  uint32_t* counters;                    // a zero for every image and block y
  float* d_weight;                       // partial sums of every group of tiles
  int32_t out_height, out_width, tiles;  // tiles of an image
  int32_t depth;                         // KH * KW * Cin
  int32_t staged;                        // floats of shared memory for stage_rows(), a multiple of 4, or 0
  int32_t columns, groups;               // gradient of weights: output channels of a block, groups of tiles
};

// Pixels of, say, three channels are no quads. So that they are not read one value at a time, and again for every tap,
// the rows of x that the windows of output pixels first to last (numbered through all images) reach are copied to
// `memory` as they lie, where they fit into it: they are one stretch. Returns where x would begin for a reader of the
// copy, or x itself. All threads take part.
PN_DEVICE const float* stage_rows(const Launch& l, float* memory, int64_t first, int64_t last) {
  if (l.staged == 0 || !is_aligned16(l.a.x)) return l.a.x;
  const int height = l.a.height, pixels = l.out_height * l.out_width;
  const int64_t image0 = first / pixels, image1 = last / pixels, line = int64_t(l.a.width) * l.a.in_channels;
  const int top = int(first - image0 * pixels) / l.out_width * l.a.stride_h - l.a.padding_h;
  const int bottom = int(last - image1 * pixels) / l.out_width * l.a.stride_h - l.a.padding_h + l.a.kernel_h;
  const int64_t begin = (image0 * height + min(max(top, 0), height)) * line & ~int64_t(3);
  const int64_t end = (image1 * height + min(max(bottom, 0), height)) * line;
  if (end - begin > l.staged) return l.a.x;
  const float* from = l.a.x + begin;
  const int count = int(end - begin);
#pragma unroll 1
  for (int i = thread_index().x * 4; i < count; i += block_extent().x * 4)
    store4_shared(memory + i, load_channels(from + i, count - i, count - i >= 4));
  barrier();
  return memory - begin;
}

// Where the window of an output pixel begins: its image (of x or of its copy), a row, and a place in the row, in
// floats. No tap of a window that there is not lies inside the image.
struct Window {
  const float* image = nullptr;
  int row = -(1 << 30), place = 0;
};

PN_DEVICE Window window_of(const Launch& l, const float* x, int64_t image, int pixel) {
  const int row = pixel / l.out_width, column = pixel - row * l.out_width;
  return {x + image * l.a.height * l.a.width * l.a.in_channels, row * l.a.stride_h - l.a.padding_h,
          (column * l.a.stride_w - l.a.padding_w) * l.a.in_channels};
}

// Values k and, where `aligned`, the three after it of the windows, rectified if asked for: value k is the one that
// row k of the weights multiplies. The values of a row of the kernel lie side by side.
PN_DEVICE void load_values(float4 (&v)[kLoads], const Launch& l, const Window (&windows)[kLoads], int k, bool aligned) {
  const int taps = l.a.kernel_w * l.a.in_channels, line = l.a.width * l.a.in_channels;
  const int ky = k / taps, kx = k - ky * taps;
#pragma unroll
  for (int u = 0; u < kLoads; u++) {
    const int row = windows[u].row + ky, place = windows[u].place + kx;
    const bool inside = k < l.depth && row >= 0 && row < l.a.height && place >= 0 && place < line;
    const float* from = windows[u].image + int64_t(row) * line + place;
    v[u] = load_channels(from, inside ? (aligned ? 4 : 1) : 0, aligned);
    if (l.a.relu) v[u] = make4(relu(v[u].x), relu(v[u].y), relu(v[u].z), relu(v[u].w));
  }
}

// The thread's quads of the chunk of values from k on.
PN_DEVICE void load_input(float4 (&v)[kLoads], const Launch& l, const Window (&windows)[kLoads], int k) {
  k += loaded_quad() * 4;
  if ((l.a.in_channels & 3) == 0 && is_aligned16(l.a.x)) {
    load_values(v, l, windows, k, true);
    return;
  }
  float4 one[4][kLoads];
#pragma unroll
  for (int e = 0; e < 4; e++) load_values(one[e], l, windows, k + e, false);
#pragma unroll
  for (int u = 0; u < kLoads; u++) v[u] = make4(one[0][u].x, one[1][u].x, one[2][u].x, one[3][u].x);
}

template <int kColumns>
struct ForwardSource {
  const Launch& l;
  Window windows[kLoads];
  int column0, columns, k;

  PN_DEVICE_METHOD bool next() { return (k += kDepth) < l.depth; }
  PN_DEVICE_METHOD void load_pixels(float4 (&v)[kLoads]) const { load_input(v, l, windows, k); }
  PN_DEVICE_METHOD void load_weights(float* w) const {
    pn::load_weights<kColumns>(w, l.a.weight + int64_t(k) * l.a.out_channels + column0, l.a.out_channels, l.depth - k,
                               columns);
  }
};

template <int kColumns, bool kTf32>
PN_DEVICE void forward(const Launch& l) {
  const int64_t image = block_index().x / l.tiles;
  const int pixels = l.out_height * l.out_width, first = int(block_index().x - image * l.tiles) * block_extent().x;
  const int count = min(block_extent().x, pixels - first), column0 = block_index().y * kColumns;
  ForwardSource<kColumns> source = {l, {}, column0, min(kColumns, l.a.out_channels - column0), -kDepth};
  float* staged = pn_shared + 2 * (block_extent().x * kDepth + kWeightFloats<kColumns>);
  const int64_t pixel0 = image * pixels + first;
  const float* x = stage_rows(l, staged, pixel0, pixel0 + count - 1);
#pragma unroll
  for (int u = 0; u < kLoads; u++)
    if (loaded_pixel(u) < count) source.windows[u] = window_of(l, x, image, first + loaded_pixel(u));
  Product<kColumns, kTf32> product;
  float* memory = multiply_chunks(product, source);

  const bool aligned = (l.a.out_channels & 3) == 0 && is_aligned16(l.a.y);
  float* y = l.a.y + pixel0 * l.a.out_channels + column0;
  const int t = fresh_thread_index();
  uint32_t valid = 0;
#pragma unroll
  for (int i = 0; i < product.kPixels; i++) {
    if (product.pixel(t, i) >= count) continue;
    valid |= 1u << i;
#pragma unroll
    for (int j = 0; j < product.kOwn; j += product.kVector)
      product.store(y + int64_t(product.pixel(t, i)) * l.a.out_channels, t, i, j, source.columns, aligned);
  }
  if (!l.a.statistics) return;
  const int64_t channel = column0;
  float* tile = l.sums + int64_t(block_index().x) * 2 * l.a.out_channels + channel;
  statistics(product, valid, count, source.columns, memory, tile, tile + l.a.out_channels);
  if (l.tiles == 1) return;
  const Cover cover = {1, pixels, 1, block_extent().x};
  float* mean = l.a.statistics + image * 2 * l.a.out_channels + channel;
  merge_statistics<kColumns>(l.sums + image * l.tiles * 2 * l.a.out_channels + channel, cover, l.a.out_channels,
                             source.columns, l.counters + image * grid_extent().y + block_index().y, mean,
                             mean + l.a.out_channels);
}

PN_DEVICE PendingGradient output_gradient(const Launch& l) {
  return {l.a.g, l.a.y, l.a.coefficients, l.a.out_channels,
          (l.a.out_channels & 3) == 0 && is_aligned16(l.a.g) &&
              (!l.a.coefficients || (is_aligned16(l.a.y) && is_aligned16(l.a.coefficients)))};
}

// An input pixel: its image's first output pixel, and its coordinates counted from the padding. No tap reaches one with
// negative coordinates.
struct InputPixel {
  int64_t image;
  int y, x;
};

// A chunk is one tap's gradients of 16 output channels.
template <int kColumns>
struct BackwardSource {
  const Launch& l;
  PendingGradient gradient;
  InputPixel pixels[kLoads];
  int column0, columns;  // input channels
  int tap, channel;

  PN_DEVICE_METHOD bool next() {
    channel += kDepth;
    if (channel < l.a.out_channels) return true;
    channel = 0;
    return ++tap < l.a.kernel_h * l.a.kernel_w;
  }
  PN_DEVICE_METHOD void load_pixels(float4 (&v)[kLoads]) const {
    const int ky = tap / l.a.kernel_w, kx = tap - ky * l.a.kernel_w, c = channel + loaded_quad() * 4;
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      v[u] = zero4();
      const int y = pixels[u].y - ky, x = pixels[u].x - kx;
      if (y < 0 || x < 0 || y % l.a.stride_h || x % l.a.stride_w || c >= l.a.out_channels) continue;
      const int row = y / l.a.stride_h, column = x / l.a.stride_w;
      if (row < l.out_height && column < l.out_width)
        v[u] = gradient.load((pixels[u].image + int64_t(row) * l.out_width + column) * l.a.out_channels, c,
                             l.a.out_channels - c);
    }
  }
  PN_DEVICE_METHOD void load_weights(float* w) const {
    load_transposed_weights<kColumns>(
        w, l.a.weight + (int64_t(tap) * l.a.in_channels + column0) * l.a.out_channels + channel, l.a.out_channels,
        l.a.out_channels - channel, columns);
  }
};

template <int kColumns, bool kTf32>
PN_DEVICE void backward_input(const Launch& l) {
  const int pixels = l.a.height * l.a.width, column0 = block_index().y * kColumns;
  const int64_t first = int64_t(block_index().x) * block_extent().x;
  const int64_t count = min<int64_t>(block_extent().x, int64_t(l.a.images) * pixels - first);
  BackwardSource<kColumns> source = {
      l, output_gradient(l), {}, column0, min(kColumns, l.a.in_channels - column0), 0, -kDepth};
#pragma unroll
  for (int u = 0; u < kLoads; u++) {
    const int64_t q = first + loaded_pixel(u), image = q / pixels;
    const int pixel = int(q - image * pixels), row = pixel / l.a.width, column = pixel - row * l.a.width;
    source.pixels[u] = {image * l.out_height * l.out_width, loaded_pixel(u) < count ? row + l.a.padding_h : -1,
                        column + l.a.padding_w};
  }
  Product<kColumns, kTf32> product;
  multiply_chunks(product, source);

  const bool aligned = (l.a.in_channels & 3) == 0 && is_aligned16(l.a.dx) && (!l.a.relu || is_aligned16(l.a.x));
  const int t = fresh_thread_index();
#pragma unroll
  for (int i = 0; i < product.kPixels; i++) {
    if (product.pixel(t, i) >= count) continue;
    const int64_t at = (first + product.pixel(t, i)) * l.a.in_channels + column0;
    product.store_gradient(l.a.dx + at, l.a.relu ? l.a.x + at : nullptr, t, i, source.columns, aligned, l.a.accumulate);
  }
}

// The gradient of a chunk of the weights' rows (block y) and of l.columns output channels (block z) over a group of
// tiles.
PN_DEVICE void backward_weights(const Launch& l) {
  float* tile = pn_shared;
  float* dy = tile + block_extent().x * kDepth;
  float* staged = dy + block_extent().x * l.columns;
  const PendingGradient gradient = output_gradient(l);
  const int k = block_index().y * kDepth, column0 = block_index().z * l.columns;
  const int columns = min(l.columns, l.a.out_channels - column0), pixels = l.out_height * l.out_width;
  const int threads = block_extent().x;
  const int64_t count = int64_t(l.a.images) * pixels, tiles = (count + threads - 1) / threads, group = block_index().x;
  WeightGradient sum;
  sum.clear();
  for (int64_t i = group * tiles / l.groups; i < (group + 1) * tiles / l.groups; i++) {
    const int64_t first = i * threads;
    const float* x = stage_rows(l, staged, first, min(first + threads, count) - 1);
    Window windows[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      const int64_t q = first + loaded_pixel(u), image = q / pixels;
      if (q < count) windows[u] = window_of(l, x, image, int(q - image * pixels));
    }
    float4 v[kLoads];
    load_input(v, l, windows, k);
    store_tile(tile, v);
    gradient.load_tile(dy, l.columns, column0, columns, threads,
                       [&](int p) { return first + p < count ? (first + p) * l.a.out_channels : -1; });
    barrier();
    sum.add(tile, 31, dy, l.columns);
    barrier();
  }
  sum.finish(pn_shared, l.columns, l.d_weight + (group * l.depth + k) * l.a.out_channels + column0, l.a.out_channels,
             min(kDepth, l.depth - k), columns);
}

}  // namespace

PN_PRODUCT_KERNELS(convolution)

PN_KERNEL __launch_bounds__(kMaxThreads, 4) convolution_backward_weights(const Launch l) { backward_weights(l); }
