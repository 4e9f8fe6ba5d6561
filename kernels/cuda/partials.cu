// What the blocks of a kernel left apart, put together in a fixed order.
#include "cuda/device.h"

namespace {

using namespace pn;

// Statistics of the tiles of an image, to those of the image: every tile is `tile_height` x `tile_width` pixels but for
// the last ones of a row and of a column.
struct TileStatistics {
  const float* partial;                    // [images, tiles, 2, channels]
  float* statistics;                       // [images, 2, channels]
  int32_t images, channels, first, count;  // channels [first, first + count) are merged
  int32_t height, width, tile_height, tile_width;
};

// out [outer, count] = the sum over `parts` of partial [outer, parts, count].
struct PartialSum {
  const float* partial;
  float* out;
  int64_t count;
  int32_t outer, parts;
};

// Block y works on sum y.
struct PartialSums {
  PartialSum sums[3];
};

}  // namespace

PN_KERNEL __launch_bounds__(128) merge_statistics(const TileStatistics a) {
  const int64_t i = int64_t(block_index().x) * block_extent().x + thread_index().x, image = i / a.count;
  if (image >= a.images) return;
  const int channel = a.first + int(i - image * a.count);
  const int across = (a.width + a.tile_width - 1) / a.tile_width, down = (a.height + a.tile_height - 1) / a.tile_height;
  const float* from = a.partial + image * across * down * 2 * a.channels + channel;
  float mean = 0.0f, squares = 0.0f, before = 0.0f;
  for (int tile = 0; tile < across * down; tile++, from += 2 * a.channels) {
    const int row = tile / across * a.tile_height, column = tile % across * a.tile_width;
    const float pixels = float(min(a.tile_height, a.height - row) * min(a.tile_width, a.width - column));
    const float all = before + pixels, d = from[0] - mean;
    // Chan, Golub & LeVeque 1979; the first tile's mean is taken as it is.
    if (tile == 0) {
      mean = from[0];
      squares = from[a.channels];
    } else {
      mean += d * (pixels / all);
      squares += from[a.channels] + d * d * (before * pixels / all);
    }
    before = all;
  }
  float* to = a.statistics + image * 2 * a.channels + channel;
  to[0] = mean;
  to[a.channels] = squares;
}

// A block is 32 x 8 threads: 32 neighbouring sums, of each of which eight threads add up an eighth.
PN_KERNEL __launch_bounds__(256) sum_partials(const PartialSums sums) {
  float* memory = pn_shared;
  const Index t = thread_index();
  PartialSum a = sums.sums[0];
  if (block_index().y == 1) a = sums.sums[1];
  if (block_index().y == 2) a = sums.sums[2];
  const int64_t i = int64_t(block_index().x) * 32 + t.x, outer = i / a.count;
  const bool exists = outer < a.outer;
  float total = 0.0f;
  if (exists) {
    const float* from = a.partial + outer * a.parts * a.count + (i - outer * a.count);
    for (int part = a.parts * t.y / 8; part < a.parts * (t.y + 1) / 8; part++) total += from[part * a.count];
  }
  memory[t.y * 32 + t.x] = total;
  barrier();
  if (t.y != 0 || !exists) return;
  for (int other = 1; other < 8; other++) total += memory[other * 32 + t.x];
  a.out[i] = total;
}
