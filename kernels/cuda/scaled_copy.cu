// dx (+)= weight[0] * g: the gradient of a skip connection.
#include "cuda/device.h"

PN_KERNEL __launch_bounds__(256) scaled_copy(const pn_scaled_copy a) {
  const float weight = a.weight ? *a.weight : 1.0f;
  const int64_t step = int64_t(pn::grid_extent().x) * pn::block_extent().x;
  for (int64_t i = int64_t(pn::block_index().x) * pn::block_extent().x + pn::thread_index().x; i < a.count; i += step)
    a.dx[i] = a.accumulate ? a.dx[i] + weight * a.g[i] : weight * a.g[i];
}
