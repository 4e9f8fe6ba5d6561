// Runs kernels: thread blocks on the host's threads, the warps of a block in turns from barrier to barrier.
#include <algorithm>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <thread>

#include "program.h"

namespace emulator {

// What the blocks of a kernel with atomics, which run in order, know of each other. A block that passes a fence and
// then updates a word tells what it did and what it knows to whoever updates that word later and then passes a fence
// ("the last block adds up what all have left"). What it does from then on counts as another block's, so that it gets a
// number of its own.
struct Meetings {
  std::vector<uint64_t> blocks;                /* by number, from the launch's first: the index of the block */
  std::map<uint64_t, std::set<uint32_t>> told; /* by the word's address: numbers */
  std::set<uint32_t> heard, known;             /* by this block: before and behind its fence */
};

namespace {

struct FaultException {
  Fault fault;
};

const char* const BLOCK_RACE = "race between blocks";

Extent thread_of(const Worker& k, uint32_t linear) {
  const Extent& block = k.launch->block;
  return {linear % block.x, linear / block.x % block.y, linear / (block.x * block.y)};
}

std::string text(const Extent& e) {
  return "(" + std::to_string(e.x) + "," + std::to_string(e.y) + "," + std::to_string(e.z) + ")";
}

// "4 bytes past the end of shared variable 'tile' of 1024 bytes"
std::string describe_variable(const std::vector<PlacedVariable>& variables, uint64_t address, const std::string& kind) {
  const PlacedVariable* before = nullptr;
  for (const PlacedVariable& v : variables)
    if (v.offset <= address) before = &v;
  if (!before) return "at offset " + std::to_string(int64_t(address)) + " of " + kind + " memory";
  const uint64_t end = before->offset + before->bytes;
  return (address < end ? std::to_string(address - before->offset) + " bytes into "
                        : std::to_string(address - end) + " bytes past the end of ") +
         kind + " variable '" + before->name + "' of " + std::to_string(before->bytes) + " bytes";
}

std::string describe_shared(const Worker& k, uint64_t address) {
  const uint32_t dynamic = k.kernel->shared_window_bytes;
  if (k.launch->dynamic_shared_bytes == 0 || address < dynamic)
    return describe_variable(k.kernel->shared_variables, address, "shared");
  const uint64_t offset = address - dynamic, bytes = k.launch->dynamic_shared_bytes;
  const std::string memory = "the dynamic shared memory of " + std::to_string(bytes) + " bytes";
  return offset < bytes ? std::to_string(offset) + " bytes into " + memory
                        : std::to_string(offset - bytes) + " bytes past the end of " + memory;
}

// --- Host threads ---

// Calls a function on all threads at once; they sleep in between.
class ThreadPool {
 public:
  explicit ThreadPool(unsigned count) {
    for (unsigned t = 1; t < count; ++t) threads.emplace_back([this, t] { work(t); });
  }
  ~ThreadPool() {
    {
      std::lock_guard lock(mutex);
      stopping = true;
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }
  unsigned size() const { return unsigned(threads.size()) + 1; }
  // f(thread) on the first `count` threads.
  void run(unsigned count, const std::function<void(unsigned)>& f) {
    if (count > 1) {
      std::lock_guard lock(mutex);
      job = &f;
      wanted = count;
      left = count - 1;
      ++round;
    }
    if (count > 1) wake.notify_all();
    f(0);
    if (count == 1) return;
    std::unique_lock lock(mutex);
    done.wait(lock, [&] { return left == 0; });
  }

 private:
  std::mutex mutex;
  std::condition_variable wake, done;
  std::vector<std::thread> threads;
  const std::function<void(unsigned)>* job = nullptr;
  unsigned wanted = 0, left = 0;
  uint64_t round = 0;
  bool stopping = false;

  void work(unsigned thread) {
    for (uint64_t seen = 0;;) {
      const std::function<void(unsigned)>* f;
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [&] { return stopping || (round != seen && thread < wanted); });
        if (stopping) return;
        seen = round;
        f = job;
      }
      (*f)(thread);
      std::lock_guard lock(mutex);
      if (--left == 0) done.notify_one();
    }
  }
};

ThreadPool& threads() {
  static ThreadPool pool([] {
    const char* const wanted = getenv("PERTURBNAS_EMULATOR_THREADS");
    const int count = wanted ? atoi(wanted) : int(std::thread::hardware_concurrency());
    return unsigned(std::clamp(count, 1, 256));
  }());
  return pool;
}

// --- One thread's state, kept from launch to launch ---

struct Aligned {
  void* data = nullptr;
  size_t bytes = 0;
  Aligned() = default;
  Aligned(const Aligned&) = delete;
  ~Aligned() { std::free(data); }
  // At least that many bytes. Zeros when it grows, else what was there.
  template <class T>
  T* get(size_t count) {
    const size_t wanted = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (wanted > bytes) {
      std::free(data);
      data = aligned_alloc(4096, wanted);
      if (!data) throw std::bad_alloc();
      bytes = wanted;
      memset(data, 0, bytes);
    }
    return static_cast<T*>(data);
  }
};

struct WorkerMemory {
  Aligned registers, warps, shared, shared_state, writer, reader, other_reader, local, local_state, block_runs,
      block_lanes, patterns;
  Worker worker{};
  uint32_t warps_made = 0;

