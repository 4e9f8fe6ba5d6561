// The driver functions, under the names that libcuda.so.1 exports. Everything runs when it is issued, except while a
// stream captures. One lock serialises all calls.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <set>

#include "program.h"

namespace emulator {
namespace {

enum Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  DEVICE_UNAVAILABLE = 46,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  NO_BINARY_FOR_GPU = 209,
  INVALID_PTX = 218,
  UNSUPPORTED_PTX_VERSION = 222,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  LAUNCH_OUT_OF_RESOURCES = 701,
  MISALIGNED_ADDRESS = 716,
  LAUNCH_FAILED = 719,
  NOT_SUPPORTED = 801,
  STREAM_CAPTURE_UNSUPPORTED = 900,
  STREAM_CAPTURE_INVALIDATED = 901,
  STREAM_CAPTURE_UNMATCHED = 903,
};

struct ResultText {
  int result;
  const char *name, *text;
};
constexpr ResultText RESULTS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {DEVICE_UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not initiated in this stream"},
};

using Step = std::function<int()>;

struct Graph {
  std::vector<Step> steps;
};

struct Capture {
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  int mode = 0;
  bool invalid = false;
};

struct Stream {
  std::shared_ptr<Capture> capture; /* while it captures */
  bool origin = false;              /* where the capture was begun */
};

struct Event {
  std::chrono::steady_clock::time_point time{};
  bool recorded = false;
  std::shared_ptr<Capture> capture; /* recorded in a stream that captures */
};

struct Function {
  Kernel* kernel;
  size_t max_dynamic_shared = 48 << 10;
};

struct LoadedModule {
  std::unique_ptr<Module> module;
  std::map<std::string, std::unique_ptr<Function>, std::less<>> functions;
};

struct Driver {
  std::recursive_mutex mutex;
  Memory memory;
  bool initialised = false;
  int devices = 1, capability = 80, version = 11080;
  int64_t lose_after = -1;
  int failure = SUCCESS; /* that every call returns from now on */
  std::string last_fault;
  int context = 0; /* its address is the handle of the primary context */
  int retained = 0;
  Stream default_stream;
  std::set<std::unique_ptr<Stream>> streams;
  std::set<std::unique_ptr<Event>> events;
  std::set<std::unique_ptr<LoadedModule>> modules;
  std::set<std::unique_ptr<Graph>> graphs; /* also executable ones: these are copies */
  std::vector<std::pair<std::string, Counters>> counters;

  size_t max_shared() const { return capability >= 90 ? 227 << 10 : capability >= 80 ? 163 << 10 : 96 << 10; }
};

Driver& driver() {
  static Driver* const instance = new Driver; /* never destroyed: calls may come while the process ends */
  return *instance;
}

thread_local void* current_context = nullptr;

int64_t environment(const char* name, int64_t otherwise) {
  const char* const text = getenv(name);
  return text && *text ? strtoll(text, nullptr, 10) : otherwise;
}

// A function that needs a context: f(driver) under the lock, unless an earlier fault or the lack of a context forbids.
template <class F>
int call(F f) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  if (!d.initialised) return NOT_INITIALIZED;
  if (d.failure != SUCCESS) return d.failure;
  if (!current_context) return INVALID_CONTEXT;
  return f(d);
}

template <class T>
T* find(std::set<std::unique_ptr<T>>& owned, void* handle) {
  for (const auto& item : owned)
    if (item.get() == handle) return item.get();
  return nullptr;
}

template <class T>
int destroy(std::set<std::unique_ptr<T>>& owned, void* handle) {
  for (auto item = owned.begin(); item != owned.end(); ++item)
    if (item->get() == handle) {
      owned.erase(item);
      return SUCCESS;
    }
  return INVALID_HANDLE;
}

// Null, 1 and 2 are the default streams.
Stream* find_stream(Driver& d, void* handle) {
  return reinterpret_cast<uintptr_t>(handle) <= 2 ? &d.default_stream : find(d.streams, handle);
}

