using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends;

// The argument structs of kernels/perturbnas_kernels.h, field for field. That header is the contract and documents every
// shape, layout and rule. Addresses are the backend's own: float32 on the CPU, double on the Reference backend.

[StructLayout(LayoutKind.Sequential)]
public struct PartArgs
{
    public nint X, Dx;
    public int Variants, Channels, Accumulate, Reserved;
}

[StructLayout(LayoutKind.Sequential)]
public struct DepthwisePointwiseArgs
{
    public nint X, XNormalization, Depthwise, Pointwise, Y, Statistics, G, Coefficients, Dx, GradientSums, DDepthwise, DPointwise;
    public int Variants, Images, Height, Width, InChannels, OutChannels, Kernel, Stride, Dilation, Accumulate;
}

[StructLayout(LayoutKind.Sequential)]
public struct PointwiseArgs
{
    public nint Parts, Weight, Y, Statistics, G, Coefficients, DWeight;
    public int PartCount, Relu, Images, Height, Width, OutChannels, Stride, Offset, YChannels, YOffset;
}

[StructLayout(LayoutKind.Sequential)]
public struct ConvolutionArgs
{
    public nint X, Weight, Y, Statistics, G, Coefficients, Dx, DWeight;
    public int Variants, Images, Height, Width, InChannels, OutChannels;
    public int KernelH, KernelW, StrideH, StrideW, PaddingH, PaddingW, Relu, Accumulate;
}

/// <summary>How a value comes from its tensor, none: it is the tensor's (of an edge: a skip connection); enum pn_pooling.</summary>
public enum Pooling
{
    None,
    Max3x3,
    Avg3x3,
}

/// <summary>An address for every <see cref="Pooling"/>.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct PoolingAddresses
{
    private Addresses _all;

    public nint this[Pooling pooling]
    {
        readonly get => _all[(int)pooling];
        set => _all[(int)pooling] = value;
    }

    [InlineArray(3)]
    private struct Addresses
    {
        private nint _first;
    }
}

[StructLayout(LayoutKind.Sequential)]
public struct PoolGradientArgs
{
    public nint G;
    public PoolingAddresses Coefficients;
}

[StructLayout(LayoutKind.Sequential)]
public struct PoolArgs
{
    public nint X;
    public PoolingAddresses Y, Statistics;
    public nint Gradients, Dx;
    public int Variants, Images, Height, Width, Channels, Stride, GradientCount, Accumulate;
}

[StructLayout(LayoutKind.Sequential)]
public struct BatchNormForwardArgs
{
    public nint Statistics, Gamma, Beta, RunningMean, RunningVariance, Normalization;
    public int Variants, Images, Pixels, Channels;
    public float Epsilon, Momentum;
}

[StructLayout(LayoutKind.Sequential)]
public struct BatchNormBackwardArgs
{
    public nint GradientSums, Normalization, Weight, Coefficients, DGamma, DBeta;
    public int Images, Pixels, Channels, Rows, Row, Training;
}

[StructLayout(LayoutKind.Sequential)]
public struct TermArgs
{
    public nint Y, Normalization;
    public int Variants, WeightIndex;
    public Pooling Pooling;
    public int Height, Width, Stride;
}

[StructLayout(LayoutKind.Sequential)]
public struct MixedSumArgs
{
    public nint Terms, Weights, Out, G, GradientSums, WeightGradients;
    public int TermCount, Variants, Images, Pixels, Channels, WeightStride;
}

[StructLayout(LayoutKind.Sequential)]
public struct GlobalAveragePoolArgs
{
    public nint Parts, Out, G;
    public int PartCount, Images, Pixels, Reserved;
}

[StructLayout(LayoutKind.Sequential)]
public struct LinearArgs
{
    public nint X, Weight, Bias, Out, G, Dx, DWeight, DBias;
    public int Rows, InChannels, OutChannels, Reserved;
}

[StructLayout(LayoutKind.Sequential)]
public struct SoftmaxCrossEntropyArgs
{
    public nint Logits, Labels, ImageLosses, ImageCorrect, LossSums, CorrectCounts, Dlogits;
    public int Variants, Images, Classes;
    public float Smoothing, Scale;
    public int Reserved;
}

[StructLayout(LayoutKind.Sequential)]
public struct SgdArgs
{
    public nint Parameters, Gradients, MomentumBuffer, Norm;
    public long Count;
    public float Rate, Momentum, WeightDecay, MaxNorm;
}

[StructLayout(LayoutKind.Sequential)]
public struct AdamArgs
{
    public nint Parameters, Gradients, FirstMoment, SecondMoment;
    public long Count, Step;
    public float Rate, Beta1, Beta2, Epsilon, WeightDecay;
    public int Reserved;
}

[StructLayout(LayoutKind.Sequential)]
public struct NoiseArgs
{
    public nint Out;
    public long Count;
    public ulong Key, Position;
}

[StructLayout(LayoutKind.Sequential)]
public struct MachineLimits
{
    public double Gigaflops, GigabytesPerSecond;
}
