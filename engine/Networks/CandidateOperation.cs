using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Operators;
using PerturbNas.Tensors;

namespace PerturbNas.Networks;

/// <summary>
/// An operation that an edge can carry, C channels in and out. Creating one defines its parameters, under the reference's names;
/// <see cref="Apply"/> records it. In the supernet its batch norms have no affine parameters and pools are followed by one; in a
/// derived network it is the other way round.
/// </summary>
public abstract class CandidateOperation
{
    /// <summary>The names of all operations.</summary>
    public static IReadOnlyList<string> Names { get; } =
    [
        "none", "noise", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7", "dil_conv_3x3",
        "dil_conv_5x5", "conv_7x1_1x7",
    ];

    /// <summary>Records the operation; null: the output is zero and nothing is to be added.</summary>
    internal abstract Tensor? Apply(Tape tape, Tensor x);

    /// <param name="prefix">Name of the operation in files, "cells.3._ops.5._ops.2".</param>
    /// <param name="derived">Whether it belongs to a derived network.</param>
    /// <param name="noise">Makes the noise tensor of a given shape on a tape.</param>
    internal static CandidateOperation Create(string name, ParameterStore store, string prefix, int channels, int stride, bool derived,
        Func<Tape, Shape, Tensor> noise) => name switch
        {
            "none" => new NoneOperation(),
            "noise" => new NoiseOperation(stride, noise),
            "max_pool_3x3" or "avg_pool_3x3" => new PoolOperation(store, prefix, name == "max_pool_3x3" ? Pooling.Max3x3 : Pooling.Avg3x3, channels,
                stride, !derived),
            "skip_connect" when stride == 1 => new Identity(),
            "skip_connect" => new FactorizedReduction(store, prefix, channels, channels, derived),
            "sep_conv_3x3" => new SeparableConvolution(store, prefix, channels, 3, stride, derived),
            "sep_conv_5x5" => new SeparableConvolution(store, prefix, channels, 5, stride, derived),
            "sep_conv_7x7" => new SeparableConvolution(store, prefix, channels, 7, stride, derived),
            "dil_conv_3x3" => new DilatedConvolution(store, prefix, channels, 3, stride, derived),
            "dil_conv_5x5" => new DilatedConvolution(store, prefix, channels, 5, stride, derived),
            "conv_7x1_1x7" => new FactorizedConvolution(store, prefix, channels, stride, derived),
            _ => throw new ArgumentException($"unknown operation '{name}'", nameof(name)),
        };
}

/// <summary>Zeros.</summary>
internal sealed class NoneOperation : CandidateOperation
{
    internal override Tensor? Apply(Tape tape, Tensor x) => null;
}

/// <summary>N(0,1) noise of the output's shape.</summary>
internal sealed class NoiseOperation(int stride, Func<Tape, Shape, Tensor> noise) : CandidateOperation
{
    internal override Tensor Apply(Tape tape, Tensor x) => noise(tape, x.Shape.Strided(stride, x.Shape.Channels) with { Variants = 1 });
}

internal sealed class Identity : CandidateOperation
{
    internal override Tensor Apply(Tape tape, Tensor x) => Pool.Apply(tape, x, Pooling.None, stride: 1, normalized: false);
}

/// <summary>Pool 3x3, then (in the supernet) batch norm.</summary>
internal sealed class PoolOperation(ParameterStore store, string prefix, Pooling pooling, int channels, int stride, bool normalized)
    : CandidateOperation
{
    private readonly BatchNormParameters? _batchNorm = normalized ? store.AddBatchNorm(prefix + ".1", channels, affine: false) : null;

    internal override Tensor Apply(Tape tape, Tensor x)
    {
        var y = Pool.Apply(tape, x, pooling, stride, _batchNorm is not null);
        return _batchNorm is null ? y : BatchNorm.Apply(tape, y, _batchNorm);
    }
}

/// <summary>ReLU - two 1x1 stride-2 convolutions, the second on the input shifted by one pixel - concatenate - batch norm.</summary>
internal sealed class FactorizedReduction(ParameterStore store, string prefix, int inChannels, int channels, bool affine) : CandidateOperation
{
    private readonly Parameter _first = store.AddWeight(prefix + ".conv_1.weight", channels / 2, inChannels, 1, 1);
    private readonly Parameter _second = store.AddWeight(prefix + ".conv_2.weight", channels - channels / 2, inChannels, 1, 1);
    private readonly BatchNormParameters _batchNorm = store.AddBatchNorm(prefix + ".bn", channels, affine);

