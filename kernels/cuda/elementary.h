// Elementary functions in double, for there is no device library: correct to about one unit in the last place.
#pragma once

#include "cuda/device.h"

namespace pn {

PN_DEVICE double double_of(int64_t bits) { return __builtin_bit_cast(double, bits); }
PN_DEVICE int64_t bits_of(double value) { return __builtin_bit_cast(int64_t, value); }

// e^x for x <= 0 (not-a-number passes through): x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor series of e^r.
PN_DEVICE double exp_negative(double x) {
  if (x < -700) return 0;
  constexpr double kRound = 6755399441055744;  // 1.5 * 2^52: a sum with it is rounded to an integer in its low bits
  const double shifted = x * 1.4426950408889634 + kRound, n = shifted - kRound;
  // ln 2 in two parts, the first with zeros at its end, so that n times it is exact.
  const double r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
  double sum = 1;
  for (int k = 13; k > 0; k--) sum = 1 + sum * r * (1.0 / k);
  return sum * double_of((bits_of(shifted) + 1023) << 52);
}

// ln x for normal x > 0 (not-a-number passes through): x = 2^e m with m about 1, and ln m = 2 artanh((m - 1) / (m +
// 1)).
PN_DEVICE double log_positive(double x) {
  if (!(x == x)) return x;
  constexpr int64_t kRootHalf = 0x3FE6A09E667F3BCD;  // the bits of sqrt(1/2), so that m lies between it and its double
  const int64_t bits = bits_of(x), exponent = (bits - kRootHalf) >> 52;
  const double m = double_of(bits - (exponent << 52)), e = double(exponent);
  const double s = (m - 1) / (m + 1), square = s * s;
  double sum = 1.0 / 23;
  for (int k = 21; k > 0; k -= 2) sum = sum * square + 1.0 / k;
  return e * 0.6931471803691238 + (2 * s * sum + e * 1.9082149292705877e-10);
}

// Sine and cosine of turn / 2^32 full turns: the Taylor series, about the nearest quarter turn.
struct SineCosine {
  double sine, cosine;
};
PN_DEVICE SineCosine sine_cosine(uint32_t turn) {
  const uint32_t quarter = (turn + (1u << 29)) >> 30;
  const double angle = double(int32_t(turn - (quarter << 30))) * (6.283185307179586 / 4294967296.0);
  const double square = -angle * angle;
  double sine = 1, cosine = 1;
  for (int k = 16; k > 0; k -= 2) {
    sine = 1 + sine * square * (1.0 / (k * (k + 1)));
    cosine = 1 + cosine * square * (1.0 / (k * (k - 1)));
  }
  sine *= angle;
  const SineCosine swapped = quarter & 1 ? SineCosine{cosine, -sine} : SineCosine{sine, cosine};
  return quarter & 2 ? SineCosine{-swapped.sine, -swapped.cosine} : swapped;
}

}  // namespace pn
