// For operators that treat all channels alike: an activation is [pixels, channels], a thread owns W = 4 neighbouring
// channels (one access of 16 bytes), or W = 1 where the channels or addresses do not allow that, and walks over pixels.
// A block is (units of W channels, rows of threads that share a pixel); neighbouring threads touch neighbouring
// addresses. The host chooses its extent (engine/Backends/Cuda/ChannelBlock.cs).
#pragma once

#include "cuda/device.h"

namespace pn {

template <int W>
struct alignas(4 * W) Floats {
  float x[W];

  PN_DEVICE_METHOD float& operator[](int i) { return x[i]; }
  PN_DEVICE_METHOD const float& operator[](int i) const { return x[i]; }
  PN_DEVICE_METHOD void operator+=(const Floats& other) {
    for (int i = 0; i < W; i++) x[i] += other.x[i];
  }
};

template <int W>
PN_DEVICE Floats<W> load(const float* p) {
  if constexpr (W == 4) return __builtin_bit_cast(Floats<W>, load4(p));
  return *reinterpret_cast<const Floats<W>*>(p);
}

template <int W>
PN_DEVICE void store(float* p, const Floats<W>& v) {
  if constexpr (W == 4)
    store4(p, __builtin_bit_cast(float4, v));
  else
    *reinterpret_cast<Floats<W>*>(p) = v;
}

template <int W>
PN_DEVICE void store(float* p, const float (&v)[W]) {
  Floats<W> floats;
  for (int i = 0; i < W; i++) floats[i] = v[i];
  store<W>(p, floats);
}

template <int W>
PN_DEVICE Floats<W> splat(float value) {
  Floats<W> v;
  for (int i = 0; i < W; i++) v[i] = value;
  return v;
}

// The first of this thread's channels; it may lie beyond the last channel. `group` counts blocks along the channels.
template <int W>
PN_DEVICE int first_channel(int group) {
  return (group * block_extent().x + thread_index().x) * W;
}

// Values of all threads of a block in shared memory: word by word, so that neighbouring threads use neighbouring banks.
template <class T, int Threads>
class Exchange {
 public:
  PN_DEVICE_METHOD void put(int thread, const T& value) {
    const Words words = __builtin_bit_cast(Words, value);
    for (int i = 0; i < kWords; i++) words_[i][thread] = words.x[i];
  }

  PN_DEVICE_METHOD T get(int thread) const {
    Words words;
    for (int i = 0; i < kWords; i++) words.x[i] = words_[i][thread];
    return __builtin_bit_cast(T, words);
  }

 private:
  static constexpr int kWords = sizeof(T) / 4;
  struct Words {
    uint32_t x[kWords];
  };
  uint32_t words_[kWords][Threads];
};

// Combines the values of the block's rows, for every unit of channels by itself, in an order that depends on the
// block's extent alone, and gives the result to all threads.
template <class T, int Threads, class Combine>
PN_DEVICE T combine_rows(T value, Exchange<T, Threads>& exchange, Combine combine) {
  const Index thread = thread_index(), extent = block_extent();
  const int own = thread.y * extent.x + thread.x;
  exchange.put(own, value);
  for (int rows = extent.y; rows > 1;) {
    const int half = (rows + 1) / 2;
    barrier();
    if (thread.y + half < rows) {
      value = combine(value, exchange.get(own + half * extent.x));
      exchange.put(own, value);
    }
    rows = half;
  }
  barrier();
  const T result = exchange.get(thread.x);
  barrier();  // the memory may now be used again
  return result;
}

template <class T, int Threads>
PN_DEVICE T sum_rows(const T& value, Exchange<T, Threads>& exchange) {
  return combine_rows(value, exchange, [](T a, const T& b) {
    a += b;
    return a;
  });
}

// Count, mean, and sum of squared deviations from the mean.
template <int W>
struct Moments {
  float mean[W], squares[W], count;
};

// Chan et al. 1983.
template <int W>
PN_DEVICE Moments<W> merge(const Moments<W>& a, const Moments<W>& b) {
  const float count = a.count + b.count, share = count > 0 ? b.count / count : 0;
  Moments<W> merged;
  merged.count = count;
  for (int i = 0; i < W; i++) {
    const float distance = b.mean[i] - a.mean[i];
    merged.mean[i] = a.mean[i] + distance * share;
    merged.squares[i] = a.squares[i] + b.squares[i] + distance * distance * (a.count * share);
  }
  return merged;
}

// Collects the moments of one thread's values. Deviations are taken from the first value, which keeps them small.
template <int W>
class MomentSums {
 public:
  PN_DEVICE_METHOD void add(const Floats<W>& value) {
    if (count_ == 0) shift_ = value;
    count_++;
    for (int i = 0; i < W; i++) {
      const float deviation = value[i] - shift_[i];
      sum_[i] += deviation;
      squares_[i] += deviation * deviation;
    }
  }

  PN_DEVICE_METHOD Moments<W> moments() const {
    const float inverse = count_ > 0 ? 1.0f / float(count_) : 0;
    Moments<W> moments;
    moments.count = float(count_);
    for (int i = 0; i < W; i++) {
      const float squares = squares_[i] - sum_[i] * (sum_[i] * inverse);
      moments.mean[i] = shift_[i] + sum_[i] * inverse;
      moments.squares[i] = squares < 0 ? 0 : squares;  // rounding must not make it negative
    }
    return moments;
  }

 private:
  Floats<W> shift_{}, sum_{}, squares_{};
  int count_ = 0;
};

}  // namespace pn