  ~WorkerMemory() {
    for (uint32_t w = 0; w < warps_made; ++w) std::free(static_cast<Warp*>(warps.data)[w].copies);
  }
};

uint64_t lane_value(const Worker& k, const Constant& c, uint32_t first_thread, int lane) {
  const Extent thread = thread_of(k, first_thread + lane), &block = k.launch->block, &grid = k.launch->grid;
  switch (c.kind) {
    case Constant::VALUE:
      return c.value;
    case Constant::PARAMETER: {
      uint64_t value = 0;
      memcpy(&value, k.parameters + c.value, c.loaded);
      const int unused = 64 - c.loaded * 8;
      return c.is_signed ? uint64_t(int64_t(value << unused) >> unused) : value;
    }
    case Constant::TID_X:
      return thread.x;
    case Constant::TID_Y:
      return thread.y;
    case Constant::TID_Z:
      return thread.z;
    case Constant::NTID_X:
      return block.x;
    case Constant::NTID_Y:
      return block.y;
    case Constant::NTID_Z:
      return block.z;
    case Constant::CTAID_X:
      return k.block.x;
    case Constant::CTAID_Y:
      return k.block.y;
    case Constant::CTAID_Z:
      return k.block.z;
    case Constant::NCTAID_X:
      return grid.x;
    case Constant::NCTAID_Y:
      return grid.y;
    case Constant::NCTAID_Z:
      return grid.z;
    case Constant::LANEID:
      return uint64_t(lane);
    case Constant::WARPID:
      return first_thread / LANES;
    case Constant::NWARPID:
      return k.warp_count;
    case Constant::LANEMASK_EQ:
      return 1u << lane;
    case Constant::LANEMASK_LE:
      return (2u << lane) - 1;
    case Constant::LANEMASK_LT:
      return (1u << lane) - 1;
    case Constant::LANEMASK_GE:
      return uint32_t(~((1u << lane) - 1));
    case Constant::LANEMASK_GT:
      return uint32_t(~((2u << lane) - 1));
    case Constant::DYNAMIC_SHARED_BYTES:
      return k.launch->dynamic_shared_bytes;
    case Constant::TOTAL_SHARED_BYTES:
      return k.kernel->shared_bytes + k.launch->dynamic_shared_bytes;
  }
  return 0;
}

void fill_constant(const Worker& k, Warp& w, const Constant& c) {
  uint8_t* const at = w.registers + c.offset;
  if (c.bytes == 0) {
    *reinterpret_cast<uint32_t*>(at) = uint32_t(c.value);
    return;
  }
  const bool by_lane = (c.kind >= Constant::TID_X && c.kind <= Constant::TID_Z) || c.kind == Constant::LANEID ||
                       (c.kind >= Constant::LANEMASK_EQ && c.kind <= Constant::LANEMASK_GT);
  uint64_t value = lane_value(k, c, w.first_thread, 0);
  for (int lane = 0; lane < LANES; ++lane) {
    if (by_lane) value = lane_value(k, c, w.first_thread, lane);
    if (c.bytes == 8)
      reinterpret_cast<uint64_t*>(at)[lane] = value;
    else
      reinterpret_cast<uint32_t*>(at)[lane] = uint32_t(value);
  }
}

bool depends_on_block(const Constant& c) {
  return c.kind == Constant::CTAID_X || c.kind == Constant::CTAID_Y || c.kind == Constant::CTAID_Z;
}

void prepare(WorkerMemory& m, const Kernel& kernel, const Launch& launch, const Memory& memory) {
  Worker& k = m.worker;
  k.kernel = &kernel;
  k.launch = &launch;
  k.memory = &memory;
  k.memory_base = memory.base;
  k.memory_bytes = memory.size;
  k.memory_to_state = memory.to_state;
  k.memory_to_writer = memory.to_writer;
  k.memory_to_reader = memory.to_reader;
  k.thread_count = launch.block.x * launch.block.y * launch.block.z;
  k.warp_count = (k.thread_count + LANES - 1) / LANES;
  // Vector loops may touch up to a warp's accesses.
  k.shared_bytes = kernel.shared_window_bytes + uint32_t(launch.dynamic_shared_bytes);
  k.shared = m.shared.get<uint8_t>(k.shared_bytes + 512);
  k.shared_state = m.shared_state.get<uint8_t>(k.shared_bytes + 512);
  const uint32_t shift = kernel.small_shared_accesses ? 0 : 2;
  const size_t tags = (k.shared_bytes >> shift) + 512;
  k.tag_count = std::max(tags, k.tag_count);
  k.writer = m.writer.get<uint32_t>(tags);
  k.reader = m.reader.get<uint32_t>(tags);
  k.other_reader = m.other_reader.get<uint32_t>(tags);
  k.tag_shift = shift;
  k.local_bytes = kernel.local_bytes;
  k.local = m.local.get<uint8_t>(size_t(k.local_bytes) * k.thread_count);
  k.local_state = m.local_state.get<uint8_t>(size_t(k.local_bytes) * k.thread_count);
  k.parameters = launch.parameters.data();
  k.parameter_bytes = uint32_t(launch.parameters.size());
  k.block_runs = m.block_runs.get<uint64_t>(kernel.blocks.size());
  k.block_lanes = m.block_lanes.get<uint64_t>(kernel.blocks.size());
  memset(k.block_runs, 0, kernel.blocks.size() * sizeof(uint64_t));
  memset(k.block_lanes, 0, kernel.blocks.size() * sizeof(uint64_t));
  k.patterns = m.patterns.get<Patterns>(kernel.patterns);
  k.counters = {};
  k.warps = m.warps.get<Warp>(MAX_WARPS);
  m.warps_made = MAX_WARPS;
  uint8_t* const registers = m.registers.get<uint8_t>(size_t(kernel.register_bytes) * k.warp_count);
  for (uint32_t index = 0; index < k.warp_count; ++index) {
    Warp& w = k.warps[index];
    w.registers = registers + size_t(kernel.register_bytes) * index;
    w.first_thread = index * LANES;
    w.index = index;
    w.worker = &k;
    for (const Constant& c : kernel.constants) fill_constant(k, w, c);
  }
}

void set_states(uint8_t* states, const std::vector<PlacedVariable>& variables) {
  for (const PlacedVariable& v : variables) memset(states + v.offset, UNWRITTEN, v.bytes);
}

// --- A thread block ---

Extent block_at(const Launch& launch, uint64_t index) {
  const Extent& grid = launch.grid;
  return {uint32_t(index % grid.x), uint32_t(index / grid.x % grid.y), uint32_t(index / grid.x / grid.y)};
}

// The block begins, or goes on, under a new number.
void take_number(Worker& k, uint64_t index) {
  k.tag = k.launch_tag + (uint32_t(k.meetings->blocks.size()) << BLOCK_SHIFT);
  k.meetings->blocks.push_back(index);
}

void start_block(Worker& k, uint64_t index) {
  k.block = block_at(*k.launch, index);
  k.fenced = false;
  if (k.meetings) {
    take_number(k, index);
    k.meetings->heard.clear();
    k.meetings->known.clear();
  } else {
    k.tag = k.launch_tag + (uint32_t(index) << BLOCK_SHIFT);
  }
  k.first_tag = k.tag;
  const Kernel& kernel = *k.kernel;
  memset(k.shared_state, NO_MEMORY, kernel.shared_window_bytes);
  set_states(k.shared_state, kernel.shared_variables);
  memset(k.shared_state + kernel.shared_window_bytes, UNWRITTEN, k.launch->dynamic_shared_bytes);
  if (k.local_bytes) {
    memset(k.local_state, NO_MEMORY, size_t(k.local_bytes) * k.thread_count);
    for (uint32_t t = 0; t < k.thread_count; ++t)
      set_states(k.local_state + size_t(t) * k.local_bytes, kernel.local_variables);
  }
  k.block_synchronised = next_tick(k);
  for (uint32_t index = 0; index < k.warp_count; ++index) {
    Warp& w = k.warps[index];
    for (const Constant& c : kernel.constants)
      if (depends_on_block(c)) fill_constant(k, w, c);
    const uint32_t present = k.thread_count - w.first_thread;
    w.live = w.active = present >= LANES ? ALL_LANES : (1u << present) - 1;
    w.end = nullptr;
    w.at = kernel.code.data();
    w.depth = 0;
    w.state = Warp::RUNNING;
    w.synchronised = k.block_synchronised;
    w.copy_count = 0;
    memset(w.committed_groups, 0, sizeof w.committed_groups);
  }
}

// Some warps wait at barriers and none can go on.
[[noreturn]] void fail_barrier(const Worker& k, const Warp& waiting) {
  for (uint32_t index = 0; index < k.warp_count; ++index) {
    const Warp& other = k.warps[index];
    const std::string warp = "threads " + std::to_string(other.first_thread) + ".." +
                             std::to_string(std::min(other.first_thread + LANES, k.thread_count) - 1);
    if (other.state == Warp::EXITED)
      fail(waiting, waiting.barrier_instruction, -1, "barrier divergence",
           ("a barrier is waited at while " + warp + " of the block have exited").c_str());
    if (other.state == Warp::AT_BARRIER && other.barrier_instruction != waiting.barrier_instruction)
      fail(waiting, waiting.barrier_instruction, -1, "barrier divergence",
           ("a barrier is waited at while " + warp + " of the block wait at the one in line " +
            std::to_string(other.barrier_instruction->line))
               .c_str());
  }
  fail(waiting, waiting.barrier_instruction, -1, "barrier divergence",
       ("a barrier for " + std::to_string(waiting.barrier_threads) + " threads is waited at by fewer").c_str());
}

// Lets the warps go that wait at complete barriers. False: there are none.
bool release_barriers(Worker& k) {
  bool released = false;
  for (uint32_t index = 0; index < k.warp_count; ++index) {
    Warp& first = k.warps[index];
    if (first.state != Warp::AT_BARRIER) continue;
    uint32_t arrived = 0;
    const uint32_t expected = first.barrier_threads ? first.barrier_threads : k.warp_count * LANES;
    for (uint32_t other = index; other < k.warp_count; ++other) {
      const Warp& w = k.warps[other];
      if (w.state != Warp::AT_BARRIER || w.barrier != first.barrier) continue;
      if (w.barrier_instruction != first.barrier_instruction && !first.barrier_threads) fail_barrier(k, first);
      arrived += LANES;
    }
    if (arrived != expected) continue;
    // A barrier of part of the block counts as one of the whole: what its threads did not do is not told apart.
    k.block_synchronised = next_tick(k);
    for (uint32_t other = 0; other < k.warp_count; ++other) {
      Warp& w = k.warps[other];
      w.synchronised = k.block_synchronised;
      if (other >= index && w.state == Warp::AT_BARRIER && w.barrier == first.barrier) w.state = Warp::RUNNING;
    }
    k.counters.barriers += 1;
    released = true;
  }
  return released;
}

void run_warp(Warp& w) {
  const Instruction* i = w.at;
  while (i) i = i->run(w, i);
}

void run_block(Worker& k, uint64_t index) {
  start_block(k, index);
  for (;;) {
    Warp* waiting = nullptr;
    for (uint32_t w = 0; w < k.warp_count; ++w) {
      if (k.warps[w].state == Warp::RUNNING) run_warp(k.warps[w]);
      if (k.warps[w].state == Warp::AT_BARRIER && !waiting) waiting = &k.warps[w];
    }
    if (!waiting) return;
    if (!release_barriers(k)) fail_barrier(k, *waiting);
  }
}

void add_counters(Kernel& kernel, const Worker& k) {
  Counters& sum = kernel.counters;
  static_assert(sizeof(Counters) % sizeof(uint64_t) == 0);
  const auto* const from = reinterpret_cast<const uint64_t*>(&k.counters);
  auto* const to = reinterpret_cast<uint64_t*>(&sum);
  for (size_t c = 0; c < sizeof(Counters) / sizeof(uint64_t); ++c) to[c] += from[c];
  for (size_t b = 0; b < kernel.blocks.size(); ++b) {
    const BlockCost& cost = kernel.blocks[b];
    sum.warp_instructions += cost.instructions * k.block_runs[b];
    sum.lane_instructions += cost.instructions * k.block_lanes[b];
    sum.float_operations += cost.float_operations * k.block_lanes[b];
    sum.mma_instructions += cost.mma * k.block_runs[b];
  }
}

}  // namespace

