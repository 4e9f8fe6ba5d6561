using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cpu;

/// <summary>
/// What the CPU kernels are compiled for (enum pn_isa in kernels/perturbnas_kernels.h); <see cref="Best"/> is the widest that this
/// processor has.
/// </summary>
public enum Isa
{
    Best,
    Portable,
    Avx2,
    Avx512,

    /// <summary>AVX-512 for processors where additions and moves between lanes do not take the place of multiply-adds.</summary>
    Avx512Zen,
}

/// <summary>
/// The backend that runs everywhere: float32 kernels of kernels/cpu, through the C ABI of kernels/perturbnas_kernels.h. One thread at
/// a time may call its kernels (they share scratch memory); <see cref="Free"/> may come from any thread.
/// </summary>
public sealed unsafe class CpuBackend : Backend
{
    /// <summary>Environment variable that replaces <see cref="Isa.Best"/>: portable, avx2, avx512 or avx512-zen.</summary>
    public const string IsaVariable = "PERTURBNAS_ISA";

    /// <summary>What kernels are compiled for, by name, narrowest first; the processor may lack some.</summary>
    public static IReadOnlyList<(string Name, Isa Isa)> Isas { get; } =
        [("portable", Isa.Portable), ("avx2", Isa.Avx2), ("avx512", Isa.Avx512), ("avx512-zen", Isa.Avx512Zen)];

    /// <summary>The interface version (PN_ABI_VERSION) of the kernel library that this program works with.</summary>
    public const int KernelAbiVersion = NativeKernels.AbiVersion;

    private const int Alignment = 64;
    private const long HugePage = 2 << 20;
    private const int ProtectReadWrite = 0x3, MapPrivateAnonymous = 0x22, AdviseHugePage = 14;

    private readonly ContextHandle _context;

    private readonly CallGroup _group = new();
    private bool _grouping;

    // Bytes of the blocks that came from mmap.
    private readonly Dictionary<nint, long> _mapped = [];

    /// <param name="threads">Worker threads, 1 to 256, or 0 for one per processor that this process may use.</param>
    /// <param name="isa">The instruction set; <see cref="Isa.Best"/> can be narrowed by the environment (PERTURBNAS_ISA).</param>
    /// <exception cref="UserException">
    /// The kernel library is missing or of another version, or this machine cannot give the threads or the instruction set.
    /// </exception>
    public CpuBackend(int threads = 0, Isa isa = Isa.Best)
    {
        CheckLibrary();
        if (isa == Isa.Best)
            isa = IsaFromEnvironment();
        if (NativeKernels.ContextCreate(threads, isa, out _context) != (int)KernelStatus.Ok)
            throw new UserException($"The CPU backend cannot start with {threads} threads and instruction set {isa}: {LastError()}");
    }

    public override string Name => "cpu";

    public override string Description => $"{Name} ({Threads} thread{(Threads == 1 ? "" : "s")}, {IsaName})";

    public override int ElementSize => sizeof(float);

    /// <summary>Worker threads, the calling one among them.</summary>
    public int Threads => NativeKernels.ContextThreads(_context);

    /// <summary>The instruction set in use: "portable", "avx2", "avx512" or "avx512-zen".</summary>
    public string IsaName => Marshal.PtrToStringUTF8(NativeKernels.ContextIsa(_context))!;

    /// <inheritdoc/>
    public override MachineLimits MeasureLimits()
    {
        Check(NativeKernels.MeasureLimits(_context, out var limits));
        return limits;
    }

    /// <inheritdoc/>
    /// <remarks>
    /// Blocks of 2 MiB and more are anonymous mappings in huge pages: zero without being written, resident only where they are used.
    /// </remarks>
    public override nint Allocate(long bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        if (bytes >= HugePage)
            return Map(bytes);
        var size = (nuint)((bytes / Alignment + 1) * Alignment);
        var memory = NativeMemory.AlignedAlloc(size, Alignment);
        NativeMemory.Clear(memory, size);
        return (nint)memory;
    }

