using System.Runtime.InteropServices;
using System.Text;

namespace PerturbNas.Backends.Cuda;

// What the backend sees of CUDA, in ManagedCuda's vocabulary: context, module, kernel, stream, event, graph. This folder is all that calls the
// driver; ManagedCuda/CudaDriver.cs, with the same types, takes its place in a build with -p:UseManagedCuda=true.

/// <summary>The first device of a driver library and its memory. All methods may be called from any thread.</summary>
internal sealed unsafe class CudaContext : IDisposable
{
    private const int NameLength = 256;

    [ThreadStatic]
    private static nint _current;

    private readonly int _device;
    private readonly nint _context;

    private CudaContext(int device, nint context)
    {
        (_device, _context) = (device, context);
        DriverHandle.Context = context;
        MakeCurrent();
    }

    public required DeviceProperties Properties { get; init; }

    /// <summary>Loads a driver library and takes its first device.</summary>
    /// <exception cref="DllNotFoundException">There is no such library.</exception>
    /// <exception cref="CudaException">The driver has no device, or it cannot be used.</exception>
    public static CudaContext Open(string library)
    {
        NativeDriver.Use(library);
        Check(NativeDriver.Init(0), "cuInit");
        Check(NativeDriver.DeviceGetCount(out var count), "cuDeviceGetCount");
        Check(count > 0 ? DriverStatus.Success : DriverStatus.NoDevice, "cuDeviceGetCount");
        Check(NativeDriver.DeviceGet(out var device, 0), "cuDeviceGet");
        Check(NativeDriver.DriverGetVersion(out var version), "cuDriverGetVersion");
        Check(NativeDriver.DeviceTotalMem(out var bytes, device), "cuDeviceTotalMem");
        var name = stackalloc byte[NameLength];
        Check(NativeDriver.DeviceGetName(name, NameLength, device), "cuDeviceGetName");
        var capability = 10 * Attribute(DeviceAttribute.ComputeCapabilityMajor) + Attribute(DeviceAttribute.ComputeCapabilityMinor);
        var multiprocessors = Attribute(DeviceAttribute.MultiprocessorCount);
        // Float32 lanes of a multiprocessor, each a multiply-add a cycle; memory transfers twice a cycle.
        var lanes = capability is 70 or 75 or 80 ? 64.0 : 128;
        var limits = new MachineLimits
        {
            Gigaflops = 2 * lanes * multiprocessors * Attribute(DeviceAttribute.ClockKilohertz) / 1e6,
            GigabytesPerSecond = 2.0 / 8 * Attribute(DeviceAttribute.MemoryBusBits) * Attribute(DeviceAttribute.MemoryClockKilohertz) / 1e6,
        };
        var properties = new DeviceProperties(Marshal.PtrToStringUTF8((nint)name)!, version, capability, multiprocessors, (long)bytes,
            Attribute(DeviceAttribute.MemoryPoolsSupported) != 0, limits);
        Check(NativeDriver.PrimaryContextRetain(out var context, device), "cuDevicePrimaryCtxRetain");
        return new CudaContext(device, context) { Properties = properties };

        int Attribute(DeviceAttribute attribute)
        {
            Check(NativeDriver.DeviceGetAttribute(out var value, attribute, device), "cuDeviceGetAttribute");
            return value;
        }
    }

    /// <summary>The driver's current context is a thread's own.</summary>
    public void MakeCurrent()
    {
        if (_current == _context)
            return;
        Check(NativeDriver.ContextSetCurrent(_context), "cuCtxSetCurrent");
        _current = _context;
    }

    /// <summary>Bytes of device memory that are free now.</summary>
    public long FreeMemoryBytes
    {
        get
        {
            MakeCurrent();
            Check(NativeDriver.MemoryGetInfo(out var free, out _), "cuMemGetInfo");
            return (long)free;
        }
    }

    /// <summary>Device memory, contents undefined; 0 if there is not enough.</summary>
    public nint AllocateMemory(long bytes, CudaStream stream)
    {
        MakeCurrent();
        nint address;
        var status = Properties.HasMemoryPools
            ? NativeDriver.MemoryAllocateAsync(out address, (nuint)bytes, stream.Handle)
            : NativeDriver.MemoryAllocate(out address, (nuint)bytes);
        if (status == DriverStatus.OutOfMemory)
            return 0;
        Check(status, "cuMemAlloc");
        return address;
    }

    /// <summary>
    /// Gives memory back once everything that was issued on the stream has been done. What went wrong before is not reported here again: memory
    /// is given back on the way out of an error, which this must not hide.
    /// </summary>
    public void FreeMemory(nint address, CudaStream stream)
    {
        _ = NativeDriver.ContextSetCurrent(_context);
        _current = _context;
        var status = Properties.HasMemoryPools ? NativeDriver.MemoryFreeAsync(address, stream.Handle) : NativeDriver.MemoryFree(address);
        if (status == DriverStatus.InvalidValue)
            Check(status, "cuMemFree");
    }

