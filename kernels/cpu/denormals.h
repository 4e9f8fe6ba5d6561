// Denormal numbers cost a hundred cycles an operation and carry no information here: while one of these lives, its
// thread flushes them.
#pragma once

#include <stdint.h>

namespace pn {

class FlushDenormals {
 public:
  FlushDenormals() {
#if defined(__x86_64__)
    saved_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(unsigned(saved_) | 0x8040);  // flush to zero, denormals are zero
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1u << 24)));
#endif
  }
  ~FlushDenormals() {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(unsigned(saved_));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  uint64_t saved_ = 0;
};

}  // namespace pn