std::string Fault::sentence() const {
  return kind + ": " + message + " (kernel '" + kernel + "', PTX line " + std::to_string(line) + ", block " +
         text(block) + ", thread " + text(thread) + ")";
}

// --- What the instructions use ---

void fail(const Warp& w, const Instruction* i, int lane, const char* kind, const char* message) {
  const Worker& k = *w.worker;
  if (lane < 0) lane = w.active ? std::countr_zero(w.active) : 0;
  throw FaultException{{kind, k.kernel->name, message, i->line, k.block, thread_of(k, w.first_thread + lane)}};
}

void fail_access(const Warp& w, const Instruction* i, Space space, const uint64_t* addresses, uint32_t bytes,
                 bool write, const char* action) {
  const Worker& k = *w.worker;
  const char* const names[] = {"global", "shared", "local", "parameter"};
  const std::string what = std::string(names[int(space)]) + " " + action + " of " + std::to_string(bytes) + " bytes";
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const uint64_t address = addresses[lane] + uint64_t(i->immediate);
    const uint8_t* states = nullptr;
    uint64_t size = 0, offset = address;
    std::string place;
    switch (space) {
      case Space::GLOBAL:
        states = reinterpret_cast<const uint8_t*>(k.memory_base + k.memory_to_state);
        size = k.memory_bytes;
        offset = address - k.memory_base;
        break;
      case Space::SHARED:
        states = k.shared_state;
        size = k.shared_bytes;
        break;
      case Space::LOCAL:
        states = k.local_state + size_t(w.first_thread + lane) * k.local_bytes;
        size = k.local_bytes;
        break;
      case Space::PARAMETER:
        size = k.parameter_bytes;
        break;
    }
    const auto describe = [&](uint64_t at) {
      return space == Space::GLOBAL   ? k.memory->describe(at)
             : space == Space::SHARED ? describe_shared(k, at)
             : space == Space::LOCAL  ? describe_variable(k.kernel->local_variables, at, "local")
                                      : "at offset " + std::to_string(int64_t(at)) + " of " +
                                           std::to_string(k.parameter_bytes) + " bytes of parameters";
    };
    const auto report = [&](const char* kind, uint64_t at, const char* more = "") {
      char hexadecimal[24];
      snprintf(hexadecimal, sizeof hexadecimal, "0x%llx", static_cast<unsigned long long>(address));
      fail(w, i, lane, kind, (what + " at " + hexadecimal + more + ", " + describe(at)).c_str());
    };
    if (address % bytes) report("misaligned", address);
    if (offset >= size || offset + bytes > size) report("out of bounds", address);
    if (!states) continue;
    for (uint32_t byte = 0; byte < bytes; ++byte) {
      const uint8_t state = states[offset + byte];
      if (state == NO_MEMORY) report("out of bounds", address + byte);
      if (state == FREED) report("use after free", address + byte);
      if (state == COPY_PENDING)
        report("asynchronous copy", address + byte, ", where an asynchronous copy has not been waited for");
      if (!write && state == UNWRITTEN)
        report("uninitialised read", address + byte,
               space == Space::SHARED ? ", which no thread has written yet" : ", whose bytes were never written");
    }
  }
  fail(w, i, -1, "out of bounds", (what + " whose addresses lie too far apart").c_str());
}

