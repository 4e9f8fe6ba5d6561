// dx (+)= weight * g: the gradient of a skip connection.
#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int64_t kChunk = 16384;  // elements per task

}  // namespace

int32_t scaled_copy_run(pn_context* context, const pn_scaled_copy* a) {
  PN_REQUIRE(a->count >= 0, "scaled_copy_run: count must not be negative: %lld", static_cast<long long>(a->count));
  PN_REQUIRE((a->g && a->dx) || a->count == 0, "scaled_copy_run: g or dx is null");
  const float weight = a->weight ? *a->weight : 1;
  parallel_for(context, (a->count + kChunk - 1) / kChunk, [&](int64_t task, int) {
    const float* g = a->g + task * kChunk;
    float* dx = a->dx + task * kChunk;
    const int64_t n = min(kChunk, a->count - task * kChunk);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int lanes = int(min<int64_t>(kLanes, n - i));
      vec value = splat(weight) * load_partial(g + i, lanes);
      if (a->accumulate) value += load_partial(dx + i, lanes);
      store_partial(dx + i, value, lanes);
    }
  });
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
