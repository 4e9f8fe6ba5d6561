using System.Reflection;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

/// <summary>CUdevice_attribute: the ones that are asked for here.</summary>
internal enum DeviceAttribute
{
    ClockKilohertz = 13,
    MultiprocessorCount = 16,
    MemoryClockKilohertz = 36,
    MemoryBusBits = 37,
    ComputeCapabilityMajor = 75,
    ComputeCapabilityMinor = 76,
    MemoryPoolsSupported = 115,
}

/// <summary>CUfunction_attribute: the ones that are asked for or set here.</summary>
internal enum FunctionAttribute
{
    StaticSharedBytes = 1,
    LocalBytes = 3,
    Registers = 4,
    MaxDynamicSharedBytes = 8,
}

/// <summary>
/// The CUDA driver's functions, under the names that its library exports (cuda.h renames most of them to their second version). The library
/// is NVIDIA's libcuda.so.1, or the emulated one that executes the same PTX on the processor; which one is said by <see cref="Use"/>
/// before the first call and holds for the process.
/// </summary>
internal static unsafe partial class NativeDriver
{
    internal const string Library = "cuda";

    private static string? _path;
    private static nint _library;

    static NativeDriver() => NativeLibrary.SetDllImportResolver(Assembly.GetExecutingAssembly(),
        (name, _, _) => name == Library ? _library : 0);

    /// <summary>Chooses and loads the library.</summary>
    /// <exception cref="DllNotFoundException">There is no such library.</exception>
    internal static void Use(string path)
    {
        if (_path is not null && _path != path)
            throw new InvalidOperationException($"this process uses the driver '{_path}'; '{path}' needs a process of its own");
        if (_path is not null)
            return;
        _library = NativeLibrary.Load(path);
        _path = path;
    }

    /// <summary>Whether the library in use is the emulated one.</summary>
    internal static bool IsEmulated => _library != 0 && NativeLibrary.TryGetExport(_library, "pnEmulatorLastFault", out _);

    [LibraryImport(Library, EntryPoint = "cuInit")]
    internal static partial DriverStatus Init(uint flags);

    [LibraryImport(Library, EntryPoint = "cuDriverGetVersion")]
    internal static partial DriverStatus DriverGetVersion(out int version);

    [LibraryImport(Library, EntryPoint = "cuGetErrorName")]
    internal static partial DriverStatus GetErrorName(DriverStatus error, out nint name);

    [LibraryImport(Library, EntryPoint = "cuGetErrorString")]
    internal static partial DriverStatus GetErrorString(DriverStatus error, out nint text);

    [LibraryImport(Library, EntryPoint = "cuDeviceGetCount")]
    internal static partial DriverStatus DeviceGetCount(out int count);

    [LibraryImport(Library, EntryPoint = "cuDeviceGet")]
    internal static partial DriverStatus DeviceGet(out int device, int ordinal);

    [LibraryImport(Library, EntryPoint = "cuDeviceGetName")]
    internal static partial DriverStatus DeviceGetName(byte* name, int length, int device);

    [LibraryImport(Library, EntryPoint = "cuDeviceGetAttribute")]
    internal static partial DriverStatus DeviceGetAttribute(out int value, DeviceAttribute attribute, int device);

    [LibraryImport(Library, EntryPoint = "cuDeviceTotalMem_v2")]
    internal static partial DriverStatus DeviceTotalMem(out nuint bytes, int device);

    [LibraryImport(Library, EntryPoint = "cuDevicePrimaryCtxRetain")]
    internal static partial DriverStatus PrimaryContextRetain(out nint context, int device);

    [LibraryImport(Library, EntryPoint = "cuDevicePrimaryCtxRelease_v2")]
    internal static partial DriverStatus PrimaryContextRelease(int device);

    [LibraryImport(Library, EntryPoint = "cuCtxSetCurrent")]
    internal static partial DriverStatus ContextSetCurrent(nint context);

    [LibraryImport(Library, EntryPoint = "cuMemGetInfo_v2")]
    internal static partial DriverStatus MemoryGetInfo(out nuint free, out nuint total);

    [LibraryImport(Library, EntryPoint = "cuMemAlloc_v2")]
    internal static partial DriverStatus MemoryAllocate(out nint address, nuint bytes);

    [LibraryImport(Library, EntryPoint = "cuMemFree_v2")]
    internal static partial DriverStatus MemoryFree(nint address);

    [LibraryImport(Library, EntryPoint = "cuMemAllocAsync")]
    internal static partial DriverStatus MemoryAllocateAsync(out nint address, nuint bytes, StreamHandle stream);

    [LibraryImport(Library, EntryPoint = "cuMemFreeAsync")]
    internal static partial DriverStatus MemoryFreeAsync(nint address, StreamHandle stream);

    [LibraryImport(Library, EntryPoint = "cuMemHostAlloc")]
    internal static partial DriverStatus HostAllocate(out nint address, nuint bytes, uint flags);

    [LibraryImport(Library, EntryPoint = "cuMemFreeHost")]
    internal static partial DriverStatus HostFree(nint address);

    [LibraryImport(Library, EntryPoint = "cuMemcpyHtoDAsync_v2")]
    internal static partial DriverStatus CopyToDeviceAsync(nint target, nint source, nuint bytes, StreamHandle stream);

    [LibraryImport(Library, EntryPoint = "cuMemcpyDtoHAsync_v2")]
    internal static partial DriverStatus CopyToHostAsync(nint target, nint source, nuint bytes, StreamHandle stream);

