/*
 * A decoded kernel and the state of what runs it. Plain data: warp.cpp is compiled once per instruction set of the host
 * and shares these structures with the rest.
 *
 * A warp's registers are one array of bytes. A 32-bit PTX register (and an 8- or 16-bit one, whose upper bits mean
 * nothing) is 32 lanes of 4 bytes, a 64-bit one 32 lanes of 8 bytes, a predicate a mask of 32 bits. Immediates, special
 * registers and the kernel's parameters have registers of their own that are filled before the warp starts, so that an
 * instruction knows only registers.
 *
 * Every basic block begins with a `block_start` instruction, which counts and which is where lanes that took different
 * ways come together again: a divergent branch pushes its two ways with the branch's immediate post-dominator, and a
 * way ends there.
 */
#ifndef CUDA_EMULATOR_PROGRAM_H
#define CUDA_EMULATOR_PROGRAM_H

#include "machine.h"

namespace emulator {

constexpr int LANES = 32;
constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr int MAX_WARPS = 32;

/* Where shared, local and parameter memory lie among the generic addresses; an address within a space is the offset
 * from there. Device memory lies far above. */
constexpr uint64_t SHARED_WINDOW = 0x01000000, LOCAL_WINDOW = 0x02000000, PARAMETER_WINDOW = 0x03000000,
                   WINDOW_BYTES = 0x01000000;

struct Instruction;
struct Warp;

/* Executes one instruction for the active lanes; the next instruction, or null: the warp stops (see Warp::state). */
using Handler = const Instruction* (*)(Warp&, const Instruction*);

constexpr int MAX_OPERANDS = 8;
constexpr uint32_t NEGATED = 1; /* in the offset of a predicate that is read */

struct alignas(64) Instruction {
  Handler run;
  uint32_t operand[MAX_OPERANDS]; /* offsets of registers, destinations first */
  int64_t immediate; /* memory access: added to the address; block_start: the block's index; others: as they define */
  union {
    const Instruction* target;   /* branch */
    const uint32_t* operands;    /* of instructions that have more */
    const Instruction** targets; /* indexed branch: as many as `immediate` says */
  };
  uint32_t line;
  uint32_t pattern; /* memory access: index of its Patterns; branch: index of its block */
};

/*
 * Shared-memory races. Every word (or byte) keeps who last wrote it and who last read it: tick << 12 | flags | thread.
 * The tick advances at every barrier and __syncwarp of the block, so an access was before the last barrier if its tick
 * is less than the barrier's. `other_reader` is the last one of another warp than `reader`'s.
 */
constexpr uint32_t TICK_SHIFT = 12, MANY_LANES = 1 << 10, ATOMIC = 1 << 11, THREAD_MASK = (1 << 10) - 1,
                   MAX_TICK = (1u << 20) - 1;

/*
 * Races between blocks, in device memory. Every word keeps which block last wrote it, and which one read it: number <<
 * BLOCK_SHIFT | flags. Blocks are numbered through all launches, so that an access was in an earlier launch, and is
 * over, if its tag is less than that of the launch's first block. Blocks run on several host threads, and whoever notes
 * an access does so without a lock: of two accesses at the very same time none may see the other. Accesses of less than
 * a word are not looked at.
 */
constexpr uint32_t BLOCK_SHIFT = 2, MANY_BLOCKS = 1, UPDATED = 2, /* by atomics */
    MAX_BLOCK = 1u << (31 - BLOCK_SHIFT);

/* How a memory instruction's addresses lie relative to each other: in a loop they mostly stay as they are, so that what
 * follows from them is worked out once. */
struct Pattern {
  uint64_t kernel;         /* Kernel::number: it is one of that kernel */
  int64_t relative[LANES]; /* to the first active lane */
  uint32_t mask;
  int32_t first; /* lane */
  int64_t low, high;
  bool aligned;    /* all `relative` are multiples of the access size */
  bool contiguous; /* all lanes are active and lane i's address is i access sizes past lane 0's */
  bool uniform;    /* all active lanes have the same address */
  bool shared;     /* some active lanes have the same address */
  uint8_t wavefronts;
  uint8_t sectors[32]; /* by the first address modulo 32; 0: not known yet */
  /* The accesses in order of their addresses, as stretches without gaps. */
  struct Run {
    int64_t start; /* relative to the first active lane */
    uint32_t bytes, word;
  } runs[LANES];
  uint32_t run_count;
  /* By 4-byte word of the runs: the lane that accesses it, with MANY_LANES if it is not the only one. */
  uint16_t owners[LANES * 4];
};

/* The patterns that an instruction had last: warps, and rounds of a loop, may take turns. */
struct Patterns {
  uint32_t latest;
  Pattern pattern[4];
};

/* What fills a register before a warp starts. */
struct Constant {
  enum Kind : uint8_t {
    VALUE,
    PARAMETER, /* `value` is an offset in the parameters */
    TID_X,
    TID_Y,
    TID_Z,
    NTID_X,
    NTID_Y,
    NTID_Z,
    CTAID_X,
    CTAID_Y,
    CTAID_Z,
    NCTAID_X,
    NCTAID_Y,
    NCTAID_Z,
    LANEID,
    WARPID,
    NWARPID,
    LANEMASK_EQ,
    LANEMASK_LE,
    LANEMASK_LT,
    LANEMASK_GE,
    LANEMASK_GT,
    DYNAMIC_SHARED_BYTES,
    TOTAL_SHARED_BYTES
  } kind;
  uint8_t bytes = 4;      /* of the register's lanes; 0: a predicate */
  uint8_t loaded = 0;     /* PARAMETER: bytes that are read */
  bool is_signed = false; /* PARAMETER: sign-extended */
  uint32_t offset = 0;    /* of the register */
  uint64_t value = 0;
};

/* What an instruction counts as, beside one instruction. */
enum Cost : uint8_t { PLAIN, FLOAT, MULTIPLY_ADD, MMA };

struct BlockCost {
  uint32_t instructions = 0, float_operations = 0, mma = 0;
};

/* A variable in shared or local memory. */
struct PlacedVariable {
  std::string name;
  uint32_t offset, bytes;
};

struct Kernel {
  std::string name;
  uint64_t number = 0; /* from 1, of all kernels that were ever decoded */
  std::vector<Instruction> code;
  std::vector<std::unique_ptr<uint32_t[]>> operand_lists;
  std::vector<std::unique_ptr<const Instruction*[]>> target_lists;
  std::vector<Constant> constants;
  std::vector<BlockCost> blocks;
  std::vector<PlacedVariable> shared_variables, local_variables;
  std::vector<size_t> parameter_offsets, parameter_sizes;
  size_t parameter_bytes = 0;
  uint32_t register_bytes = 0, patterns = 0;
  uint32_t shared_bytes = 0;        /* static, as PTX declares it */
  uint32_t shared_window_bytes = 0; /* static, with the gaps between variables */
  uint32_t local_bytes = 0;
  int max_threads = 1024;
  int register_count = 0;             /* 32-bit virtual registers that are live at a time, at most */
  bool small_shared_accesses = false; /* of less than 4 bytes: races are looked for by byte, not by word */
  bool serial = false; /* has atomics on global memory: blocks run in order, so that results are the same every run */
  bool has_run = false;
  Counters counters{};
};

/* Asynchronous copy of one warp instruction that has not been waited for. */
struct PendingCopy {
  uint32_t mask, bytes;
  uint32_t group[LANES]; /* the lane's count of committed groups when it was issued */
  uint32_t target[LANES];
  uint8_t data[LANES][16];
};

/* Lanes that go on at `at` once those above on the stack have come to theirs; they end at `end`. */
struct Way {
  const Instruction *at, *end;
  uint32_t lanes;
};

struct Worker;
struct Meetings;

struct Warp {
  uint8_t* registers;
  uint32_t active;        /* lanes that execute */
  uint32_t live;          /* lanes that have not exited */
  const Instruction* end; /* where the active lanes wait for the others of a divergent branch; null: nowhere */
  const Instruction* at;  /* where a stopped warp goes on */
  uint32_t unguarded;     /* the active lanes around a guarded instruction */
  uint32_t depth;
  enum : uint32_t { RUNNING, AT_BARRIER, EXITED } state;
  uint32_t barrier, barrier_threads; /* which it waits at; 0 threads: all of the block */
  const Instruction* barrier_instruction;
  uint32_t first_thread; /* linear index in the block */
  uint32_t index;
  uint32_t synchronised; /* tick of the last __syncwarp */
  Worker* worker;
  PendingCopy* copies;
  uint32_t copy_count, copy_capacity;
  uint32_t committed_groups[LANES];
  Way ways[2 * LANES + 8];
};

/* One host thread that runs thread blocks of one launch. */
struct Worker {
  const Kernel* kernel;
  const Launch* launch;
  const Memory* memory;
  uint64_t memory_base, memory_bytes;
  ptrdiff_t memory_to_state, memory_to_writer, memory_to_reader;
  /* Of the launch's first block, and the first and the current one of this block: a block has its tags one after
   * another. */
  uint32_t launch_tag, first_tag, tag;
  Meetings* meetings; /* of blocks that run in order; null: blocks cannot wait for each other */
  bool fenced;        /* what the block has stored is behind a fence */
  uint8_t *shared, *shared_state;
  uint32_t shared_bytes;
  uint32_t *writer, *reader, *other_reader;
  size_t tag_count;
  uint32_t tag_shift; /* of a shared address to the index of its tags */
  uint8_t *local, *local_state;
  uint32_t local_bytes;
  const uint8_t* parameters;
  uint32_t parameter_bytes;
  uint32_t tick, block_synchronised; /* tick of the last barrier of the block */
  Extent block;
  Warp* warps;
  uint32_t warp_count, thread_count;
  uint64_t *block_runs, *block_lanes;
  Patterns* patterns;
  Counters counters;
};

enum class Space : uint8_t { GLOBAL, SHARED, LOCAL, PARAMETER };
enum class Access : uint8_t { READ, WRITE, UPDATE };

/* What follows is not vectorised and is in executor.cpp. */

/* Throws. `lane` -1: the first active one. */
[[noreturn]] void fail(const Warp&, const Instruction*, int lane, const char* kind, const char* message);
/* Finds the lane whose access is wrong, and throws. `action`: "load", "store", ... */
[[noreturn]] void fail_access(const Warp&, const Instruction*, Space, const uint64_t* addresses, uint32_t bytes,
                              bool write, const char* action);
/* An access of `bytes` by `lane` at a shared address conflicts with the one in `tag`. */
[[noreturn]] void fail_race(const Warp&, const Instruction*, int lane, uint64_t address, uint32_t bytes,
                            const char* action, const char* earlier, uint32_t tag);
/* Other blocks have accessed some of these words of device memory in this launch: throws, unless that came before. */
void check_order(const Warp&, const Instruction*, const Pattern&, uint64_t first, uint32_t bytes, Access);
/* A fence of the whole device, and a word of device memory that is atomically updated behind one. */
void pass_fence(Worker&);
void meet(Worker&, uint64_t address);
const Pattern& learn_pattern(Patterns&, const uint64_t* addresses, const Warp&, uint32_t bytes);
uint32_t count_sectors(const Pattern&, uint64_t first_address);
PendingCopy& add_copy(Warp&);
/* The tick after this one, for a barrier or __syncwarp. */
uint32_t next_tick(Worker&);

/* All instructions that can be executed. `operands`: one letter for each, destinations first: r 32-bit, d 64-bit,
 * p predicate (as a source possibly negated). */
class InstructionTable {
 public:
  struct Entry {
    Handler run;
    std::string operands;
    Cost cost;
  };
  void add(const char* name, const char* operands, Handler run, Cost cost = PLAIN);
  const Entry* find(const std::string& name) const;

  std::map<std::string, Entry, std::less<>> entries;
};

/* Those of the host's instruction set. */
const InstructionTable& instruction_table();

namespace portable {
void define_instructions(InstructionTable&);
}
namespace avx2 {
void define_instructions(InstructionTable&);
}
namespace avx512 {
void define_instructions(InstructionTable&);
}

}  // namespace emulator

#endif