    /// <summary>Host memory that the device copies from and to by itself.</summary>
    public nint AllocateHostMemory(long bytes)
    {
        MakeCurrent();
        Check(NativeDriver.HostAllocate(out var address, (nuint)bytes, 0), "cuMemHostAlloc");
        return address;
    }

    public void FreeHostMemory(nint address)
    {
        _ = NativeDriver.ContextSetCurrent(_context);
        _ = NativeDriver.HostFree(address);
    }

    /// <summary>Compiles PTX for the device, or takes what the driver kept of the last time.</summary>
    /// <exception cref="CudaException">The driver cannot compile it; the message ends with the compiler's own words.</exception>
    public CudaModule LoadModulePtx(ReadOnlySpan<byte> ptx)
    {
        const int errorLogBuffer = 5, errorLogBytes = 6, logLength = 4096;
        MakeCurrent();
        var text = new byte[ptx.Length + 1];
        ptx.CopyTo(text);
        var log = stackalloc byte[logLength];
        log[0] = 0;
        var options = stackalloc int[] { errorLogBuffer, errorLogBytes };
        var values = stackalloc nint[] { (nint)log, logLength };
        fixed (byte* image = text)
        {
            var status = NativeDriver.ModuleLoad(out var module, image, 2, options, values);
            var words = Encoding.UTF8.GetString(MemoryMarshal.CreateReadOnlySpanFromNullTerminated(log)).ReplaceLineEndings(" ").Trim();
            Check(status, words.Length > 0 ? $"cuModuleLoadDataEx ({words})" : "cuModuleLoadDataEx");
            return new CudaModule(module);
        }
    }

    public CudaStream CreateStream()
    {
        const uint nonBlocking = 1;
        MakeCurrent();
        Check(NativeDriver.StreamCreate(out var stream, nonBlocking), "cuStreamCreate");
        return new CudaStream(stream);
    }

    public CudaEvent CreateEvent()
    {
        MakeCurrent();
        Check(NativeDriver.EventCreate(out var created, 0), "cuEventCreate");
        return new CudaEvent(created);
    }

    public void Dispose()
    {
        // A lost device refuses even this; there is nothing to be done about it.
        _ = NativeDriver.PrimaryContextRelease(_device);
        _current = 0;
    }

    internal static void Check(DriverStatus status, string call)
    {
        if (status == DriverStatus.Success)
            return;
        var known = NativeDriver.GetErrorName(status, out var name) == DriverStatus.Success;
        known &= NativeDriver.GetErrorString(status, out var text) == DriverStatus.Success;
        throw new CudaException(status, call, known ? Marshal.PtrToStringUTF8(name)! : $"error {(int)status}",
            known ? Marshal.PtrToStringUTF8(text)! : "unknown to this driver", NativeDriver.IsEmulated ? EmulatedDriver.LastFault : null);
    }
}

/// <summary>Kernels that were compiled together.</summary>
internal sealed class CudaModule(ModuleHandle handle) : IDisposable
{
    public CudaKernel GetKernel(string name)
    {
        CudaContext.Check(NativeDriver.ModuleGetFunction(out var function, handle, name), $"cuModuleGetFunction({name})");
        return new CudaKernel(name, function);
    }

    public void Dispose() => handle.Dispose();
}

/// <summary>A kernel; it belongs to its module.</summary>
internal sealed unsafe class CudaKernel(string name, nint function)
{
    // What a block may have without being asked for.
    private const int UsualSharedBytes = 48 << 10;

    private int _sharedBytes = UsualSharedBytes;

    public string Name => name;

    /// <summary>32-bit registers of a thread.</summary>
    public int Registers => Attribute(FunctionAttribute.Registers);

    /// <summary>Bytes of a thread's local memory: arrays and spilled registers.</summary>
    public int LocalBytes => Attribute(FunctionAttribute.LocalBytes);

    public int StaticSharedBytes => Attribute(FunctionAttribute.StaticSharedBytes);

    /// <summary>Blocks that a multiprocessor holds at a time.</summary>
    public int MaxActiveBlocks(Dim3 block, int dynamicSharedBytes)
    {
        CudaContext.Check(NativeDriver.MaxActiveBlocks(out var blocks, function, (int)block.Count, (nuint)dynamicSharedBytes),
            $"cuOccupancyMaxActiveBlocksPerMultiprocessor({name})");
        return blocks;
    }

