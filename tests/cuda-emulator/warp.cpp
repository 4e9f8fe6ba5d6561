// The instructions, for the 32 lanes of a warp. Compiled once per instruction set of the host, in a namespace of its
// own (PN_NAMESPACE): loops over lanes are written so that the compiler turns them into vector code. Nothing here may
// instantiate what other files share, such as the standard library's templates, lest they get instructions that the
// host lacks.
#include <bit>
#include <cfenv>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "program.h"

namespace emulator::PN_NAMESPACE {
namespace {

using Next = const Instruction*;

// --- Lanes ---

// 8- and 16-bit values lie in 32-bit registers.
template <class T>
using Stored = std::conditional_t<(sizeof(T) >= 4), T, uint32_t>;

template <class T>
Stored<T>* lanes(Warp& w, uint32_t offset) {
  return reinterpret_cast<Stored<T>*>(w.registers + offset);
}

// A table instead of a shift: it becomes vector code.
struct LaneBits {
  alignas(64) uint32_t bit[LANES];
  constexpr LaneBits() : bit() {
    for (int lane = 0; lane < LANES; ++lane) bit[lane] = 1u << lane;
  }
};
constexpr LaneBits LANE;

uint32_t predicate(Warp& w, uint32_t offset) {
  const uint32_t mask = *reinterpret_cast<uint32_t*>(w.registers + (offset & ~NEGATED));
  return offset & NEGATED ? ~mask : mask;
}

template <class T>
struct Source {
  using Value = T;
  const Stored<T>* values;
  Source(Warp& w, uint32_t offset) : values(lanes<T>(w, offset)) {}
  T operator[](int lane) const { return T(values[lane]); }
};
template <>
struct Source<bool> {
  using Value = bool;
  uint32_t mask;
  Source(Warp& w, uint32_t offset) : mask(predicate(w, offset)) {}
  bool operator[](int lane) const { return mask & LANE.bit[lane]; }
};
// d[lane] = f(lane) for the active lanes; f is also evaluated for the others.
template <class D, class F>
inline void write(Warp& w, uint32_t offset, F f) {
  using S = Stored<D>;
  S* const d = lanes<D>(w, offset);
  if (w.active == ALL_LANES) {
#pragma GCC ivdep
    for (int lane = 0; lane < LANES; ++lane) d[lane] = S(f(lane));
    return;
  }
  alignas(64) S value[LANES];
#pragma GCC ivdep
  for (int lane = 0; lane < LANES; ++lane) value[lane] = S(f(lane));
  const uint32_t active = w.active;
#pragma GCC ivdep
  for (int lane = 0; lane < LANES; ++lane) d[lane] = active & LANE.bit[lane] ? value[lane] : d[lane];
}

template <class F>
inline uint32_t mask_of(F f) {
  alignas(64) int32_t value[LANES];
  for (int lane = 0; lane < LANES; ++lane) value[lane] = f(lane) ? -1 : 0;
  uint32_t mask = 0;
#if defined(__AVX512DQ__)
  for (int part = 0; part < 2; ++part)
    mask |= uint32_t(_mm512_movepi32_mask(_mm512_load_si512(value + 16 * part))) << 16 * part;
#elif defined(__AVX2__)
  for (int part = 0; part < 4; ++part)
    mask |= uint32_t(_mm256_movemask_ps(_mm256_load_ps(reinterpret_cast<float*>(value) + 8 * part))) << 8 * part;
#else
  for (int lane = 0; lane < LANES; ++lane) mask |= uint32_t(value[lane] & 1) << lane;
#endif
  return mask;
}

void write_predicate(Warp& w, uint32_t offset, uint32_t mask) {
  uint32_t& d = *reinterpret_cast<uint32_t*>(w.registers + offset);
  d = (d & ~w.active) | (mask & w.active);
}

// --- Instructions that compute each lane from the same lane's operands ---

template <class T>
struct Letter {
  static constexpr char value = std::is_same_v<T, bool> ? 'p' : sizeof(T) == 8 ? 'd' : 'r';
};
// f has copies of its sources, so that the compiler sees that writing results does not change them.
template <class D, class F>
inline Next compute_lanes(Warp& w, Next i, F f) {
  if constexpr (std::is_same_v<D, bool>)
    write_predicate(w, i->operand[0], mask_of(f));
  else
    write<D>(w, i->operand[0], f);
  return i + 1;
}
template <class D, class F, class A>
Next compute(Warp& w, Next i) {
  const Source<A> a(w, i->operand[1]);
  return compute_lanes<D>(w, i, [=](int lane) { return F{}(a[lane]); });
}
template <class D, class F, class A, class B>
Next compute(Warp& w, Next i) {
  const Source<A> a(w, i->operand[1]);
  const Source<B> b(w, i->operand[2]);
  return compute_lanes<D>(w, i, [=](int lane) { return F{}(a[lane], b[lane]); });
}
template <class D, class F, class A, class B, class C>
Next compute(Warp& w, Next i) {
  const Source<A> a(w, i->operand[1]);
  const Source<B> b(w, i->operand[2]);
  const Source<C> c(w, i->operand[3]);
  return compute_lanes<D>(w, i, [=](int lane) { return F{}(a[lane], b[lane], c[lane]); });
}
template <class D, class F, class A, class B, class C, class E>
Next compute(Warp& w, Next i) {
  const Source<A> a(w, i->operand[1]);
  const Source<B> b(w, i->operand[2]);
  const Source<C> c(w, i->operand[3]);
  const Source<E> e(w, i->operand[4]);
  return compute_lanes<D>(w, i, [=](int lane) { return F{}(a[lane], b[lane], c[lane], e[lane]); });
}

// The table and the instruction set's name for a spelling that is put together.
struct Definitions {
  InstructionTable& table;

  template <class D, class... A, class F>
  void operation(const char* name, F, Cost cost = PLAIN) const {
    const char operands[] = {Letter<D>::value, Letter<A>::value..., 0};
    table.add(name, operands, compute<D, F, A...>, cost);
  }
};

template <class... T>
struct Spelling {
  char text[96];
  Spelling(const char* format, T... part) { snprintf(text, sizeof text, format, part...); }
  operator const char*() const { return text; }
};

template <class T>
constexpr const char* type_name = nullptr;
template <>
constexpr const char* type_name<uint8_t> = "u8";
template <>
constexpr const char* type_name<int8_t> = "s8";
template <>
constexpr const char* type_name<uint16_t> = "u16";
template <>
constexpr const char* type_name<int16_t> = "s16";
template <>
constexpr const char* type_name<uint32_t> = "u32";
template <>
constexpr const char* type_name<int32_t> = "s32";
template <>
constexpr const char* type_name<uint64_t> = "u64";
template <>
constexpr const char* type_name<int64_t> = "s64";
template <>
constexpr const char* type_name<float> = "f32";
template <>
constexpr const char* type_name<double> = "f64";

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
constexpr int BITS = int(sizeof(T)) * 8;

template <class T>
T mul_hi(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return T((W(a) * b) >> 64);
  } else {
    using W = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    return T((W(a) * b) >> BITS<T>);
  }
}

// Division by zero gives all ones, as on the hardware. Quotients of 32 bits are exact in double and have vector code.
template <class T>
T quotient(T a, T b) {
  if constexpr (sizeof(T) <= 4) {
    const double q = double(a) / double(b == 0 ? 1 : b);
    if constexpr (std::is_signed_v<T>)
      return b == 0 ? T(-1) : T(int64_t(q)); /* the most negative by -1 wraps */
    else
      return b == 0 ? T(-1) : T(q);
  } else {
    if (b == 0) return T(-1);
    if constexpr (std::is_signed_v<T>)
      if (b == -1) return T(0 - Unsigned<T>(a));
    return a / b;
  }
}

template <class T>
T remainder(T a, T b) {
  return b == 0 ? a : T(Unsigned<T>(a) - Unsigned<T>(quotient(a, b)) * Unsigned<T>(b));
}

template <class T>
T shift_left(T a, uint32_t n) {
  return n >= BITS<T> ? 0 : T(a << n);
}
template <class T>
T shift_right(T a, uint32_t n) {
  if constexpr (std::is_signed_v<T>)
    return T(a >> (n >= BITS<T> ? BITS<T> - 1 : n));
  else
    return n >= BITS<T> ? 0 : T(a >> n);
}

// Bits past the top, and past the length, are the field's sign.
template <class T>
T bit_field(T a, uint32_t position, uint32_t length) {
  using U = Unsigned<T>;
  position &= 255;
  length &= 255;
  const uint32_t top = BITS<T> - 1;
  const U mask = length > top ? ~U(0) : (U(1) << length) - 1;
  const U field = shift_right(U(a), position) & mask;
  const uint32_t sign = position + length - 1 < top ? position + length - 1 : top;
  const bool negative = std::is_signed_v<T> && length != 0 && (a >> sign & 1);
  return T(negative ? field | ~mask | ~shift_right(~U(0), position) : field);
}

template <class T>
T insert_bits(T a, T b, uint32_t position, uint32_t length) {
  position &= 255;
  length &= 255;
  const T mask = shift_left(T(length >= BITS<T> ? ~T(0) : (T(1) << length) - 1), position);
  return T((b & ~mask) | (shift_left(a, position) & mask));
}

template <class T>
uint32_t find_leading(T a) {
  Unsigned<T> u = Unsigned<T>(a);
  if constexpr (std::is_signed_v<T>)
    if (a < 0) u = ~u;
  return u == 0 ? ~0u : uint32_t(BITS<T> - 1 - std::countl_zero(u));
}

template <class T>
T reverse_bits(T a) {
  T r = 0;
  for (int bit = 0; bit < BITS<T>; ++bit) r |= T(a >> bit & 1) << (BITS<T> - 1 - bit);
  return r;
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t r = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> 4 * k & 15;
    uint32_t byte = uint32_t(bytes >> 8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * k;
  }
  return r;
}

// Minimum and maximum: a number wins over not-a-number, and +0 is more than -0.
template <class T>
T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const T zero = std::signbit(a) ? a : b;
    return a < b ? a : a > b ? b : a == b ? zero : a != a ? b : a;
  } else
    return a < b ? a : b;
}
template <class T>
T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const T zero = std::signbit(a) ? b : a;
    return a > b ? a : a < b ? b : a == b ? zero : a != a ? b : a;
  } else
    return a > b ? a : b;
}

float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
double flush(double x) { return x; }
template <class T>
T saturate(T x) {
  return x > 0 ? (x < 1 ? x : T(1)) : T(0); /* not-a-number becomes 0 */
}

template <class F>
struct Flushing {
  template <class... A>
  auto operator()(A... a) const {
    return flush(F{}(flush(a)...));
  }
};
template <class F>
struct Saturating {
  template <class... A>
  auto operator()(A... a) const {
    return saturate(F{}(a...));
  }
};

