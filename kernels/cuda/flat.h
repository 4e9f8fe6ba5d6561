// For operators over flat arrays: a block has a chunk of a fixed size.
#pragma once

#include "cuda/channels.h"

namespace pn {

constexpr int kFlatThreads = 256, kChunk = 4096;

template <int W>
struct Width {
  static constexpr int value = W;
};

// f(Width<W>, i) for this thread's units of W elements from i on, W = 4 in whole chunks if unit is 4, else 1.
template <class F>
PN_DEVICE void for_units(int64_t count, int unit, F f) {
  const int64_t begin = int64_t(block_index().x) * kChunk;
  const int thread = thread_index().x;
  if (unit == 4 && begin + kChunk <= count) {
    for (int i = 4 * thread; i < kChunk; i += 4 * kFlatThreads) f(Width<4>(), begin + i);
  } else {
    for (int i = thread; i < kChunk && begin + i < count; i += kFlatThreads) f(Width<1>(), begin + i);
  }
}

}  // namespace pn
