using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

/// <summary>
/// The kernels of kernels/cuda on a CUDA device: float32, in one stream. This file has what all operators share: memory, copies, and
/// launching; each operator checks its arguments and chooses its grid in a file of its own. One thread at a time may call kernels;
/// <see cref="Free"/> may come from any thread.
/// </summary>
public unsafe partial class CudaBackend : Backend
{
    /// <summary>Bytes of arguments that a launch can take.</summary>
    private const int ArgumentLimit = 4096;

    // Blocks beyond this only wait for others to end.
    private const int BlocksPerMultiprocessor = 32;

    private const int StagingBytes = 4 << 20;

    private readonly CudaContext _context;
    private readonly CudaStream _stream;
    private readonly PtxModules _ptx;
    private readonly List<CudaModule> _modules = [];
    private readonly Dictionary<string, CudaKernel> _kernels = [];
    private readonly Dictionary<nint, long> _allocated = [];
    private readonly ConditionalWeakTable<object, Replayed> _replayed = [];
    private readonly CudaEvent _timingStart, _timingEnd;
    private readonly Staging[] _staging;
    private int _nextStaging;
    private nint _scratch;
    private long _scratchBytes;
    private bool _capturing;

    /// <param name="kind">Which of the CUDA devices.</param>
    /// <exception cref="UserException">There is no such device, or it cannot be used; the message says why.</exception>
    public CudaBackend(DeviceKind kind)
    {
        (_context, _ptx) = CudaDevice.Open(kind);
        (Name, IsEmulated) = (Devices.NameOf(kind), kind == DeviceKind.CudaEmulated);
        Multiprocessors = _context.Properties.Multiprocessors;
        _stream = _context.CreateStream();
        _staging = [new Staging(_context), new Staging(_context)];
        (_timingStart, _timingEnd) = (_context.CreateEvent(), _context.CreateEvent());
        _refusedLabel = (RefusedLabel*)_context.AllocateHostMemory(sizeof(RefusedLabel));
        *_refusedLabel = default;
    }

    /// <summary>For <see cref="CudaLaunchCounter"/>, which has no device and overrides everything that would use it.</summary>
    private protected CudaBackend(string name, int multiprocessors)
    {
        (Name, Multiprocessors) = (name, multiprocessors);
        (_context, _ptx, _stream, _staging, _timingStart, _timingEnd) = (null!, null!, null!, [], null!, null!);
    }

    /// <summary>"cuda" or "cuda-emulated".</summary>
    public override string Name { get; }

    public override string Description => $"{Name} ({_context.Properties.Name}, {_context.Properties.MemoryBytes >> 20} MiB{(Tf32 ? ", TF32" : "")})";

    /// <summary>Whether the device is emulated.</summary>
    public bool IsEmulated { get; }

    /// <summary>What the emulated device has counted since it was opened.</summary>
    public EmulatedCounters Emulated => IsEmulated ? EmulatedDriver.Total() : throw new InvalidOperationException($"{Name} counts nothing");

    /// <summary>The device's own name.</summary>
    public string Processor => _context.Properties.Name;

    /// <summary>Bytes of the device's memory.</summary>
    public long MemoryBytes => _context.Properties.MemoryBytes;

    /// <summary>What the kernels in use were compiled for: "sm_80".</summary>
    public string Target => $"sm_{_ptx.Target}";

    /// <summary>
    /// The driver's handle of the stream that all work is issued to, for libraries that issue more to it; the device's context is then this thread's.
    /// </summary>
    public nint Stream
    {
        get
        {
            Flush();
            _context.MakeCurrent();
            return _stream.Pointer;
        }
    }

    /// <summary>What kernels are there for.</summary>
    public IReadOnlyList<string> Targets => PtxModules.TargetNames;

    /// <summary>What this build lacks to use a CUDA device, and how to get it; null: nothing.</summary>
    public static string? WhyNotBuilt(DeviceKind kind) => CudaDevice.WhyNotBuilt(kind);

    public override int ElementSize => sizeof(float);

    public override long? DeviceMemoryBytes
    {
        get
        {
            lock (_allocated)
                return _context.FreeMemoryBytes + _allocated.Values.Sum();
        }
    }

    /// <inheritdoc/>
    public override nint Allocate(long bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        var address = AllocateMemory(bytes);
        lock (_allocated)
            _allocated.Add(address, bytes);
        Zero(address, bytes);
        return address;
    }