template <class F>
Next combine_predicates(Warp& w, Next i) {
  write_predicate(w, i->operand[0], F{}(predicate(w, i->operand[1]), predicate(w, i->operand[2])));
  return i + 1;
}
template <bool NOT>
Next move_predicate(Warp& w, Next i) {
  write_predicate(w, i->operand[0], predicate(w, i->operand[1] ^ uint32_t(NOT)));
  return i + 1;
}

// d = a + b + carry, or a - b - borrow. Operands: d, the carry out, a, b, the carry in.
template <class T, bool SUBTRACTS>
Next add_carrying(Warp& w, Next i) {
  const Source<T> a(w, i->operand[2]), b(w, i->operand[3]);
  const Source<bool> in(w, i->operand[4]);
  const auto sum = [=](int lane) {
    return T(SUBTRACTS ? a[lane] - b[lane] - T(in[lane]) : a[lane] + b[lane] + T(in[lane]));
  };
  const uint32_t out = mask_of([=](int lane) {
    const T less = SUBTRACTS ? a[lane] : sum(lane), more = SUBTRACTS ? b[lane] : a[lane];
    return less < more || (in[lane] && less == more);
  });
  write<T>(w, i->operand[0], sum);
  write_predicate(w, i->operand[1], out);
  return i + 1;
}

