using System.Runtime.InteropServices;
using System.Text;

namespace PerturbNas.Tests.Emulator;

/// <summary>
/// An emulated device of a test's own: a copy of the library under another name, which the loader takes for another library, so that
/// a fault that a test plants does not reach the tests that run beside it.
/// </summary>
public sealed class EmulatedDevice : IDisposable
{
    public const int Success = 0, InvalidValue = 1, OutOfMemory = 2, DeviceUnavailable = 46, NoBinaryForGpu = 209, InvalidPtx = 218,
        UnsupportedPtxVersion = 222, NotFound = 500, IllegalAddress = 700, MisalignedAddress = 716, LaunchFailed = 719, CaptureUnsupported = 900,
        CaptureInvalidated = 901;

    private readonly string _file = Path.Combine(Path.GetTempPath(), $"libcuda-{Guid.NewGuid():N}.so.1");
    private readonly nint _library;

    public EmulatedDevice()
    {
        File.Copy(Path.Combine(AppContext.BaseDirectory, "cuda-emulator", "libcuda.so.1"), _file);
        _library = NativeLibrary.Load(_file);
        Check(Call<UintCall>("cuInit")(0));
        Check(Call<OutPointerInt>("cuDevicePrimaryCtxRetain")(out var context, 0));
        Check(Call<PointerCall>("cuCtxSetCurrent")(context));
    }

    public delegate int UintCall(uint flags);
    public delegate int OutInt(out int value);
    public delegate int OutIntIntInt(out int value, int which, int device);
    public delegate int OutPointerInt(out nint value, int device);
    public delegate int OutPointerUint(out nint value, uint flags);
    public delegate int PointerCall(nint handle);
    public delegate int OutAddressSize(out ulong address, nuint bytes);
    public delegate int OutAddressSizeStream(out ulong address, nuint bytes, nint stream);
    public delegate int OutPointerSizeUint(out nint address, nuint bytes, uint flags);
    public delegate int AddressCall(ulong address);
    public delegate int OutSizeOutSize(out nuint first, out nuint second);
    public delegate int ToDevice(ulong target, ref byte source, nuint bytes);
    public delegate int FromDevice(ref byte target, ulong source, nuint bytes);
    public delegate int OnDevice(ulong target, ulong source, nuint bytes);
    public delegate int ToDeviceAsync(ulong target, nint source, nuint bytes, nint stream);
    public delegate int FromDeviceAsync(nint target, ulong source, nuint bytes, nint stream);
    public delegate int SetBytes(ulong target, byte value, nuint count);
    public delegate int SetBytesAsync(ulong target, byte value, nuint count, nint stream);
    public delegate int LoadModule(out nint module, byte[] image, uint count, int[] options, nint[] values);
    public delegate int GetFunction(out nint function, nint module, [MarshalAs(UnmanagedType.LPUTF8Str)] string name);
    public delegate int Launch(
        nint function, uint gridX, uint gridY, uint gridZ, uint blockX, uint blockY, uint blockZ, uint shared, nint stream, nint[]? parameters, nint extra);
    public delegate int OutIntIntPointer(out int value, int which, nint function);
    public delegate int PointerIntInt(nint function, int which, int value);
    public delegate int Occupancy(out int blocks, nint function, int threads, nuint shared);
    public delegate int PointerInt(nint stream, int mode);
    public delegate int PointerOutPointer(nint stream, out nint graph);
    public delegate int OutPointerPointerUlong(out nint executable, nint graph, ulong flags);
    public delegate int PointerPointer(nint first, nint second);
    public delegate int PointerPointerOutSize(nint graph, nint nodes, ref nuint count);
    public delegate int ErrorText(int error, out nint text);
    public delegate nint Text();
    public delegate void Action();
    public delegate void SizeAction(nuint bytes);
    public delegate void LongAction(long count);
    public delegate int Count();
    public delegate nint CountersAt(int index, out Counters counters);

    /// <summary>pnEmulatorCounters.</summary>
    [StructLayout(LayoutKind.Sequential)]
    public struct Counters
    {
        public ulong Launches, Blocks, Threads, WarpInstructions, LaneInstructions, FloatOperations, MatrixInstructions;
        public ulong GlobalLoadRequests, GlobalLoadSectors, GlobalLoadBytes, GlobalStoreRequests, GlobalStoreSectors, GlobalStoreBytes;
        public ulong SharedRequests, SharedWavefronts, SharedConflicts, Barriers, DivergentBranches, Atomics;
    }

    public T Call<T>(string name) where T : Delegate => Marshal.GetDelegateForFunctionPointer<T>(NativeLibrary.GetExport(_library, name));

    public string LastFault => Marshal.PtrToStringUTF8(Call<Text>("pnEmulatorLastFault")()) ?? "";

    public void Reset() => Call<Action>("pnEmulatorReset")();

