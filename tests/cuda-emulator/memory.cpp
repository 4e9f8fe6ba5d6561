// Device memory: see Memory in machine.h.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "machine.h"

namespace emulator {
namespace {
constexpr size_t ALIGNMENT = 512, GAP = 512, PAGE = 4096;

void* reserve(size_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return address == MAP_FAILED ? nullptr : address;
}

// The bytes, their states, and the tags of writers and readers, which have four bytes for four.
constexpr size_t RANGES = 4;

void discard(uint64_t address, size_t bytes) { madvise(reinterpret_cast<void*>(address), bytes, MADV_DONTNEED); }
}  // namespace

Memory::Memory() {
  void* ranges = nullptr;
  for (size = size_t(64) << 30; !(ranges = reserve(RANGES * size)); size /= 2)
    if (size <= size_t(1) << 30) throw std::bad_alloc();
  base = next = reinterpret_cast<uint64_t>(ranges);
  to_state = ptrdiff_t(size);
  to_writer = 2 * to_state;
  to_reader = 3 * to_state;
}

Memory::~Memory() { munmap(reinterpret_cast<void*>(base), RANGES * size); }

void Memory::fill(uint64_t address, size_t bytes, ByteState state) {
  memset(reinterpret_cast<void*>(address + to_state), state, bytes);
}

uint64_t Memory::allocate(size_t bytes, bool host) {
  std::lock_guard lock(mutex);
  if (!host && (bytes > limit || used > limit - bytes)) return 0;
  const size_t span = (std::max<size_t>(bytes, 1) + GAP + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  for (int round = 0;; next = base, ++round) {
    // The first range of free addresses from `next` on; freed blocks in it are forgotten.
    while (next + span <= base + size) {
      auto block = blocks.upper_bound(next);
      if (block != blocks.begin() && std::prev(block)->first + std::prev(block)->second.bytes + GAP > next) --block;
      uint64_t end = 0;
      while (block != blocks.end() && block->first < next + span) {
        if (block->second.live) {
          end = block->first + block->second.bytes + GAP;
          break;
        }
        fill(block->first, block->second.bytes, NO_MEMORY);
        block = blocks.erase(block);
      }
      if (!end) {
        const uint64_t address = next;
        next += span;
        blocks[address] = {bytes, true, host};
        fill(address, bytes, host ? WRITTEN : UNWRITTEN);
        if (!host) used += bytes;
        return address;
      }
      next = (end + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    if (round == 1) return 0;
  }
}

bool Memory::free(uint64_t address) {
  std::lock_guard lock(mutex);
  const auto block = blocks.find(address);
  if (block == blocks.end() || !block->second.live) return false;
  block->second.live = false;
  if (!block->second.host) used -= block->second.bytes;
  fill(address, block->second.bytes, FREED);
  const uint64_t first = (address + PAGE - 1) / PAGE * PAGE, end = (address + block->second.bytes) / PAGE * PAGE;
  if (end > first)
    for (const ptrdiff_t range : {ptrdiff_t(0), to_writer, to_reader}) discard(first + uint64_t(range), end - first);
  return true;
}

bool Memory::contains(uint64_t address, size_t bytes) const {
  std::lock_guard lock(mutex);
  auto block = blocks.upper_bound(address);
  if (block == blocks.begin()) return false;
  --block;
  return block->second.live && bytes <= block->second.bytes && address - block->first <= block->second.bytes - bytes;
}

void Memory::mark_written(uint64_t address, size_t bytes) { fill(address, bytes, WRITTEN); }

void Memory::copy_states(uint64_t target, uint64_t source, size_t bytes) {
  memmove(reinterpret_cast<void*>(target + to_state), reinterpret_cast<void*>(source + to_state), bytes);
}

std::string Memory::describe(uint64_t address) const {
  std::lock_guard lock(mutex);
  const auto name = [](const Block& block) {
    return std::string(block.live ? "an allocation of " : "a freed allocation of ") + std::to_string(block.bytes) +
           " bytes";
  };
  if (address == 0) return "the null pointer";
  const auto after = blocks.upper_bound(address);
  if (after != blocks.begin()) {
    const auto& [start, block] = *std::prev(after);
    if (address < start + block.bytes) return std::to_string(address - start) + " bytes into " + name(block);
    const uint64_t past = address - start - block.bytes;
    if (after == blocks.end() || past <= after->first - address)
      return std::to_string(past) + " bytes past the end of " + name(block);
  }
  if (after != blocks.end() && owns(address))
    return std::to_string(after->first - address) + " bytes before " + name(after->second);
  return "far from every allocation";
}

void Memory::forget_accesses() { discard(base + uint64_t(to_writer), 2 * size); }

size_t Memory::in_use() const {
  std::lock_guard lock(mutex);
  return used;
}

size_t Memory::capacity() const {
  std::lock_guard lock(mutex);
  return limit;
}

void Memory::set_capacity(size_t bytes) {
  std::lock_guard lock(mutex);
  limit = bytes;
}

}  // namespace emulator