    internal override Tensor Apply(Tape tape, Tensor x) => Apply(tape, [x]);

    internal Tensor Apply(Tape tape, IReadOnlyList<Tensor> parts) =>
        BatchNorm.Apply(tape, Pointwise.ApplyFactorized(tape, parts, _first, _second, channels), _batchNorm);
}

/// <summary>ReLU - depthwise KxK - pointwise - batch norm, twice; the stride is in the first.</summary>
internal sealed class SeparableConvolution(ParameterStore store, string prefix, int channels, int kernel, int stride, bool affine)
    : CandidateOperation
{
    private readonly Parameter _depthwise1 = store.AddWeight(prefix + ".op.1.weight", channels, 1, kernel, kernel);
    private readonly Parameter _pointwise1 = store.AddWeight(prefix + ".op.2.weight", channels, channels, 1, 1);
    private readonly BatchNormParameters _batchNorm1 = store.AddBatchNorm(prefix + ".op.3", channels, affine);
    private readonly Parameter _depthwise2 = store.AddWeight(prefix + ".op.5.weight", channels, 1, kernel, kernel);
    private readonly Parameter _pointwise2 = store.AddWeight(prefix + ".op.6.weight", channels, channels, 1, 1);
    private readonly BatchNormParameters _batchNorm2 = store.AddBatchNorm(prefix + ".op.7", channels, affine);

    internal override Tensor Apply(Tape tape, Tensor x)
    {
        var first = DepthwisePointwise.Apply(tape, x, _depthwise1, _pointwise1, channels, kernel, stride, dilation: 1);
        BatchNorm.Apply(tape, first, _batchNorm1);
        var second = DepthwisePointwise.Apply(tape, first, _depthwise2, _pointwise2, channels, kernel, stride: 1, dilation: 1);
        return BatchNorm.Apply(tape, second, _batchNorm2);
    }
}

/// <summary>ReLU - depthwise KxK of dilation 2 - pointwise - batch norm.</summary>
internal sealed class DilatedConvolution(ParameterStore store, string prefix, int channels, int kernel, int stride, bool affine)
    : CandidateOperation
{
    private readonly Parameter _depthwise = store.AddWeight(prefix + ".op.1.weight", channels, 1, kernel, kernel);
    private readonly Parameter _pointwise = store.AddWeight(prefix + ".op.2.weight", channels, channels, 1, 1);
    private readonly BatchNormParameters _batchNorm = store.AddBatchNorm(prefix + ".op.3", channels, affine);

    internal override Tensor Apply(Tape tape, Tensor x)
    {
        var y = DepthwisePointwise.Apply(tape, x, _depthwise, _pointwise, channels, kernel, stride, dilation: 2);
        return BatchNorm.Apply(tape, y, _batchNorm);
    }
}

/// <summary>ReLU - 1x7 convolution - 7x1 convolution - batch norm; the stride is (1, s) and (s, 1).</summary>
internal sealed class FactorizedConvolution(ParameterStore store, string prefix, int channels, int stride, bool affine) : CandidateOperation
{
    private readonly Parameter _row = store.AddWeight(prefix + ".1.weight", channels, channels, 1, 7);
    private readonly Parameter _column = store.AddWeight(prefix + ".2.weight", channels, channels, 7, 1);
    private readonly BatchNormParameters _batchNorm = store.AddBatchNorm(prefix + ".3", channels, affine);

    internal override Tensor Apply(Tape tape, Tensor x)
    {
        var row = Convolution.Apply(tape, x, _row, new Window(1, 7, 1, stride, 0, 3), channels, relu: true, normalized: false);
        var column = Convolution.Apply(tape, row, _column, new Window(7, 1, stride, 1, 3, 0), channels, relu: false);
        return BatchNorm.Apply(tape, column, _batchNorm);
    }
}

/// <summary>ReLU - 1x1 convolution of a concatenation - batch norm: how a cell brings its inputs to C channels.</summary>
internal sealed class Preprocess(ParameterStore store, string prefix, int inChannels, int channels, bool affine)
{
    private readonly Parameter _weight = store.AddWeight(prefix + ".op.1.weight", channels, inChannels, 1, 1);
    private readonly BatchNormParameters _batchNorm = store.AddBatchNorm(prefix + ".op.2", channels, affine);

    internal Tensor Apply(Tape tape, IReadOnlyList<Tensor> parts) =>
        BatchNorm.Apply(tape, Pointwise.Apply(tape, parts, _weight, channels), _batchNorm);
}