    public void Check(int status) => Assert.True(status == Success, $"the driver call returned {status}: {LastFault}");

    public ulong Allocate(int bytes)
    {
        Check(Call<OutAddressSize>("cuMemAlloc_v2")(out var address, (nuint)bytes));
        return address;
    }

    public ulong Upload<T>(ReadOnlySpan<T> values) where T : unmanaged
    {
        var bytes = MemoryMarshal.AsBytes(values).ToArray();
        var address = Allocate(bytes.Length);
        Check(Call<ToDevice>("cuMemcpyHtoD_v2")(address, ref bytes[0], (nuint)bytes.Length));
        return address;
    }

    public T[] Download<T>(ulong address, int count) where T : unmanaged
    {
        var values = new T[count];
        var bytes = MemoryMarshal.AsBytes(values.AsSpan());
        Check(Call<FromDevice>("cuMemcpyDtoH_v2")(ref bytes[0], address, (nuint)bytes.Length));
        return values;
    }

    /// <summary>Loads PTX without its header; returns the status and what the driver says about it.</summary>
    public (int Status, nint Module, string Log) Load(string body, string version = "7.8", string target = "sm_80")
    {
        const int errorLog = 5, errorLogBytes = 6;
        var image = Encoding.UTF8.GetBytes($".version {version} .target {target} .address_size 64\n{body}\0");
        var log = new byte[400];
        var pinned = GCHandle.Alloc(log, GCHandleType.Pinned);
        try
        {
            var status = Call<LoadModule>("cuModuleLoadDataEx")(
                out var module, image, 2, [errorLog, errorLogBytes], [pinned.AddrOfPinnedObject(), log.Length]);
            return (status, module, Encoding.UTF8.GetString(log).TrimEnd('\0'));
        }
        finally
        {
            pinned.Free();
        }
    }

    public nint Function(string body, string name = "k")
    {
        var (status, module, log) = Load(body);
        Assert.True(status == Success, $"the module was refused: {log}\n{body}");
        Check(Call<GetFunction>("cuModuleGetFunction")(out var function, module, name));
        return function;
    }

    /// <summary>Launches with 64-bit parameters.</summary>
    public int TryLaunch(nint function, (int X, int Y, int Z) grid, (int X, int Y, int Z) block, int shared, nint stream, params ulong[] parameters)
    {
        var pinned = GCHandle.Alloc(parameters, GCHandleType.Pinned);
        try
        {
            var first = pinned.AddrOfPinnedObject();
            return Call<Launch>("cuLaunchKernel")(
                function, (uint)grid.X, (uint)grid.Y, (uint)grid.Z, (uint)block.X, (uint)block.Y, (uint)block.Z, (uint)shared, stream,
                [.. Enumerable.Range(0, parameters.Length).Select(p => first + (p * sizeof(ulong)))], 0);
        }
        finally
        {
            pinned.Free();
        }
    }

    public void Run(nint function, int blocks, int threads, params ulong[] parameters) =>
        Check(TryLaunch(function, (blocks, 1, 1), (threads, 1, 1), 0, 0, parameters));

    /// <summary>Launches one block with parameters as they lie in memory.</summary>
    public void RunWithStruct(nint function, int threads, byte[] parameters)
    {
        const nint end = 0, buffer = 1, size = 2;
        var bytes = GCHandle.Alloc(parameters, GCHandleType.Pinned);
        var length = GCHandle.Alloc((nuint)parameters.Length, GCHandleType.Pinned);
        var extra = GCHandle.Alloc(new[] { buffer, bytes.AddrOfPinnedObject(), size, length.AddrOfPinnedObject(), end }, GCHandleType.Pinned);
        try
        {
            Check(Call<Launch>("cuLaunchKernel")(function, 1, 1, 1, (uint)threads, 1, 1, 0, 0, null, extra.AddrOfPinnedObject()));
        }
        finally
        {
            bytes.Free();
            length.Free();
            extra.Free();
        }
    }

    public Dictionary<string, Counters> KernelCounters()
    {
        var kernels = new Dictionary<string, Counters>();
        for (var i = 0; i < Call<Count>("pnEmulatorKernelCount")(); i++)
        {
            var name = Marshal.PtrToStringUTF8(Call<CountersAt>("pnEmulatorCountersAt")(i, out var counters))!;
            kernels.Add(name, counters);
        }
        return kernels;
    }

    public void Dispose()
    {
        NativeLibrary.Free(_library);
        File.Delete(_file);
    }
}

/// <summary>One device for the tests of a class, made when the first of them runs.</summary>
public sealed class EmulatedDeviceFixture : IDisposable
{
    private readonly Lazy<EmulatedDevice> _device = new(() => new());

    public EmulatedDevice Device => _device.Value;

    public void Dispose()
    {
        if (_device.IsValueCreated)
            _device.Value.Dispose();
    }
}
