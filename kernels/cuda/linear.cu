// Linear layer with bias.
#include "cuda/channels.h"

namespace pn {

namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // of the output, that a block of forward computes from one reading of the weights

struct RowSums {
  float sum[kRows];

  PN_DEVICE_METHOD void operator+=(const RowSums& other) {
    for (int r = 0; r < kRows; r++) sum[r] += other.sum[r];
  }
};

}  // namespace

}  // namespace pn

// Grid: (blocks of kRows rows, groups of output channels). The rows of threads share the input channels.
PN_KERNEL __launch_bounds__(pn::kThreads, 4) linear_forward(const pn_linear a) {
  __shared__ pn::Exchange<pn::RowSums, pn::kThreads> exchange;
  const int c = pn::first_channel<1>(pn::block_index().y);
  const int begin = pn::block_index().x * pn::kRows;
  pn::RowSums sums{};
  for (int k = pn::thread_index().y; k < a.in_channels && c < a.out_channels; k += pn::block_extent().y) {
    const float weight = a.weight[int64_t(k) * a.out_channels + c];
    for (int r = 0; r < pn::kRows; r++)
      if (begin + r < a.rows) sums.sum[r] += a.x[int64_t(begin + r) * a.in_channels + k] * weight;
  }
  sums = pn::sum_rows(sums, exchange);
  if (pn::thread_index().y != 0 || c >= a.out_channels) return;
  for (int r = 0; r < pn::kRows; r++)
    if (begin + r < a.rows) a.out[int64_t(begin + r) * a.out_channels + c] = sums.sum[r] + a.bias[c];
}

// A block computes a tile of kTile rows by kTile input channels of dx. Grid: (blocks of input channels, of rows); block
// (kTile, kTile).
namespace pn {

namespace {

constexpr int kTile = 16;

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kThreads) linear_backward_input(const pn_linear a) {
  __shared__ float g[pn::kTile][pn::kTile];
  __shared__ float weight[pn::kTile][pn::kTile + 1];
  const pn::Index thread = pn::thread_index();
  const int row = pn::block_index().y * pn::kTile + thread.y;
  const int begin = pn::block_index().x * pn::kTile, k = begin + thread.x;
  float sum = 0;
  for (int first = 0; first < a.out_channels; first += pn::kTile) {
    const int o = first + thread.x;
    g[thread.y][thread.x] = row < a.rows && o < a.out_channels ? a.g[int64_t(row) * a.out_channels + o] : 0;
    weight[thread.y][thread.x] = begin + thread.y < a.in_channels && o < a.out_channels
                                     ? a.weight[int64_t(begin + thread.y) * a.out_channels + o]
                                     : 0;
    pn::barrier();
    for (int i = 0; i < pn::kTile; i++) sum += g[thread.y][i] * weight[thread.x][i];
    pn::barrier();
  }
  if (row < a.rows && k < a.in_channels) a.dx[int64_t(row) * a.in_channels + k] = sum;
}

// A thread sums over all rows, for one element of the weights or, beyond them, of the bias.
PN_KERNEL __launch_bounds__(pn::kThreads) linear_backward_weight(const pn_linear a) {
  const int64_t i = int64_t(pn::block_index().x) * pn::kThreads + pn::thread_index().x;
  const int k = int(i / a.out_channels), o = int(i % a.out_channels);
  float* target = k < a.in_channels ? a.d_weight : a.d_bias;
  if (!target || k > a.in_channels) return;
  float sum = 0;
  for (int row = 0; row < a.rows; row++) {
    const float x = k < a.in_channels ? a.x[int64_t(row) * a.in_channels + k] : 1;
    sum += x * a.g[int64_t(row) * a.out_channels + o];
  }
  target[k < a.in_channels ? i : o] = sum;
}