void define_integers(const Definitions& define) {
  const auto for_type = [&]<class T>(T) {
    const char* const t = type_name<T>;
    using U = Unsigned<T>;
    define.operation<T, T, T>(Spelling("add.%s", t), [](T a, T b) { return T(U(a) + U(b)); });
    define.operation<T, T, T>(Spelling("sub.%s", t), [](T a, T b) { return T(U(a) - U(b)); });
    define.operation<T, T, T>(Spelling("mul.lo.%s", t), [](T a, T b) { return T(uint64_t(a) * uint64_t(b)); });
    define.operation<T, T, T>(Spelling("mul.hi.%s", t), [](T a, T b) { return mul_hi(a, b); });
    define.operation<T, T, T, T>(Spelling("mad.lo.%s", t),
                                 [](T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); });
    define.operation<T, T, T, T>(Spelling("mad.hi.%s", t), [](T a, T b, T c) { return T(U(mul_hi(a, b)) + U(c)); });
    define.operation<T, T, T>(Spelling("div.%s", t), [](T a, T b) { return quotient(a, b); });
    define.operation<T, T, T>(Spelling("rem.%s", t), [](T a, T b) { return remainder(a, b); });
    define.operation<T, T, T>(Spelling("min.%s", t), [](T a, T b) { return minimum(a, b); });
    define.operation<T, T, T>(Spelling("max.%s", t), [](T a, T b) { return maximum(a, b); });
    define.operation<T, T, uint32_t>(Spelling("shr.%s", t), [](T a, uint32_t n) { return shift_right(a, n); });
    if constexpr (std::is_signed_v<T>) {
      define.operation<T, T>(Spelling("neg.%s", t), [](T a) { return T(0 - U(a)); });
      define.operation<T, T>(Spelling("abs.%s", t), [](T a) { return a < 0 ? T(0 - U(a)) : a; });
    }
    if constexpr (sizeof(T) >= 4) {
      define.operation<T, T, uint32_t, uint32_t>(Spelling("bfe.%s", t), [](T a, uint32_t position, uint32_t length) {
        return bit_field(a, position, length);
      });
      define.operation<uint32_t, T>(Spelling("bfind.%s", t), [](T a) { return find_leading(a); });
      define.operation<uint32_t, T>(Spelling("bfind.shiftamt.%s", t), [](T a) {
        const uint32_t bit = find_leading(a);
        return bit == ~0u ? bit : uint32_t(BITS<T> - 1) - bit;
      });
    }
    if constexpr (sizeof(T) <= 4) {
      using W = std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                   std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>;
      define.operation<W, T, T>(Spelling("mul.wide.%s", t), [](T a, T b) { return W(W(a) * W(b)); });
      define.operation<W, T, T, W>(Spelling("mad.wide.%s", t),
                                   [](T a, T b, W c) { return W(Unsigned<W>(W(a) * W(b)) + Unsigned<W>(c)); });
    }
  };
  for_type(uint16_t());
  for_type(int16_t());
  for_type(uint32_t());
  for_type(int32_t());
  for_type(uint64_t());
  for_type(int64_t());
  const auto saturated = [](int32_t a, int32_t b, int sign) {
    const int64_t sum = int64_t(a) + sign * int64_t(b);
    return int32_t(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
  };
  using Saturated = decltype(saturated);
  define.operation<int32_t, int32_t, int32_t>("add.sat.s32", [](int32_t a, int32_t b) { return Saturated{}(a, b, 1); });
  define.operation<int32_t, int32_t, int32_t>("sub.sat.s32",
                                              [](int32_t a, int32_t b) { return Saturated{}(a, b, -1); });

  define.table.add("add.carrying.32", "", add_carrying<uint32_t, false>);
  define.table.add("add.carrying.64", "", add_carrying<uint64_t, false>);
  define.table.add("sub.carrying.32", "", add_carrying<uint32_t, true>);
  define.table.add("sub.carrying.64", "", add_carrying<uint64_t, true>);

  const auto for_bits = [&]<class T>(T, const char* t) {
    define.operation<T, T, T>(Spelling("and.%s", t), [](T a, T b) { return T(a & b); });
    define.operation<T, T, T>(Spelling("or.%s", t), [](T a, T b) { return T(a | b); });
    define.operation<T, T, T>(Spelling("xor.%s", t), [](T a, T b) { return T(a ^ b); });
    define.operation<T, T>(Spelling("not.%s", t), [](T a) { return T(~a); });
    define.operation<T, T>(Spelling("cnot.%s", t), [](T a) { return T(a == 0); });
    define.operation<T, T, uint32_t>(Spelling("shl.%s", t), [](T a, uint32_t n) { return shift_left(a, n); });
    define.operation<T, T, uint32_t>(Spelling("shr.%s", t), [](T a, uint32_t n) { return shift_right(a, n); });
    if constexpr (sizeof(T) >= 4) {
      define.operation<uint32_t, T>(Spelling("popc.%s", t), [](T a) { return uint32_t(std::popcount(a)); });
      define.operation<uint32_t, T>(Spelling("clz.%s", t), [](T a) { return uint32_t(std::countl_zero(a)); });
      define.operation<T, T>(Spelling("brev.%s", t), [](T a) { return reverse_bits(a); });
      define.operation<T, T, T, uint32_t, uint32_t>(
          Spelling("bfi.%s", t),
          [](T a, T b, uint32_t position, uint32_t length) { return insert_bits(a, b, position, length); });
    }
  };
  for_bits(uint16_t(), "b16");
  for_bits(uint32_t(), "b32");
  for_bits(uint64_t(), "b64");
  const auto combination = [&]<class F>(const char* name, F) { define.table.add(name, "ppp", combine_predicates<F>); };
  combination("and.pred", [](uint32_t a, uint32_t b) { return a & b; });
  combination("or.pred", [](uint32_t a, uint32_t b) { return a | b; });
  combination("xor.pred", [](uint32_t a, uint32_t b) { return a ^ b; });
  define.table.add("not.pred", "pp", move_predicate<true>);
  define.table.add("mov.pred", "pp", move_predicate<false>);

  using U = uint32_t;
  define.operation<U, U, U, U>("shf.l.wrap.b32",
                               [](U a, U b, U n) { return U((uint64_t(b) << 32 | a) << (n & 31) >> 32); });
  define.operation<U, U, U, U>("shf.r.wrap.b32", [](U a, U b, U n) { return U((uint64_t(b) << 32 | a) >> (n & 31)); });
  define.operation<U, U, U, U>("shf.l.clamp.b32",
                               [](U a, U b, U n) { return n >= 32 ? a : U((uint64_t(b) << 32 | a) << n >> 32); });
  define.operation<U, U, U, U>("shf.r.clamp.b32",
                               [](U a, U b, U n) { return n >= 32 ? b : U((uint64_t(b) << 32 | a) >> n); });
  define.operation<U, U, U, U>("prmt.b32", [](U a, U b, U selector) { return permute_bytes(a, b, selector); });
  define.operation<U, U, U, U, U>("lop3.b32", [](U a, U b, U c, U table) {
    U r = 0;
    for (int k = 0; k < 8; ++k)
      r |= (table >> k & 1 ? ~0u : 0) & (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return r;
  });
  define.operation<U, U, U, U>("sad.u32", [](U a, U b, U c) { return c + (a > b ? a - b : b - a); });
  define.operation<int32_t, int32_t, int32_t, int32_t>(
      "sad.s32", [](int32_t a, int32_t b, int32_t c) { return int32_t(U(c) + (a > b ? U(a) - U(b) : U(b) - U(a))); });
  define.operation<U, U, U>("mul24.lo.u32", [](U a, U b) { return (a & 0xffffff) * (b & 0xffffff); });
}

void define_moves(const Definitions& define) {
  for (const char* t : {"b16", "u16", "s16", "b32", "u32", "s32", "f32"}) {
    using T = uint32_t;
    define.operation<T, T>(Spelling("mov.%s", t), [](T a) { return a; });
    define.operation<T, T, T, bool>(Spelling("selp.%s", t), [](T a, T b, bool p) { return p ? a : b; });
    define.operation<T, T, T, int32_t>(Spelling("slct.%s.s32", t), [](T a, T b, int32_t c) { return c >= 0 ? a : b; });
    define.operation<T, T, T, float>(Spelling("slct.%s.f32", t), [](T a, T b, float c) { return c >= 0 ? a : b; });
  }
  for (const char* t : {"b64", "u64", "s64", "f64"}) {
    using T = uint64_t;
    define.operation<T, T>(Spelling("mov.%s", t), [](T a) { return a; });
    define.operation<T, T, T, bool>(Spelling("selp.%s", t), [](T a, T b, bool p) { return p ? a : b; });
    define.operation<T, T, T, int32_t>(Spelling("slct.%s.s32", t), [](T a, T b, int32_t c) { return c >= 0 ? a : b; });
  }
  // Halves of a register; the decoder splits vector moves into these.
  define.operation<uint64_t, uint32_t, uint32_t>("pack.b64",
                                                 [](uint32_t a, uint32_t b) { return a | uint64_t(b) << 32; });
  define.operation<uint32_t, uint64_t>("low.b64", [](uint64_t a) { return uint32_t(a); });
  define.operation<uint32_t, uint64_t>("high.b64", [](uint64_t a) { return uint32_t(a >> 32); });
  define.operation<uint32_t, uint32_t, uint32_t>("pack.b32",
                                                 [](uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; });
  define.operation<uint32_t, uint32_t>("low.b32", [](uint32_t a) { return a & 0xffff; });
  define.operation<uint32_t, uint32_t>("high.b32", [](uint32_t a) { return a >> 16; });
  define.operation<uint64_t, uint32_t>("widen", [](uint32_t a) { return uint64_t(a); });
}

// --- Floating point ---

// With the host's own rounding: what comes between the two changes of it has operands and a result that the compiler
// cannot know, and stays there.
template <class F, int DIRECTION>
struct Rounded {
  template <class... A>
  auto operator()(A... a) const {
    const int before = fegetround();
    fesetround(DIRECTION);
    (hide(a), ...);
    auto result = F{}(a...);
    hide(result);
    fesetround(before);
    return result;
  }
  template <class T>
  static void hide(T& value) {
    asm volatile("" : "+m"(value) : : "memory");
  }
};

template <class T, class F, class... A>
void define_float(const Definitions& define, const char* name, F, Cost cost) {
  const char* const t = type_name<T>;
  const auto rounded = [&]<class R>(const char* r, R) {
    define.operation<T, A...>(Spelling("%s%s.%s", name, r, t), R{}, cost);
    if constexpr (std::is_same_v<T, float>) {
      define.operation<T, A...>(Spelling("%s%s.ftz.%s", name, r, t), Flushing<R>{}, cost);
      define.operation<T, A...>(Spelling("%s%s.sat.%s", name, r, t), Saturating<R>{}, cost);
      define.operation<T, A...>(Spelling("%s%s.ftz.sat.%s", name, r, t), Saturating<Flushing<R>>{}, cost);
    }
  };
  rounded("", F{});
  rounded(".rn", F{});
  rounded(".rz", Rounded<F, FE_TOWARDZERO>{});
  rounded(".rm", Rounded<F, FE_DOWNWARD>{});
  rounded(".rp", Rounded<F, FE_UPWARD>{});
}

// The approximate functions are computed exactly rounded, or nearly so.
template <class F>
void define_approximate(const Definitions& define, const char* name, F) {
  define.operation<float, float>(Spelling("%s.f32", name), F{});
  define.operation<float, float>(Spelling("%s.ftz.f32", name), Flushing<F>{});
}

void define_floats(const Definitions& define) {
  const auto for_type = [&]<class T>(T) {
    const char* const t = type_name<T>;
    const bool single = sizeof(T) == 4;
    const auto add = [](T a, T b) { return a + b; };
    const auto subtract = [](T a, T b) { return a - b; };
    const auto multiply = [](T a, T b) { return a * b; };
    const auto multiply_add = [](T a, T b, T c) { return std::fma(a, b, c); };
    define_float<T, decltype(add), T, T>(define, "add", add, single ? FLOAT : PLAIN);
    define_float<T, decltype(subtract), T, T>(define, "sub", subtract, single ? FLOAT : PLAIN);
    define_float<T, decltype(multiply), T, T>(define, "mul", multiply, single ? FLOAT : PLAIN);
    define_float<T, decltype(multiply_add), T, T, T>(define, "fma", multiply_add, single ? MULTIPLY_ADD : PLAIN);
    define_float<T, decltype(multiply_add), T, T, T>(define, "mad", multiply_add, single ? MULTIPLY_ADD : PLAIN);
    define.operation<T, T, T>(Spelling("div.rn.%s", t), [](T a, T b) { return a / b; });
    define.operation<T, T>(Spelling("rcp.rn.%s", t), [](T a) { return T(1) / a; });
    define.operation<T, T>(Spelling("sqrt.rn.%s", t), [](T a) { return std::sqrt(a); });
    define.operation<T, T>(Spelling("neg.%s", t), [](T a) { return -a; });
    define.operation<T, T>(Spelling("abs.%s", t), [](T a) { return std::fabs(a); });
    define.operation<T, T, T>(Spelling("min.%s", t), [](T a, T b) { return minimum(a, b); });
    define.operation<T, T, T>(Spelling("max.%s", t), [](T a, T b) { return maximum(a, b); });
    define.operation<T, T, T>(Spelling("copysign.%s", t), [](T a, T b) { return std::copysign(b, a); });
    define.operation<bool, T>(Spelling("testp.finite.%s", t), [](T a) { return a - a == 0; });
    define.operation<bool, T>(Spelling("testp.infinite.%s", t), [](T a) { return a == a && a - a != 0; });
    define.operation<bool, T>(Spelling("testp.number.%s", t), [](T a) { return a == a; });
    define.operation<bool, T>(Spelling("testp.notanumber.%s", t), [](T a) { return a != a; });
  };
  for_type(float());
  for_type(double());

  using F = float;
  define.operation<F, F, F>("min.NaN.f32", [](F a, F b) { return a != a || b != b ? NAN : minimum(a, b); });
  define.operation<F, F, F>("max.NaN.f32", [](F a, F b) { return a != a || b != b ? NAN : maximum(a, b); });
  define.operation<F, F, F>("min.ftz.f32", [](F a, F b) { return minimum(flush(a), flush(b)); });
  define.operation<F, F, F>("max.ftz.f32", [](F a, F b) { return maximum(flush(a), flush(b)); });
  define.operation<F, F>("neg.ftz.f32", [](F a) { return -flush(a); });
  define.operation<F, F>("abs.ftz.f32", [](F a) { return std::fabs(flush(a)); });
  const auto divide = [](F a, F b) { return a / b; };
  for (const char* name : {"div.approx.f32", "div.full.f32"}) define.operation<F, F, F>(name, divide);
  for (const char* name : {"div.approx.ftz.f32", "div.full.ftz.f32", "div.rn.ftz.f32"})
    define.operation<F, F, F>(name, Flushing<decltype(divide)>{});
  define_approximate(define, "rcp.approx", [](F a) { return 1 / a; });
  define_approximate(define, "sqrt.approx", [](F a) { return std::sqrt(a); });
  define_approximate(define, "rsqrt.approx", [](F a) { return F(1 / std::sqrt(double(a))); });
  define_approximate(define, "ex2.approx", [](F a) { return F(::exp2(double(a))); });
  define_approximate(define, "lg2.approx", [](F a) { return F(::log2(double(a))); });
  define_approximate(define, "sin.approx", [](F a) { return F(::sin(double(a))); });
  define_approximate(define, "cos.approx", [](F a) { return F(::cos(double(a))); });
  define_approximate(define, "tanh.approx", [](F a) { return F(::tanh(double(a))); });
  define.operation<double, double>("rsqrt.approx.f64", [](double a) { return 1 / std::sqrt(a); });
  const auto flushed_reciprocal = [](F a) { return 1 / a; };
  define.operation<F, F>("rcp.rn.ftz.f32", Flushing<decltype(flushed_reciprocal)>{});
  const auto root = [](F a) { return std::sqrt(a); };
  define.operation<F, F>("sqrt.rn.ftz.f32", Flushing<decltype(root)>{});
}

// --- Comparisons ---

template <class T, class F>
void define_comparison(const Definitions& define, const char* comparison, const char* t, F) {
  define.operation<bool, T, T>(Spelling("setp.%s.%s", comparison, t), F{});
  if constexpr (sizeof(T) == 4) {
    define.operation<uint32_t, T, T>(Spelling("set.%s.u32.%s", comparison, t),
                                     [](T a, T b) { return F{}(a, b) ? ~0u : 0u; });
    define.operation<uint32_t, T, T>(Spelling("set.%s.s32.%s", comparison, t),
                                     [](T a, T b) { return F{}(a, b) ? ~0u : 0u; });
    define.operation<float, T, T>(Spelling("set.%s.f32.%s", comparison, t),
                                  [](T a, T b) { return F{}(a, b) ? 1.0f : 0.0f; });
  }
}

template <class T>
void define_comparisons(const Definitions& define, const char* t) {
  const auto add = [&](const char* name, auto f) { define_comparison<T>(define, name, t, f); };
  add("eq", [](T a, T b) { return a == b; });
  if constexpr (std::is_floating_point_v<T>)
    add("ne", [](T a, T b) { return a < b || a > b; });
  else
    add("ne", [](T a, T b) { return a != b; });
  add("lt", [](T a, T b) { return a < b; });
  add("le", [](T a, T b) { return a <= b; });
  add("gt", [](T a, T b) { return a > b; });
  add("ge", [](T a, T b) { return a >= b; });
  if constexpr (std::is_floating_point_v<T>) {
    add("equ", [](T a, T b) { return !(a < b || a > b); });
    add("neu", [](T a, T b) { return a != b; });
    add("ltu", [](T a, T b) { return !(a >= b); });
    add("leu", [](T a, T b) { return !(a > b); });
    add("gtu", [](T a, T b) { return !(a <= b); });
    add("geu", [](T a, T b) { return !(a < b); });
    add("num", [](T a, T b) { return a == a && b == b; });
    add("nan", [](T a, T b) { return a != a || b != b; });
  } else if constexpr (!std::is_signed_v<T>) {
    add("lo", [](T a, T b) { return a < b; });
    add("ls", [](T a, T b) { return a <= b; });
    add("hi", [](T a, T b) { return a > b; });
    add("hs", [](T a, T b) { return a >= b; });
  }
}

// --- Conversions ---

struct RoundNearest {
  template <class T>
  static T apply(T x) {
    return std::rint(x);
  }
};
struct RoundZero {
  template <class T>
  static T apply(T x) {
    return std::trunc(x);
  }
};
struct RoundDown {
  template <class T>
  static T apply(T x) {
    return std::floor(x);
  }
};
struct RoundUp {
  template <class T>
  static T apply(T x) {
    return std::ceil(x);
  }
};

// Out of range: the nearest value; not-a-number: 0.
template <class T, class R, class S>
T to_integer(S x) {
  const S rounded = R::apply(x);
  constexpr S above = S(std::numeric_limits<T>::max() / 2 + 1) * 2, lowest = S(std::numeric_limits<T>::min());
  const bool fits = rounded >= lowest && rounded < above;
  const T converted = T(fits ? rounded : S(0));
  return fits               ? converted
         : rounded >= above ? std::numeric_limits<T>::max()
         : rounded < lowest ? std::numeric_limits<T>::min()
                            : T(0);
}

template <class D, class S>
D clamp_integer(S x) {
  using L = std::numeric_limits<D>;
  if (std::cmp_less(x, L::min())) return L::min();
  if (std::cmp_greater(x, L::max())) return L::max();
  return D(x);
}

template <class D, class S>
void define_integer_conversion(const Definitions& define) {
  const char *const to = type_name<D>, *const from = type_name<S>;
  define.operation<D, S>(Spelling("cvt.%s.%s", to, from), [](S a) { return D(a); });
  define.operation<D, S>(Spelling("cvt.sat.%s.%s", to, from), [](S a) { return clamp_integer<D>(a); });
}

template <class I>
void define_conversions_of(const Definitions& define) {
  [&]<class... S>(std::tuple<S...>*) {
    (define_integer_conversion<I, S>(define), ...);
  }(static_cast<std::tuple<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>*>(nullptr));
  const auto for_float = [&]<class S>(S) {
    const char *const i = type_name<I>, *const s = type_name<S>;
    define.operation<S, I>(Spelling("cvt.rn.%s.%s", s, i), [](I a) { return S(a); });
    const auto rounded = [&]<class R>(R, const char* r) {
      define.operation<I, S>(Spelling("cvt.%s.%s.%s", r, i, s), [](S a) { return to_integer<I, R>(a); });
      define.operation<I, S>(Spelling("cvt.%s.ftz.%s.%s", r, i, s), [](S a) { return to_integer<I, R>(flush(a)); });
    };
    rounded(RoundNearest(), "rni");
    rounded(RoundZero(), "rzi");
    rounded(RoundDown(), "rmi");
    rounded(RoundUp(), "rpi");
  };
  for_float(float());
  for_float(double());
}

void define_conversions(const Definitions& define) {
  define_conversions_of<uint8_t>(define);
  define_conversions_of<int8_t>(define);
  define_conversions_of<uint16_t>(define);
  define_conversions_of<int16_t>(define);
  define_conversions_of<uint32_t>(define);
  define_conversions_of<int32_t>(define);
  define_conversions_of<uint64_t>(define);
  define_conversions_of<int64_t>(define);
  const auto for_type = [&]<class T>(T) {
    const char* const t = type_name<T>;
    define.operation<T, T>(Spelling("cvt.rni.%s.%s", t, t), [](T a) { return std::rint(a); });
    define.operation<T, T>(Spelling("cvt.rzi.%s.%s", t, t), [](T a) { return std::trunc(a); });
    define.operation<T, T>(Spelling("cvt.rmi.%s.%s", t, t), [](T a) { return std::floor(a); });
    define.operation<T, T>(Spelling("cvt.rpi.%s.%s", t, t), [](T a) { return std::ceil(a); });
    define.operation<T, T>(Spelling("cvt.sat.%s.%s", t, t), [](T a) { return saturate(a); });
    define.operation<T, T>(Spelling("cvt.%s.%s", t, t), [](T a) { return a; });
  };
  for_type(float());
  for_type(double());
  define.operation<float, float>("cvt.ftz.f32.f32", [](float a) { return flush(a); });
  define.operation<double, float>("cvt.f64.f32", [](float a) { return double(a); });
  define.operation<double, float>("cvt.ftz.f64.f32", [](float a) { return double(flush(a)); });
  define.operation<float, double>("cvt.rn.f32.f64", [](double a) { return float(a); });
  define.operation<float, double>("cvt.rn.ftz.f32.f64", [](double a) { return flush(float(a)); });
  // To the 10 bits of tf32, ties away from zero.
  define.operation<uint32_t, float>("cvt.rna.tf32.f32", [](float a) {
    const uint32_t bits = std::bit_cast<uint32_t>(a);
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
  });
}

// --- Memory ---

// Addresses of a warp instruction in one space, with the offset of the instruction added.
inline bool fits(const Pattern& p, const Warp& w, const uint64_t* addresses) {
  if (p.mask != w.active || p.kernel != w.worker->kernel->number) return false;
  const uint64_t base = addresses[p.first];
  uint64_t different = 0;
  if (p.mask == ALL_LANES)
    for (int lane = 0; lane < LANES; ++lane) different |= (addresses[lane] - base) ^ uint64_t(p.relative[lane]);
  else
    for (int lane = 0; lane < LANES; ++lane)
      different |= ((addresses[lane] - base) ^ uint64_t(p.relative[lane])) & -uint64_t(p.mask >> lane & 1);
  return !different;
}

template <uint32_t BYTES>
inline const Pattern& pattern_of(Warp& w, Next i, const uint64_t* addresses) {
  Patterns& patterns = w.worker->patterns[i->pattern];
  if (fits(patterns.pattern[patterns.latest], w, addresses)) return patterns.pattern[patterns.latest];
  for (uint32_t other = 1; other < 4; ++other) {
    const uint32_t k = (patterns.latest + other) % 4;
    if (!fits(patterns.pattern[k], w, addresses)) continue;
    patterns.latest = k;
    return patterns.pattern[k];
  }
  return learn_pattern(patterns, addresses, w, BYTES);
}

template <class T>
constexpr T STATE_OF(uint8_t state) {
  return T(T(~T(0)) / 255 * state);
}

template <uint32_t BYTES>
inline bool all_written(const uint8_t* state) {
  if constexpr (BYTES >= 8) {
    uint64_t different = 0;
    for (uint32_t k = 0; k < BYTES / 8; ++k)
      different |= reinterpret_cast<const uint64_t*>(state)[k] ^ STATE_OF<uint64_t>(WRITTEN);
    return !different;
  } else {
    using T = std::conditional_t<BYTES == 4, uint32_t, std::conditional_t<BYTES == 2, uint16_t, uint8_t>>;
    return *reinterpret_cast<const T*>(state) == STATE_OF<T>(WRITTEN);
  }
}

template <uint32_t BYTES>
inline bool all_writable(const uint8_t* state) {
  if constexpr (BYTES >= 8) {
    uint64_t common = ~uint64_t(0);
    for (uint32_t k = 0; k < BYTES / 8; ++k) common &= reinterpret_cast<const uint64_t*>(state)[k];
    return (common & STATE_OF<uint64_t>(UNWRITTEN)) == STATE_OF<uint64_t>(UNWRITTEN);
  } else {
    using T = std::conditional_t<BYTES == 4, uint32_t, std::conditional_t<BYTES == 2, uint16_t, uint8_t>>;
    return (*reinterpret_cast<const T*>(state) & STATE_OF<T>(UNWRITTEN)) == STATE_OF<T>(UNWRITTEN);
  }
}

// Where the first active lane's bytes and their states are; null: some lane's access is out of bounds or misaligned.
struct Bytes {
  uint8_t *data, *state;
};

template <Space SPACE, uint32_t BYTES>
inline Bytes locate(Warp& w, const Pattern& p, uint64_t first) {
  const Worker& k = *w.worker;
  const uint64_t origin = SPACE == Space::GLOBAL ? k.memory_base : 0;
  const uint64_t size = SPACE == Space::GLOBAL ? k.memory_bytes : k.shared_bytes;
  const uint64_t low = first + uint64_t(p.low) - origin, high = first + uint64_t(p.high) - origin + BYTES;
  if (low >= size || high > size || !p.aligned || first % BYTES) return {nullptr, nullptr};
  if constexpr (SPACE == Space::GLOBAL) {
    uint8_t* const data = reinterpret_cast<uint8_t*>(first);
    return {data, data + k.memory_to_state};
  } else {
    return {k.shared + first, k.shared_state + first};
  }
}

template <Space SPACE, uint32_t BYTES>
inline void count_access(Warp& w, const Pattern& p, uint64_t first, bool is_load) {
  Counters& c = w.worker->counters;
  const uint64_t bytes = uint64_t(std::popcount(w.active)) * BYTES;
  if constexpr (SPACE == Space::GLOBAL) {
    const uint32_t phase = first & 31;
    const uint32_t sectors = p.sectors[phase] ? p.sectors[phase] : count_sectors(p, first);
    const_cast<Pattern&>(p).sectors[phase] = uint8_t(sectors);
    (is_load ? c.global_load_requests : c.global_store_requests) += 1;
    (is_load ? c.global_load_sectors : c.global_store_sectors) += sectors;
    (is_load ? c.global_load_bytes : c.global_store_bytes) += bytes;
  } else {
    constexpr uint32_t group = BYTES <= 4 ? 32 : 128 / BYTES;
    uint32_t least = 0;
    for (int lane = 0; lane < LANES; lane += group)
      least += (w.active >> lane & (group == 32 ? ALL_LANES : (1u << group % 32) - 1)) != 0;
    c.shared_requests += 1;
    c.shared_wavefronts += p.wavefronts;
    c.shared_conflicts += p.wavefronts - least;
  }
}

// Vectors of words, for the marks of shared memory; their owners have half as many bits.
typedef uint32_t Vector16 __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));
typedef uint32_t Vector4 __attribute__((vector_size(16)));
typedef uint16_t Halves4 __attribute__((vector_size(8)));