void fail_race(const Warp& w, const Instruction* i, int lane, uint64_t address, uint32_t bytes, const char* action,
               const char* earlier, uint32_t tag) {
  const Worker& k = *w.worker;
  const uint32_t thread = tag & THREAD_MASK;
  const bool same_warp = thread / LANES == w.index;
  const std::string who = tag & MANY_LANES ? "several threads of its warp" : "thread " + text(thread_of(k, thread));
  fail(w, i, lane, "shared-memory race",
       ("the thread " + std::string(action) + " " + std::to_string(bytes) + " bytes " + describe_shared(k, address) +
        ", which " + who + " " + earlier + " with no " + (same_warp ? "__syncwarp or barrier" : "barrier") +
        " in between")
           .c_str());
}

void pass_fence(Worker& k) {
  k.fenced = true;
  if (k.meetings) k.meetings->known.merge(k.meetings->heard);
}

void meet(Worker& k, uint64_t address) {
  Meetings& m = *k.meetings;
  std::set<uint32_t>& told = m.told[address];
  m.heard.insert(told.begin(), told.end());
  if (!k.fenced) return;
  const uint32_t own = (k.tag - k.launch_tag) >> BLOCK_SHIFT;
  m.known.insert(own);
  told.insert(m.known.begin(), m.known.end());
  take_number(k, m.blocks[own]);
}

