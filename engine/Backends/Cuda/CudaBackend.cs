using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

/// <summary>
/// The kernels of kernels/cuda on a CUDA device: float32, in one stream. This file has what all operators share: memory, copies, and
/// launching; each operator checks its arguments and chooses its grid in a file of its own. One thread at a time may call kernels;
/// <see cref="Free"/> may come from any thread.
/// </summary>
public sealed unsafe partial class CudaBackend : Backend
{
    /// <summary>Bytes of arguments that a launch can take.</summary>
    private const int ArgumentLimit = 4096;

    // Blocks beyond this only wait for others to end.
    private const int BlocksPerMultiprocessor = 32;

    private const int StagingBytes = 4 << 20;

    private readonly CudaContext _context;
    private readonly CudaStream _stream;
    private readonly PtxModules _ptx;
    private readonly Dictionary<string, CudaModule> _modules = [];
    private readonly Dictionary<string, CudaKernel> _kernels = [];
    private readonly Staging[] _staging;
    private int _nextStaging;
    private nint _scratch;
    private long _scratchBytes;

    /// <param name="kind">Which of the CUDA devices.</param>
    /// <exception cref="UserException">There is no such device, or it cannot be used; the message says why.</exception>
    public CudaBackend(DeviceKind kind)
    {
        (_context, _ptx) = CudaDevice.Open(kind);
        Name = Devices.NameOf(kind);
        _stream = _context.CreateStream();
        _staging = [new Staging(_context), new Staging(_context)];
    }

    /// <summary>"cuda" or "cuda-emulated".</summary>
    public override string Name { get; }

    public override int ElementSize => sizeof(float);

    /// <inheritdoc/>
    public override nint Allocate(long bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        var address = AllocateMemory(bytes);
        Zero(address, bytes);
        return address;
    }

    public override void Free(nint address)
    {
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
        _context.MakeCurrent();
        fixed (byte* target = bytes)
        {
            if (bytes.Length > 0)
                _stream.CopyToHost((nint)target, address, bytes.Length);
            _stream.Synchronize();
        }
    }

    public override void Zero(nint address, long bytes)
    {
        _context.MakeCurrent();
        if (bytes > 0)
            _stream.ClearMemory(address, bytes);
    }

    protected override void Dispose(bool disposing)
    {
        if (!disposing)
            return;
        Free(_scratch);
        foreach (var staging in _staging)
            staging.Dispose();
        foreach (var module in _modules.Values)
            module.Dispose();
        _stream.Dispose();
        _context.Dispose();
    }

    /// <summary>Launches a kernel with its one argument. The kernel's module is loaded where it was not needed before.</summary>
    private void Launch<T>(string kernel, Dim3 grid, Dim3 block, in T arguments, int sharedBytes = 0)
        where T : unmanaged
    {
        if (sizeof(T) > ArgumentLimit)
            throw new InvalidOperationException($"{typeof(T).Name} has {sizeof(T)} bytes; a launch takes {ArgumentLimit}");
        _context.MakeCurrent();
        fixed (T* address = &arguments)
            Find(kernel).Launch(grid, block, sharedBytes, address, _stream);
    }

    /// <summary>
    /// Device memory, contents undefined, until the next operator's call: an operator asks once, for the sum of what its kernels need.
    /// </summary>
    private nint Scratch(long bytes)
    {
        if (bytes <= _scratchBytes)
            return _scratch;
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
        (int)Math.Clamp((elements + elementsPerBlock - 1) / elementsPerBlock, 1, (long)_context.Properties.Multiprocessors * BlocksPerMultiprocessor);

    /// <summary>Refuses the arguments of the calling operator unless the condition holds.</summary>
    private static void Require(bool condition, string message, [CallerMemberName] string @operator = "")
    {
        if (!condition)
            throw new KernelException($"{@operator}: {message}");
    }

    private KernelException NotSupported(string kernel) => new($"{kernel} is not supported on {Name} yet", KernelStatus.NotSupported);

    private CudaKernel Find(string name)
    {
        if (_kernels.TryGetValue(name, out var kernel))
            return kernel;
        var resource = _ptx.ResourceOf(name) ?? throw NotSupported(name);
        if (!_modules.TryGetValue(resource, out var module))
            _modules.Add(resource, module = _context.LoadModulePtx(PtxModules.Read(resource)));
        kernel = module.GetKernel(name);
        _kernels.Add(name, kernel);
        return kernel;
    }

    private nint AllocateMemory(long bytes)
    {
        var address = _context.AllocateMemory(Math.Max(bytes, 1), _stream);
        return address != 0 ? address : throw new KernelException(
            $"{Name} has no room for {bytes / (double)(1 << 20):0.0} MiB more: {_context.FreeMemoryBytes >> 20} of " +
            $"{_context.Properties.MemoryBytes >> 20} MiB are free", KernelStatus.OutOfMemory);
    }

    // The source may be changed as soon as this returns: it goes through pinned memory, of which there are two pieces, so that one is filled while
    // the other is copied.
    private void Write(nint address, ReadOnlySpan<byte> bytes)
    {
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
