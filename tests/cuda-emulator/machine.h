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
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

struct Extent {
  uint32_t x = 1, y = 1, z = 1;
};

/* Device memory. Addresses are host addresses, 512-byte aligned. Keeps for every byte whether it was ever written. */
class Memory {
 public:
  explicit Memory(size_t capacity);
  ~Memory();
  /* Null: more than the capacity that is left. */
  uint64_t allocate(size_t bytes);
  /* False: not the address of a live allocation. Freed addresses are not handed out again soon, so that a use after
   * free is seen. */
  bool free(uint64_t address);
  /* Do these bytes lie within one live allocation? */
  bool contains(uint64_t address, size_t bytes) const;
  /* A host copy or a memset wrote these bytes. */
  void mark_written(uint64_t address, size_t bytes);
  /* A device-to-device copy: what was not written at the source is not written at the target. The bytes themselves are
   * the caller's. */
  void copy_marks(uint64_t target, uint64_t source, size_t bytes);
  size_t capacity() const;
  size_t in_use() const;
  size_t live_allocations() const;

  struct Implementation;
  std::unique_ptr<Implementation> implementation;
};

/* The first wrong thing that a kernel did. */
struct Fault {
  std::string kind;   /* "out of bounds", "misaligned", "use after free", "uninitialised read", "shared-memory race",
                         "barrier divergence", ... */
  std::string kernel; /* its name */
  std::string
      message;  /* one sentence: what was accessed, where it lies relative to the nearest allocation, by whom before */
  int line = 0; /* line of the PTX text, from 1 */
  Extent block{0, 0, 0}, thread{0, 0, 0};
};

/* What a kernel did since the counters were reset, summed over launches. A warp instruction counts once for its 32
 * lanes. */
struct Counters {
  uint64_t launches = 0, blocks = 0, threads = 0;
  uint64_t warp_instructions = 0, lane_instructions = 0;
  uint64_t fma_lanes = 0,
           mma_instructions = 0; /* float32 multiply-adds by lanes (add and mul count half); mma.sync by warps */
  uint64_t global_load_requests = 0, global_load_sectors = 0,
           global_load_bytes = 0; /* requests: warp instructions; sectors of 32 bytes */
  uint64_t global_store_requests = 0, global_store_sectors = 0,
           global_store_bytes = 0;                     /* bytes: asked for by active lanes */
  uint64_t shared_requests = 0, shared_wavefronts = 0; /* wavefronts - requests' least = bank conflicts */
  uint64_t shared_conflicts = 0;
  uint64_t barriers = 0, divergent_branches = 0, atomics = 0;
};

struct Kernel; /* parsed and decoded, owned by its Module */

class Module {
 public:
  /* Null: the text is not PTX that this device runs; `error` says what and on which line ("unknown instruction
   * 'foo.u32', line 12"). */
  static std::unique_ptr<Module> parse(std::string_view ptx, std::string& error);
  ~Module();
  Kernel* kernel(std::string_view name) const; /* null: there is none */
  std::vector<Kernel*> kernels() const;
  std::string target;  /* "sm_70" */
  int ptx_version = 0; /* 78 for 7.8 */

  struct Implementation;
  std::unique_ptr<Implementation> implementation;
};

struct KernelAttributes {
  std::string name;
  int static_shared_bytes = 0, local_bytes = 0, max_threads_per_block = 1024;
  int registers = 0; /* 32-bit virtual registers; what ptxas makes of them is another matter */
  std::vector<size_t> parameter_offsets, parameter_sizes;
};

const KernelAttributes& attributes_of(const Kernel&);
Counters& counters_of(Kernel&);

struct Launch {
  Extent grid, block;
  size_t dynamic_shared_bytes = 0;
  std::vector<uint8_t> parameters; /* packed at parameter_offsets */
};

/* Runs a kernel to its end, thread blocks in parallel on the host's cores. False: it did something wrong, `fault` says
 * what. */
bool run(Kernel& kernel, const Launch& launch, Memory& memory, Fault& fault);

}  // namespace emulator

#endif