template <class V, class H>
struct Words {
  using Vector = V;
  static V load(const uint32_t* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(uint32_t* p, V v) { memcpy(p, &v, sizeof v); }
  static V widen(const uint16_t* p) {
    H h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, V);
  }
  static bool any(V v) {
#if defined(__AVX512F__)
    if constexpr (sizeof v == sizeof(__m512i)) return _mm512_test_epi32_mask(__m512i(v), __m512i(v));
#endif
    uint64_t parts[sizeof v / 8], bits = 0;
    memcpy(parts, &v, sizeof v);
    for (const uint64_t part : parts) bits |= part;
    return bits;
  }
};
using Words16 = Words<Vector16, Halves16>;
using Words4 = Words<Vector4, Halves4>;
struct Words1 {
  using Vector = uint32_t;
  static uint32_t load(const uint32_t* p) { return *p; }
  static void store(uint32_t* p, uint32_t v) { *p = v; }
  static uint32_t widen(const uint16_t* p) { return *p; }
  static bool any(uint32_t v) { return v; }
};

// Ones where the condition holds, for vectors and for single words.
template <class V, class C>
inline V where(C condition) {
  if constexpr (std::is_same_v<V, uint32_t>)
    return condition ? ~0u : 0u;
  else
    return V(condition);
}
template <class V>
inline V choose(V mask, V a, V b) {
  return (mask & a) | (~mask & b);
}

// A warp's place among the accesses to shared memory.
struct Place {
  uint32_t warp, thread, now, since, block_since;
  explicit Place(const Warp& w)
      : warp(w.index),
        thread(w.first_thread),
        now(w.worker->tick << TICK_SHIFT),
        since(w.synchronised),
        block_since(w.worker->block_synchronised) {}

  template <class V>
  V is_own_warp(V tag) const {
    return where<V>((tag & THREAD_MASK) >> 5 == warp);
  }
  // Is the access in `tag` one of another thread than `me`, not separated from it by a barrier?
  template <class V>
  V races(V tag, V me) const {
    const V limit = choose<V>(is_own_warp(tag), V{} + since, V{} + block_since);
    return where<V>(tag >> TICK_SHIFT >= limit) & where<V>((tag & (THREAD_MASK | MANY_LANES)) != me);
  }
};

// Calls f(Words, index) for pieces of a stretch of words.
template <class F>
inline void by_words(uint32_t count, F f) {
  uint32_t k = 0;
  for (; k + 16 <= count; k += 16) f(Words16(), k);
  for (; k + 4 <= count; k += 4) f(Words4(), k);
  for (; k < count; ++k) f(Words1(), k);
}

// Notes a reader of words; true: it races with a writer.
template <class W>
inline bool note_readers(const Worker& k, const Place& place, uint32_t index, typename W::Vector me) {
  using V = typename W::Vector;
  const V raced = place.races<V>(W::load(k.writer + index), me);
  const V before = W::load(k.reader + index), own = place.is_own_warp(before);
  const V others =
      own & where<V>(before >> TICK_SHIFT >= place.since) & where<V>((before & (THREAD_MASK | MANY_LANES)) != me);
  W::store(k.other_reader + index, choose<V>(own, W::load(k.other_reader + index), before));
  W::store(k.reader + index, place.now | me | (others & MANY_LANES));
  return W::any(raced);
}

