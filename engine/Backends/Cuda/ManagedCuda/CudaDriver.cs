using System.Runtime.InteropServices;
using System.Text;
using ManagedCuda;
using ManagedCuda.BasicTypes;
using Context = ManagedCuda.PrimaryContext;
using Driver = ManagedCuda.DriverAPINativeMethods;

namespace PerturbNas.Backends.Cuda;

// The types of Driver/CudaDriver.cs on top of ManagedCuda-12, for builds with -p:UseManagedCuda=true, which need its package from the registry
// and its licence (GPL 3, or a commercial one). Written against its public interface; it is not part of the default build, which is the
// one that is tested. It cannot choose the emulated driver: ManagedCuda loads the system's library by itself.

/// <summary>The first device and its memory. All methods may be called from any thread.</summary>
internal sealed unsafe class CudaContext : IDisposable
{
    private const int NameLength = 256, LogLength = 4096;

    private readonly Context _context;

    private CudaContext(Context context) => _context = context;

    public required DeviceProperties Properties { get; init; }

    /// <summary>Takes the first device of the system's driver.</summary>
    public static CudaContext Open(string library)
    {
        if (Path.IsPathRooted(library))
            throw new UserException("This build drives CUDA through ManagedCuda, which cannot use the emulated driver; build without -p:UseManagedCuda=true.");
        return Try("PrimaryContext", () =>
        {
            var context = new Context(0);
            context.SetCurrent();
            // One by one: ManagedCuda's own summary of a device asks for everything that the newest driver knows.
            var device = new CUdevice();
            Check(Driver.DeviceManagement.cuDeviceGet(ref device, 0), "cuDeviceGet");
            var version = 0;
            Check(Driver.cuDriverGetVersion(ref version), "cuDriverGetVersion");
            SizeT bytes = 0;
            Check(Driver.DeviceManagement.cuDeviceTotalMem_v2(ref bytes, device), "cuDeviceTotalMem");
            var name = new byte[NameLength];
            Check(Driver.DeviceManagement.cuDeviceGetName(name, NameLength, device), "cuDeviceGetName");
            var capability = 10 * Attribute(CUDeviceAttribute.ComputeCapabilityMajor) + Attribute(CUDeviceAttribute.ComputeCapabilityMinor);
            var multiprocessors = Attribute(CUDeviceAttribute.MultiProcessorCount);
            var lanes = capability is 70 or 75 or 80 ? 64.0 : 128;
            var limits = new MachineLimits
            {
                Gigaflops = 2 * lanes * multiprocessors * Attribute(CUDeviceAttribute.ClockRate) / 1e6,
                GigabytesPerSecond = 2.0 / 8 * Attribute(CUDeviceAttribute.GlobalMemoryBusWidth) * Attribute(CUDeviceAttribute.MemoryClockRate) / 1e6,
            };
            return new CudaContext(context)
            {
                Properties = new DeviceProperties(Text(name), version, capability, multiprocessors, (long)(ulong)bytes,
                    Attribute(CUDeviceAttribute.MemoryPoolsSupported) != 0, limits),
            };

            int Attribute(CUDeviceAttribute attribute)
            {
                var value = 0;
                Check(Driver.DeviceManagement.cuDeviceGetAttribute(ref value, attribute, device), "cuDeviceGetAttribute");
                return value;
            }
        });
    }

    public void MakeCurrent() => Try("cuCtxSetCurrent", _context.SetCurrent);

    /// <summary>Bytes of device memory that are free now.</summary>
    public long FreeMemoryBytes
    {
        get
        {
            MakeCurrent();
            SizeT free = 0, total = 0;
            Check(Driver.MemoryManagement.cuMemGetInfo_v2(ref free, ref total), "cuMemGetInfo");
            return (long)(ulong)free;
        }
    }