// Runs a step, or records it if the stream captures.
int issue(Driver& d, void* handle, Step step) {
  Stream* const stream = find_stream(d, handle);
  if (!stream) return INVALID_HANDLE;
  if (!stream->capture) return step();
  if (stream->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
  stream->capture->graph->steps.push_back(std::move(step));
  return SUCCESS;
}

// Calls that might wait for the device are not allowed while a stream captures, unless in relaxed mode (2).
int forbid_while_capturing(Driver& d) {
  int result = SUCCESS;
  for (const auto& stream : d.streams)
    if (stream->capture && stream->capture->mode != 2) {
      stream->capture->invalid = true;
      result = STREAM_CAPTURE_UNSUPPORTED;
    }
  return result;
}

template <class F>
int immediate_call(F f) {
  return call([&](Driver& d) {
    const int forbidden = forbid_while_capturing(d);
    return forbidden != SUCCESS ? forbidden : f(d);
  });
}

int fail_with(Driver& d, const Fault& fault) {
  d.last_fault = fault.sentence();
  return d.failure =
             fault.kind == "misaligned" ? MISALIGNED_ADDRESS
             : fault.kind == "out of bounds" || fault.kind == "use after free" || fault.kind == "uninitialised read"
                 ? ILLEGAL_ADDRESS
                 : LAUNCH_FAILED;
}

int launch(Driver& d, Kernel& kernel, const Launch& work) {
  if (d.failure != SUCCESS) return d.failure;
  if (d.lose_after == 0) {
    d.last_fault = "the device was lost, as PERTURBNAS_EMULATOR_LOSE_AFTER or pnEmulatorLoseAfter asked for";
    return d.failure = DEVICE_UNAVAILABLE;
  }
  if (d.lose_after > 0) --d.lose_after;
  Fault fault;
  const bool good = run(kernel, work, d.memory, fault);
  auto entry =
      std::find_if(d.counters.begin(), d.counters.end(), [&](const auto& e) { return e.first == kernel.name; });
  if (entry == d.counters.end()) entry = d.counters.insert(entry, {kernel.name, Counters{}});
  const auto* const from = reinterpret_cast<const uint64_t*>(&kernel.counters);
  auto* const to = reinterpret_cast<uint64_t*>(&entry->second);
  for (size_t c = 0; c < sizeof(Counters) / sizeof(uint64_t); ++c) to[c] += from[c];
  kernel.counters = {};
  return good ? int(SUCCESS) : fail_with(d, fault);
}

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

// Host memory for copies: what lies in device memory must be one live allocation.
bool is_usable(Driver& d, uint64_t address, size_t bytes) {
  return d.memory.owns(address) ? d.memory.contains(address, bytes) : address != 0;
}

// Any of the two may be device memory.
int copy(Driver& d, uint64_t target, uint64_t source, size_t bytes) {
  if (bytes == 0) return SUCCESS;
  if (!is_usable(d, target, bytes) || !is_usable(d, source, bytes)) return INVALID_VALUE;
  memmove(pointer(target), pointer(source), bytes);
  if (d.memory.owns(target)) {
    if (d.memory.owns(source))
      d.memory.copy_states(target, source, bytes);
    else
      d.memory.mark_written(target, bytes);
  }
  return SUCCESS;
}

int device_copy(Driver& d, uint64_t target, uint64_t source, size_t bytes, bool target_on_device,
                bool source_on_device) {
  if (bytes && ((target_on_device && !d.memory.owns(target)) || (source_on_device && !d.memory.owns(source))))
    return INVALID_VALUE;
  return copy(d, target, source, bytes);
}

template <class T>
int fill(Driver& d, uint64_t target, T value, size_t count) {
  if (count == 0) return SUCCESS;
  if (!d.memory.contains(target, count * sizeof(T)) || target % sizeof(T)) return INVALID_VALUE;
  std::fill_n(reinterpret_cast<T*>(target), count, value);
  d.memory.mark_written(target, count * sizeof(T));
  return SUCCESS;
}

int allocate(Driver& d, uint64_t* address, size_t bytes) {
  if (!address || bytes == 0) return INVALID_VALUE;
  const uint64_t found = d.memory.allocate(bytes);
  if (!found) return OUT_OF_MEMORY;
  *address = found;
  return SUCCESS;
}

int release(Driver& d, uint64_t address) { return address == 0 || d.memory.free(address) ? SUCCESS : INVALID_VALUE; }

int load_module(Driver& d, void** module, const void* image, unsigned count, int* options, void** values) {
  if (!module || !image) return INVALID_VALUE;
  std::string error;
  auto loaded = std::make_unique<LoadedModule>();
  int result = SUCCESS;
  loaded->module = Module::parse(static_cast<const char*>(image), d.memory, error);
  const int newest = d.version >= 12000   ? 80 + d.version % 1000 / 10
                     : d.version >= 11000 ? 70 + d.version % 1000 / 10
                                          : 63 + d.version % 1000 / 10;
  if (!loaded->module) {
    result = INVALID_PTX;
  } else if (loaded->module->ptx_version > newest) {
    error = "PTX version " + std::to_string(loaded->module->ptx_version / 10) + "." +
            std::to_string(loaded->module->ptx_version % 10) + " is newer than this driver's " +
            std::to_string(newest / 10) + "." + std::to_string(newest % 10);
    result = UNSUPPORTED_PTX_VERSION;
  } else if (loaded->module->target.starts_with("sm_") && atoi(loaded->module->target.c_str() + 3) > d.capability) {
    error = "the module is for " + loaded->module->target + ", the device is sm_" + std::to_string(d.capability);
    result = NO_BINARY_FOR_GPU;
  }
  if (result != SUCCESS) {
    d.last_fault = error;
    constexpr int ERROR_LOG = 5, ERROR_LOG_BYTES = 6;
    char* log = nullptr;
    size_t bytes = 0, option_of_size = count;
    for (unsigned o = 0; o < count; ++o) {
      if (options[o] == ERROR_LOG) log = static_cast<char*>(values[o]);
      if (options[o] == ERROR_LOG_BYTES) {
        bytes = reinterpret_cast<size_t>(values[o]) & 0xffffffff;
        option_of_size = o;
      }
    }
    if (log && bytes) {
      const size_t length = std::min(error.size(), bytes - 1);
      memcpy(log, error.c_str(), length);
      log[length] = 0;
      values[option_of_size] = reinterpret_cast<void*>(length);
    }
    return result;
  }
  for (const auto& kernel : loaded->module->kernels)
    loaded->functions[kernel->name] = std::make_unique<Function>(Function{kernel.get()});
  *module = loaded.get();
  d.modules.insert(std::move(loaded));
  return SUCCESS;
}

Function* find_function(Driver& d, void* handle) {
  for (const auto& module : d.modules)
    for (const auto& [name, function] : module->functions)
      if (function.get() == handle) return function.get();
  return nullptr;
}

// What a compiler would need at most for the registers that are live at a time.
int estimated_registers(const Kernel& kernel) { return std::clamp(kernel.register_count, 16, 255); }

int launch_kernel(Driver& d, void* handle, Extent grid, Extent block, size_t shared, void* stream, void** parameters,
                  void** extra) {
  Function* const function = find_function(d, handle);
  if (!function) return INVALID_HANDLE;
  Kernel& kernel = *function->kernel;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024 || threads > uint64_t(kernel.max_threads))
    return INVALID_VALUE;
  if (kernel.shared_bytes + shared > d.max_shared() || shared > function->max_dynamic_shared) return INVALID_VALUE;
  Launch work{grid, block, shared, std::vector<uint8_t>(kernel.parameter_bytes)};
  if (parameters) {
    for (size_t p = 0; p < kernel.parameter_offsets.size(); ++p)
      memcpy(work.parameters.data() + kernel.parameter_offsets[p], parameters[p], kernel.parameter_sizes[p]);
  } else if (extra) {
    const void* buffer = nullptr;
    size_t bytes = 0;
    for (void** option = extra; *option; option += 2) {
      if (*option == reinterpret_cast<void*>(1)) buffer = option[1];
      if (*option == reinterpret_cast<void*>(2)) bytes = *static_cast<size_t*>(option[1]);
    }
    if (!buffer || bytes < kernel.parameter_bytes) return INVALID_VALUE;
    memcpy(work.parameters.data(), buffer, kernel.parameter_bytes);
  } else if (kernel.parameter_bytes) {
    return INVALID_VALUE;
  }
  return issue(d, stream, [&d, &kernel, work = std::move(work)] { return launch(d, kernel, work); });
}

