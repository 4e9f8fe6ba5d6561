namespace PerturbNas.Backends.Cuda;

/// <summary>
/// Counts the launches that a CUDA device would be given, with the grids of an H100. It has no device: nothing is computed, addresses are made up,
/// and reading gives zeros.
/// </summary>
public class CudaLaunchCounter() : CudaBackend("cuda launch counter", H100Multiprocessors)
{
    private const int H100Multiprocessors = 132;
    private const long Alignment = 512;

    private readonly SortedDictionary<string, long> _launches = new(StringComparer.Ordinal);
    private nint _next = (nint)Alignment;

    /// <summary>The limits of an H100 SXM by its data sheet, of which float32 multiply-adds reach some nine tenths.</summary>
    public static MachineLimits H100 { get; } = new() { Gigaflops = 60_000, GigabytesPerSecond = 3_350 };

    /// <summary>Launches by kernel.</summary>
    public IReadOnlyDictionary<string, long> Launches
    {
        get
        {
            Flush();
            return _launches;
        }
    }

    public override MachineLimits MeasureLimits() => H100;

    public override string Description => Name;

    public override long? DeviceMemoryBytes => null;

    public override nint Allocate(long bytes)
    {
        var address = _next;
        _next += (nint)((bytes / Alignment + 1) * Alignment);
        return address;
    }

    public override void Free(nint address)
    {
    }

    public override void Write(nint address, ReadOnlySpan<float> values)
    {
    }

    public override void Write(nint address, ReadOnlySpan<double> values)
    {
    }

    public override void Write(nint address, ReadOnlySpan<int> values)
    {
    }

    public override void Read(nint address, Span<float> values) => values.Clear();

    public override void Read(nint address, Span<double> values) => values.Clear();

    public override void ReadBytes(nint address, Span<byte> bytes) => bytes.Clear();

    public override void Zero(nint address, long bytes)
    {
    }

    public override void Replay(object key, Action work) => work();

    public override void BeginTiming() => Flush();

    public override double? EndTiming()
    {
        Flush();
        return 0;
    }

    private protected override unsafe void Launch(string kernel, Dim3 grid, Dim3 block, void* argument, int sharedBytes) =>
        _launches[kernel] = _launches.GetValueOrDefault(kernel) + 1;

    private protected override nint Scratch(long bytes) => (nint)Alignment;

    protected override void Dispose(bool disposing) => base.Dispose(disposing: false);
}