    /// <summary>Device memory, contents undefined; 0 if there is not enough.</summary>
    public nint AllocateMemory(long bytes, CudaStream stream)
    {
        MakeCurrent();
        var address = new CUdeviceptr();
        var status = Properties.HasMemoryPools
            ? Driver.MemoryManagement.cuMemAllocAsync(ref address, (ulong)bytes, stream.Handle)
            : Driver.MemoryManagement.cuMemAlloc_v2(ref address, (ulong)bytes);
        if (status == CUResult.ErrorOutOfMemory)
            return 0;
        Check(status, "cuMemAlloc");
        return (nint)(ulong)address.Pointer;
    }

    /// <summary>Gives memory back once everything that was issued on the stream has been done; what went wrong before is not reported again.</summary>
    public void FreeMemory(nint address, CudaStream stream)
    {
        _ = Driver.ContextManagement.cuCtxSetCurrent(_context.Context);
        var status = Properties.HasMemoryPools
            ? Driver.MemoryManagement.cuMemFreeAsync(At(address), stream.Handle)
            : Driver.MemoryManagement.cuMemFree_v2(At(address));
        if (status == CUResult.ErrorInvalidValue)
            Check(status, "cuMemFree");
    }

    /// <summary>Host memory that the device copies from and to by itself.</summary>
    public nint AllocateHostMemory(long bytes)
    {
        MakeCurrent();
        var address = IntPtr.Zero;
        Check(Driver.MemoryManagement.cuMemHostAlloc(ref address, (ulong)bytes, 0), "cuMemHostAlloc");
        return address;
    }

    public void FreeHostMemory(nint address)
    {
        _ = Driver.ContextManagement.cuCtxSetCurrent(_context.Context);
        _ = Driver.MemoryManagement.cuMemFreeHost(address);
    }

    /// <summary>Compiles PTX for the device, or takes what the driver kept of the last time.</summary>
    /// <exception cref="CudaException">The driver cannot compile it; the message ends with the compiler's own words.</exception>
    public CudaModule LoadModulePtx(ReadOnlySpan<byte> ptx)
    {
        MakeCurrent();
        var text = new byte[ptx.Length + 1];
        ptx.CopyTo(text);
        var log = new byte[LogLength];
        fixed (byte* words = log)
        {
            var module = new CUmodule();
            var status = Driver.ModuleManagement.cuModuleLoadDataEx(ref module, text, 2, [CUJITOption.ErrorLogBuffer, CUJITOption.ErrorLogBufferSizeBytes],
                [(IntPtr)words, LogLength]);
            var said = Text(log).ReplaceLineEndings(" ").Trim();
            Check(status, said.Length > 0 ? $"cuModuleLoadDataEx ({said})" : "cuModuleLoadDataEx");
            return new CudaModule(module);
        }
    }

    public CudaStream CreateStream()
    {
        MakeCurrent();
        return Try("cuStreamCreate", () => new CudaStream(new ManagedCuda.CudaStream(CUStreamFlags.NonBlocking)));
    }

    public CudaEvent CreateEvent()
    {
        MakeCurrent();
        return Try("cuEventCreate", () => new CudaEvent(new ManagedCuda.CudaEvent()));
    }

    public void Dispose() => _context.Dispose();

    internal static CUdeviceptr At(nint address) => new((ulong)address);

    private static string Text(byte[] text) => Encoding.UTF8.GetString(text.AsSpan()[..Math.Max(0, Array.IndexOf(text, (byte)0))]);

    internal static void Check(CUResult status, string call)
    {
        if (status == CUResult.Success)
            return;
        var (name, text) = (IntPtr.Zero, IntPtr.Zero);
        _ = Driver.ErrorHandling.cuGetErrorName(status, ref name);
        _ = Driver.ErrorHandling.cuGetErrorString(status, ref text);
        throw new CudaException((DriverStatus)(int)status, call, Marshal.PtrToStringUTF8(name) ?? $"{status}", Marshal.PtrToStringUTF8(text) ?? "", fault: null);
    }