// Has the block heard of what is in another's tag? Where several blocks have accessed the word, it must have heard of
// all that ran before it.
bool is_known(const Worker& k, uint32_t tag) {
  if (!k.meetings) return false;
  const Meetings& m = *k.meetings;
  if (!(tag & MANY_BLOCKS)) return m.known.contains((tag - k.launch_tag) >> BLOCK_SHIFT);
  const uint64_t block = m.blocks.back();
  std::set<uint64_t> known{block};
  for (const uint32_t number : m.known) known.insert(m.blocks[number]);
  return known.size() == block + 1;
}

void check_order(const Warp& w, const Instruction* i, const Pattern& p, uint64_t first, uint32_t bytes, Access access) {
  const Worker& k = *w.worker;
  const auto check = [&](int lane, uint64_t address, uint32_t tag, const char* earlier) {
    const bool is_own = tag >= k.first_tag && tag >> BLOCK_SHIFT <= k.tag >> BLOCK_SHIFT && !(tag & MANY_BLOCKS);
    if (tag < k.launch_tag || is_own || is_known(k, tag)) return;
    const uint32_t number = (tag - k.launch_tag) >> BLOCK_SHIFT;
    const std::string who =
        tag & MANY_BLOCKS ? "several blocks"
                          : "block " + text(block_at(*k.launch, k.meetings ? k.meetings->blocks[number] : number));
    const char* const actions[] = {"reads", "writes", "updates"};
    fail(w, i, lane, BLOCK_RACE,
         (std::string("the thread ") + actions[int(access)] + " " + std::to_string(bytes) + " bytes " +
          k.memory->describe(address) + ", which " + who + " " + earlier + " in the same launch")
             .c_str());
  };
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const uint64_t start = first + uint64_t(p.relative[lane]);
    for (uint64_t address = start; address < start + bytes; address += 4) {
      const auto tag = [&](ptrdiff_t to_tag) { return *reinterpret_cast<const uint32_t*>(address + uint64_t(to_tag)); };
      const uint32_t writer = tag(k.memory_to_writer);
      if (access != Access::UPDATE || !(writer & UPDATED))
        check(lane, start, writer, writer & UPDATED ? "updated" : "wrote");
      if (access != Access::READ) check(lane, start, tag(k.memory_to_reader), "read");
    }
  }
}