    [LibraryImport(Library, EntryPoint = "cuMemsetD8Async")]
    internal static partial DriverStatus SetBytesAsync(nint address, byte value, nuint bytes, StreamHandle stream);

    [LibraryImport(Library, EntryPoint = "cuModuleLoadDataEx")]
    internal static partial DriverStatus ModuleLoad(out ModuleHandle module, byte* image, uint optionCount, int* options, nint* values);

    [LibraryImport(Library, EntryPoint = "cuModuleUnload")]
    internal static partial DriverStatus ModuleUnload(nint module);

    [LibraryImport(Library, EntryPoint = "cuModuleGetFunction", StringMarshalling = StringMarshalling.Utf8)]
    internal static partial DriverStatus ModuleGetFunction(out nint function, ModuleHandle module, string name);

    [LibraryImport(Library, EntryPoint = "cuFuncGetAttribute")]
    internal static partial DriverStatus FunctionGetAttribute(out int value, FunctionAttribute attribute, nint function);

    [LibraryImport(Library, EntryPoint = "cuFuncSetAttribute")]
    internal static partial DriverStatus FunctionSetAttribute(nint function, FunctionAttribute attribute, int value);

    [LibraryImport(Library, EntryPoint = "cuOccupancyMaxActiveBlocksPerMultiprocessor")]
    internal static partial DriverStatus MaxActiveBlocks(out int blocks, nint function, int threadsPerBlock, nuint dynamicSharedBytes);

    [LibraryImport(Library, EntryPoint = "cuLaunchKernel")]
    internal static partial DriverStatus LaunchKernel(nint function, uint gridX, uint gridY, uint gridZ, uint blockX, uint blockY, uint blockZ,
        uint dynamicSharedBytes, StreamHandle stream, void** parameters, void** extra);

    [LibraryImport(Library, EntryPoint = "cuStreamCreate")]
    internal static partial DriverStatus StreamCreate(out StreamHandle stream, uint flags);

    [LibraryImport(Library, EntryPoint = "cuStreamDestroy_v2")]
    internal static partial DriverStatus StreamDestroy(nint stream);

    [LibraryImport(Library, EntryPoint = "cuStreamSynchronize")]
    internal static partial DriverStatus StreamSynchronize(StreamHandle stream);

    [LibraryImport(Library, EntryPoint = "cuStreamBeginCapture_v2")]
    internal static partial DriverStatus StreamBeginCapture(StreamHandle stream, uint mode);

    [LibraryImport(Library, EntryPoint = "cuStreamEndCapture")]
    internal static partial DriverStatus StreamEndCapture(StreamHandle stream, out nint graph);

    [LibraryImport(Library, EntryPoint = "cuEventCreate")]
    internal static partial DriverStatus EventCreate(out EventHandle created, uint flags);

    [LibraryImport(Library, EntryPoint = "cuEventDestroy_v2")]
    internal static partial DriverStatus EventDestroy(nint destroyed);

    [LibraryImport(Library, EntryPoint = "cuEventRecord")]
    internal static partial DriverStatus EventRecord(EventHandle recorded, StreamHandle stream);

    [LibraryImport(Library, EntryPoint = "cuEventSynchronize")]
    internal static partial DriverStatus EventSynchronize(EventHandle awaited);

    [LibraryImport(Library, EntryPoint = "cuEventElapsedTime")]
    internal static partial DriverStatus EventElapsedTime(out float milliseconds, EventHandle start, EventHandle end);

    [LibraryImport(Library, EntryPoint = "cuGraphGetNodes")]
    internal static partial DriverStatus GraphGetNodes(nint graph, nint* nodes, ref nuint count);

    [LibraryImport(Library, EntryPoint = "cuGraphInstantiateWithFlags")]
    internal static partial DriverStatus GraphInstantiate(out GraphHandle executable, nint graph, ulong flags);

    [LibraryImport(Library, EntryPoint = "cuGraphLaunch")]
    internal static partial DriverStatus GraphLaunch(GraphHandle executable, StreamHandle stream);

    [LibraryImport(Library, EntryPoint = "cuGraphDestroy")]
    internal static partial DriverStatus GraphDestroy(nint graph);

    [LibraryImport(Library, EntryPoint = "cuGraphExecDestroy")]
    internal static partial DriverStatus GraphExecutableDestroy(nint executable);
}

/// <summary>
/// A handle of the driver. The context must be current where one is released, which may be on the finalizer's thread, and must outlive
/// it: the process keeps the primary context to its end.
/// </summary>
internal abstract class DriverHandle() : SafeHandle(0, ownsHandle: true)
{
    /// <summary>The context that all handles of the process belong to; there is one device.</summary>
    internal static nint Context { get; set; }

    public override bool IsInvalid => handle == 0;

    protected abstract DriverStatus Destroy(nint value);

    protected override bool ReleaseHandle()
    {
        _ = NativeDriver.ContextSetCurrent(Context);
        return Destroy(handle) == DriverStatus.Success;
    }
}

internal sealed class ModuleHandle : DriverHandle
{
    protected override DriverStatus Destroy(nint value) => NativeDriver.ModuleUnload(value);
}

internal sealed class StreamHandle : DriverHandle
{
    protected override DriverStatus Destroy(nint value) => NativeDriver.StreamDestroy(value);
}

internal sealed class EventHandle : DriverHandle
{
    protected override DriverStatus Destroy(nint value) => NativeDriver.EventDestroy(value);
}

internal sealed class GraphHandle : DriverHandle
{
    protected override DriverStatus Destroy(nint value) => NativeDriver.GraphExecutableDestroy(value);
}