int attribute(const Driver& d, int which) {
  switch (which) {
    case 1: /* MAX_THREADS_PER_BLOCK */
    case 2:
    case 3: /* MAX_BLOCK_DIM_X, Y */
      return 1024;
    case 4:
      return 64;
    case 5: /* MAX_GRID_DIM_X */
      return 0x7fffffff;
    case 6:
    case 7:
      return 65535;
    case 8: /* MAX_SHARED_MEMORY_PER_BLOCK */
      return 48 << 10;
    case 9: /* TOTAL_CONSTANT_MEMORY */
      return 64 << 10;
    case 10: /* WARP_SIZE */
      return LANES;
    case 12: /* MAX_REGISTERS_PER_BLOCK */
    case 82: /* MAX_REGISTERS_PER_MULTIPROCESSOR */
      return 65536;
    case 13: /* CLOCK_RATE, kHz */
    case 36: /* MEMORY_CLOCK_RATE */
      return 1000000;
    case 16: /* MULTIPROCESSOR_COUNT */
      return 16;
    case 31:  /* CONCURRENT_KERNELS */
    case 40:  /* ASYNC_ENGINE_COUNT */
    case 41:  /* UNIFIED_ADDRESSING */
    case 115: /* MEMORY_POOLS_SUPPORTED */
      return 1;
    case 37: /* GLOBAL_MEMORY_BUS_WIDTH */
      return 256;
    case 38: /* L2_CACHE_SIZE */
      return 4 << 20;
    case 39: /* MAX_THREADS_PER_MULTIPROCESSOR */
      return 2048;
    case 75: /* COMPUTE_CAPABILITY_MAJOR */
      return d.capability / 10;
    case 76:
      return d.capability % 10;
    case 81: /* MAX_SHARED_MEMORY_PER_MULTIPROCESSOR */
      return int(d.max_shared()) + 1024;
    case 97: /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
      return int(d.max_shared());
    case 106: /* MAX_BLOCKS_PER_MULTIPROCESSOR */
      return 32;
    case 111: /* RESERVED_SHARED_MEMORY_PER_BLOCK */
      return 1024;
    default:
      return 0;
  }
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

#define API PN_EMULATOR_API int

API cuInit(unsigned flags) {
  if (flags) return INVALID_VALUE;
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  if (d.initialised) return SUCCESS;
  d.devices = environment("PERTURBNAS_EMULATOR_DEVICES", 1) > 0;
  if (!d.devices) return NO_DEVICE;
  d.memory.set_capacity(size_t(environment("PERTURBNAS_EMULATOR_MEMORY_MIB", 4096)) << 20);
  d.lose_after = environment("PERTURBNAS_EMULATOR_LOSE_AFTER", d.lose_after);
  d.capability = int(environment("PERTURBNAS_EMULATOR_CAPABILITY", d.capability));
  d.initialised = true;
  return SUCCESS;
}

API cuDriverGetVersion(int* version) {
  if (!version) return INVALID_VALUE;
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  *version = d.version = int(environment("PERTURBNAS_EMULATOR_DRIVER", d.version));
  return SUCCESS;
}

static const ResultText* find_result(int result) {
  for (const ResultText& r : RESULTS)
    if (r.result == result) return &r;
  return nullptr;
}

API cuGetErrorName(int result, const char** name) {
  const ResultText* const found = find_result(result);
  if (!name) return INVALID_VALUE;
  *name = found ? found->name : nullptr;
  return found ? SUCCESS : INVALID_VALUE;
}

API cuGetErrorString(int result, const char** text) {
  const ResultText* const found = find_result(result);
  if (!text) return INVALID_VALUE;
  *text = found ? found->text : nullptr;
  return found ? SUCCESS : INVALID_VALUE;
}

// --- Devices and contexts ---

API cuDeviceGetCount(int* count) {
  if (!count) return INVALID_VALUE;
  if (!driver().initialised) return NOT_INITIALIZED;
  *count = driver().devices;
  return SUCCESS;
}

API cuDeviceGet(int* device, int ordinal) {
  if (!device) return INVALID_VALUE;
  if (!driver().initialised) return NOT_INITIALIZED;
  if (ordinal < 0 || ordinal >= driver().devices) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

API cuDeviceGetName(char* name, int length, int device) {
  if (!name || length <= 0) return INVALID_VALUE;
  if (device != 0) return INVALID_DEVICE;
  snprintf(name, size_t(length), "Emulated CUDA device (sm_%d)", driver().capability);
  return SUCCESS;
}

API cuDeviceGetUuid(void* uuid, int device) {
  if (!uuid) return INVALID_VALUE;
  if (device != 0) return INVALID_DEVICE;
  memcpy(uuid, "emulated device", 16);
  return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int device) {
  if (!bytes) return INVALID_VALUE;
  if (device != 0) return INVALID_DEVICE;
  *bytes = driver().memory.capacity();
  return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int which, int device) {
  if (!value) return INVALID_VALUE;
  if (device != 0) return INVALID_DEVICE;
  *value = attribute(driver(), which);
  return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void** context, int device) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  if (!context) return INVALID_VALUE;
  if (!d.initialised) return NOT_INITIALIZED;
  if (device != 0) return INVALID_DEVICE;
  if (d.failure != SUCCESS) return d.failure;
  ++d.retained;
  *context = &d.context;
  return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  if (device != 0) return INVALID_DEVICE;
  if (d.retained == 0) return INVALID_CONTEXT;
  --d.retained;
  return SUCCESS;
}

API cuDevicePrimaryCtxSetFlags_v2(int device, unsigned) { return device == 0 ? SUCCESS : INVALID_DEVICE; }

API cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  if (!flags || !active) return INVALID_VALUE;
  *flags = 0;
  *active = driver().retained > 0;
  return device == 0 ? SUCCESS : INVALID_DEVICE;
}

