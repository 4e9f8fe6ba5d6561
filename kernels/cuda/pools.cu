// Pooling 3x3 with padding 1. Forward walks down columns of outputs. Backward pools x again, once for every output that
// a tile of the input lies in, and keeps the gradients of these outputs in shared memory, where the tile's pixels
// gather them.
#include "cuda/pooled_column.h"

namespace pn {

namespace {

constexpr int kMaxGradients = 8;

struct Pool {
  pn_pool call;  // its `gradients` is the host's array
  int32_t unit;  // channels of a thread, 4 or 1
  pn_pending_gradient gradients[kMaxGradients];
};

constexpr int kForwardThreads = 512, kBackwardThreads = 256;  // at most
// Backward: the extent of a tile of the input, the channels of a block, and the windows of a tile, each at most.
constexpr int kTileRows = 8, kTileColumns = 32, kTileChannels = 16;
constexpr int kTileWindows = (kTileRows + 2) * (kTileColumns + 2);

PN_DEVICE PoolShape shape_of(const pn_pool& a) { return {a.height, a.width, a.channels, a.stride}; }

// Divides `height` x `width` pixels among the block's rows of threads: f(column, begin, end) for this thread's parts of
// columns.
template <class F>
PN_DEVICE void for_columns(int height, int width, F f) {
  const int rows = block_extent().y, parts = max(1, min(height, rows / width)),
            part_rows = (height + parts - 1) / parts;
  for (int item = thread_index().y; item < width * parts; item += rows) {
    const int begin = item / width * part_rows;
    f(item % width, begin, min(height, begin + part_rows));
  }
}

// Grid: (variants * images, groups of channels). A block has all pixels of its image and channels, so that the
// statistics need no second pass.
template <bool Max, int W>
PN_DEVICE void forward(const pn_pool& a) {
  __shared__ Exchange<Moments<W>, kForwardThreads> exchange;
  const PoolShape shape = shape_of(a);
  const int c = first_channel<W>(block_index().y), out_height = shape.out_height(), out_width = shape.out_width();
  const int64_t image = block_index().x;
  const float* x = a.x + image * a.height * a.width * a.channels + c;
  float* out = a.y ? a.y + image * out_height * out_width * a.channels + c : nullptr;

  MomentSums<W> sums;
  if (c < a.channels)
    for_columns(out_height, out_width, [&](int ox, int begin, int end) {
      PooledColumn<W> pool(shape, x, begin, ox);
#pragma unroll 1
      for (int oy = begin; oy < end; oy++) {
        const Pooled<W> pooled = pool.next();
        const Floats<W> y = Max ? pooled.maximum : pooled.average;
        if (out) store<W>(out + (int64_t(oy) * out_width + ox) * a.channels, y);
        sums.add(y);
      }
    });
  if (!a.statistics) return;
  const Moments<W> moments = combine_rows(
      sums.moments(), exchange, [](const Moments<W>& first, const Moments<W>& second) { return merge(first, second); });
  if (thread_index().y == 0 && c < a.channels) {
    float* mean = a.statistics + image * 2 * a.channels + c;
    store<W>(mean, moments.mean);
    store<W>(mean + a.channels, moments.squares);
  }
}

template <bool Max>
PN_DEVICE void forward(const Pool& a) {
  if (a.unit == 4)
    forward<Max, 4>(a.call);
  else
    forward<Max, 1>(a.call);
}

// One dimension of a tile: its pixels [begin, end) and the windows [first_window, end_window) that they lie in.
struct Span {
  int begin, end, first_window, end_window;

  PN_DEVICE_METHOD Span(int tile, int size, int extent, int out_extent, int stride)
      : begin(tile * size),
        end(min(extent, begin + size)),
        first_window(first_window_of(begin, stride)),
        end_window(min(out_extent, end / stride + 1)) {}