// Shared memory: a read races with an earlier write.
template <uint32_t BYTES>
inline void check_read(Warp& w, Next i, const Pattern& p, uint64_t first) {
  const Worker& k = *w.worker;
  const Place place(w);
  if (BYTES >= 4 && k.tag_shift == 2) {
    bool raced = false;
    for (uint32_t r = 0; r < p.run_count; ++r) {
      const uint32_t index = uint32_t(first + uint64_t(p.runs[r].start)) >> 2;
      const uint16_t* const owners = p.owners + p.runs[r].word;
      by_words(p.runs[r].bytes >> 2, [&]<class W>(W, uint32_t word) {
        raced |= note_readers<W>(k, place, index + word, W::widen(owners + word) + place.thread);
      });
    }
    if (!raced) return;
  }
  const uint32_t tags = BYTES >> k.tag_shift ? BYTES >> k.tag_shift : 1;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const uint64_t address = first + uint64_t(p.relative[lane]);
    for (uint32_t j = 0; j < tags; ++j) {
      const uint32_t index = uint32_t(address >> k.tag_shift) + j;
      if (note_readers<Words1>(k, place, index, place.thread + uint32_t(lane)))
        fail_race(w, i, lane, address, BYTES, "reads", "wrote", k.writer[index]);
    }
  }
}

// A write races with an earlier write or read; atomic ones do not race with each other.
template <uint32_t BYTES>
inline void check_write(Warp& w, Next i, const Pattern& p, uint64_t first, bool atomic = false) {
  const Worker& k = *w.worker;
  const Place place(w);
  if (BYTES >= 4 && k.tag_shift == 2 && !p.shared && !atomic) {
    bool raced = false;
    for (uint32_t r = 0; r < p.run_count; ++r) {
      const uint32_t index = uint32_t(first + uint64_t(p.runs[r].start)) >> 2;
      const uint16_t* const owners = p.owners + p.runs[r].word;
      by_words(p.runs[r].bytes >> 2, [&]<class W>(W, uint32_t word) {
        using V = typename W::Vector;
        const V me = W::widen(owners + word) + place.thread;
        raced |= W::any(place.races<V>(W::load(k.writer + index + word), me) |
                        place.races<V>(W::load(k.reader + index + word), me) |
                        place.races<V>(W::load(k.other_reader + index + word), me));
      });
    }
    if (!raced) {
      for (uint32_t r = 0; r < p.run_count; ++r) {
        const uint32_t index = uint32_t(first + uint64_t(p.runs[r].start)) >> 2;
        const uint16_t* const owners = p.owners + p.runs[r].word;
        by_words(p.runs[r].bytes >> 2, [&]<class W>(W, uint32_t word) {
          W::store(k.writer + index + word, (W::widen(owners + word) + place.thread) | place.now);
        });
      }
      return;
    }
  }
  const uint32_t tags = BYTES >> k.tag_shift ? BYTES >> k.tag_shift : 1;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const uint64_t address = first + uint64_t(p.relative[lane]);
    const uint32_t me = place.thread + uint32_t(lane);
    for (uint32_t j = 0; j < tags; ++j) {
      const uint32_t index = uint32_t(address >> k.tag_shift) + j;
      const uint32_t earlier = k.writer[index];
      if (!(atomic && earlier & ATOMIC) && place.races(earlier, me))
        fail_race(w, i, lane, address, BYTES, "writes", "wrote", earlier);
      for (const uint32_t reader : {k.reader[index], k.other_reader[index]})
        if (place.races(reader, me)) fail_race(w, i, lane, address, BYTES, "writes", "read", reader);
      k.writer[index] = place.now | (atomic ? uint32_t(ATOMIC) : 0) | me;
    }
  }
}

// Calls f(Words, address) for pieces of the words that an access touches, each once.
template <class F>
inline void by_addresses(const Pattern& p, uint64_t first, F f) {
  for (uint32_t r = 0; r < p.run_count; ++r) {
    const uint64_t start = first + uint64_t(p.runs[r].start);
    by_words(p.runs[r].bytes >> 2, [&]<class W>(W, uint32_t word) { f(W(), start + word * 4); });
  }
}

inline uint32_t* tag_at(uint64_t address, ptrdiff_t to_tag) {
  return reinterpret_cast<uint32_t*>(address + uint64_t(to_tag));
}

// A block's place among the accesses to device memory.
struct BlockPlace {
  uint32_t launch, first, tag, own;
  explicit BlockPlace(const Worker& k)
      : launch(k.launch_tag), first(k.first_tag), tag(k.tag), own(k.tag - k.first_tag + (1 << BLOCK_SHIFT)) {}

  template <class V>
  V is_of_launch(V tags) const {
    return where<V>(tags >= launch);
  }
  // Has another block accessed the word in this launch?
  template <class V>
  V is_foreign(V tags) const {
    return is_of_launch<V>(tags) & (where<V>(tags - first >= own) | where<V>((tags & MANY_BLOCKS) != 0));
  }
};

// Device memory: a read races with another block's write. A word that is noted as read needs no second look: who
// writes it afterwards sees that.
template <uint32_t BYTES>
inline void note_read(Warp& w, Next i, const Pattern& p, uint64_t first) {
  if constexpr (BYTES < 4) return;
  const Worker& k = *w.worker;
  const BlockPlace place(k);
  bool foreign = false;
  by_addresses(p, first, [&]<class W>(W, uint64_t address) {
    using V = typename W::Vector;
    uint32_t* const reader = tag_at(address, k.memory_to_reader);
    const V before = W::load(reader), of_launch = place.is_of_launch<V>(before);
    if (!W::any(where<V>(before != place.tag) & ~(of_launch & where<V>((before & MANY_BLOCKS) != 0)))) return;
    foreign |= W::any(place.is_foreign<V>(W::load(tag_at(address, k.memory_to_writer))));
    W::store(reader, choose<V>(of_launch, before | (place.is_foreign<V>(before) & MANY_BLOCKS), V{} + place.tag));
  });
  if (foreign) check_order(w, i, p, first, BYTES, Access::READ);
}

// A write races with another block's read or write.
template <uint32_t BYTES>
inline void note_write(Warp& w, Next i, const Pattern& p, uint64_t first) {
  if constexpr (BYTES < 4) return;
  Worker& k = *w.worker;
  const BlockPlace place(k);
  k.fenced = false;
  bool foreign = false;
  by_addresses(p, first, [&]<class W>(W, uint64_t address) {
    using V = typename W::Vector;
    foreign |= W::any(place.is_foreign<V>(W::load(tag_at(address, k.memory_to_writer))) |
                      place.is_foreign<V>(W::load(tag_at(address, k.memory_to_reader))));
  });
  if (foreign) check_order(w, i, p, first, BYTES, Access::WRITE);
  by_addresses(p, first, [&]<class W>(W, uint64_t address) {
    using V = typename W::Vector;
    W::store(tag_at(address, k.memory_to_writer), V{} + place.tag);
    if (foreign) W::store(tag_at(address, k.memory_to_reader), V{}); /* these came before */
  });
}

// Atomic updates race with another block's reads and writes, not with each other.
inline void note_update(Warp& w, Next i, const Pattern& p, uint64_t first, uint32_t bytes) {
  Worker& k = *w.worker;
  const BlockPlace place(k);
  check_order(w, i, p, first, bytes, Access::UPDATE);
  by_addresses(p, first, [&]<class W>(W, uint64_t address) {
    using V = typename W::Vector;
    uint32_t* const writer = tag_at(address, k.memory_to_writer);
    const V before = W::load(writer), others = place.is_foreign<V>(before);
    const V own_write = place.is_of_launch<V>(before) & ~others & where<V>((before & UPDATED) == 0);
    W::store(writer, choose<V>(own_write, before, (others & MANY_BLOCKS) | (place.tag | UPDATED)));
  });
  for (uint32_t m = w.active; m; m &= m - 1) meet(k, first + uint64_t(p.relative[std::countr_zero(m)]));
}

// Are all bytes of the access WRITTEN?
template <uint32_t BYTES>
inline bool is_written(const Pattern& p, const uint8_t* state) {
  if (p.contiguous) return all_written<BYTES * LANES>(state);
  bool written = true;
  for (uint32_t r = 0; r < p.run_count; ++r) {
    const uint8_t* const s = state + p.runs[r].start;
    for (uint32_t byte = 0; byte < p.runs[r].bytes; byte += BYTES) written &= all_written<BYTES>(s + byte);
  }
  return written;
}

// The values of four lanes, one lane after another, as four registers' values of these lanes, and back.
typedef uint32_t Four __attribute__((vector_size(16), aligned(4)));
inline void transpose(Four& a, Four& b, Four& c, Four& d) {
  const Four ab = __builtin_shuffle(a, b, Four{0, 4, 1, 5}), cd = __builtin_shuffle(c, d, Four{0, 4, 1, 5});
  const Four ab2 = __builtin_shuffle(a, b, Four{2, 6, 3, 7}), cd2 = __builtin_shuffle(c, d, Four{2, 6, 3, 7});
  a = __builtin_shuffle(ab, cd, Four{0, 1, 4, 5});
  b = __builtin_shuffle(ab, cd, Four{2, 3, 6, 7});
  c = __builtin_shuffle(ab2, cd2, Four{0, 1, 4, 5});
  d = __builtin_shuffle(ab2, cd2, Four{2, 3, 6, 7});
}

template <Space SPACE, class T, int N, class D>
void load_from(Warp& w, Next i, const uint64_t* addresses) {
  constexpr uint32_t BYTES = sizeof(T) * N;
  const Pattern& p = pattern_of<BYTES>(w, i, addresses);
  const uint64_t first = addresses[p.first] + uint64_t(i->immediate);
  const Bytes at = locate<SPACE, BYTES>(w, p, first);
  if (!at.data) fail_access(w, i, SPACE, addresses, BYTES, false, "load");
  if constexpr (SPACE == Space::SHARED) check_read<BYTES>(w, i, p, first);
  count_access<SPACE, BYTES>(w, p, first, true);
  if (!is_written<BYTES>(p, at.state)) fail_access(w, i, SPACE, addresses, BYTES, false, "load");
  if constexpr (SPACE == Space::GLOBAL) note_read<BYTES>(w, i, p, first);
  // The destination may be the address register: no address is read from here on.
  D* d[N];
  for (int k = 0; k < N; ++k) d[k] = lanes<D>(w, i->operand[k]);
  const T* const values = reinterpret_cast<const T*>(at.data);
  if (p.uniform) {
    D value[N];
    for (int k = 0; k < N; ++k) value[k] = D(values[k]);
    for (int k = 0; k < N; ++k) write<D>(w, i->operand[k], [v = value[k]](int) { return v; });
  } else if (N == 4 && sizeof(T) == 4 && sizeof(D) == 4 && w.active == ALL_LANES) {
    for (int lane = 0; lane < LANES; lane += 4) {
      Four v[4];
      for (int k = 0; k < 4; ++k) memcpy(&v[k], at.data + p.relative[lane + k], sizeof v[k]);
      transpose(v[0], v[1], v[2], v[3]);
      for (int k = 0; k < 4; ++k) memcpy(d[k % N] + lane, &v[k], sizeof v[k]);
    }
  } else if (p.contiguous) {
    for (int k = 0; k < N; ++k)
#pragma GCC ivdep
      for (int lane = 0; lane < LANES; ++lane) d[k][lane] = D(values[lane * N + k]);
  } else {
    const auto load_lane = [&](int lane) {
      const T* const source = reinterpret_cast<const T*>(at.data + p.relative[lane]);
      for (int k = 0; k < N; ++k) d[k][lane] = D(source[k]);
    };
    if (w.active == ALL_LANES)
      for (int lane = 0; lane < LANES; ++lane) load_lane(lane);
    else
      for (uint32_t m = w.active; m; m &= m - 1) load_lane(std::countr_zero(m));
  }
}