    public override void Free(nint address)
    {
        Flush();
        lock (_allocated)
            _allocated.Remove(address);
        if (address != 0)
            _context.FreeMemory(address, _stream);
    }

    public override void Write(nint address, ReadOnlySpan<float> values) => Write(address, MemoryMarshal.AsBytes(values));

    public override void Write(nint address, ReadOnlySpan<double> values)
    {
        var floats = new float[values.Length];
        for (var i = 0; i < values.Length; i++)
            floats[i] = (float)values[i];
        Write(address, floats.AsSpan());
    }

    public override void Write(nint address, ReadOnlySpan<int> values) => Write(address, MemoryMarshal.AsBytes(values));

    public override void Read(nint address, Span<float> values) => ReadBytes(address, MemoryMarshal.AsBytes(values));

    public override void Read(nint address, Span<double> values)
    {
        var floats = new float[values.Length];
        Read(address, floats.AsSpan());
        for (var i = 0; i < values.Length; i++)
            values[i] = floats[i];
    }

    public override void ReadBytes(nint address, Span<byte> bytes)
    {
        RequireNotCapturing();
        Flush();
        _context.MakeCurrent();
        fixed (byte* target = bytes)
        {
            if (bytes.Length > 0)
                _stream.CopyToHost((nint)target, address, bytes.Length);
            _stream.Synchronize();
        }
        RefuseLabels();
    }

    public override void Zero(nint address, long bytes)
    {
        Flush();
        _context.MakeCurrent();
        if (bytes > 0)
            _stream.ClearMemory(address, bytes);
    }

    /// <inheritdoc/>
    /// <remarks>
    /// The first time the work is just done, which loads its kernels and lets the scratch memory grow; the second time it is captured as a graph,
    /// and from then on the graph is launched, as long as the scratch memory stays where it is. A graph lives as long as its key.
    /// </remarks>
    public override void Replay(object key, Action work)
    {
        Flush();
        if (!_replayed.TryGetValue(key, out var replayed))
        {
            work();
            _replayed.Add(key, new Replayed());
            return;
        }
        if (replayed.Graph is null || replayed.Scratch != _scratch)
        {
            replayed.Graph?.Dispose();
            replayed.Graph = Capture(work);
            replayed.Scratch = _scratch;
        }
        _stream.Launch(replayed.Graph);
    }

    public override void BeginTiming()
    {
        Flush();
        _context.MakeCurrent();
        _stream.Record(_timingStart);
    }

    public override double? EndTiming()
    {
        Flush();
        _stream.Record(_timingEnd);
        _timingEnd.Synchronize();
        return CudaEvent.ElapsedMilliseconds(_timingStart, _timingEnd) / 1e3;
    }

    protected override void Dispose(bool disposing)
    {
        if (!disposing)
            return;
        foreach (var (_, replayed) in _replayed)
            replayed.Graph?.Dispose();
        _timingStart.Dispose();
        _timingEnd.Dispose();
        Free(_scratch);
        FreeCounters();
        _context.FreeHostMemory((nint)_refusedLabel);
        foreach (var staging in _staging)
            staging.Dispose();
        foreach (var module in _modules)
            module.Dispose();
        _stream.Dispose();
        _context.Dispose();
    }

    /// <summary>The device's processors, each of which runs some blocks at a time.</summary>
    private int Multiprocessors { get; }

    /// <inheritdoc/>
    /// <remarks>What is emulated is an H100.</remarks>
    public override MachineLimits MeasureLimits() => IsEmulated ? CudaLaunchCounter.H100 : _context.Properties.Limits;

    /// <summary>Launches a kernel with its one argument. The kernel is loaded where it was not needed before.</summary>
    private void Launch<T>(string kernel, Dim3 grid, Dim3 block, in T arguments, int sharedBytes = 0)
        where T : unmanaged
    {
        if (sizeof(T) > ArgumentLimit)
            throw new InvalidOperationException($"{typeof(T).Name} has {sizeof(T)} bytes; a launch takes {ArgumentLimit}");
        Flush();
        fixed (T* address = &arguments)
            Launch(kernel, grid, block, address, sharedBytes);
    }

    private protected virtual void Launch(string kernel, Dim3 grid, Dim3 block, void* argument, int sharedBytes)
    {
        _context.MakeCurrent();
        Find(kernel).Launch(grid, block, sharedBytes, argument, _stream);
    }

