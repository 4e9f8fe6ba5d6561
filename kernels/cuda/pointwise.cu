// Optional ReLU - pointwise 1x1 convolution of a concatenation that never exists as a whole, with statistics; and its
// gradients. A chunk of channels never spans two parts. Forward, a tile is a run of output pixels of one image;
// backward, of all images.
#include "cuda/matrix.h"

namespace {

using namespace pn;

struct Launch {
  pn_pointwise a;
  pn_part parts[8];
  int32_t first_row[8];  // of the weights, of every part
  int32_t
      first_block[8];  // backward_input: the block y with which every part begins; one that wants no gradient has none
  float* sums;         // forward: statistics of every tile
  uint32_t* counters;  // a zero for every image and block y
  float* d_weight;     // partial sums of every group of tiles
  int32_t out_width, pixels, tiles;      // output pixels and tiles of an image
  int32_t in_channels, columns, groups;  // gradient of weights: output channels of a block, groups of tiles
};

// The input pixel that output pixel o of an image reads, or -1 outside of the image.
PN_DEVICE int source_pixel(const Launch& l, int o) {
  if (l.a.stride == 1 && l.a.offset == 0) return o;
  const int row = o / l.out_width, column = o - row * l.out_width;
  const int y = row * l.a.stride + l.a.offset, x = column * l.a.stride + l.a.offset;
  return y < l.a.height && x < l.a.width ? y * l.a.width + x : -1;
}

// The channels of the concatenation, in chunks.
struct Channels {
  int part = 0, first = -kDepth, row = 0;  // a part, a channel of it, and the weights' row of that

  PN_DEVICE_METHOD bool next(const Launch& l) {
    if (first >= 0) row += min(kDepth, l.parts[part].channels - first);
    first += kDepth;
    if (first < l.parts[part].channels) return true;
    first = 0;
    return ++part < l.a.part_count;
  }
};

// The thread's quads of a chunk of input pixels, through ReLU if asked for.
PN_DEVICE void load_input(float4 (&v)[kLoads], const Launch& l, const Channels& chunk, int64_t variant,
                          const int32_t (&pixels)[kLoads]) {
  const pn_part& part = l.parts[chunk.part];
  const int channel = chunk.first + loaded_quad() * 4, count = part.channels - channel;
  const bool aligned = (part.channels & 3) == 0 && is_aligned16(part.x);
  const float* x = part.x + channel;
  if (part.variants > 1) x += variant * l.a.images * l.a.height * l.a.width * part.channels;
#pragma unroll
  for (int u = 0; u < kLoads; u++) {
    v[u] = load_channels(x + int64_t(pixels[u]) * part.channels, pixels[u] < 0 ? 0 : count, aligned);
    if (l.a.relu) v[u] = make4(relu(v[u].x), relu(v[u].y), relu(v[u].z), relu(v[u].w));
  }
}

template <int kColumns>
struct ForwardSource {
  const Launch& l;
  int64_t variant;
  int32_t pixels[kLoads];  // numbered through all images of a variant
  int column0, columns;
  Channels chunk;

  PN_DEVICE_METHOD bool next() { return chunk.next(l); }
  PN_DEVICE_METHOD void load_pixels(float4 (&v)[kLoads]) const { load_input(v, l, chunk, variant, pixels); }
  PN_DEVICE_METHOD void load_weights(float* w) const {
    pn::load_weights<kColumns>(w, l.a.weight + int64_t(chunk.row) * l.a.out_channels + column0, l.a.out_channels,
                               min(kDepth, l.parts[chunk.part].channels - chunk.first), columns);
  }
};

template <int kColumns, bool kTf32>
PN_DEVICE void forward(const Launch& l) {
  const int64_t image = block_index().x / l.tiles;  // of all variants
  const int first = int(block_index().x - image * l.tiles) * block_extent().x,
            count = min(block_extent().x, l.pixels - first);
  ForwardSource<kColumns> source = {l, image / l.a.images, {}, block_index().y * kColumns, 0, {}};
  source.columns = min(kColumns, l.a.out_channels - source.column0);
#pragma unroll
  for (int u = 0; u < kLoads; u++) {
    const int pixel = loaded_pixel(u) < count ? source_pixel(l, first + loaded_pixel(u)) : -1;
    source.pixels[u] = pixel < 0 ? -1 : int(image % l.a.images) * l.a.height * l.a.width + pixel;
  }
  Product<kColumns, kTf32> product;
  float* memory = multiply_chunks(product, source);

  const bool aligned = ((l.a.out_channels | l.a.y_channels) & 3) == 0 && is_aligned16(l.a.y + l.a.y_offset);
  float* y = l.a.y + (image * l.pixels + first) * l.a.y_channels + l.a.y_offset + source.column0;
  const int t = fresh_thread_index();
  uint32_t valid = 0;
#pragma unroll
  for (int i = 0; i < product.kPixels; i++) {
    if (product.pixel(t, i) >= count) continue;
    valid |= 1u << i;
#pragma unroll
    for (int j = 0; j < product.kOwn; j += product.kVector)
      product.store(y + int64_t(product.pixel(t, i)) * l.a.y_channels, t, i, j, source.columns, aligned);
  }
  if (!l.a.statistics) return;
  const int64_t channel = l.a.y_offset + source.column0;
  float* tile = l.sums + int64_t(block_index().x) * 2 * l.a.y_channels + channel;
  statistics(product, valid, count, source.columns, memory, tile, tile + l.a.y_channels);
  if (l.tiles == 1) return;
  const Cover cover = {1, l.pixels, 1, block_extent().x};
  float* mean = l.a.statistics + image * 2 * l.a.y_channels + channel;
  merge_statistics<kColumns>(l.sums + image * l.tiles * 2 * l.a.y_channels + channel, cover, l.a.y_channels,
                             source.columns, l.counters + image * grid_extent().y + block_index().y, mean,
                             mean + l.a.y_channels);
}

PN_DEVICE PendingGradient output_gradient(const Launch& l) {
  const float* g = l.a.g + l.a.y_offset;
  const float* y = l.a.y + l.a.y_offset;
  const float* coefficients = l.a.coefficients ? l.a.coefficients + l.a.y_offset : nullptr;
  return {g, y, coefficients, l.a.y_channels,
          ((l.a.out_channels | l.a.y_channels) & 3) == 0 && is_aligned16(g) &&
              (!coefficients || (is_aligned16(y) && is_aligned16(coefficients)))};
}

template <int kColumns>
struct BackwardSource {
  const Launch& l;
  PendingGradient gradient;
  int64_t first, count;  // output pixels
  int row, columns;      // of the weights: input channels
  int channel;