const Pattern& learn_pattern(Patterns& patterns, const uint64_t* addresses, const Warp& w, uint32_t bytes) {
  patterns.latest = (patterns.latest + 1) % 4;
  Pattern& p = patterns.pattern[patterns.latest];
  const uint32_t active = w.active;
  p.kernel = w.worker->kernel->number;
  p.mask = active;
  p.first = std::countr_zero(active);
  p.low = p.high = 0;
  p.aligned = p.uniform = true;
  p.contiguous = active == ALL_LANES;
  memset(p.sectors, 0, sizeof p.sectors);
  for (int lane = 0; lane < LANES; ++lane) {
    if (!(active >> lane & 1)) {
      p.relative[lane] = 0;
      continue;
    }
    const int64_t relative = int64_t(addresses[lane] - addresses[p.first]);
    p.relative[lane] = relative;
    p.low = std::min(p.low, relative);
    p.high = std::max(p.high, relative);
    p.aligned &= (relative & (bytes - 1)) == 0;
    p.uniform &= relative == 0;
    p.contiguous &= relative == lane * int64_t(bytes);
  }
  p.run_count = 0;
  // Too far apart for one memory: not aligned, so that each lane is looked at.
  if (p.low < -(int64_t(1) << 40) || p.high > int64_t(1) << 40) {
    p.aligned = false;
    return p;
  }
  // The lanes in the order of their addresses, mostly their own.
  int order[LANES], count = 0;
  for (uint32_t m = active; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    int at = count++;
    for (; at > 0 && p.relative[order[at - 1]] > p.relative[lane]; --at) order[at] = order[at - 1];
    order[at] = lane;
  }
  // Stretches of addresses.
  const uint32_t words = bytes / 4;
  uint32_t word = 0;
  p.shared = false;
  for (int c = 0; c < count; ++c) {
    const int64_t start = p.relative[order[c]];
    if (c && start == p.relative[order[c - 1]]) {
      p.shared = true;
      for (uint32_t k = 1; k <= words; ++k) p.owners[word - k] |= MANY_LANES;
      continue;
    }
    if (p.run_count && p.runs[p.run_count - 1].start + p.runs[p.run_count - 1].bytes == start)
      p.runs[p.run_count - 1].bytes += bytes;
    else
      p.runs[p.run_count++] = {start, bytes, word};
    for (uint32_t k = 0; k < words; ++k) p.owners[word++] = uint16_t(order[c]);
  }
  // Shared memory: groups of lanes that together ask for at most 128 bytes take as many passes as the fullest bank has
  // different words.
  const int group = bytes <= 4 ? LANES : 128 / int(bytes);
  p.wavefronts = 0;
  for (int start = 0; start < LANES; start += group) {
    uint32_t per_bank[32] = {}, most = 0;
    int64_t latest = INT64_MIN;
    for (int c = 0; c < count; ++c) {
      if (order[c] < start || order[c] >= start + group) continue;
      const int64_t first = p.relative[order[c]] >> 2;
      if (first == latest) continue;
      latest = first;
      for (uint32_t k = 0; k < std::max(words, 1u); ++k) most = std::max(most, ++per_bank[(first + k) & 31]);
    }
    p.wavefronts += uint8_t(most);
  }
  return p;
}

