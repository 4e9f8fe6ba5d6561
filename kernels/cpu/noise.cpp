// Normal noise from the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
// 2, 3", 2011), the same stream as engine/Training/RandomStream.cs. Everything before the last rounding is double and
// the C library's, without sums that a fused multiply-add could change, so that the noise does not depend on the
// instruction set.
#include <math.h>

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int64_t kChunk = 4096;  // elements per task, a multiple of four

struct Words {
  uint32_t x[4];
};

PN_INLINE Words philox(uint64_t key, uint64_t index, uint64_t position) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = uint32_t(position), c3 = uint32_t(position >> 32);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// Box & Muller 1958.
void normal_pair(uint32_t a, uint32_t b, float* out) {
  constexpr double kTwoPi = 6.283185307179586;
  constexpr double kUnit = 1.0 / 4294967296.0;
  const double radius = sqrt(-2 * log((double(a) + 0.5) * kUnit)), angle = kTwoPi * (double(b) * kUnit);
  out[0] = float(radius * cos(angle));
  out[1] = float(radius * sin(angle));
}

}  // namespace

int32_t noise_normal(pn_context* context, const pn_noise* a) {
  PN_REQUIRE(a->count >= 0, "noise_normal: count must not be negative: %lld", static_cast<long long>(a->count));
  PN_REQUIRE(a->out || a->count == 0, "noise_normal: out is null");
  parallel_for(context, (a->count + kChunk - 1) / kChunk, [&](int64_t task, int) {
    const int64_t end = min((task + 1) * kChunk, a->count);
    for (int64_t i = task * kChunk; i < end; i += 4) {
      const Words words = philox(a->key, uint64_t(i / 4), a->position);
      float values[4];
      normal_pair(words.x[0], words.x[1], values);
      normal_pair(words.x[2], words.x[3], values + 2);
      for (int64_t k = 0; k < min<int64_t>(4, end - i); k++) a->out[i + k] = values[k];
    }
  });
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
