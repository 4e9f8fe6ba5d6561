// Gradients of weights that groups of tiles left apart, added up in a fixed order.
#include "cuda/device.h"

namespace {

using namespace pn;

// out [count] = the sum over `parts` of partial [parts, count].
struct PartialSum {
  const float* partial;
  float* out;
  int64_t count, parts;
};

// Block y works on sum y.
struct PartialSums {
  PartialSum sums[2];
};

}  // namespace

// A block is 32 x 8 threads: 32 neighbouring sums, of each of which eight threads add up an eighth.
PN_KERNEL __launch_bounds__(256) sum_partials(const PartialSums sums) {
  float* memory = pn_shared;
  const Index t = thread_index();
  const PartialSum a = block_index().y == 0 ? sums.sums[0] : sums.sums[1];
  const int64_t i = int64_t(block_index().x) * 32 + t.x;
  float total = 0.0f;
  if (i < a.count)
    for (int64_t part = a.parts * t.y / 8; part < a.parts * (t.y + 1) / 8; part++)
      total += a.partial[part * a.count + i];
  memory[t.y * 32 + t.x] = total;
  barrier();
  if (t.y != 0 || i >= a.count) return;
  for (int other = 1; other < 8; other++) total += memory[other * 32 + t.x];
  a.out[i] = total;
}