uint32_t count_sectors(const Pattern& p, uint64_t first_address) {
  uint32_t count = 0;
  uint64_t latest = 0;
  for (uint32_t r = 0; r < p.run_count; ++r) {
    const uint64_t start = first_address + uint64_t(p.runs[r].start), from = std::max(start / 32, latest);
    const uint64_t end = (start + p.runs[r].bytes - 1) / 32 + 1;
    count += uint32_t(end - std::min(from, end));
    latest = end;
  }
  return count;
}

PendingCopy& add_copy(Warp& w) {
  if (w.copy_count == w.copy_capacity) {
    w.copy_capacity = std::max(16u, w.copy_capacity * 2);
    w.copies =
        static_cast<PendingCopy*>(std::realloc(static_cast<void*>(w.copies), w.copy_capacity * sizeof(PendingCopy)));
    if (!w.copies) throw std::bad_alloc();
  }
  return w.copies[w.copy_count++];
}

uint32_t next_tick(Worker& k) {
  if (k.tick == MAX_TICK) { /* start anew: accesses so far are forgotten */
    for (uint32_t* tag : {k.writer, k.reader, k.other_reader}) memset(tag, 0, k.tag_count * sizeof(uint32_t));
    k.tick = 1;
    k.block_synchronised = 1;
    for (uint32_t index = 0; index < k.warp_count; ++index) k.warps[index].synchronised = 1;
  }
  return ++k.tick;
}