API cuCtxSetCurrent(void* context) {
  if (context && context != &driver().context) return INVALID_CONTEXT;
  current_context = context;
  return SUCCESS;
}

API cuCtxGetCurrent(void** context) {
  if (!context) return INVALID_VALUE;
  *context = current_context;
  return SUCCESS;
}

API cuCtxPushCurrent_v2(void* context) { return cuCtxSetCurrent(context); }

API cuCtxPopCurrent_v2(void** context) {
  if (context) *context = current_context;
  current_context = nullptr;
  return SUCCESS;
}

API cuCtxGetDevice(int* device) {
  if (!device) return INVALID_VALUE;
  *device = 0;
  return current_context ? SUCCESS : INVALID_CONTEXT;
}

API cuCtxSynchronize() {
  return immediate_call([](Driver&) { return int(SUCCESS); });
}

// --- Memory ---

API cuMemGetInfo_v2(size_t* free, size_t* total) {
  return call([&](Driver& d) -> int {
    if (!free || !total) return INVALID_VALUE;
    const size_t used = d.memory.in_use();
    *total = d.memory.capacity();
    *free = *total > used ? *total - used : 0;
    return SUCCESS;
  });
}

API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  return immediate_call([&](Driver& d) { return allocate(d, address, bytes); });
}

