/*
 * What the emulated libcuda.so.1 exports beside the driver functions.
 *
 * Environment variables, read by cuInit:
 *   PERTURBNAS_EMULATOR_MEMORY_MIB  device memory in MiB (default 4096)
 *   PERTURBNAS_EMULATOR_LOSE_AFTER  the device is lost after so many kernel launches
 *   PERTURBNAS_EMULATOR_THREADS     host threads that run thread blocks (default: one per core)
 *   PERTURBNAS_EMULATOR_ISA         portable, avx2 or avx512 (default: the widest that the host has)
 *   PERTURBNAS_EMULATOR_CAPABILITY  compute capability, 70 or 80 (default) or higher
 *   PERTURBNAS_EMULATOR_DRIVER      what cuDriverGetVersion says, such as 11080 (default); newer PTX than that driver's
 * is refused PERTURBNAS_EMULATOR_DEVICES     0: cuInit finds no device
 */
#ifndef CUDA_EMULATOR_API_H
#define CUDA_EMULATOR_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PN_EMULATOR_API __attribute__((visibility("default")))

/* What a kernel did since the counters were reset, summed over launches. A warp instruction counts once for its 32
 * lanes. Requests are warp instructions that access memory; sectors have 32 bytes; bytes are what active lanes asked
 * for. */
typedef struct {
  uint64_t launches, blocks, threads;
  uint64_t warp_instructions, lane_instructions;
  uint64_t float_operations; /* float32 by lanes: a multiply-add counts 2, an addition or multiplication 1 */
  uint64_t mma_instructions; /* mma.sync by warps */
  uint64_t global_load_requests, global_load_sectors, global_load_bytes;
  uint64_t global_store_requests, global_store_sectors, global_store_bytes;
  uint64_t shared_requests, shared_wavefronts; /* wavefronts: passes over the 32 banks that the requests took */
  uint64_t shared_conflicts;                   /* wavefronts beyond the least that requests of this size need */
  uint64_t barriers, divergent_branches, atomics;
} pnEmulatorCounters;

/* The sentence that says what the last failing call found wrong: a kernel's fault, or why a module was refused. Valid
 * until the next failing call. */
PN_EMULATOR_API const char* pnEmulatorLastFault(void);

/* Forgets a fault or the loss of the device, so that calls work again. Memory stays as it is. */
PN_EMULATOR_API void pnEmulatorReset(void);

/* Bytes of device memory; live allocations stay. */
PN_EMULATOR_API void pnEmulatorSetCapacity(size_t bytes);

/* The device is lost once `launches` more kernels have run: the next launch and every later call return
 * CUDA_ERROR_DEVICE_UNAVAILABLE. Negative: never. */
PN_EMULATOR_API void pnEmulatorLoseAfter(int64_t launches);

/* Counters by kernel name, in the order in which the kernels were first launched; kernels of the same name are one.
 * pnEmulatorCountersAt returns the name, valid until the reset, or null if there are not that many. */
PN_EMULATOR_API int32_t pnEmulatorKernelCount(void);
PN_EMULATOR_API const char* pnEmulatorCountersAt(int32_t index, pnEmulatorCounters* counters);
PN_EMULATOR_API void pnEmulatorResetCounters(void);

#ifdef __cplusplus
}
#endif

#endif