    public override void Free(nint address)
    {
        long bytes;
        bool mapped;
        lock (_mapped)
            mapped = _mapped.Remove(address, out bytes);
        if (mapped)
            _ = NativeKernels.MemoryUnmap(address, (nuint)bytes);
        else
            NativeMemory.AlignedFree((void*)address);
    }

    public override void Write(nint address, ReadOnlySpan<float> values) =>
        values.CopyTo(new Span<float>((void*)address, values.Length));

    public override void Write(nint address, ReadOnlySpan<double> values)
    {
        var target = (float*)address;
        for (var i = 0; i < values.Length; i++)
            target[i] = (float)values[i];
    }

    public override void Write(nint address, ReadOnlySpan<int> values) =>
        values.CopyTo(new Span<int>((void*)address, values.Length));

    public override void Read(nint address, Span<float> values) =>
        new ReadOnlySpan<float>((void*)address, values.Length).CopyTo(values);

    public override void Read(nint address, Span<double> values)
    {
        var source = (float*)address;
        for (var i = 0; i < values.Length; i++)
            values[i] = source[i];
    }

    public override void ReadBytes(nint address, Span<byte> bytes) =>
        new ReadOnlySpan<byte>((void*)address, bytes.Length).CopyTo(bytes);

    public override void Zero(nint address, long bytes) => NativeMemory.Clear((void*)address, (nuint)bytes);

    public override void BeginGroup() => _grouping = true;

    public override void EndGroup()
    {
        _grouping = false;
        _ = Ready();
    }

    public override void DepthwisePointwiseForward(in DepthwisePointwiseArgs a) => Run(Kernel.DepthwisePointwiseForward, a);

    public override void DepthwisePointwiseBackward(in DepthwisePointwiseArgs a) => Run(Kernel.DepthwisePointwiseBackward, a);

    public override void PointwiseForward(in PointwiseArgs a) => Check(NativeKernels.PointwiseForward(Ready(), a));

    public override void PointwiseBackward(in PointwiseArgs a) => Check(NativeKernels.PointwiseBackward(Ready(), a));

    public override void ConvolutionForward(in ConvolutionArgs a) => Check(NativeKernels.ConvolutionForward(Ready(), a));

    public override void ConvolutionBackward(in ConvolutionArgs a) => Check(NativeKernels.ConvolutionBackward(Ready(), a));

    public override void PoolForward(in PoolArgs a) => Run(Kernel.PoolForward, a);

    public override void PoolBackward(in PoolArgs a) => Run(Kernel.PoolBackward, a);

    public override void BatchNormForward(in BatchNormForwardArgs a) => Check(NativeKernels.BatchNormForward(Ready(), a));

    public override void BatchNormBackward(in BatchNormBackwardArgs a)
    {
        if (_group.Count > 0)
            _group.AddAfter(a);
        else
            Check(NativeKernels.BatchNormBackward(_context, a));
    }

    public override void MixedSumForward(in MixedSumArgs a) => Run(Kernel.MixedSumForward, a);

    public override void MixedSumBackward(in MixedSumArgs a) => Run(Kernel.MixedSumBackward, a);

    public override void GlobalAveragePoolForward(in GlobalAveragePoolArgs a) => Check(NativeKernels.GlobalAveragePoolForward(Ready(), a));

    public override void GlobalAveragePoolBackward(in GlobalAveragePoolArgs a) => Check(NativeKernels.GlobalAveragePoolBackward(Ready(), a));

    public override void LinearForward(in LinearArgs a) => Check(NativeKernels.LinearForward(Ready(), a));

    public override void LinearBackward(in LinearArgs a) => Check(NativeKernels.LinearBackward(Ready(), a));

