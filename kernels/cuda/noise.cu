// Normal noise from the counter-based generator Philox4x32-10 (Salmon et al. 2011), four elements a thread; in double
// but for the last rounding, like the CPU's.
#include "cuda/channels.h"
#include "cuda/elementary.h"

namespace pn {

namespace {

constexpr int kThreads = 256;

struct Noise {
  pn_noise call;
  int32_t unit;  // 4: whole stores of 16 bytes
};

struct Words {
  uint32_t x[4];
};

PN_DEVICE Words philox(uint64_t key, uint64_t index, uint64_t position) {
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
PN_DEVICE void normal_pair(uint32_t a, uint32_t b, float* out) {
  const double radius = __builtin_sqrt(-2 * log_positive((double(a) + 0.5) * (1.0 / 4294967296.0)));
  const SineCosine direction = sine_cosine(b);
  out[0] = float(radius * direction.cosine);
  out[1] = float(radius * direction.sine);
}

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kThreads) noise_normal(const pn::Noise a) {
  const int64_t index = int64_t(pn::block_index().x) * pn::kThreads + pn::thread_index().x;
  if (4 * index >= a.call.count) return;
  const pn::Words words = pn::philox(a.call.key, uint64_t(index), a.call.position);
  pn::Floats<4> values;
  pn::normal_pair(words.x[0], words.x[1], values.x);
  pn::normal_pair(words.x[2], words.x[3], values.x + 2);
  float* out = a.call.out + 4 * index;
  if (a.unit == 4 && 4 * index + 4 <= a.call.count)
    pn::store<4>(out, values);
  else
    for (int i = 0; i < 4; i++)
      if (4 * index + i < a.call.count) out[i] = values[i];
}