  PN_DEVICE_METHOD bool next() { return (channel += kDepth) < l.a.out_channels; }
  PN_DEVICE_METHOD void load_pixels(float4 (&v)[kLoads]) const {
    const int c = channel + loaded_quad() * 4;
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      v[u] = zero4();
      if (loaded_pixel(u) < count && c < l.a.out_channels)
        v[u] = gradient.load((first + loaded_pixel(u)) * l.a.y_channels, c, l.a.out_channels - c);
    }
  }
  PN_DEVICE_METHOD void load_weights(float* w) const {
    load_transposed_weights<kColumns>(w, l.a.weight + int64_t(row) * l.a.out_channels + channel, l.a.out_channels,
                                      l.a.out_channels - channel, columns);
  }
};

template <int kColumns, bool kTf32>
PN_DEVICE void backward_input(const Launch& l) {
  int index = 0, row = 0, block = block_index().y;
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (block_index().y >= l.first_block[i])
      index = i, row = l.first_row[i], block = block_index().y - l.first_block[i];
  const pn_part part = l.parts[index];
  const int column0 = block * kColumns, columns = min(kColumns, part.channels - column0);
  const int64_t first = int64_t(block_index().x) * block_extent().x;
  const int64_t count = min<int64_t>(block_extent().x, int64_t(l.a.images) * l.pixels - first);
  BackwardSource<kColumns> source = {l, output_gradient(l), first, count, row + column0, columns, -kDepth};
  Product<kColumns, kTf32> product;
  multiply_chunks(product, source);

  const bool aligned = (part.channels & 3) == 0 && is_aligned16(part.dx) && (!l.a.relu || is_aligned16(part.x));
  const int t = fresh_thread_index();
#pragma unroll
  for (int i = 0; i < product.kPixels; i++) {
    if (product.pixel(t, i) >= count) continue;
    const int64_t q = first + product.pixel(t, i), image = q / l.pixels;
    const int pixel = source_pixel(l, int(q - image * l.pixels));
    if (pixel < 0) continue;
    const int64_t at = (image * l.a.height * l.a.width + pixel) * part.channels + column0;
    product.store_gradient(part.dx + at, l.a.relu ? part.x + at : nullptr, t, i, columns, aligned, part.accumulate);
  }
}

// The gradient of a chunk of input channels (block y) and of l.columns output channels (block z) over a group of tiles.
PN_DEVICE void backward_weights(const Launch& l) {
  float* tile = pn_shared;
  float* dy = tile + block_extent().x * kDepth;
  Channels chunk;
  for (int i = 0; i <= block_index().y; i++) chunk.next(l);
  const PendingGradient gradient = output_gradient(l);
  const int column0 = block_index().z * l.columns, columns = min(l.columns, l.a.out_channels - column0);
  const int threads = block_extent().x;
  const int64_t count = int64_t(l.a.images) * l.pixels, tiles = (count + threads - 1) / threads,
                group = block_index().x;
  WeightGradient sum;
  sum.clear();
  for (int64_t i = group * tiles / l.groups; i < (group + 1) * tiles / l.groups; i++) {
    const int64_t first = i * threads;
    int32_t pixels[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      const int64_t q = first + loaded_pixel(u), image = q / l.pixels;
      const int pixel = q < count ? source_pixel(l, int(q - image * l.pixels)) : -1;
      pixels[u] = pixel < 0 ? -1 : int(image) * l.a.height * l.a.width + pixel;
    }
    float4 v[kLoads];
    load_input(v, l, chunk, 0, pixels);
    store_tile(tile, v);
    gradient.load_tile(dy, l.columns, column0, columns, threads,
                       [&](int p) { return first + p < count ? (first + p) * l.a.y_channels : -1; });
    barrier();
    sum.add(tile, 31, dy, l.columns);
    barrier();
  }
  sum.finish(pn_shared, l.columns, l.d_weight + (group * l.in_channels + chunk.row) * l.a.out_channels + column0,
             l.a.out_channels, min(kDepth, l.parts[chunk.part].channels - chunk.first), columns);
}

}  // namespace

PN_PRODUCT_KERNELS(pointwise)

PN_KERNEL __launch_bounds__(kMaxThreads, 5) pointwise_backward_weights(const Launch l) { backward_weights(l); }