void InstructionTable::add(const char* name, const char* operands, Handler run, Cost cost) {
  entries[name] = {run, operands, cost};
}

const InstructionTable::Entry* InstructionTable::find(const std::string& name) const {
  const auto found = entries.find(name);
  return found == entries.end() ? nullptr : &found->second;
}

const InstructionTable& instruction_table() {
  static const InstructionTable table = [] {
    InstructionTable t;
    const char* const wanted = getenv("PERTURBNAS_EMULATOR_ISA");
    const std::string isa = wanted ? wanted : "";
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (has_avx512 && (isa.empty() || isa == "avx512"))
      avx512::define_instructions(t);
    else if (has_avx2 && isa != "portable")
      avx2::define_instructions(t);
    else
#endif
      portable::define_instructions(t);
    return t;
  }();
  return table;
}

namespace {

// Runs all blocks on `count` host threads. False: one did something wrong, `fault` says what the first one did.
bool run_blocks(Kernel& kernel, const Launch& launch, Memory& memory, unsigned count, Fault& fault) {
  static std::vector<std::unique_ptr<WorkerMemory>> workers;
  static uint32_t next_number = 1; /* of a block, through all launches */
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  while (workers.size() < count) workers.push_back(std::make_unique<WorkerMemory>());
  if (next_number + blocks > MAX_BLOCK) {
    memory.forget_accesses();
    next_number = 1;
  }
  Meetings meetings;
  std::atomic<uint64_t> next_block = 0, faulty_block = ~uint64_t(0);
  std::vector<Fault> faults(count);
  std::vector<uint64_t> fault_blocks(count, ~uint64_t(0));
  threads().run(count, [&](unsigned thread) {
    WorkerMemory& m = *workers[thread];
    prepare(m, kernel, launch, memory);
    m.worker.launch_tag = next_number << BLOCK_SHIFT;
    m.worker.meetings = kernel.serial ? &meetings : nullptr;
    // Blocks before a faulty one run to their end, so that the first fault is found whatever the number of threads.
    for (uint64_t block; (block = next_block.fetch_add(1)) < blocks && block < faulty_block.load();) {
      try {
        run_block(m.worker, block);
      } catch (FaultException& e) {
        faults[thread] = std::move(e.fault);
        fault_blocks[thread] = block;
        for (uint64_t least = faulty_block.load();
             block < least && !faulty_block.compare_exchange_weak(least, block);) {
        }
        break;
      }
    }
  });
  next_number += uint32_t(kernel.serial ? meetings.blocks.size() : blocks);
  kernel.counters.launches += 1;
  kernel.counters.blocks += blocks;
  kernel.counters.threads += blocks * launch.block.x * launch.block.y * launch.block.z;
  for (unsigned thread = 0; thread < count; ++thread) add_counters(kernel, workers[thread]->worker);
  if (faulty_block.load() == ~uint64_t(0)) return true;
  fault = faults[std::find(fault_blocks.begin(), fault_blocks.end(), faulty_block.load()) - fault_blocks.begin()];
  return false;
}

}  // namespace

bool run(Kernel& kernel, const Launch& launch, Memory& memory, Fault& fault) {
  static std::mutex one_at_a_time;
  std::lock_guard lock(one_at_a_time);
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  // Blocks that access a word at the same moment may both miss that it is a race. In order, as they run the first time,
  // they miss nothing.
  const bool in_parallel = kernel.has_run && !kernel.serial;
  kernel.has_run = true;
  const unsigned count = in_parallel ? unsigned(std::min<uint64_t>(threads().size(), blocks)) : 1;
  if (run_blocks(kernel, launch, memory, count, fault)) return true;
  // Which of two blocks came second is chance: in order it is the same one every time.
  Fault in_order;
  if (count > 1 && fault.kind == BLOCK_RACE && !run_blocks(kernel, launch, memory, 1, in_order) &&
      in_order.kind == BLOCK_RACE)
    fault = in_order;
  return false;
}

}  // namespace emulator
