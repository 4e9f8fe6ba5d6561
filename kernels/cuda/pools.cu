// The operations without weights: pooling 3x3 with padding 1, and the skip connection. Forward walks down columns of
// outputs. Backward pools x again, once for every output that a tile of the input lies in, and keeps the gradients of
// these outputs in shared memory, where the tile's pixels gather them.
#include "cuda/pooled_column.h"

namespace pn {

namespace {

constexpr int kMaxGradients = 8;

struct Pool {
  pn_pool call;  // its `gradients` is the host's array
  int32_t unit;  // channels of a thread, 4 or 1
  pn_pool_gradient gradients[kMaxGradients];
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
template <int W>
PN_DEVICE void forward(const pn_pool& a) {
  __shared__ Exchange<Moments<W>, kForwardThreads> exchange;
  const PoolShape shape = shape_of(a);
  const int c = first_channel<W>(block_index().y), out_height = shape.out_height(), out_width = shape.out_width();
  const int64_t image = block_index().x;
  const float* x = a.x + image * a.height * a.width * a.channels + c;
  const int64_t out = image * out_height * out_width * a.channels + c;

  MomentSums<W> maximum, average;
  if (c < a.channels)
    for_columns(out_height, out_width, [&](int ox, int begin, int end) {
      PooledColumn<W> pool(shape, x, begin, ox);
#pragma unroll 1
      for (int oy = begin; oy < end; oy++) {
        const Pooled<W> y = pool.next();
        const int64_t at = out + (int64_t(oy) * out_width + ox) * a.channels;
        if (a.y[PN_POOL_MAX_3X3]) store<W>(a.y[PN_POOL_MAX_3X3] + at, y.maximum);
        if (a.y[PN_POOL_AVG_3X3]) store<W>(a.y[PN_POOL_AVG_3X3] + at, y.average);
        maximum.add(y.maximum);
        average.add(y.average);
      }
    });
  for (int pooling = PN_POOL_MAX_3X3; pooling <= PN_POOL_AVG_3X3; pooling++) {
    if (!a.statistics[pooling]) continue;
    const Moments<W> moments =
        combine_rows((pooling == PN_POOL_MAX_3X3 ? maximum : average).moments(), exchange,
                     [](const Moments<W>& first, const Moments<W>& second) { return merge(first, second); });
    if (thread_index().y == 0 && c < a.channels) {
      float* mean = a.statistics[pooling] + image * 2 * a.channels + c;
      store<W>(mean, moments.mean);
      store<W>(mean + a.channels, moments.squares);
    }
  }
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

// The gradients of the maxima and averages of a tile's windows, and the taps that the maxima's go to: by window and
// channel of the block.
struct alignas(16) Windows {
  float maximum[kTileWindows * kTileChannels], average[kTileWindows * kTileChannels];
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

// dy += the gradient of y that a node has, if it takes this y.
template <int W>
PN_DEVICE void add_gradient(const Pool& launch, int node, int pooling, int c, const Floats<W>& g, const Floats<W>& y,
                            Floats<W>& dy) {
  const float* coefficients = launch.gradients[node].coefficients[pooling];
  if (!coefficients) return;
  const int channels = launch.call.channels;
  const Floats<W> factor = load<W>(coefficients + c), slope = load<W>(coefficients + channels + c);
  dy += load<W>(coefficients + 2 * channels + c);
  for (int i = 0; i < W; i++) dy[i] += factor[i] * g[i] + slope[i] * y[i];
}

PN_DEVICE bool is_taken(const Pool& launch, int pooling) {
  bool taken = false;
  for (int k = 0; k < launch.call.gradient_count; k++) taken |= launch.gradients[k].coefficients[pooling] != nullptr;
  return taken;
}

// The gradients of the tile's windows. x: the image, out: its outputs, both from the thread's first channel c on; of
// `windows`, the thread has W channels of a window from `first` on, `pitch` a window.
template <int W>
PN_DEVICE void window_gradients(const Pool& launch, const float* x, int64_t out, int c, const Span& rows,
                                const Span& columns, int first, int pitch, Windows& windows) {
  const pn_pool& a = launch.call;
  const PoolShape shape = shape_of(a);
  for_columns(rows.windows(), columns.windows(), [&](int column, int begin, int end) {
    const int ox = columns.first_window + column;
    PooledColumn<W> pool(shape, x, rows.first_window + begin, ox);
#pragma unroll 1
    for (int row = begin; row < end; row++) {
      const int oy = rows.first_window + row;
      const Pooled<W> y = pool.next();
      Floats<W> d_maximum{}, d_average{};
#pragma unroll 1
      for (int k = 0; k < a.gradient_count; k++) {
        const Floats<W> g = load<W>(launch.gradients[k].g + out + (int64_t(oy) * shape.out_width() + ox) * a.channels);
        add_gradient<W>(launch, k, PN_POOL_MAX_3X3, c, g, y.maximum, d_maximum);
        add_gradient<W>(launch, k, PN_POOL_AVG_3X3, c, g, y.average, d_average);
      }
      const float share = 1.0f / float(taps_inside(oy, a.height, a.stride) * taps_inside(ox, a.width, a.stride));
      for (int i = 0; i < W; i++) d_average[i] *= share;
      const int at = (row * columns.windows() + column) * pitch + first;
      store<W>(windows.maximum + at, d_maximum);
      store<W>(windows.average + at, d_average);
      store_taps<W>(windows.tap + at, y.tap);
    }
  });
}

// Grid: (images, groups of channels, tiles).
template <int W>
PN_DEVICE void backward(const Pool& launch, Windows& windows) {
  const pn_pool& a = launch.call;
  const PoolShape shape = shape_of(a);
  const int c = first_channel<W>(block_index().y), tiles = (a.width + kTileColumns - 1) / kTileColumns;
  const Span rows(block_index().z / tiles, kTileRows, a.height, shape.out_height(), a.stride);
  const Span columns(block_index().z % tiles, kTileColumns, a.width, shape.out_width(), a.stride);
  const int first = thread_index().x * W, pitch = block_extent().x * W;
  const int64_t image = block_index().x, in = image * a.height * a.width * a.channels + c;
  const int64_t out = image * shape.out_height() * shape.out_width() * a.channels + c;
  const bool pooled = is_taken(launch, PN_POOL_MAX_3X3) || is_taken(launch, PN_POOL_AVG_3X3);
  if (c < a.channels && pooled) window_gradients<W>(launch, a.x + in, out, c, rows, columns, first, pitch, windows);
  barrier();
  if (c >= a.channels) return;

  for_columns(rows.size(), columns.size(), [&](int column, int from, int to) {
    const int ix = columns.begin + column, begin = rows.begin + from, end = rows.begin + to;
    Floats<W> share[3] = {};  // of the three rows that the windows of row oy cover, so far
    // From the first row of windows that reaches the part to the one after which its last row is complete.
    for (int oy = Span::first_window_of(begin, a.stride); oy <= end / a.stride; oy++) {
      for (int kx = 0; kx < 3 && oy < rows.end_window && pooled; kx++) {
        const int ox = (ix + 1 - kx) / a.stride;
        if (ix + 1 - kx < 0 || ox * a.stride != ix + 1 - kx || ox >= columns.end_window) continue;
        const int at = ((oy - rows.first_window) * columns.windows() + ox - columns.first_window) * pitch + first;
        const Floats<W> maximum = load<W>(windows.maximum + at), average = load<W>(windows.average + at);
        int tap[W];
        load_taps<W>(windows.tap + at, tap);
        for (int ky = 0; ky < 3; ky++) {
          share[ky] += average;
          for (int i = 0; i < W; i++)
            if (tap[i] == 3 * ky + kx) share[ky][i] += maximum[i];
        }
      }
      // No window after this one covers its first `stride` rows.
      for (int k = 0; k < a.stride; k++) {
        const int iy = oy * a.stride - 1 + k;
        if (iy >= begin && iy < end) {
          const int64_t pixel = in + (int64_t(iy) * a.width + ix) * a.channels;
          float* dx = a.dx + pixel;
#pragma unroll 1
          for (int n = 0; n < a.gradient_count; n++)
            if (launch.gradients[n].coefficients[PN_POOL_NONE])
              add_gradient<W>(launch, n, PN_POOL_NONE, c, load<W>(launch.gradients[n].g + pixel), load<W>(a.x + pixel),
                              share[0]);
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

}  // namespace

}  // namespace pn

// One block a multiprocessor is enough: with more in mind, the compiler spills registers.
PN_KERNEL __launch_bounds__(pn::kForwardThreads, 1) pool_3x3_forward(const pn::Pool a) {
  if (a.unit == 4)
    pn::forward<4>(a.call);
  else
    pn::forward<1>(a.call);
}

PN_KERNEL __launch_bounds__(pn::kBackwardThreads, 2) pool_3x3_backward(const pn::Pool a) {
  __shared__ pn::Windows windows;
  if (a.unit == 4)
    pn::backward<4>(a, windows);
  else
    pn::backward<1>(a, windows);
}