template <Space SPACE, class T, int N, class A>
void store_to(Warp& w, Next i, const uint64_t* addresses) {
  constexpr uint32_t BYTES = sizeof(T) * N;
  const Pattern& p = pattern_of<BYTES>(w, i, addresses);
  const uint64_t first = addresses[p.first] + uint64_t(i->immediate);
  const Bytes at = locate<SPACE, BYTES>(w, p, first);
  if (!at.data) fail_access(w, i, SPACE, addresses, BYTES, true, "store");
  if constexpr (SPACE == Space::SHARED) check_write<BYTES>(w, i, p, first);
  count_access<SPACE, BYTES>(w, p, first, false);
  const auto note = [&](bool writable) {
    if (!writable) fail_access(w, i, SPACE, addresses, BYTES, true, "store");
    if constexpr (SPACE == Space::GLOBAL) note_write<BYTES>(w, i, p, first);
  };
  const A* a[N];
  for (int k = 0; k < N; ++k) a[k] = lanes<A>(w, i->operand[k + 1]);
  if (N == 4 && sizeof(T) == 4 && sizeof(A) == 4 && p.contiguous) {
    note(all_writable<BYTES * LANES>(at.state));
    for (int lane = 0; lane < LANES; lane += 4) {
      Four v[4];
      for (int k = 0; k < 4; ++k) memcpy(&v[k], a[k % N] + lane, sizeof v[k]);
      transpose(v[0], v[1], v[2], v[3]);
      memcpy(at.data + lane * BYTES, v, sizeof v);
    }
    memset(at.state, WRITTEN, BYTES * LANES);
  } else if (p.contiguous) {
    note(all_writable<BYTES * LANES>(at.state));
    T* const values = reinterpret_cast<T*>(at.data);
    for (int k = 0; k < N; ++k)
#pragma GCC ivdep
      for (int lane = 0; lane < LANES; ++lane) values[lane * N + k] = T(a[k][lane]);
    memset(at.state, WRITTEN, BYTES * LANES);
  } else {
    bool writable = true;
    for (uint32_t m = w.active; m; m &= m - 1)
      writable &= all_writable<BYTES>(at.state + p.relative[std::countr_zero(m)]);
    note(writable);
    for (uint32_t m = w.active; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      T* const target = reinterpret_cast<T*>(at.data + p.relative[lane]);
      for (int k = 0; k < N; ++k) target[k] = T(a[k][lane]);
      memset(at.state + p.relative[lane], WRITTEN, BYTES);
    }
  }
}

// Local memory is one piece a thread; parameters are the same for all.
template <uint32_t BYTES>
inline bool local_bytes(Warp& w, uint64_t address, int lane, Bytes& at) {
  const Worker& k = *w.worker;
  if (address % BYTES || address >= k.local_bytes || address + BYTES > k.local_bytes) return false;
  const size_t offset = size_t(w.first_thread + lane) * k.local_bytes + address;
  at = {k.local + offset, k.local_state + offset};
  return true;
}

template <class T, int N, class D>
void load_local(Warp& w, Next i, const uint64_t* addresses) {
  D* d[N];
  for (int k = 0; k < N; ++k) d[k] = lanes<D>(w, i->operand[k]);
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    Bytes at;
    if (!local_bytes<sizeof(T) * N>(w, addresses[lane] + uint64_t(i->immediate), lane, at) ||
        !all_written<sizeof(T) * N>(at.state))
      fail_access(w, i, Space::LOCAL, addresses, sizeof(T) * N, false, "load");
    for (int k = 0; k < N; ++k) d[k][lane] = D(reinterpret_cast<const T*>(at.data)[k]);
  }
}

template <class T, int N, class A>
void store_local(Warp& w, Next i, const uint64_t* addresses) {
  const A* a[N];
  for (int k = 0; k < N; ++k) a[k] = lanes<A>(w, i->operand[k + 1]);
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    Bytes at;
    if (!local_bytes<sizeof(T) * N>(w, addresses[lane] + uint64_t(i->immediate), lane, at) ||
        !all_writable<sizeof(T) * N>(at.state))
      fail_access(w, i, Space::LOCAL, addresses, sizeof(T) * N, true, "store");
    for (int k = 0; k < N; ++k) reinterpret_cast<T*>(at.data)[k] = T(a[k][lane]);
    memset(at.state, WRITTEN, sizeof(T) * N);
  }
}

template <class T, int N, class D>
void load_parameter(Warp& w, Next i, const uint64_t* addresses) {
  constexpr uint32_t BYTES = sizeof(T) * N;
  D* d[N];
  for (int k = 0; k < N; ++k) d[k] = lanes<D>(w, i->operand[k]);
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const uint64_t address = addresses[lane] + uint64_t(i->immediate);
    if (address % BYTES || address >= w.worker->parameter_bytes || address + BYTES > w.worker->parameter_bytes)
      fail_access(w, i, Space::PARAMETER, addresses, BYTES, false, "load");
    for (int k = 0; k < N; ++k) d[k][lane] = D(reinterpret_cast<const T*>(w.worker->parameters + address)[k]);
  }
}

// Calls f(space, addresses in it) with the lanes active whose generic addresses lie in that space.
template <class F>
inline void by_space(Warp& w, Next i, const uint64_t* addresses, F f) {
  const uint32_t active = w.active;
  const uint64_t offset = uint64_t(i->immediate);
  const auto in_window = [&](uint64_t window) {
    return mask_of([&](int lane) { return addresses[lane] + offset - window < WINDOW_BYTES; }) & active;
  };
  const uint32_t shared = in_window(SHARED_WINDOW), local = in_window(LOCAL_WINDOW),
                 parameter = in_window(PARAMETER_WINDOW);
  alignas(64) uint64_t within[LANES];
  const auto part = [&](Space space, uint32_t mask, uint64_t window) {
    if (!mask) return;
    for (int lane = 0; lane < LANES; ++lane) within[lane] = addresses[lane] - window;
    w.active = mask;
    f(space, within);
  };
  part(Space::GLOBAL, active & ~(shared | local | parameter), 0);
  part(Space::SHARED, shared, SHARED_WINDOW);
  part(Space::LOCAL, local, LOCAL_WINDOW);
  part(Space::PARAMETER, parameter, PARAMETER_WINDOW);
  w.active = active;
}

template <Space SPACE, class T, int N, class D>
Next load(Warp& w, Next i) {
  const uint64_t* const addresses = lanes<uint64_t>(w, i->operand[N]);
  if constexpr (SPACE == Space::LOCAL)
    load_local<T, N, D>(w, i, addresses);
  else if constexpr (SPACE == Space::PARAMETER)
    load_parameter<T, N, D>(w, i, addresses);
  else
    load_from<SPACE, T, N, D>(w, i, addresses);
  return i + 1;
}

template <class T, int N, class D>
Next load_generic(Warp& w, Next i) {
  alignas(64) uint64_t addresses[LANES];
  memcpy(addresses, lanes<uint64_t>(w, i->operand[N]), sizeof addresses);
  by_space(w, i, addresses, [&](Space space, const uint64_t* within) {
    if (space == Space::GLOBAL) load_from<Space::GLOBAL, T, N, D>(w, i, within);
    if (space == Space::SHARED) load_from<Space::SHARED, T, N, D>(w, i, within);
    if (space == Space::LOCAL) load_local<T, N, D>(w, i, within);
    if (space == Space::PARAMETER) load_parameter<T, N, D>(w, i, within);
  });
  return i + 1;
}

template <Space SPACE, class T, int N, class A>
Next store(Warp& w, Next i) {
  const uint64_t* const addresses = lanes<uint64_t>(w, i->operand[0]);
  if constexpr (SPACE == Space::LOCAL)
    store_local<T, N, A>(w, i, addresses);
  else
    store_to<SPACE, T, N, A>(w, i, addresses);
  return i + 1;
}

template <class T, int N, class A>
Next store_generic(Warp& w, Next i) {
  by_space(w, i, lanes<uint64_t>(w, i->operand[0]), [&](Space space, const uint64_t* within) {
    if (space == Space::GLOBAL) store_to<Space::GLOBAL, T, N, A>(w, i, within);
    if (space == Space::SHARED) store_to<Space::SHARED, T, N, A>(w, i, within);
    if (space == Space::LOCAL) store_local<T, N, A>(w, i, within);
    if (space == Space::PARAMETER) fail_access(w, i, Space::PARAMETER, within, sizeof(T) * N, true, "store");
  });
  return i + 1;
}

template <class T, int N, class R>
void define_accesses_of(const Definitions& define) {
  const char letter = Letter<R>::value;
  const auto add = [&](const char* action, const char* space, Handler run) {
    define.table.add(Spelling("%s.%s.%s.v%d:%c", action, space, type_name<T>, N, letter), "", run);
  };
  // The register holds bits: what is narrower is extended by its own sign.
  using D = std::conditional_t<std::is_signed_v<T>, std::make_signed_t<R>, R>;
  add("ld", "global", load<Space::GLOBAL, T, N, D>);
  add("ld", "shared", load<Space::SHARED, T, N, D>);
  add("ld", "local", load<Space::LOCAL, T, N, D>);
  add("ld", "param", load<Space::PARAMETER, T, N, D>);
  add("ld", "generic", load_generic<T, N, D>);
  if constexpr (!std::is_signed_v<T>) {
    add("st", "global", store<Space::GLOBAL, T, N, R>);
    add("st", "shared", store<Space::SHARED, T, N, R>);
    add("st", "local", store<Space::LOCAL, T, N, R>);
    add("st", "generic", store_generic<T, N, R>);
  }
}

template <class T>
void define_accesses(const Definitions& define) {
  if constexpr (sizeof(T) <= 4) {
    define_accesses_of<T, 1, uint32_t>(define);
    define_accesses_of<T, 2, uint32_t>(define);
    define_accesses_of<T, 4, uint32_t>(define);
  }
  define_accesses_of<T, 1, uint64_t>(define);
  if constexpr (sizeof(T) == 8) define_accesses_of<T, 2, uint64_t>(define);
}

