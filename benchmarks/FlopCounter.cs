using PerturbNas.Backends;
using PerturbNas.Tests.Kernels;

namespace PerturbNas.Benchmarks;

/// <summary>
/// A backend that computes nothing and adds up the floating-point operations of every kernel called: those of the operator's
/// definition, as the case table counts them (a multiply-add is two, recomputation does not count, a gradient that is not asked for
/// does not either). So the engine itself says what a step or a scoring pass is. Addresses are made up; reads give zeros.
/// </summary>
internal sealed class FlopCounter : Backend
{
    private nint _next = 64;

    /// <summary>Operations of all kernels since the start.</summary>
    public double Flops { get; private set; }

    /// <summary>Of these, the multiply-adds of convolutions and linear layers.</summary>
    public double ProductFlops { get; private set; }

    public override string Name => "flop counter";

    public override int ElementSize => sizeof(float);

    public override nint Allocate(long bytes)
    {
        var address = _next;
        _next += (nint)(bytes + 64) / 64 * 64;
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

    public override void DepthwisePointwiseForward(in DepthwisePointwiseArgs a) => CountProduct(Case(a).ForwardFlops);

    public override void DepthwisePointwiseBackward(in DepthwisePointwiseArgs a) => CountProduct(Case(a).BackwardFlops);

    public override void PointwiseForward(in PointwiseArgs a) => CountProduct(Case(a).ForwardFlops);

    public override void PointwiseBackward(in PointwiseArgs a) => CountProduct(Case(a).BackwardFlops);

    public override void ConvolutionForward(in ConvolutionArgs a) => CountProduct(Case(a).ForwardFlops);

    public override void ConvolutionBackward(in ConvolutionArgs a) => CountProduct(Case(a).BackwardFlops);

    public override void MaxPoolForward(in PoolArgs a) => Flops += Case(a, true).ForwardFlops;

    public override void MaxPoolBackward(in PoolArgs a) => Flops += Case(a, true).BackwardFlops;

    public override void AvgPoolForward(in PoolArgs a) => Flops += Case(a, false).ForwardFlops;

    public override void AvgPoolBackward(in PoolArgs a) => Flops += Case(a, false).BackwardFlops;

    public override void BatchNormForward(in BatchNormForwardArgs a) =>
        Flops += KernelCases.BatchNormForward(a.Variants, a.Images, a.Pixels, a.Channels, a.Statistics != 0, a.Gamma != 0, running: true)
            .ForwardFlops;

    public override void BatchNormBackward(in BatchNormBackwardArgs a) =>
        Flops += KernelCases.BatchNormBackward(a.Images, a.Pixels, a.Channels, a.Rows, a.Row, a.Training != 0, a.Normalization != 0,
            a.Weight != 0, a.DGamma != 0).ForwardFlops;

    public override void MixedSumForward(in MixedSumArgs a) => Flops += Case(a).ForwardFlops;

    public override void MixedSumBackward(in MixedSumArgs a) => Flops += Case(a).BackwardFlops;

    public override void ScaledCopy(in ScaledCopyArgs a) =>
        Flops += KernelCases.ScaledCopy((int)a.Count, a.Weight != 0, a.Accumulate != 0).ForwardFlops;

    public override void GlobalAveragePoolForward(in GlobalAveragePoolArgs a) => Flops += Case(a).ForwardFlops;

    public override void GlobalAveragePoolBackward(in GlobalAveragePoolArgs a) => Flops += Case(a).BackwardFlops;

    public override void LinearForward(in LinearArgs a) => CountProduct(Case(a).ForwardFlops);

    public override void LinearBackward(in LinearArgs a) => CountProduct(Case(a).BackwardFlops);

    public override void SoftmaxCrossEntropy(in SoftmaxCrossEntropyArgs a) =>
        Flops += KernelCases.SoftmaxCrossEntropy(a.Variants, a.Images, a.Classes).ForwardFlops;

    public override void SgdStep(in SgdArgs a) => Flops += KernelCases.Sgd((int)a.Count, a.MaxNorm).ForwardFlops;

    public override void AdamStep(in AdamArgs a) => Flops += KernelCases.Adam((int)a.Count, a.Step).ForwardFlops;

    public override void NoiseNormal(in NoiseArgs a) => Flops += KernelCases.Noise((int)a.Count, a.Key, a.Position).ForwardFlops;

    protected override void Dispose(bool disposing)
    {
    }

    private void CountProduct(double flops)
    {
        Flops += flops;
        ProductFlops += flops;
    }

    private static Wanted Asked(bool input, bool weights) => (input ? Wanted.Input : 0) | (weights ? Wanted.Weights : 0);

    private static KernelCase Case(in DepthwisePointwiseArgs a) => KernelCases.DepthwisePointwise(a.Height, a.Width, a.InChannels,
        a.OutChannels, a.Kernel, a.Stride, a.Dilation, new(a.Variants, a.Images, Wanted: Asked(a.Dx != 0, a.DDepthwise != 0)));

    private static KernelCase Case(in PointwiseArgs a)
    {
        var parts = PartsOf(a.Parts, a.PartCount);
        return KernelCases.Pointwise(a.Height, a.Width, parts, a.OutChannels,
            new(Images: a.Images, Wanted: Asked(parts.Any(part => part.Gradient), a.DWeight != 0)), stride: a.Stride);
    }

    private static KernelCase Case(in ConvolutionArgs a) => KernelCases.Convolution(a.Height, a.Width, a.InChannels, a.OutChannels,
        (a.KernelH, a.KernelW), (a.StrideH, a.StrideW), (a.PaddingH, a.PaddingW),
        new(a.Variants, a.Images, Wanted: Asked(a.Dx != 0, a.DWeight != 0)));

    private static KernelCase Case(in PoolArgs a, bool maximum) =>
        KernelCases.Pool(maximum, a.Height, a.Width, a.Channels, a.Stride, new(a.Variants, a.Images));

    private static KernelCase Case(in LinearArgs a) =>
        KernelCases.Linear(a.Rows, a.InChannels, a.OutChannels, Asked(a.Dx != 0, a.DWeight != 0));

    private static KernelCase Case(in GlobalAveragePoolArgs a) =>
        KernelCases.GlobalAveragePool(a.Images, a.Pixels, PartsOf(a.Parts, a.PartCount));

    // Which terms are normalised makes no difference to the count.
    private static KernelCase Case(in MixedSumArgs a) => KernelCases.MixedSum(a.Variants, a.Images, a.Pixels, a.Channels,
        new (int, bool, int)[a.TermCount], a.WeightStride);

    private static unsafe Part[] PartsOf(nint parts, int count) =>
        Array.ConvertAll(new ReadOnlySpan<PartArgs>((void*)parts, count).ToArray(),
            part => new Part(part.Channels, part.Variants, Gradient: part.Dx != 0));
}