    public override void SoftmaxCrossEntropy(in SoftmaxCrossEntropyArgs a) => Check(NativeKernels.SoftmaxCrossEntropy(Ready(), a));

    public override void SgdStep(in SgdArgs a) => Check(NativeKernels.SgdStep(Ready(), a));

    public override void AdamStep(in AdamArgs a) => Check(NativeKernels.AdamStep(Ready(), a));

    public override void NoiseNormal(in NoiseArgs a) => Check(NativeKernels.NoiseNormal(Ready(), a));

    protected override void Dispose(bool disposing)
    {
        if (!disposing)
            return;
        _context.Dispose();
        _group.Dispose();
    }

    /// <summary>Runs a call of a kernel that works image by image, or puts it off to the end of the group.</summary>
    private void Run<T>(Kernel kernel, in T arguments)
        where T : unmanaged
    {
        _group.Add(kernel, arguments);
        if (!_grouping)
            _ = Ready();
    }

    /// <summary>The context, after everything that was put off has been run.</summary>
    private ContextHandle Ready()
    {
        if (_group.Count == 0)
            return _context;
        try
        {
            Check(NativeKernels.RunGroup(_context, _group.Calls, _group.Count));
            foreach (ref readonly var after in _group.After)
                Check(NativeKernels.BatchNormBackward(_context, after));
        }
        finally
        {
            _group.Clear();
        }
        return _context;
    }

    private static void Check(int status)
    {
        if (status != (int)KernelStatus.Ok)
            throw new KernelException(LastError(), (KernelStatus)status);
    }

    private static string LastError() => Marshal.PtrToStringUTF8(NativeKernels.LastError()) ?? "";

    private static void CheckLibrary()
    {
        int version;
        try
        {
            version = NativeKernels.LibraryAbiVersion();
        }
        catch (Exception e) when (e is DllNotFoundException or EntryPointNotFoundException or BadImageFormatException)
        {
            throw new UserException(
                $"The kernel library libperturbnas_kernels.so cannot be loaded from {AppContext.BaseDirectory}; rebuild the program.", e);
        }
        if (version != NativeKernels.AbiVersion)
            throw new UserException(
                $"The kernel library libperturbnas_kernels.so in {AppContext.BaseDirectory} has interface version {version} where this " +
                $"program needs {NativeKernels.AbiVersion}; rebuild the program.");
    }

    private static Isa IsaFromEnvironment()
    {
        var name = Environment.GetEnvironmentVariable(IsaVariable);
        if (string.IsNullOrEmpty(name))
            return Isa.Best;
        foreach (var known in Isas)
            if (known.Name == name)
                return known.Isa;
        throw new UserException($"The environment variable {IsaVariable} is \"{name}\"; set it to " +
            $"{string.Join(", ", Isas.SkipLast(1).Select(known => known.Name))} or {Isas[^1].Name}, or unset it.");
    }

    private nint Map(long bytes)
    {
        // One huge page more than needed, so that an aligned block fits; what lies outside it is given back.
        var size = (bytes + HugePage - 1) / HugePage * HugePage;
        var start = NativeKernels.MemoryMap(0, (nuint)(size + HugePage), ProtectReadWrite, MapPrivateAnonymous, -1, 0);
        if (start == -1)
            throw new KernelException($"no memory for a block of {bytes / 1048576.0:0} MiB", KernelStatus.OutOfMemory);
        var aligned = (nint)((start + HugePage - 1) / HugePage * HugePage);
        if (aligned != start)
            _ = NativeKernels.MemoryUnmap(start, (nuint)(aligned - start));
        _ = NativeKernels.MemoryUnmap((nint)(aligned + size), (nuint)(start + HugePage - aligned));
        // A kernel without huge pages refuses the advice; the block is as good without them.
        _ = NativeKernels.MemoryAdvise(aligned, (nuint)size, AdviseHugePage);
        lock (_mapped)
            _mapped.Add(aligned, size);
        return aligned;
    }
}
