using System.Diagnostics;

namespace PerturbNas.Backends.Planning;

/// <summary>A kernel call as a <see cref="MeteredBackend"/> saw it.</summary>
/// <param name="Kernel">The kernel's name as in kernels/, with its pass: "depthwise_pointwise_forward".</param>
/// <param name="Cost">The least that it had to do.</param>
/// <param name="Start">Timestamp (<see cref="Stopwatch"/>) before the call.</param>
/// <param name="End">Timestamp after it.</param>
/// <param name="Group">The group that the call ran in, whose first and last moments Start and End then are; 0: it ran alone.</param>
public readonly record struct KernelCall(string Kernel, Cost Cost, long Start, long End, int Group = 0);

/// <summary>
/// Counts what is asked of a backend: memory, and the FLOPs and bytes of every kernel call. Without an inner backend nothing is
/// computed and no memory is taken (addresses are made up, reading gives zeros): that is planning, the engine's own code run to
/// learn what it would cost. With one, every call is passed on and timed: that is profiling. Replays are not passed on.
/// </summary>
/// <param name="inner">The backend that does the work, not disposed with this one; null: none does.</param>
public sealed class MeteredBackend(Backend? inner = null) : Backend
{
    private const long Alignment = 64;

    private readonly Dictionary<nint, long> _blocks = [];
    private readonly List<(string Kernel, Cost Cost)> _putOff = [];
    private bool _grouping;
    private int _groups;
    private nint _next = (nint)Alignment;

    public override string Name => inner?.Name ?? "planning";

    public override string Description => inner?.Description ?? Name;

    public override long? DeviceMemoryBytes => inner?.DeviceMemoryBytes;

    public override int ElementSize => inner?.ElementSize ?? sizeof(float);

    /// <summary>Bytes allocated at this moment.</summary>
    public long AllocatedBytes { get; private set; }

    /// <summary>The most that was allocated at any moment.</summary>
    public long PeakBytes { get; private set; }

    /// <summary>The cost of all kernel calls so far.</summary>
    public Cost Total { get; private set; }

    /// <summary>Called after every kernel call, in the order in which they were issued.</summary>
    public Action<KernelCall>? Called { get; set; }

    /// <summary>Whether groups are passed on. Otherwise every call has a time of its own, and together they may take longer.</summary>
    public bool PassesGroups { get; set; } = true;

    /// <summary>What some work would cost; nothing is computed.</summary>
    public static Cost CostOf(Action<Backend> work)
    {
        using var backend = new MeteredBackend();
        work(backend);
        return backend.Total;
    }

    public override nint Allocate(long bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        var address = inner?.Allocate(bytes) ?? _next;
        _next += (nint)((bytes / Alignment + 1) * Alignment);
        _blocks.Add(address, bytes);
        AllocatedBytes += bytes;
        PeakBytes = Math.Max(PeakBytes, AllocatedBytes);
        return address;
    }

    public override void Free(nint address)
    {
        if (_blocks.Remove(address, out var bytes))
            AllocatedBytes -= bytes;
        inner?.Free(address);
    }

    public override void Write(nint address, ReadOnlySpan<float> values) => inner?.Write(address, values);

    public override void Write(nint address, ReadOnlySpan<double> values) => inner?.Write(address, values);

    public override void Write(nint address, ReadOnlySpan<int> values) => inner?.Write(address, values);

    public override void Read(nint address, Span<float> values)
    {
        if (inner is null)
            values.Clear();
        else
            inner.Read(address, values);
    }

    public override void Read(nint address, Span<double> values)
    {
        if (inner is null)
            values.Clear();
        else
            inner.Read(address, values);
    }

    public override void ReadBytes(nint address, Span<byte> bytes)
    {
        if (inner is null)
            bytes.Clear();
        else
            inner.ReadBytes(address, bytes);
    }

    public override void Zero(nint address, long bytes) => inner?.Zero(address, bytes);

    public override void BeginGroup()
    {
        if (!PassesGroups)
            return;
        _grouping = true;
        inner?.BeginGroup();
    }

    public override void EndGroup()
    {
        if (!_grouping)
            return;
        RunPutOff();
        inner?.EndGroup();
        _grouping = false;
    }

    public override void DepthwisePointwiseForward(in DepthwisePointwiseArgs a)
    {
        var start = Start(joinsGroup: true);
        inner?.DepthwisePointwiseForward(a);
        Count("depthwise_pointwise_forward", Cost.Of(a, backward: false), start, joinsGroup: true);
    }

    public override void DepthwisePointwiseBackward(in DepthwisePointwiseArgs a)
    {
        var start = Start(joinsGroup: true);
        inner?.DepthwisePointwiseBackward(a);
        Count("depthwise_pointwise_backward", Cost.Of(a, backward: true), start, joinsGroup: true);
    }

    public override void PointwiseForward(in PointwiseArgs a)
    {
        var start = Start();
        inner?.PointwiseForward(a);
        Count("pointwise_forward", Cost.Of(a, backward: false), start);
    }

    public override void PointwiseBackward(in PointwiseArgs a)
    {
        var start = Start();
        inner?.PointwiseBackward(a);
        Count("pointwise_backward", Cost.Of(a, backward: true), start);
    }