// --- Atomics: lane by lane. Kernels that have them on global memory run block by block. ---

template <Space SPACE, class T, class F>
void update(Warp& w, Next i, const uint64_t* addresses) {
  constexpr uint32_t BYTES = sizeof(T);
  const Pattern& p = pattern_of<BYTES>(w, i, addresses);
  const uint64_t first = addresses[p.first] + uint64_t(i->immediate);
  const Bytes at = locate<SPACE, BYTES>(w, p, first);
  if (!at.data) fail_access(w, i, SPACE, addresses, BYTES, true, "atomic access");
  if constexpr (SPACE == Space::SHARED) check_write<BYTES>(w, i, p, first, true);
  count_access<SPACE, BYTES>(w, p, first, false);
  if constexpr (SPACE == Space::GLOBAL) note_update(w, i, p, first, BYTES);
  w.worker->counters.atomics += 1;
  const T *const b = lanes<T>(w, i->operand[2]), *const c = lanes<T>(w, i->operand[3]);
  T* const d = lanes<T>(w, i->operand[0]);
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    if (!all_written<BYTES>(at.state + p.relative[lane]))
      fail_access(w, i, SPACE, addresses, BYTES, false, "atomic access");
    T* const target = reinterpret_cast<T*>(at.data + p.relative[lane]);
    const T old = *target;
    *target = F{}(old, b[lane], c[lane]);
    d[lane] = old;
  }
}

template <Space SPACE, class T, class F>
Next atomic(Warp& w, Next i) {
  update<SPACE, T, F>(w, i, lanes<uint64_t>(w, i->operand[1]));
  return i + 1;
}

template <class T, class F>
Next atomic_generic(Warp& w, Next i) {
  alignas(64) uint64_t addresses[LANES];
  memcpy(addresses, lanes<uint64_t>(w, i->operand[1]), sizeof addresses);
  by_space(w, i, addresses, [&](Space space, const uint64_t* within) {
    if (space == Space::GLOBAL)
      update<Space::GLOBAL, T, F>(w, i, within);
    else if (space == Space::SHARED)
      update<Space::SHARED, T, F>(w, i, within);
    else
      fail(w, i, -1, "out of bounds", "an atomic access to local or parameter memory");
  });
  return i + 1;
}

// Operands of the decoded instruction: d, address, b, c (c is b where there is none).
template <class T, class F>
void define_atomic(const Definitions& define, const char* operation, const char* t, F) {
  define.table.add(Spelling("atom.global.%s.%s", operation, t), "", atomic<Space::GLOBAL, T, F>);
  define.table.add(Spelling("atom.shared.%s.%s", operation, t), "", atomic<Space::SHARED, T, F>);
  define.table.add(Spelling("atom.generic.%s.%s", operation, t), "", atomic_generic<T, F>);
}

void define_atomics(const Definitions& define) {
  const auto for_integer = [&]<class T>(T) {
    const char* const t = type_name<T>;
    define_atomic<T>(define, "add", t, [](T old, T b, T) { return T(Unsigned<T>(old) + Unsigned<T>(b)); });
    define_atomic<T>(define, "min", t, [](T old, T b, T) { return minimum(old, b); });
    define_atomic<T>(define, "max", t, [](T old, T b, T) { return maximum(old, b); });
  };
  for_integer(uint32_t());
  for_integer(int32_t());
  for_integer(uint64_t());
  for_integer(int64_t());
  const auto for_bits = [&]<class T>(T, const char* t) {
    define_atomic<T>(define, "and", t, [](T old, T b, T) { return T(old & b); });
    define_atomic<T>(define, "or", t, [](T old, T b, T) { return T(old | b); });
    define_atomic<T>(define, "xor", t, [](T old, T b, T) { return T(old ^ b); });
    define_atomic<T>(define, "exch", t, [](T, T b, T) { return b; });
    define_atomic<T>(define, "cas", t, [](T old, T b, T c) { return old == b ? c : old; });
  };
  for_bits(uint32_t(), "b32");
  for_bits(uint64_t(), "b64");
  define_atomic<uint32_t>(define, "inc", "u32",
                          [](uint32_t old, uint32_t b, uint32_t) { return old >= b ? 0 : old + 1; });
  define_atomic<uint32_t>(define, "dec", "u32",
                          [](uint32_t old, uint32_t b, uint32_t) { return old == 0 || old > b ? b : old - 1; });
  define_atomic<float>(define, "add", "f32", [](float old, float b, float) { return old + b; });
  define_atomic<double>(define, "add", "f64", [](double old, double b, double) { return old + b; });
}

// --- Asynchronous copies: the bytes are kept aside until they are waited for. ---

// Operands: shared address, global address, count of bytes that are read (the rest is zero).
template <uint32_t BYTES>
Next copy_async(Warp& w, Next i) {
  const uint64_t *const targets = lanes<uint64_t>(w, i->operand[0]), *const sources = lanes<uint64_t>(w, i->operand[1]);
  const uint32_t* const read = lanes<uint32_t>(w, i->operand[2]);
  PendingCopy& copy = add_copy(w);
  copy.mask = w.active;
  copy.bytes = BYTES;
  const uint32_t active = w.active;
  const uint32_t reading = mask_of([&](int lane) { return read[lane] != 0; }) & active;
  if (reading) {
    w.active = reading;
    const Pattern& p = pattern_of<BYTES>(w, i, sources);
    const uint64_t first = sources[p.first] + uint64_t(i->immediate);
    const Bytes at = locate<Space::GLOBAL, BYTES>(w, p, first);
    if (!at.data) fail_access(w, i, Space::GLOBAL, sources, BYTES, false, "asynchronous copy");
    count_access<Space::GLOBAL, BYTES>(w, p, first, true);
    for (uint32_t m = reading; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      const uint32_t count = read[lane] < BYTES ? read[lane] : BYTES;
      for (uint32_t byte = 0; byte < count; ++byte)
        if (at.state[p.relative[lane] + byte] != WRITTEN)
          fail_access(w, i, Space::GLOBAL, sources, BYTES, false, "asynchronous copy");
      memset(copy.data[lane], 0, BYTES);
      memcpy(copy.data[lane], at.data + p.relative[lane], count);
    }
    note_read<BYTES>(w, i, p, first);
    w.active = active;
  }
  for (uint32_t m = active & ~reading; m; m &= m - 1) memset(copy.data[std::countr_zero(m)], 0, BYTES);
  Instruction target = *i;
  target.immediate = 0;
  target.pattern = i->pattern + 1;
  const Pattern& p = pattern_of<BYTES>(w, &target, targets);
  const uint64_t first = targets[p.first];
  const Bytes at = locate<Space::SHARED, BYTES>(w, p, first);
  if (!at.data) fail_access(w, &target, Space::SHARED, targets, BYTES, true, "asynchronous copy");
  check_write<BYTES>(w, &target, p, first);
  count_access<Space::SHARED, BYTES>(w, p, first, false);
  for (uint32_t m = active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    if (!all_writable<BYTES>(at.state + p.relative[lane]))
      fail_access(w, &target, Space::SHARED, targets, BYTES, true, "asynchronous copy");
    memset(at.state + p.relative[lane], COPY_PENDING, BYTES);
    copy.target[lane] = uint32_t(first + p.relative[lane]);
    copy.group[lane] = w.committed_groups[lane];
  }
  return i + 1;
}

Next commit_copies(Warp& w, Next i) {
  for (int lane = 0; lane < LANES; ++lane) w.committed_groups[lane] += w.active >> lane & 1;
  return i + 1;
}

// Waits for all groups but the last `immediate` ones; -1: for all copies, committed or not.
Next wait_for_copies(Warp& w, Next i) {
  Worker& k = *w.worker;
  uint32_t kept = 0;
  for (uint32_t c = 0; c < w.copy_count; ++c) {
    PendingCopy& copy = w.copies[c];
    for (uint32_t m = copy.mask & w.active; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      if (i->immediate >= 0 && int64_t(copy.group[lane]) >= int64_t(w.committed_groups[lane]) - i->immediate) continue;
      const uint32_t target = copy.target[lane];
      memcpy(k.shared + target, copy.data[lane], copy.bytes);
      memset(k.shared_state + target, WRITTEN, copy.bytes);
      for (uint32_t byte = 0; byte < copy.bytes; byte += 1 << k.tag_shift)
        k.writer[(target + byte) >> k.tag_shift] = k.tick << TICK_SHIFT | (w.first_thread + lane);
      copy.mask &= ~(1u << lane);
    }
    if (copy.mask) {
      if (kept != c) w.copies[kept] = copy;
      ++kept;
    }
  }
  w.copy_count = kept;
  return i + 1;
}

// --- Control ---

// The next of the ways that lanes took, or null: all lanes have exited.
Next next_way(Warp& w) {
  while (w.depth) {
    const Way& way = w.ways[--w.depth];
    const uint32_t active = way.lanes & w.live;
    if (!active) continue;
    w.active = active;
    w.end = way.end;
    return way.at;
  }
  w.state = Warp::EXITED;
  w.active = 0;
  return nullptr;
}

Next block_start(Warp& w, Next i) {
  if (i == w.end) return next_way(w);
  w.worker->block_runs[i->immediate] += 1;
  w.worker->block_lanes[i->immediate] += uint64_t(std::popcount(w.active));
  return i + 1;
}

Next branch(Warp&, Next i) { return i->target; }

// `immediate` is the address of the block_start of the immediate post-dominator, or 0.
Next branch_if(Warp& w, Next i) {
  const uint32_t taken = predicate(w, i->operand[0]) & w.active;
  if (taken == w.active) return i->target;
  if (!taken) return i + 1;
  w.worker->counters.divergent_branches += 1;
  const Next end = reinterpret_cast<Next>(i->immediate), other = i + 1;
  const uint32_t staying = w.active & ~taken;
  if (end && end != w.end) w.ways[w.depth++] = {end, w.end, w.active};
  w.end = end;
  if (i->target == end) {
    w.active = staying;
    return other;
  }
  if (other != end) w.ways[w.depth++] = {other, end, staying};
  w.active = taken;
  return i->target;
}

// Operand 0 is the index among `targets`, of which there are `pattern`.
Next branch_indexed(Warp& w, Next i) {
  const uint32_t* const index = lanes<uint32_t>(w, i->operand[0]);
  const Next end = reinterpret_cast<Next>(i->immediate);
  uint32_t left = w.active;
  bool diverged = false;
  for (uint32_t target = 0; target < i->pattern && left; ++target) {
    const uint32_t going = mask_of([&](int lane) { return index[lane] == target; }) & left;
    if (!going) continue;
    if (!diverged && going == w.active) return i->targets[target];
    if (!diverged && end && end != w.end) w.ways[w.depth++] = {end, w.end, w.active};
    diverged = true;
    left &= ~going;
    if (i->targets[target] != end) w.ways[w.depth++] = {i->targets[target], end, going};
  }
  if (left)
    fail(w, i, std::countr_zero(left), "invalid branch", "the index of an indexed branch lies beyond its targets");
  w.worker->counters.divergent_branches += 1;
  return next_way(w);
}

