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

struct alignas(64) Share {
  std::atomic<uint32_t> runs{0};   // that the thread was to take part in
  std::atomic<uint64_t> tasks{0};  // that are left of the thread's share: first in the low half, end in the high half
};

uint64_t range(int64_t first, int64_t end) { return uint64_t(first) | uint64_t(end) << 32; }

// Takes the first task of a share, or the last one; -1: none is left.
int64_t take(std::atomic<uint64_t>& tasks, bool last) {
  uint64_t left = tasks.load(std::memory_order_relaxed);
  for (;;) {
    const int64_t first = int64_t(left & UINT32_MAX), end = int64_t(left >> 32);
    if (first >= end) return -1;
    if (tasks.compare_exchange_weak(left, last ? range(first, end - 1) : range(first + 1, end),
                                    std::memory_order_relaxed))
      return last ? end - 1 : first;
  }
}

}  // namespace

struct ThreadPool::State {
  explicit State(int threads) : shares(size_t(threads)) {}

  std::vector<std::thread> workers;
  std::vector<Share> shares;        // of every thread
  std::atomic<uint32_t> active{0};  // workers that have not finished the current run
  std::atomic<bool> stop{false};
  int participants = 0;
  void (*function)(void*, int64_t, int) = nullptr;
  void* argument = nullptr;

  void work(int thread) {
    for (int i = 0; i < participants; i++) {
      std::atomic<uint64_t>& tasks = shares[size_t((thread + i) % participants)].tasks;
      for (int64_t task; (task = take(tasks, i > 0)) >= 0;) function(argument, task, thread);
    }
  }

  void start(int thread) {
    shares[size_t(thread)].runs.fetch_add(1, std::memory_order_release);
    shares[size_t(thread)].runs.notify_one();
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads), state_(new State(threads)) {
  for (int thread = 1; thread < threads; thread++) {
    state_->workers.emplace_back([state = state_, thread] {
      FlushDenormals flush;
      uint32_t seen = 0;
      for (;;) {
        wait_change(state->shares[size_t(thread)].runs, seen++);
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
  s.function = function;
  s.argument = argument;
  const int participants = s.participants = int(std::min<int64_t>(tasks, threads_));
  for (int thread = 0; thread < participants; thread++)
    s.shares[size_t(thread)].tasks.store(range(thread * tasks / participants, (thread + 1) * tasks / participants),
                                         std::memory_order_relaxed);
  s.active.store(uint32_t(participants - 1), std::memory_order_relaxed);
  for (int thread = 1; thread < participants; thread++) s.start(thread);
  s.work(0);
  for (uint32_t active; (active = s.active.load(std::memory_order_acquire)) != 0;) wait_change(s.active, active);
}

Scratch::~Scratch() { free(memory_); }

void* Scratch::get(int64_t bytes) {
  if (bytes > bytes_ || !memory_) {
    free(memory_);
    bytes_ = bytes / 4096 * 4096 + 4096;  // for no bytes, too, there is memory: null says that there is none left
    memory_ = aligned_alloc(4096, size_t(bytes_));
    if (!memory_) bytes_ = 0;
  }
  return memory_;
}

}  // namespace pn