API cuMemFree_v2(uint64_t address) {
  return immediate_call([&](Driver& d) { return release(d, address); });
}

API cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
  return call([&](Driver& d) -> int {
    const Stream* const s = find_stream(d, stream);
    if (!s) return INVALID_HANDLE;
    return s->capture ? int(STREAM_CAPTURE_UNSUPPORTED) : allocate(d, address, bytes);
  });
}

API cuMemFreeAsync(uint64_t address, void* stream) {
  return call([&](Driver& d) { return issue(d, stream, [&d, address] { return release(d, address); }); });
}

API cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  return call([&](Driver& d) -> int {
    if (!address || bytes == 0) return INVALID_VALUE;
    *address = pointer(d.memory.allocate(bytes, true));
    return *address ? SUCCESS : OUT_OF_MEMORY;
  });
}

API cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }

API cuMemFreeHost(void* address) {
  return call([&](Driver& d) { return release(d, reinterpret_cast<uint64_t>(address)); });
}

API cuMemHostGetDevicePointer_v2(uint64_t* device, void* host, unsigned) {
  return call([&](Driver& d) -> int {
    *device = reinterpret_cast<uint64_t>(host);
    return d.memory.owns(*device) ? SUCCESS : INVALID_VALUE;
  });
}

API cuMemcpyHtoD_v2(uint64_t target, const void* source, size_t bytes) {
  return immediate_call(
      [&](Driver& d) { return device_copy(d, target, reinterpret_cast<uint64_t>(source), bytes, true, false); });
}

API cuMemcpyDtoH_v2(void* target, uint64_t source, size_t bytes) {
  return immediate_call(
      [&](Driver& d) { return device_copy(d, reinterpret_cast<uint64_t>(target), source, bytes, false, true); });
}

API cuMemcpyDtoD_v2(uint64_t target, uint64_t source, size_t bytes) {
  return immediate_call([&](Driver& d) { return device_copy(d, target, source, bytes, true, true); });
}

API cuMemcpyHtoDAsync_v2(uint64_t target, const void* source, size_t bytes, void* stream) {
  return call([&](Driver& d) {
    return issue(d, stream,
                 [=, &d] { return device_copy(d, target, reinterpret_cast<uint64_t>(source), bytes, true, false); });
  });
}

API cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t bytes, void* stream) {
  return call([&](Driver& d) {
    return issue(d, stream,
                 [=, &d] { return device_copy(d, reinterpret_cast<uint64_t>(target), source, bytes, false, true); });
  });
}

API cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void* stream) {
  return call([&](Driver& d) {
    return issue(d, stream, [=, &d] { return device_copy(d, target, source, bytes, true, true); });
  });
}

API cuMemcpyAsync(uint64_t target, uint64_t source, size_t bytes, void* stream) {
  return call([&](Driver& d) { return issue(d, stream, [=, &d] { return copy(d, target, source, bytes); }); });
}

API cuMemcpy(uint64_t target, uint64_t source, size_t bytes) {
  return immediate_call([&](Driver& d) { return copy(d, target, source, bytes); });
}

API cuMemsetD8_v2(uint64_t target, unsigned char value, size_t count) {
  return immediate_call([&](Driver& d) { return fill<uint8_t>(d, target, value, count); });
}

API cuMemsetD32_v2(uint64_t target, unsigned value, size_t count) {
  return immediate_call([&](Driver& d) { return fill<uint32_t>(d, target, value, count); });
}

API cuMemsetD8Async(uint64_t target, unsigned char value, size_t count, void* stream) {
  return call([&](Driver& d) { return issue(d, stream, [=, &d] { return fill<uint8_t>(d, target, value, count); }); });
}

API cuMemsetD32Async(uint64_t target, unsigned value, size_t count, void* stream) {
  return call([&](Driver& d) { return issue(d, stream, [=, &d] { return fill<uint32_t>(d, target, value, count); }); });
}

// There is one pool; what is freed is free at once.
API cuDeviceGetDefaultMemPool(void** pool, int device) {
  if (!pool) return INVALID_VALUE;
  *pool = &driver().memory;
  return device == 0 ? SUCCESS : INVALID_DEVICE;
}

API cuMemPoolSetAttribute(void* pool, int, void*) { return pool == &driver().memory ? SUCCESS : INVALID_HANDLE; }

API cuMemPoolTrimTo(void* pool, size_t) { return pool == &driver().memory ? SUCCESS : INVALID_HANDLE; }

// --- Modules and launches ---

API cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
  int version;
  cuDriverGetVersion(&version);
  return call([&](Driver& d) { return load_module(d, module, image, count, options, values); });
}

API cuModuleLoadData(void** module, const void* image) {
  return cuModuleLoadDataEx(module, image, 0, nullptr, nullptr);
}

API cuModuleUnload(void* module) {
  return call([&](Driver& d) { return destroy(d.modules, module); });
}

API cuModuleGetFunction(void** function, void* module, const char* name) {
  return call([&](Driver& d) -> int {
    LoadedModule* const loaded = find(d.modules, module);
    if (!function || !name) return INVALID_VALUE;
    if (!loaded) return INVALID_HANDLE;
    const auto found = loaded->functions.find(name);
    if (found == loaded->functions.end()) return NOT_FOUND;
    *function = found->second.get();
    return SUCCESS;
  });
}

API cuModuleGetGlobal_v2(uint64_t* address, size_t* bytes, void* module, const char* name) {
  return call([&](Driver& d) -> int {
    LoadedModule* const loaded = find(d.modules, module);
    if (!name) return INVALID_VALUE;
    if (!loaded) return INVALID_HANDLE;
    const auto found = loaded->module->variables.find(name);
    if (found == loaded->module->variables.end()) return NOT_FOUND;
    if (address) *address = found->second.address;
    if (bytes) *bytes = found->second.bytes;
    return SUCCESS;
  });
}

API cuFuncGetAttribute(int* value, int which, void* function) {
  return call([&](Driver& d) -> int {
    const Function* const f = find_function(d, function);
    if (!value) return INVALID_VALUE;
    if (!f) return INVALID_HANDLE;
    switch (which) {
      case 0: /* MAX_THREADS_PER_BLOCK */
        *value = f->kernel->max_threads;
        return SUCCESS;
      case 1: /* SHARED_SIZE_BYTES */
        *value = int(f->kernel->shared_bytes);
        return SUCCESS;
      case 2: /* CONST_SIZE_BYTES */
        *value = 0;
        return SUCCESS;
      case 3: /* LOCAL_SIZE_BYTES */
        *value = int(f->kernel->local_bytes);
        return SUCCESS;
      case 4: /* NUM_REGS */
        *value = estimated_registers(*f->kernel);
        return SUCCESS;
      case 5: /* PTX_VERSION */
      case 6: /* BINARY_VERSION */
        *value = d.capability;
        return SUCCESS;
      case 8: /* MAX_DYNAMIC_SHARED_SIZE_BYTES */
        *value = int(f->max_dynamic_shared);
        return SUCCESS;
      default:
        return INVALID_VALUE;
    }
  });
}

