namespace PerturbNas.Backends;

/// <summary>
/// The kernel contract in C#: memory, and one method per kernel of kernels/perturbnas_kernels.h, which documents every argument.
/// All reals of a backend (activations, weights, statistics, gradients) have <see cref="ElementSize"/> bytes: float32, or double on
/// the Reference backend. Kernel calls are issued in order; a kernel sees the results of those before it.
/// </summary>
/// <exception cref="KernelException">A kernel refused its arguments or ran out of memory; thrown by every kernel method.</exception>
public abstract class Backend : IDisposable
{
    /// <summary>"cpu", "cuda", "cuda-emulated" or "reference".</summary>
    public abstract string Name { get; }

    /// <summary>The name, and what it computes on: "cpu (2 threads, avx2)".</summary>
    public virtual string Description => Name;

    /// <summary>Bytes of a real: 4 or 8.</summary>
    public abstract int ElementSize { get; }

    /// <summary>Bytes that this backend can have on a device of its own, with those that it has; null: it shares the process's memory.</summary>
    public virtual long? DeviceMemoryBytes => null;

    /// <summary>
    /// What the device can do at most: float32 multiply-adds and memory bandwidth, measured (about a second), or, on CUDA, by its clocks and widths.
    /// </summary>
    public virtual MachineLimits MeasureLimits() => throw new NotSupportedException($"{Name} is not about speed");

    /// <summary>Memory of at least <paramref name="bytes"/> bytes, 64-byte aligned, zeroed.</summary>
    public abstract nint Allocate(long bytes);

    public abstract void Free(nint address);

    /// <summary>Writes reals (converted to the backend's element type) at an address.</summary>
    public abstract void Write(nint address, ReadOnlySpan<float> values);

    public abstract void Write(nint address, ReadOnlySpan<double> values);

    public abstract void Write(nint address, ReadOnlySpan<int> values);

    /// <summary>Reads reals from an address, after all kernels issued before have finished.</summary>
    public abstract void Read(nint address, Span<float> values);

    public abstract void Read(nint address, Span<double> values);

    /// <summary>Reads bytes as they are (integers, the double sums of the loss).</summary>
    public abstract void ReadBytes(nint address, Span<byte> bytes);

    public abstract void Zero(nint address, long bytes);

    /// <summary>
    /// Begins a group. Until <see cref="EndGroup"/>, kernels that work image by image (depthwise-pointwise, pools, mixed sums) may be put off and
    /// then run together, one image through all of them, which keeps what they share in the cache; batch norm's backward waits for them. Any other
    /// kernel first lets those run. Results are the same as without a group; none may be read before the group has ended.
    /// </summary>
    public virtual void BeginGroup()
    {
    }

    /// <summary>Ends a group: everything issued in it has been run.</summary>
    public virtual void EndGroup()
    {
    }

    /// <summary>
    /// Runs work that issues the same kernel calls with the same arguments every time that it is given with this key, and nothing else, so that
    /// a backend may keep what was issued and issue it again as a whole.
    /// </summary>
    public virtual void Replay(object key, Action work) => work();

    /// <summary>The next kernel is to be timed by <see cref="EndTiming"/>.</summary>
    public virtual void BeginTiming()
    {
    }

    /// <summary>
    /// Seconds that the device spent on what was issued since <see cref="BeginTiming"/>, waiting for it; null: calls return when they are done.
    /// </summary>
    public virtual double? EndTiming() => null;

    public abstract void DepthwisePointwiseForward(in DepthwisePointwiseArgs a);

    public abstract void DepthwisePointwiseBackward(in DepthwisePointwiseArgs a);

    public abstract void PointwiseForward(in PointwiseArgs a);

    public abstract void PointwiseBackward(in PointwiseArgs a);

    public abstract void ConvolutionForward(in ConvolutionArgs a);

    public abstract void ConvolutionBackward(in ConvolutionArgs a);

    public abstract void PoolForward(in PoolArgs a);

    public abstract void PoolBackward(in PoolArgs a);

    public abstract void BatchNormForward(in BatchNormForwardArgs a);

    public abstract void BatchNormBackward(in BatchNormBackwardArgs a);

    public abstract void MixedSumForward(in MixedSumArgs a);

    public abstract void MixedSumBackward(in MixedSumArgs a);

    public abstract void GlobalAveragePoolForward(in GlobalAveragePoolArgs a);

    public abstract void GlobalAveragePoolBackward(in GlobalAveragePoolArgs a);

    public abstract void LinearForward(in LinearArgs a);

    public abstract void LinearBackward(in LinearArgs a);

    public abstract void SoftmaxCrossEntropy(in SoftmaxCrossEntropyArgs a);

    public abstract void SgdStep(in SgdArgs a);

    public abstract void AdamStep(in AdamArgs a);

    public abstract void NoiseNormal(in NoiseArgs a);

    public void Dispose()
    {
        Dispose(true);
        GC.SuppressFinalize(this);
    }

    protected abstract void Dispose(bool disposing);
}

/// <summary>What a kernel returned: pn_status of kernels/perturbnas_kernels.h.</summary>
public enum KernelStatus
{
    Ok,
    InvalidArgument,
    OutOfMemory,
    NotSupported,
}

/// <summary>A kernel refused its arguments, lacks a case, or ran out of memory; the message is the kernel's own.</summary>
public sealed class KernelException(string message, KernelStatus status = KernelStatus.InvalidArgument) : Exception(message)
{
    /// <summary>Which of these it was.</summary>
    public KernelStatus Status { get; } = status;
}
