/*
 * The emulated CUDA device, seen from the driver functions (driver.cpp): memory, modules of PTX, kernels that run, what
 * they did wrong and what they cost. memory.cpp, ptx.cpp and executor.cpp implement it.
 */
#ifndef CUDA_EMULATOR_MACHINE_H
#define CUDA_EMULATOR_MACHINE_H

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "emulator_api.h"

namespace emulator {

struct Extent {
  uint32_t x = 1, y = 1, z = 1;
};

/* What a byte of memory is; kept for every byte of device, shared and local memory. */
enum ByteState : uint8_t {
  NO_MEMORY = 0,
  UNWRITTEN = 1, /* allocated, never written */
  WRITTEN = 3,
  FREED = 4,
  COPY_PENDING = 8 /* target of an asynchronous copy that nobody has waited for */
};

/*
 * Device memory: one reserved range of host addresses, so that a device address is a host address, a second range that
 * holds the ByteState of every byte, and two more for the blocks that accessed every word (see program.h). Addresses of
 * freed memory are handed out again only when the range is used up, so that a use after free is seen. The gap behind
 * every allocation is NO_MEMORY.
 */
class Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  /* 0: more than what is left of the capacity. `host`: page-locked host memory: it does not count, and what the host
   * writes into it is not seen, so that it counts as written. */
  uint64_t allocate(size_t bytes, bool host = false);
  /* False: not the address of a live allocation. */
  bool free(uint64_t address);
  /* Do these bytes lie within one live allocation? */
  bool contains(uint64_t address, size_t bytes) const;
  /* Does the address lie in the reserved range? */
  bool owns(uint64_t address) const { return address - base < size; }
  void mark_written(uint64_t address, size_t bytes);
  /* What was not written at the source is not written at the target. */
  void copy_states(uint64_t target, uint64_t source, size_t bytes);
  /* "16 bytes past the end of an allocation of 64 bytes" */
  std::string describe(uint64_t address) const;
  size_t in_use() const;
  void set_capacity(size_t bytes);
  size_t capacity() const;
  /* No word was accessed by any block. */
  void forget_accesses();

  uint64_t base = 0;
  size_t size = 0;
  ptrdiff_t to_state = 0;                 /* from the address of a byte to that of its state */
  ptrdiff_t to_writer = 0, to_reader = 0; /* from the address of a word to those of its tags */

 private:
  struct Block {
    size_t bytes;
    bool live, host;
  };
  mutable std::mutex mutex;
  std::map<uint64_t, Block> blocks; /* by address: live ones, and freed ones until their addresses are used again */
  uint64_t next = 0;
  size_t used = 0, limit = 0;

  void fill(uint64_t address, size_t bytes, ByteState state);
};

/* The first wrong thing that a kernel did. */
struct Fault {
  std::string kind;    /* "out of bounds", "misaligned", "use after free", "uninitialised read", "read before the
                          asynchronous copy was waited for", "shared-memory race", "race between blocks", ... */
  std::string kernel;  /* its name */
  std::string message; /* what was accessed, where it lies relative to the nearest allocation, by whom before */
  uint32_t line = 0;   /* line of the PTX text, from 1 */
  Extent block{0, 0, 0}, thread{0, 0, 0};

  std::string sentence() const;
};

using Counters = pnEmulatorCounters;

struct Kernel; /* decoded, owned by its Module; see program.h */

class Module {
 public:
  /* Null: the text is not PTX that this device runs; `error` says what and on which line. Variables are allocated in
   * `memory`, which must outlive the module. */
  static std::unique_ptr<Module> parse(std::string_view ptx, Memory& memory, std::string& error);
  explicit Module(Memory& device_memory);
  ~Module();
  Kernel* kernel(std::string_view name) const; /* null: there is none */

  std::string target;  /* "sm_70" */
  int ptx_version = 0; /* 78 for 7.8 */
  std::vector<std::unique_ptr<Kernel>> kernels;
  struct Variable {
    uint64_t address;
    size_t bytes;
  };
  std::map<std::string, Variable, std::less<>> variables; /* .global and .const */

 private:
  Memory& memory;
};

struct Launch {
  Extent grid, block;
  size_t dynamic_shared_bytes = 0;
  std::vector<uint8_t> parameters;
};

/* Runs a kernel to its end, thread blocks in parallel on the host's cores. False: it did something wrong, `fault` says
 * what. The result does not depend on the number of cores. */
bool run(Kernel& kernel, const Launch& launch, Memory& memory, Fault& fault);

}  // namespace emulator

#endif
