// What every CPU kernel is given: worker threads, scratch memory, and the table of the chosen instruction set.
#pragma once

#include <stdarg.h>
#include <stdint.h>

#include "perturbnas_kernels.h"

namespace pn {

// Runs function(argument, task, thread) for every task in 0..tasks-1. Every thread begins with the same part of them in
// every run, so that it finds in its cache what it left there (tasks go by images), and who is done helps the others: a
// result must depend on the task alone, never on the thread; `thread` (0..threads-1) only selects scratch memory.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  int threads() const { return threads_; }
  void run(int64_t tasks, void (*function)(void*, int64_t, int), void* argument);

 private:
  struct State;
  int threads_;
  State* state_;
};

// Memory that only grows: after the first call of a shape there are no allocations.
class Scratch {
 public:
  ~Scratch();
  // 64-byte aligned, contents undefined; valid until the next call on the same Scratch. Null: out of memory.
  void* get(int64_t bytes);

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

struct KernelTable {
#define KERNEL(name, args) int32_t (*name)(pn_context*, const args*);
#include "cpu/kernel_list.h"
#undef KERNEL
  int32_t (*run_group)(pn_context*, const pn_call*, int32_t count);
  int32_t (*measure_limits)(pn_context*, pn_limits*);
};

// Leaves a message for pn_last_error and returns the status.
int32_t fail(int32_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace pn

struct pn_context {
  explicit pn_context(int threads) : pool(threads) {}
  pn::ThreadPool pool;
  pn::Scratch shared;            // for partial sums and packed weights of the running kernel
  pn::Scratch* local = nullptr;  // one per thread, for tiles
  const pn::KernelTable* kernels = nullptr;
  const char* isa = "";
};

namespace pn {

// f(task, thread) for every task.
template <class F>
inline void parallel_for(pn_context* context, int64_t tasks, F f) {
  context->pool.run(
      tasks, [](void* argument, int64_t task, int thread) { (*static_cast<F*>(argument))(task, thread); }, &f);
}

}  // namespace pn

#define PN_REQUIRE(condition, ...) \
  if (!(condition)) return pn::fail(PN_INVALID_ARGUMENT, __VA_ARGS__)