    /// <summary>Runs calls of ManagedCuda's classes, whose exceptions become this program's.</summary>
    internal static T Try<T>(string call, Func<T> calls)
    {
        try
        {
            return calls();
        }
        catch (ManagedCuda.CudaException e)
        {
            Check(e.CudaError, call);
            throw;
        }
    }

    internal static void Try(string call, Action calls) => Try(call, () =>
    {
        calls();
        return true;
    });
}

/// <summary>Kernels that were compiled together.</summary>
internal sealed class CudaModule(CUmodule module) : IDisposable
{
    public CudaKernel GetKernel(string name)
    {
        var function = new CUfunction();
        CudaContext.Check(Driver.ModuleManagement.cuModuleGetFunction(ref function, module, name), $"cuModuleGetFunction({name})");
        return new CudaKernel(name, function);
    }

    // A lost device refuses even this; there is nothing to be done about it.
    public void Dispose() => _ = Driver.ModuleManagement.cuModuleUnload(module);
}

/// <summary>A kernel; it belongs to its module.</summary>
internal sealed unsafe class CudaKernel(string name, CUfunction function)
{
    private const int UsualSharedBytes = 48 << 10;

    private int _sharedBytes = UsualSharedBytes;

    public string Name => name;

    /// <summary>32-bit registers of a thread.</summary>
    public int Registers => Attribute(CUFunctionAttribute.NumRegs);

    /// <summary>Bytes of a thread's local memory: arrays and spilled registers.</summary>
    public int LocalBytes => Attribute(CUFunctionAttribute.LocalSizeBytes);

    public int StaticSharedBytes => Attribute(CUFunctionAttribute.SharedSizeBytes);

    /// <summary>Blocks that a multiprocessor holds at a time.</summary>
    public int MaxActiveBlocks(Dim3 block, int dynamicSharedBytes)
    {
        var blocks = 0;
        CudaContext.Check(Driver.Occupancy.cuOccupancyMaxActiveBlocksPerMultiprocessor(ref blocks, function, (int)block.Count, dynamicSharedBytes),
            $"cuOccupancyMaxActiveBlocksPerMultiprocessor({Name})");
        return blocks;
    }

    /// <summary>Launches the kernel with its one argument, a struct, which is copied.</summary>
    public void Launch(Dim3 grid, Dim3 block, int dynamicSharedBytes, void* argument, CudaStream stream)
    {
        if (dynamicSharedBytes > _sharedBytes)
        {
            CudaContext.Check(Driver.FunctionManagement.cuFuncSetAttribute(function, CUFunctionAttribute.MaxDynamicSharedSizeBytes, dynamicSharedBytes),
                $"cuFuncSetAttribute({Name}, {dynamicSharedBytes} bytes of shared memory)");
            _sharedBytes = dynamicSharedBytes;
        }
        CudaContext.Check(Driver.Launch.cuLaunchKernel(function, (uint)grid.X, (uint)grid.Y, (uint)grid.Z, (uint)block.X, (uint)block.Y, (uint)block.Z,
            (uint)dynamicSharedBytes, stream.Handle, [(IntPtr)argument], null), $"cuLaunchKernel({Name})");
    }

    private int Attribute(CUFunctionAttribute attribute)
    {
        var value = 0;
        CudaContext.Check(Driver.FunctionManagement.cuFuncGetAttribute(ref value, attribute, function), $"cuFuncGetAttribute({name})");
        return value;
    }
}

/// <summary>Work for the device, done in the order in which it was issued.</summary>
internal sealed class CudaStream(ManagedCuda.CudaStream stream) : IDisposable
{
    internal CUstream Handle => stream.Stream;

    /// <summary>The driver's own handle.</summary>
    public nint Pointer => stream.Stream.Pointer;

    public void CopyToDevice(nint target, nint source, long bytes) =>
        CudaContext.Check(Driver.AsynchronousMemcpy_v2.cuMemcpyHtoDAsync_v2(CudaContext.At(target), source, (ulong)bytes, Handle), "cuMemcpyHtoDAsync");

