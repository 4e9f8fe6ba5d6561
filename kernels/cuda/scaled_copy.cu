// dx (+)= weight * g: the gradient of a skip connection. A block has a chunk.
#include "cuda/flat.h"

namespace pn {

namespace {

struct ScaledCopy {
  pn_scaled_copy call;
  int32_t unit;  // elements of a thread, 4 or 1
};

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kFlatThreads) scaled_copy(const pn::ScaledCopy launch) {
  const pn_scaled_copy& a = launch.call;
  const float weight = a.weight ? *a.weight : 1;
  pn::for_units(a.count, launch.unit, [&](auto width, int64_t i) {
    constexpr int W = decltype(width)::value;
    pn::Floats<W> value = pn::load<W>(a.g + i);
    for (int l = 0; l < W; l++) value[l] *= weight;
    if (a.accumulate) value += pn::load<W>(a.dx + i);
    pn::store<W>(a.dx + i, value);
  });
}