  PN_DEVICE_METHOD static int first_window_of(int pixel, int stride) { return max(0, (pixel + stride - 2) / stride); }
  PN_DEVICE_METHOD int size() const { return end - begin; }
  PN_DEVICE_METHOD int windows() const { return end_window - first_window; }
};

// The gradients of the windows of a tile, and for the maximum the taps that they go to: by window and channel of the
// block.
struct alignas(16) Windows {
  float dy[kTileWindows * kTileChannels];
  uint8_t tap[kTileWindows * kTileChannels];
};

template <int W>
PN_DEVICE void store_taps(uint8_t* p, const int (&tap)[W]) {
  if constexpr (W == 4)
    *reinterpret_cast<uint32_t*>(p) = uint32_t(tap[0] | tap[1] << 8 | tap[2] << 16 | tap[3] << 24);
  else
    *p = uint8_t(tap[0]);
}

template <int W>
PN_DEVICE void load_taps(const uint8_t* p, int (&tap)[W]) {
  const uint32_t packed = W == 4 ? *reinterpret_cast<const uint32_t*>(p) : uint32_t(*p);
  for (int i = 0; i < W; i++) tap[i] = packed >> 8 * i & 255;
}

// The gradients of the tile's windows. x: the image, out: its outputs, both from the thread's first channel c on; of
// `windows`, the thread has `stride` floats a window from `first` on.
template <bool Max, int W>
PN_DEVICE void window_gradients(const Pool& launch, const float* x, int64_t out, int c, const Span& rows,
                                const Span& columns, int first, int pitch, Windows& windows) {
  const pn_pool& a = launch.call;
  const PoolShape shape = shape_of(a);
  // All consumers take the same y.
  bool needs_y = false;
  Floats<W> slope{}, constant{};
  for (int k = 0; k < a.gradient_count; k++)
    if (const float* coefficients = launch.gradients[k].coefficients) {
      needs_y = true;
      slope += load<W>(coefficients + a.channels + c);
      constant += load<W>(coefficients + 2 * a.channels + c);
    }
  for_columns(rows.windows(), columns.windows(), [&](int column, int begin, int end) {
    const int ox = columns.first_window + column;
    PooledColumn<W> pool(shape, x, rows.first_window + begin, ox);
#pragma unroll 1
    for (int row = begin; row < end; row++) {
      const int oy = rows.first_window + row;
      const Pooled<W> pooled = pool.next();
      const Floats<W> y = Max ? pooled.maximum : pooled.average;
      Floats<W> dy{};
      if (needs_y)
        for (int i = 0; i < W; i++) dy[i] = slope[i] * y[i] + constant[i];
#pragma unroll 1
      for (int k = 0; k < a.gradient_count; k++) {
        const pn_pending_gradient& gradient = launch.gradients[k];
        const Floats<W> factor = gradient.coefficients ? load<W>(gradient.coefficients + c) : splat<W>(1);
        const Floats<W> g = load<W>(gradient.g + out + (int64_t(oy) * shape.out_width() + ox) * a.channels);
        for (int i = 0; i < W; i++) dy[i] += factor[i] * g[i];
      }
      if (!Max) {
        const float share = 1.0f / float(taps_inside(oy, a.height, a.stride) * taps_inside(ox, a.width, a.stride));
        for (int i = 0; i < W; i++) dy[i] *= share;
      }
      const int at = (row * columns.windows() + column) * pitch + first;
      store<W>(windows.dy + at, dy);
      if (Max) store_taps<W>(windows.tap + at, pooled.tap);
    }
  });
}

// Grid: (images, groups of channels, tiles).
template <bool Max, int W>
PN_DEVICE void backward(const Pool& launch, Windows& windows) {
  const pn_pool& a = launch.call;
  const PoolShape shape = shape_of(a);
  const int c = first_channel<W>(block_index().y), tiles = (a.width + kTileColumns - 1) / kTileColumns;
  const Span rows(block_index().z / tiles, kTileRows, a.height, shape.out_height(), a.stride);
  const Span columns(block_index().z % tiles, kTileColumns, a.width, shape.out_width(), a.stride);
  const int first = thread_index().x * W, pitch = block_extent().x * W;
  const int64_t image = block_index().x, in = image * a.height * a.width * a.channels + c;
  const int64_t out = image * shape.out_height() * shape.out_width() * a.channels + c;
  if (c < a.channels) window_gradients<Max, W>(launch, a.x + in, out, c, rows, columns, first, pitch, windows);
  barrier();
  if (c >= a.channels) return;

  for_columns(rows.size(), columns.size(), [&](int column, int from, int to) {
    const int ix = columns.begin + column, begin = rows.begin + from, end = rows.begin + to;
    Floats<W> share[3] = {};  // of the three rows that the windows of row oy cover, so far
    // From the first row of windows that reaches the part to the one after which its last row is complete.
    for (int oy = Span::first_window_of(begin, a.stride); oy <= end / a.stride; oy++) {
      for (int kx = 0; kx < 3 && oy < rows.end_window; kx++) {
        const int ox = (ix + 1 - kx) / a.stride;
        if (ix + 1 - kx < 0 || ox * a.stride != ix + 1 - kx || ox >= columns.end_window) continue;
        const int at = ((oy - rows.first_window) * columns.windows() + ox - columns.first_window) * pitch + first;
        const Floats<W> dy = load<W>(windows.dy + at);
        if (Max) {
          int tap[W];
          load_taps<W>(windows.tap + at, tap);
          for (int ky = 0; ky < 3; ky++)
            for (int i = 0; i < W; i++)
              if (tap[i] == 3 * ky + kx) share[ky][i] += dy[i];
        } else {
          for (int ky = 0; ky < 3; ky++) share[ky] += dy;
        }
      }
      // No window after this one covers its first `stride` rows.
      for (int k = 0; k < a.stride; k++) {
        const int iy = oy * a.stride - 1 + k;
        if (iy >= begin && iy < end) {
          float* dx = a.dx + in + (int64_t(iy) * a.width + ix) * a.channels;
          if (a.accumulate) share[0] += load<W>(dx);
          store<W>(dx, share[0]);
        }
        share[0] = share[1];
        share[1] = share[2];
        share[2] = {};
      }
    }
  });
}

template <bool Max>
PN_DEVICE void backward(const Pool& a) {
  __shared__ Windows windows;
  if (a.unit == 4)
    backward<Max, 4>(a, windows);
  else
    backward<Max, 1>(a, windows);
}

}  // namespace

}  // namespace pn

// One block a multiprocessor is enough: with more in mind, the compiler spills registers.
PN_KERNEL __launch_bounds__(pn::kForwardThreads, 1) max_pool_3x3_forward(const pn::Pool a) { pn::forward<true>(a); }

PN_KERNEL __launch_bounds__(pn::kForwardThreads, 1) avg_pool_3x3_forward(const pn::Pool a) { pn::forward<false>(a); }

PN_KERNEL __launch_bounds__(pn::kBackwardThreads, 2) max_pool_3x3_backward(const pn::Pool a) { pn::backward<true>(a); }

PN_KERNEL __launch_bounds__(pn::kBackwardThreads, 2) avg_pool_3x3_backward(const pn::Pool a) { pn::backward<false>(a); }
