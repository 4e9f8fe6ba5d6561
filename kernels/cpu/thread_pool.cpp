// The worker threads. Kernels are short (tens of microseconds to milliseconds) and follow one another closely, so an
// idle worker spins for a moment before it sleeps; the moment is short enough that a busy machine loses almost nothing
// to it. Every worker has its own starting signal, so that a run with few tasks neither wakes nor waits for all.
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "cpu/context.h"
#include "cpu/denormals.h"

namespace pn {

namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until value != old: spins, then sleeps.
void wait_change(std::atomic<uint32_t>& value, uint32_t old) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; i++) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  value.wait(old, std::memory_order_acquire);
}

struct alignas(64) Signal {
  std::atomic<uint32_t> runs{0};  // that the worker was to take part in
};

}  // namespace

struct ThreadPool::State {
  explicit State(int threads) : signals(size_t(threads)) {}

  std::vector<std::thread> workers;
  std::vector<Signal> signals;      // of every thread; the first is not used
  std::atomic<uint32_t> active{0};  // workers that have not finished the current run
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  int64_t tasks = 0;
  void (*function)(void*, int64_t, int) = nullptr;
  void* argument = nullptr;

  void work(int thread) {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      function(argument, task, thread);
    }
  }

  void start(int thread) {
    signals[size_t(thread)].runs.fetch_add(1, std::memory_order_release);
    signals[size_t(thread)].runs.notify_one();
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads), state_(new State(threads)) {
  for (int thread = 1; thread < threads; thread++) {
    state_->workers.emplace_back([state = state_, thread] {
      FlushDenormals flush;
      uint32_t seen = 0;
      for (;;) {
        wait_change(state->signals[size_t(thread)].runs, seen++);
        if (state->stop.load(std::memory_order_acquire)) return;
        state->work(thread);
        if (state->active.fetch_sub(1, std::memory_order_acq_rel) == 1) state->active.notify_all();
      }
    });
  }
}

ThreadPool::~ThreadPool() {
  state_->stop = true;
  for (int thread = 1; thread < threads_; thread++) state_->start(thread);
  for (auto& worker : state_->workers) worker.join();
  delete state_;
}

void ThreadPool::run(int64_t tasks, void (*function)(void*, int64_t, int), void* argument) {
  if (threads_ == 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; task++) function(argument, task, 0);
    return;
  }
  State& s = *state_;
  s.tasks = tasks;
  s.function = function;
  s.argument = argument;
  s.next.store(0, std::memory_order_relaxed);
  const int participants = int(std::min<int64_t>(tasks, threads_));
  s.active.store(uint32_t(participants - 1), std::memory_order_relaxed);
  for (int thread = 1; thread < participants; thread++) s.start(thread);
  s.work(0);
  for (uint32_t active; (active = s.active.load(std::memory_order_acquire)) != 0;) wait_change(s.active, active);
}

Scratch::~Scratch() { free(memory_); }

void* Scratch::get(int64_t bytes) {
  if (bytes > bytes_) {
    free(memory_);
    bytes_ = (bytes + 4095) / 4096 * 4096;
    memory_ = aligned_alloc(4096, size_t(bytes_));
    if (!memory_) bytes_ = 0;
  }
  return memory_;
}

}  // namespace pn