API cuFuncSetAttribute(void* function, int which, int value) {
  return call([&](Driver& d) -> int {
    Function* const f = find_function(d, function);
    if (!f) return INVALID_HANDLE;
    if (which == 9) return SUCCESS; /* PREFERRED_SHARED_MEMORY_CARVEOUT */
    if (which != 8 || value < 0 || size_t(value) + f->kernel->shared_bytes > d.max_shared()) return INVALID_VALUE;
    f->max_dynamic_shared = size_t(value);
    return SUCCESS;
  });
}

API cuFuncSetCacheConfig(void* function, int) {
  return call([&](Driver& d) -> int { return find_function(d, function) ? SUCCESS : INVALID_HANDLE; });
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t dynamic_shared) {
  return call([&](Driver& d) -> int {
    const Function* const f = find_function(d, function);
    if (!blocks || threads <= 0) return INVALID_VALUE;
    if (!f) return INVALID_HANDLE;
    const int warps = (threads + LANES - 1) / LANES;
    const int registers = (estimated_registers(*f->kernel) + 7) / 8 * 8 * LANES * warps;
    const size_t shared = f->kernel->shared_bytes + dynamic_shared + 1024;
    *blocks = threads > f->kernel->max_threads
                  ? 0
                  : std::min({32, 64 / warps, 65536 / registers, int((d.max_shared() + 1024) / shared)});
    return SUCCESS;
  });
}

API cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra) {
  return call([&](Driver& d) {
    return launch_kernel(d, function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream, parameters,
                         extra);
  });
}

API cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  return call([&](Driver& d) {
    return issue(d, stream, [=] {
      function(data);
      return int(SUCCESS);
    });
  });
}

// --- Streams and events ---

API cuStreamCreate(void** stream, unsigned) {
  return call([&](Driver& d) -> int {
    if (!stream) return INVALID_VALUE;
    *stream = d.streams.insert(std::make_unique<Stream>()).first->get();
    return SUCCESS;
  });
}

API cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

API cuStreamDestroy_v2(void* stream) {
  return call([&](Driver& d) { return destroy(d.streams, stream); });
}

API cuStreamSynchronize(void* stream) {
  return call([&](Driver& d) -> int {
    Stream* const s = find_stream(d, stream);
    if (!s) return INVALID_HANDLE;
    if (!s->capture) return SUCCESS;
    s->capture->invalid = true;
    return STREAM_CAPTURE_UNSUPPORTED;
  });
}

API cuStreamQuery(void* stream) { return cuStreamSynchronize(stream); }

API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  return call([&](Driver& d) -> int {
    Stream* const s = find_stream(d, stream);
    const Event* const e = find(d.events, event);
    if (!s || !e) return INVALID_HANDLE;
    if (e->capture && !s->capture) s->capture = e->capture; /* the stream joins the capture */
    return SUCCESS;
  });
}

API cuEventCreate(void** event, unsigned) {
  return call([&](Driver& d) -> int {
    if (!event) return INVALID_VALUE;
    *event = d.events.insert(std::make_unique<Event>()).first->get();
    return SUCCESS;
  });
}

API cuEventDestroy_v2(void* event) {
  return call([&](Driver& d) { return destroy(d.events, event); });
}

API cuEventRecord(void* event, void* stream) {
  return call([&](Driver& d) -> int {
    Stream* const s = find_stream(d, stream);
    Event* const e = find(d.events, event);
    if (!s || !e) return INVALID_HANDLE;
    e->capture = s->capture;
    if (s->capture) return s->capture->invalid ? STREAM_CAPTURE_INVALIDATED : SUCCESS;
    e->time = std::chrono::steady_clock::now();
    e->recorded = true;
    return SUCCESS;
  });
}

API cuEventSynchronize(void* event) {
  return call([&](Driver& d) -> int { return find(d.events, event) ? SUCCESS : INVALID_HANDLE; });
}

