// Global average pooling of a concatenation. Grid: (variants * images, groups of channels, parts).
#include "cuda/channels.h"

namespace pn {

namespace {

constexpr int kMaxParts = 32, kThreads = 256;

struct GlobalAveragePool {
  pn_global_average_pool call;  // its `parts` is the host's array
  int32_t channels;             // of all parts
  int32_t unit;                 // channels of a thread, 4 or 1
  int32_t first[kMaxParts];     // channel of the concatenation where the part begins
  pn_part parts[kMaxParts];
};

template <int W>
PN_DEVICE void forward(const GlobalAveragePool& a) {
  __shared__ Exchange<Floats<W>, kThreads> exchange;
  const pn_part& part = a.parts[block_index().z];
  const int c = first_channel<W>(block_index().y), pixels = a.call.pixels;
  const int64_t image = block_index().x;
  Floats<W> sum{};
  if (c < part.channels) {
    const int64_t own = part.variants == 1 ? image % a.call.images : image;
    const float* x = part.x + own * pixels * part.channels + c;
    for (int p = thread_index().y; p < pixels; p += block_extent().y) sum += load<W>(x + int64_t(p) * part.channels);
  }
  sum = sum_rows(sum, exchange);
  if (thread_index().y != 0 || c >= part.channels) return;
  for (int i = 0; i < W; i++) sum[i] /= float(pixels);
  store<W>(a.call.out + image * a.channels + a.first[block_index().z] + c, sum);
}

template <int W>
PN_DEVICE void backward(const GlobalAveragePool& a) {
  const pn_part& part = a.parts[block_index().z];
  const int c = first_channel<W>(block_index().y), pixels = a.call.pixels;
  const int64_t image = block_index().x;
  if (!part.dx || c >= part.channels) return;
  Floats<W> value = load<W>(a.call.g + image * a.channels + a.first[block_index().z] + c);
  for (int i = 0; i < W; i++) value[i] /= float(pixels);
  float* dx = part.dx + image * pixels * part.channels + c;
  for (int p = thread_index().y; p < pixels; p += block_extent().y) {
    Floats<W> gradient = value;
    if (part.accumulate) gradient += load<W>(dx + int64_t(p) * part.channels);
    store<W>(dx + int64_t(p) * part.channels, gradient);
  }
}

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kThreads) global_average_pool_forward(const pn::GlobalAveragePool a) {
  if (a.unit == 4)
    pn::forward<4>(a);
  else
    pn::forward<1>(a);
}

PN_KERNEL __launch_bounds__(pn::kThreads) global_average_pool_backward(const pn::GlobalAveragePool a) {
  if (a.unit == 4)
    pn::backward<4>(a);
  else
    pn::backward<1>(a);
}