    public override void ConvolutionForward(in ConvolutionArgs a)
    {
        var start = Start();
        inner?.ConvolutionForward(a);
        Count("convolution_forward", Cost.Of(a, backward: false), start);
    }

    public override void ConvolutionBackward(in ConvolutionArgs a)
    {
        var start = Start();
        inner?.ConvolutionBackward(a);
        Count("convolution_backward", Cost.Of(a, backward: true), start);
    }

    public override void PoolForward(in PoolArgs a)
    {
        var start = Start(joinsGroup: true);
        inner?.PoolForward(a);
        Count("pool_3x3_forward", Cost.Of(a, backward: false), start, joinsGroup: true);
    }

    public override void PoolBackward(in PoolArgs a)
    {
        var start = Start(joinsGroup: true);
        inner?.PoolBackward(a);
        Count("pool_3x3_backward", Cost.Of(a, backward: true), start, joinsGroup: true);
    }

    public override void BatchNormForward(in BatchNormForwardArgs a)
    {
        var start = Start();
        inner?.BatchNormForward(a);
        Count("batch_norm_forward", Cost.Of(a), start);
    }

    public override void BatchNormBackward(in BatchNormBackwardArgs a)
    {
        var start = Start(joinsGroup: true);
        inner?.BatchNormBackward(a);
        Count("batch_norm_backward", Cost.Of(a), start, joinsGroup: true);
    }

    public override void MixedSumForward(in MixedSumArgs a)
    {
        var start = Start(joinsGroup: true);
        inner?.MixedSumForward(a);
        Count("mixed_sum_forward", Cost.Of(a, backward: false), start, joinsGroup: true);
    }

    public override void MixedSumBackward(in MixedSumArgs a)
    {
        var start = Start(joinsGroup: true);
        inner?.MixedSumBackward(a);
        Count("mixed_sum_backward", Cost.Of(a, backward: true), start, joinsGroup: true);
    }

    public override void GlobalAveragePoolForward(in GlobalAveragePoolArgs a)
    {
        var start = Start();
        inner?.GlobalAveragePoolForward(a);
        Count("global_average_pool_forward", Cost.Of(a, backward: false), start);
    }

    public override void GlobalAveragePoolBackward(in GlobalAveragePoolArgs a)
    {
        var start = Start();
        inner?.GlobalAveragePoolBackward(a);
        Count("global_average_pool_backward", Cost.Of(a, backward: true), start);
    }

    public override void LinearForward(in LinearArgs a)
    {
        var start = Start();
        inner?.LinearForward(a);
        Count("linear_forward", Cost.Of(a, backward: false), start);
    }

    public override void LinearBackward(in LinearArgs a)
    {
        var start = Start();
        inner?.LinearBackward(a);
        Count("linear_backward", Cost.Of(a, backward: true), start);
    }

    public override void SoftmaxCrossEntropy(in SoftmaxCrossEntropyArgs a)
    {
        var start = Start();
        inner?.SoftmaxCrossEntropy(a);
        Count("softmax_cross_entropy", Cost.Of(a), start);
    }

    public override void SgdStep(in SgdArgs a)
    {
        var start = Start();
        inner?.SgdStep(a);
        Count("sgd_step", Cost.Of(a), start);
    }

    public override void AdamStep(in AdamArgs a)
    {
        var start = Start();
        inner?.AdamStep(a);
        Count("adam_step", Cost.Of(a), start);
    }

    public override void NoiseNormal(in NoiseArgs a)
    {
        var start = Start();
        inner?.NoiseNormal(a);
        Count("noise_normal", Cost.Of(a), start);
    }

    protected override void Dispose(bool disposing)
    {
    }

    // Kernels that work image by image, and batch norm's backward behind them, may be put off to the end of a group; any other lets them run.
    private long Start(bool joinsGroup = false)
    {
        if (Called is null)
            return 0;
        if (joinsGroup && _grouping)
        {
            if (_putOff.Count == 0)
                inner?.BeginTiming();
            return 0;
        }
        RunPutOff();
        inner?.BeginTiming();
        return Stopwatch.GetTimestamp();
    }

    private void Count(string kernel, Cost cost, long start, bool joinsGroup = false)
    {
        Total += cost;
        if (Called is not null && joinsGroup && _grouping)
            _putOff.Add((kernel, cost));
        else
            Called?.Invoke(new KernelCall(kernel, cost, start, End(start)));
    }

    // Ends and begins the inner backend's group, so that what has been put off has a time.
    private void RunPutOff()
    {
        if (_putOff.Count == 0)
            return;
        var start = Stopwatch.GetTimestamp();
        inner?.EndGroup();
        var end = End(start);
        inner?.BeginGroup();
        _groups++;
        foreach (var (kernel, cost) in _putOff)
            Called?.Invoke(new KernelCall(kernel, cost, start, end, _groups));
        _putOff.Clear();
    }

    // When what began at a timestamp has ended: on a device, the time that it spent; else now.
    private long End(long start) =>
        inner?.EndTiming() is { } seconds ? start + (long)(seconds * Stopwatch.Frequency) : Stopwatch.GetTimestamp();
}