    public void CopyToHost(nint target, nint source, long bytes) =>
        CudaContext.Check(Driver.AsynchronousMemcpy_v2.cuMemcpyDtoHAsync_v2(target, CudaContext.At(source), (ulong)bytes, Handle), "cuMemcpyDtoHAsync");

    public void ClearMemory(nint address, long bytes) =>
        CudaContext.Check(Driver.MemsetAsync.cuMemsetD8Async(CudaContext.At(address), 0, (ulong)bytes, Handle), "cuMemsetD8Async");

    public void Record(CudaEvent recorded) => CudaContext.Try("cuEventRecord", () => recorded.Event.Record(Handle));

    /// <summary>Waits until everything has been done; an error of any of it comes out here.</summary>
    public void Synchronize() => CudaContext.Try("cuStreamSynchronize", stream.Synchronize);

    /// <summary>From here to <see cref="EndCapture"/> what is issued is not done but written down.</summary>
    public void BeginCapture() =>
        CudaContext.Check(Driver.Streams.cuStreamBeginCapture(Handle, CUstreamCaptureMode.Relaxed), "cuStreamBeginCapture");

    public void AbandonCapture()
    {
        var graph = new CUgraph();
        if (Driver.Streams.cuStreamEndCapture(Handle, ref graph) == CUResult.Success)
            _ = Driver.GraphManagment.cuGraphDestroy(graph);
    }

    public CudaGraph EndCapture()
    {
        var graph = new CUgraph();
        CudaContext.Check(Driver.Streams.cuStreamEndCapture(Handle, ref graph), "cuStreamEndCapture");
        try
        {
            return new CudaGraph(graph);
        }
        finally
        {
            _ = Driver.GraphManagment.cuGraphDestroy(graph);
        }
    }

    public void Launch(CudaGraph graph) => CudaContext.Check(Driver.GraphManagment.cuGraphLaunch(graph.Handle, Handle), "cuGraphLaunch");

    public void Dispose() => stream.Dispose();
}

/// <summary>A point in a stream.</summary>
internal sealed class CudaEvent(ManagedCuda.CudaEvent recorded) : IDisposable
{
    internal ManagedCuda.CudaEvent Event => recorded;

    /// <summary>Waits until the stream has come to the point where the event was recorded last; at once if it never was.</summary>
    public void Synchronize() => CudaContext.Try("cuEventSynchronize", recorded.Synchronize);

    /// <summary>Time between two points.</summary>
    public static float ElapsedMilliseconds(CudaEvent start, CudaEvent end) =>
        CudaContext.Try("cuEventElapsedTime", () => ManagedCuda.CudaEvent.ElapsedTime(start.Event, end.Event));

    public void Dispose() => recorded.Dispose();
}

/// <summary>Captured work, which is launched as a whole.</summary>
internal sealed class CudaGraph : IDisposable
{
    private CUgraphExec _executable;

    /// <param name="graph">What was captured; the caller's own.</param>
    internal CudaGraph(CUgraph graph)
    {
        SizeT count = 0;
        CudaContext.Check(Driver.GraphManagment.cuGraphGetNodes(graph, null, ref count), "cuGraphGetNodes");
        CudaContext.Check(Driver.GraphManagment.cuGraphInstantiate(ref _executable, graph, 0), "cuGraphInstantiate");
        NodeCount = (int)(long)count;
    }

    ~CudaGraph() => Dispose();

    internal CUgraphExec Handle => _executable;

    /// <summary>Kernels, copies and fills of the graph.</summary>
    public int NodeCount { get; }

    public void Dispose()
    {
        if (_executable.Pointer != IntPtr.Zero)
            _ = Driver.GraphManagment.cuGraphExecDestroy(_executable);
        _executable = new CUgraphExec();
        GC.SuppressFinalize(this);
    }
}

/// <summary>There is no emulated device in this build.</summary>
internal static class EmulatedDriver
{
    internal static EmulatedCounters Total() => throw new NotSupportedException("ManagedCuda cannot use the emulated driver");
}