    /// <summary>Launches the kernel with its one argument, a struct, which is copied.</summary>
    public void Launch(Dim3 grid, Dim3 block, int dynamicSharedBytes, void* argument, CudaStream stream)
    {
        if (dynamicSharedBytes > _sharedBytes)
        {
            CudaContext.Check(NativeDriver.FunctionSetAttribute(function, FunctionAttribute.MaxDynamicSharedBytes, dynamicSharedBytes),
                $"cuFuncSetAttribute({name}, {dynamicSharedBytes} bytes of shared memory)");
            _sharedBytes = dynamicSharedBytes;
        }
        CudaContext.Check(NativeDriver.LaunchKernel(function, (uint)grid.X, (uint)grid.Y, (uint)grid.Z, (uint)block.X, (uint)block.Y, (uint)block.Z,
            (uint)dynamicSharedBytes, stream.Handle, &argument, null), $"cuLaunchKernel({name})");
    }

    private int Attribute(FunctionAttribute attribute)
    {
        CudaContext.Check(NativeDriver.FunctionGetAttribute(out var value, attribute, function), $"cuFuncGetAttribute({name})");
        return value;
    }
}

/// <summary>Work for the device, done in the order in which it was issued.</summary>
internal sealed class CudaStream(StreamHandle handle) : IDisposable
{
    internal StreamHandle Handle => handle;

    /// <summary>The driver's own handle.</summary>
    public nint Pointer => handle.DangerousGetHandle();

    public void CopyToDevice(nint target, nint source, long bytes) =>
        CudaContext.Check(NativeDriver.CopyToDeviceAsync(target, source, (nuint)bytes, handle), "cuMemcpyHtoDAsync");

    public void CopyToHost(nint target, nint source, long bytes) =>
        CudaContext.Check(NativeDriver.CopyToHostAsync(target, source, (nuint)bytes, handle), "cuMemcpyDtoHAsync");

    public void ClearMemory(nint address, long bytes) =>
        CudaContext.Check(NativeDriver.SetBytesAsync(address, 0, (nuint)bytes, handle), "cuMemsetD8Async");

    public void Record(CudaEvent recorded) => CudaContext.Check(NativeDriver.EventRecord(recorded.Handle, handle), "cuEventRecord");

    /// <summary>Waits until everything has been done; an error of any of it comes out here.</summary>
    public void Synchronize() => CudaContext.Check(NativeDriver.StreamSynchronize(handle), "cuStreamSynchronize");

    /// <summary>From here to <see cref="EndCapture"/> what is issued is not done but written down.</summary>
    public void BeginCapture()
    {
        const uint relaxed = 2;
        CudaContext.Check(NativeDriver.StreamBeginCapture(handle, relaxed), "cuStreamBeginCapture");
    }

    public void AbandonCapture()
    {
        if (NativeDriver.StreamEndCapture(handle, out var graph) == DriverStatus.Success)
            _ = NativeDriver.GraphDestroy(graph);
    }

    public CudaGraph EndCapture()
    {
        CudaContext.Check(NativeDriver.StreamEndCapture(handle, out var graph), "cuStreamEndCapture");
        try
        {
            return new CudaGraph(graph);
        }
        finally
        {
            _ = NativeDriver.GraphDestroy(graph);
        }
    }

    public void Launch(CudaGraph graph) => CudaContext.Check(NativeDriver.GraphLaunch(graph.Handle, handle), "cuGraphLaunch");

    public void Dispose() => handle.Dispose();
}

/// <summary>A point in a stream.</summary>
internal sealed class CudaEvent(EventHandle handle) : IDisposable
{
    internal EventHandle Handle => handle;

    /// <summary>Waits until the stream has come to the point where the event was recorded last; at once if it never was.</summary>
    public void Synchronize() => CudaContext.Check(NativeDriver.EventSynchronize(handle), "cuEventSynchronize");

    /// <summary>Time between two points.</summary>
    public static float ElapsedMilliseconds(CudaEvent start, CudaEvent end)
    {
        CudaContext.Check(NativeDriver.EventElapsedTime(out var milliseconds, start.Handle, end.Handle), "cuEventElapsedTime");
        return milliseconds;
    }

    public void Dispose() => handle.Dispose();
}

/// <summary>Captured work, which is launched as a whole.</summary>
internal sealed unsafe class CudaGraph : IDisposable
{
    private readonly GraphHandle _handle;

    /// <param name="graph">What was captured; the caller's own.</param>
    internal CudaGraph(nint graph)
    {
        nuint count = 0;
        CudaContext.Check(NativeDriver.GraphGetNodes(graph, null, ref count), "cuGraphGetNodes");
        CudaContext.Check(NativeDriver.GraphInstantiate(out _handle, graph, 0), "cuGraphInstantiate");
        NodeCount = (int)count;
    }

    internal GraphHandle Handle => _handle;

    /// <summary>Kernels, copies and fills of the graph.</summary>
    public int NodeCount { get; }

    public void Dispose() => _handle.Dispose();
}