    /// <summary>
    /// Device memory, contents undefined, until the next operator's call: an operator asks once, for the sum of what its kernels need.
    /// </summary>
    private protected virtual nint Scratch(long bytes)
    {
        if (bytes <= _scratchBytes)
            return _scratch;
        RequireNotCapturing();
        Free(_scratch);
        (_scratch, _scratchBytes) = (0, 0);
        _scratch = AllocateMemory(bytes);
        _scratchBytes = bytes;
        return _scratch;
    }

    /// <summary>
    /// Blocks for elements that are dealt out in strides of the grid: enough to fill the device, no more than there is work for.
    /// </summary>
    private int GridFor(long elements, int elementsPerBlock) =>
        (int)Math.Clamp((elements + elementsPerBlock - 1) / elementsPerBlock, 1, (long)Multiprocessors * BlocksPerMultiprocessor);

    /// <summary>Refuses the arguments of the calling operator unless the condition holds.</summary>
    private static void Require(bool condition, string message, [CallerMemberName] string @operator = "")
    {
        if (!condition)
            throw new KernelException($"{@operator}: {message}");
    }

    private KernelException NotSupported(string kernel) => new($"{kernel} is not supported on {Name} yet", KernelStatus.NotSupported);

    /// <summary>From now on the kernel of this name is that of other PTX: so tests plant errors.</summary>
    internal void Replace(string kernel, ReadOnlySpan<byte> ptx)
    {
        _context.MakeCurrent();
        _kernels[kernel] = Load(kernel, ptx);
    }

    private CudaKernel Find(string name)
    {
        if (!_kernels.TryGetValue(name, out var kernel))
            _kernels.Add(name, kernel = Load(name, _ptx.ModuleOf(name) ?? throw NotSupported(name)));
        return kernel;
    }

    private CudaKernel Load(string kernel, ReadOnlySpan<byte> ptx)
    {
        var module = _context.LoadModulePtx(ptx);
        _modules.Add(module);
        return module.GetKernel(kernel);
    }

    private nint AllocateMemory(long bytes)
    {
        var address = _context.AllocateMemory(Math.Max(bytes, 1), _stream);
        return address != 0 ? address : throw new KernelException(
            $"{Name} has no room for {bytes / (double)(1 << 20):0.0} MiB more: {_context.FreeMemoryBytes >> 20} of " +
            $"{_context.Properties.MemoryBytes >> 20} MiB are free", KernelStatus.OutOfMemory);
    }

    private CudaGraph Capture(Action work)
    {
        _context.MakeCurrent();
        _stream.BeginCapture();
        _capturing = true;
        try
        {
            work();
            Flush();
        }
        catch
        {
            // The work's own error counts, not that of a capture which was cut short.
            _capturing = false;
            Forget();
            _stream.AbandonCapture();
            throw;
        }
        _capturing = false;
        return _stream.EndCapture();
    }

    private void RequireNotCapturing()
    {
        if (_capturing)
            throw new InvalidOperationException("work that is replayed may only launch kernels");
    }

    // The source may be changed as soon as this returns: it goes through pinned memory, of which there are two pieces, so that one is filled while
    // the other is copied.
    private void Write(nint address, ReadOnlySpan<byte> bytes)
    {
        RequireNotCapturing();
        Flush();
        _context.MakeCurrent();
        while (bytes.Length > 0)
        {
            var staging = _staging[_nextStaging];
            _nextStaging = 1 - _nextStaging;
            var count = Math.Min(bytes.Length, StagingBytes);
            staging.Copied.Synchronize();
            bytes[..count].CopyTo(new Span<byte>((void*)staging.Memory, StagingBytes));
            _stream.CopyToDevice(address, staging.Memory, count);
            _stream.Record(staging.Copied);
            address += count;
            bytes = bytes[count..];
        }
    }

    /// <summary>Work that was given to <see cref="Replay"/>.</summary>
    private sealed class Replayed
    {
        public CudaGraph? Graph { get; set; }

        /// <summary>Where the scratch memory was when the graph was captured.</summary>
        public nint Scratch { get; set; }
    }

    /// <summary>Pinned memory on its way to the device.</summary>
    private sealed class Staging(CudaContext context) : IDisposable
    {
        public nint Memory { get; } = context.AllocateHostMemory(StagingBytes);

        /// <summary>The last copy out of it has been done.</summary>
        public CudaEvent Copied { get; } = context.CreateEvent();

        public void Dispose()
        {
            context.FreeHostMemory(Memory);
            Copied.Dispose();
        }
    }
}