API cuEventQuery(void* event) { return cuEventSynchronize(event); }

API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  return call([&](Driver& d) -> int {
    const Event *const from = find(d.events, start), *const to = find(d.events, end);
    if (!milliseconds) return INVALID_VALUE;
    if (!from || !to || !from->recorded || !to->recorded) return INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return SUCCESS;
  });
}

// --- Capture and graphs ---

API cuStreamBeginCapture_v2(void* stream, int mode) {
  return call([&](Driver& d) -> int {
    Stream* const s = find_stream(d, stream);
    if (!s) return INVALID_HANDLE;
    if (s == &d.default_stream || s->capture) return STREAM_CAPTURE_UNSUPPORTED;
    s->capture = std::make_shared<Capture>();
    s->capture->mode = mode;
    s->origin = true;
    return SUCCESS;
  });
}

API cuStreamEndCapture(void* stream, void** graph) {
  return call([&](Driver& d) -> int {
    Stream* const s = find_stream(d, stream);
    if (!s) return INVALID_HANDLE;
    if (!s->capture || !s->origin) return STREAM_CAPTURE_UNMATCHED;
    const std::shared_ptr<Capture> capture = s->capture;
    for (const auto& other : d.streams)
      if (other->capture == capture) other->capture = nullptr;
    for (const auto& event : d.events)
      if (event->capture == capture) event->capture = nullptr;
    s->origin = false;
    if (graph) *graph = nullptr;
    if (capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    if (!graph) return INVALID_VALUE;
    *graph = d.graphs.insert(std::make_unique<Graph>(*capture->graph)).first->get();
    return SUCCESS;
  });
}

API cuStreamIsCapturing(void* stream, int* status) {
  return call([&](Driver& d) -> int {
    const Stream* const s = find_stream(d, stream);
    if (!status) return INVALID_VALUE;
    if (!s) return INVALID_HANDLE;
    *status = !s->capture ? 0 : s->capture->invalid ? 2 : 1;
    return SUCCESS;
  });
}

API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  return call([&](Driver& d) -> int {
    const Graph* const g = find(d.graphs, graph);
    if (!executable) return INVALID_VALUE;
    if (!g) return INVALID_HANDLE;
    *executable = d.graphs.insert(std::make_unique<Graph>(*g)).first->get();
    return SUCCESS;
  });
}

API cuGraphLaunch(void* executable, void* stream) {
  return call([&](Driver& d) -> int {
    const Graph* const g = find(d.graphs, executable);
    if (!g) return INVALID_HANDLE;
    for (const Step& step : g->steps) {
      const int result = issue(d, stream, step);
      if (result != SUCCESS) return result;
    }
    return SUCCESS;
  });
}

API cuGraphUpload(void* executable, void* stream) {
  return call([&](Driver& d) -> int {
    return find(d.graphs, executable) && find_stream(d, stream) ? SUCCESS : INVALID_HANDLE;
  });
}

API cuGraphGetNodes(void* graph, void**, size_t* count) {
  return call([&](Driver& d) -> int {
    const Graph* const g = find(d.graphs, graph);
    if (!count) return INVALID_VALUE;
    if (!g) return INVALID_HANDLE;
    *count = g->steps.size();
    return SUCCESS;
  });
}

API cuGraphExecDestroy(void* executable) {
  return call([&](Driver& d) { return destroy(d.graphs, executable); });
}

API cuGraphDestroy(void* graph) {
  return call([&](Driver& d) { return destroy(d.graphs, graph); });
}

// --- Beside the driver's functions ---

const char* pnEmulatorLastFault(void) { return driver().last_fault.c_str(); }

void pnEmulatorReset(void) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  d.failure = SUCCESS;
  d.lose_after = -1;
  d.last_fault.clear();
}

void pnEmulatorSetCapacity(size_t bytes) { driver().memory.set_capacity(bytes); }

void pnEmulatorLoseAfter(int64_t launches) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  d.lose_after = launches;
}

int32_t pnEmulatorKernelCount(void) { return int32_t(driver().counters.size()); }

const char* pnEmulatorCountersAt(int32_t index, pnEmulatorCounters* counters) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  if (index < 0 || size_t(index) >= d.counters.size()) return nullptr;
  *counters = d.counters[size_t(index)].second;
  return d.counters[size_t(index)].first.c_str();
}

void pnEmulatorResetCounters(void) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  d.counters.clear();
}

}  // extern "C"