Next leave(Warp& w, Next) {
  w.live &= ~w.active;
  return next_way(w);
}

Next trap(Warp& w, Next i) { fail(w, i, -1, "trap", "the kernel stopped itself"); }

// Around a guarded instruction: `target` follows the whole.
Next guard(Warp& w, Next i) {
  const uint32_t executing = predicate(w, i->operand[0]) & w.active;
  if (!executing) return i->target;
  w.unguarded = w.active;
  w.active = executing;
  return i + 1;
}

Next end_guard(Warp& w, Next i) {
  w.active = w.unguarded;
  return i + 1;
}

// Operands: the barrier's number, and the count of threads (0: all).
Next barrier(Warp& w, Next i) {
  if (w.active != w.live) fail(w, i, -1, "barrier divergence", "a barrier is reached by some threads of the warp only");
  w.state = Warp::AT_BARRIER;
  w.barrier = lanes<uint32_t>(w, i->operand[0])[std::countr_zero(w.active)];
  w.barrier_threads = lanes<uint32_t>(w, i->operand[1])[std::countr_zero(w.active)];
  w.barrier_instruction = i;
  w.at = i + 1;
  return nullptr;
}

// All lanes that the mask names must be there. Lanes beyond the end of the block are not missed.
void check_members(Warp& w, Next i, uint32_t operand, const char* missing) {
  const uint32_t* const members = lanes<uint32_t>(w, operand);
  const uint32_t present = w.worker->thread_count - w.first_thread;
  const uint32_t existing = present >= LANES ? ALL_LANES : (1u << present) - 1;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    if ((members[lane] & existing) != w.active) fail(w, i, lane, "barrier divergence", missing);
  }
}

Next synchronise_warp(Warp& w, Next i) {
  check_members(w, i, i->operand[0], "the mask of bar.warp.sync is not the set of threads that execute it");
  w.synchronised = next_tick(*w.worker);
  return i + 1;
}

Next nothing(Warp&, Next i) { return i + 1; }

Next fence(Warp& w, Next i) {
  pass_fence(*w.worker);
  return i + 1;
}

// --- Between lanes ---

enum class Shuffle { UP, DOWN, BUTTERFLY, INDEX };

// Operands: d, whether the source was in range, a, b, c, members.
template <Shuffle MODE>
Next shuffle(Warp& w, Next i) {
  check_members(w, i, i->operand[5], "the mask of shfl.sync is not the set of threads that execute it");
  alignas(64) uint32_t a[LANES], result[LANES];
  memcpy(a, lanes<uint32_t>(w, i->operand[2]), sizeof a);
  const uint32_t *const b = lanes<uint32_t>(w, i->operand[3]), *const c = lanes<uint32_t>(w, i->operand[4]);
  uint32_t inside = 0, missing = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    const int step = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    const int from = MODE == Shuffle::UP          ? lane - step
                     : MODE == Shuffle::DOWN      ? lane + step
                     : MODE == Shuffle::BUTTERFLY ? lane ^ step
                                                  : first | (step & ~segment);
    const bool fits = MODE == Shuffle::UP ? from >= last : from <= last;
    const int source = fits ? from : lane;
    inside |= uint32_t(fits) << lane;
    missing |= uint32_t(~w.active >> (source & 31) & 1) << lane;
    result[lane] = a[source & 31];
  }
  if (missing &= w.active)
    fail(w, i, std::countr_zero(missing), "barrier divergence",
         "shfl.sync reads from a thread that does not execute it");
  write<uint32_t>(w, i->operand[0], [&](int lane) { return result[lane]; });
  write_predicate(w, i->operand[1], inside);
  return i + 1;
}

enum class Vote { ALL, ANY, UNIFORM, BALLOT };

template <Vote MODE>
Next vote(Warp& w, Next i) {
  check_members(w, i, i->operand[2], "the mask of vote.sync is not the set of threads that execute it");
  const uint32_t votes = predicate(w, i->operand[1]) & w.active;
  if (MODE == Vote::BALLOT)
    write<uint32_t>(w, i->operand[0], [&](int) { return votes; });
  else
    write_predicate(w, i->operand[0],
                    (MODE == Vote::ANY   ? votes != 0
                     : MODE == Vote::ALL ? votes == w.active
                                         : votes == w.active || votes == 0)
                        ? ALL_LANES
                        : 0);
  return i + 1;
}

Next active_mask(Warp& w, Next i) {
  write<uint32_t>(w, i->operand[0], [&](int) { return w.active; });
  return i + 1;
}

template <class T, class F>
Next reduce(Warp& w, Next i) {
  check_members(w, i, i->operand[2], "the mask of redux.sync is not the set of threads that execute it");
  const T* const a = lanes<T>(w, i->operand[1]);
  T result = a[std::countr_zero(w.active)];
  for (uint32_t m = w.active & (w.active - 1); m; m &= m - 1) result = F{}(result, a[std::countr_zero(m)]);
  write<T>(w, i->operand[0], [&](int) { return result; });
  return i + 1;
}

template <class T, class F>
void define_reduction(const Definitions& define, const char* name, F) {
  define.table.add(name, "rrr", reduce<T, F>);
}

// --- Matrix products ---

// d = a * b + c for 16 x K by K x 8. The lower 13 bits of tf32 operands are not looked at; products are exact, the sum
// of all is rounded once. Operands: 4 of d, K / 2 of a, K / 4 of b, 4 of c.
template <int K>
Next multiply_matrices(Warp& w, Next i) {
  if (w.active != ALL_LANES)
    fail(w, i, -1, "barrier divergence", "mma.sync is not executed by all threads of the warp");
  const uint32_t *const d = i->operands, *const a = d + 4, *const b = a + K / 2, *const c = b + K / 4;
  const auto element = [&](uint32_t operand, int lane) {
    return double(std::bit_cast<float>(lanes<uint32_t>(w, operand)[lane] & ~0x1fffu));
  };
  double left[16][K], right[K][8], sum[16][8];
  for (int lane = 0; lane < LANES; ++lane) {
    const int row = lane / 4, column = lane % 4;
    for (int part = 0; part < K / 2; ++part) left[row + part % 2 * 8][column + part / 2 * 4] = element(a[part], lane);
    for (int part = 0; part < K / 4; ++part) right[column + part * 4][row] = element(b[part], lane);
    for (int part = 0; part < 4; ++part)
      sum[row + part / 2 * 8][column * 2 + part % 2] = lanes<float>(w, c[part])[lane];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
  for (int lane = 0; lane < LANES; ++lane)
    for (int part = 0; part < 4; ++part)
      lanes<float>(w, d[part])[lane] = float(sum[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2]);
  return i + 1;
}

void define_control(const Definitions& define) {
  InstructionTable& t = define.table;
  t.add("block_start", "", block_start);
  t.add("bra", "", branch);
  t.add("bra.if", "p", branch_if);
  t.add("brx.idx", "r", branch_indexed);
  t.add("exit", "", leave);
  t.add("trap", "", trap);
  t.add("guard", "p", guard);
  t.add("end_guard", "", end_guard);
  t.add("bar.sync", "rr", barrier);
  t.add("bar.warp.sync", "r", synchronise_warp);
  for (const char* name : {"membar.cta", "fence.acq_rel.cta", "fence.sc.cta"}) t.add(name, "", nothing);
  for (const char* name :
       {"membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu", "fence.sc.sys"})
    t.add(name, "", fence);
  t.add("nanosleep.u32", "r", nothing);
  t.add("shfl.sync.up.b32", "rprrrr", shuffle<Shuffle::UP>);
  t.add("shfl.sync.down.b32", "rprrrr", shuffle<Shuffle::DOWN>);
  t.add("shfl.sync.bfly.b32", "rprrrr", shuffle<Shuffle::BUTTERFLY>);
  t.add("shfl.sync.idx.b32", "rprrrr", shuffle<Shuffle::INDEX>);
  t.add("vote.sync.all.pred", "ppr", vote<Vote::ALL>);
  t.add("vote.sync.any.pred", "ppr", vote<Vote::ANY>);
  t.add("vote.sync.uni.pred", "ppr", vote<Vote::UNIFORM>);
  t.add("vote.sync.ballot.b32", "rpr", vote<Vote::BALLOT>);
  t.add("activemask.b32", "r", active_mask);
  using U = uint32_t;
  define_reduction<U>(define, "redux.sync.add.u32", [](U a, U b) { return a + b; });
  define_reduction<U>(define, "redux.sync.add.s32", [](U a, U b) { return a + b; });
  define_reduction<U>(define, "redux.sync.min.u32", [](U a, U b) { return minimum(a, b); });
  define_reduction<U>(define, "redux.sync.max.u32", [](U a, U b) { return maximum(a, b); });
  define_reduction<int32_t>(define, "redux.sync.min.s32", [](int32_t a, int32_t b) { return minimum(a, b); });
  define_reduction<int32_t>(define, "redux.sync.max.s32", [](int32_t a, int32_t b) { return maximum(a, b); });
  define_reduction<U>(define, "redux.sync.and.b32", [](U a, U b) { return a & b; });
  define_reduction<U>(define, "redux.sync.or.b32", [](U a, U b) { return a | b; });
  define_reduction<U>(define, "redux.sync.xor.b32", [](U a, U b) { return a ^ b; });
  t.add("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32", "", multiply_matrices<4>, MMA);
  t.add("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "", multiply_matrices<8>, MMA);
  t.add("cp.async.4", "ddr", copy_async<4>);
  t.add("cp.async.8", "ddr", copy_async<8>);
  t.add("cp.async.16", "ddr", copy_async<16>);
  t.add("cp.async.commit_group", "", commit_copies);
  t.add("cp.async.wait", "", wait_for_copies);
}

}  // namespace

void define_instructions(InstructionTable& table) {
  const Definitions define{table};
  define_integers(define);
  define_moves(define);
  define_floats(define);
  define_comparisons<uint16_t>(define, "u16");
  define_comparisons<uint16_t>(define, "b16");
  define_comparisons<int16_t>(define, "s16");
  define_comparisons<uint32_t>(define, "u32");
  define_comparisons<uint32_t>(define, "b32");
  define_comparisons<int32_t>(define, "s32");
  define_comparisons<uint64_t>(define, "u64");
  define_comparisons<uint64_t>(define, "b64");
  define_comparisons<int64_t>(define, "s64");
  define_comparisons<float>(define, "f32");
  define_comparisons<double>(define, "f64");
  define_conversions(define);
  define_accesses<uint8_t>(define);
  define_accesses<int8_t>(define);
  define_accesses<uint16_t>(define);
  define_accesses<int16_t>(define);
  define_accesses<uint32_t>(define);
  define_accesses<int32_t>(define);
  define_accesses<uint64_t>(define);
  define_atomics(define);
  define_control(define);
}

}  // namespace emulator::PN_NAMESPACE
