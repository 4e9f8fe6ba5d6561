// dx (+)= weight * g: the gradient of a skip connection. A block has kChunk elements.
#include "cuda/channels.h"

namespace pn {

namespace {

constexpr int kThreads = 256, kChunk = 4096;

struct ScaledCopy {
  pn_scaled_copy call;
  int32_t unit;  // elements of a thread, 4 or 1
};

template <int W>
PN_DEVICE void scale(const pn_scaled_copy& a) {
  const float weight = a.weight ? *a.weight : 1;
  const int64_t begin = int64_t(block_index().x) * kChunk + thread_index().x * W;
  for (int k = 0; k < kChunk / (kThreads * W); k++) {
    const int64_t i = begin + k * (kThreads * W);
    if (i >= a.count) continue;
    Floats<W> value = load_partial<W>(a.g + i, a.count - i);
    for (int l = 0; l < W; l++) value[l] *= weight;
    if (a.accumulate) value += load_partial<W>(a.dx + i, a.count - i);
    store_partial<W>(a.dx + i, value, a.count - i);
  }
}

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kThreads) scaled_copy(const pn::ScaledCopy a) {
  if (a.unit == 4)
    pn::scale<4>(a.call);
  else
    pn::scale<1>(a.call);
}
