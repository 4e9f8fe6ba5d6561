using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Operators;

namespace PerturbNas.Tensors;

/// <summary>
/// An activation on a tape. A plain tensor is a finished value; gradients of its consumers add up in <see cref="Gradient"/>. A raw tensor
/// is the output of a convolution or pool that has not been normalised: it carries a pending <see cref="Normalization"/>, has
/// exactly one consumer, which applies it while loading, and gets a pending gradient (design: "pending affine").
/// </summary>
public sealed class Tensor
{
    internal Tensor(Tape tape, Shape shape, bool needsGradient)
    {
        Shape = shape;
        NeedsGradient = needsGradient;
        Data = tape.Allocate(shape.Count);
    }

    /// <summary>A value that is given from outside: no gradient.</summary>
    internal Tensor(Block data, Shape shape) => (Data, Shape) = (data, shape);

    /// <summary>
    /// A raw tensor that is never written: its consumer takes x while loading, pooled or as it is. Every consumer has one of its own, with a
    /// normalisation and a gradient of its own.
    /// </summary>
    internal static Tensor OfPool(Tensor x, Pooling pooling, int stride, Block? statistics) =>
        new(x.Data, x.Shape.Strided(stride, x.Shape.Channels))
        {
            NeedsGradient = x.NeedsGradient,
            IsRaw = true,
            Statistics = statistics,
            Pooling = pooling,
            Pooled = (x.Shape.Height, x.Shape.Width, stride),
        };

    public Shape Shape { get; }

    /// <summary>The values; of a pooled tensor, those that are to be pooled.</summary>
    public Block Data { get; }

    /// <summary>How the values come from <see cref="Data"/>.</summary>
    public Pooling Pooling { get; private init; }

    /// <summary>Extent of what is to be pooled, and the stride.</summary>
    public (int Height, int Width, int Stride) Pooled { get; private init; }

    /// <summary>Whether anything that this tape wants gradients for lies upstream.</summary>
    public bool NeedsGradient { get; private init; }

    /// <summary>The output has not been finished by its producer: normalisation and gradient are pending.</summary>
    public bool IsRaw { get; init; }

    /// <summary>The pools of this value that have been recorded.</summary>
    internal List<Pool> Pools { get; } = [];

    /// <summary>The first wave of a node's operators that can use this value (see <see cref="Operator.Wave"/>).</summary>
    internal int Wave { get; set; }

    /// <summary>Gradient of a plain tensor, once a consumer has asked for it.</summary>
    public Block? Gradient { get; private set; }

    /// <summary>Per image mean and squared deviation [V, N, 2, C], written by the producer for batch statistics.</summary>
    internal Block? Statistics { get; init; }

    /// <summary>Scale, shift, inverse deviation and mean [V, 4, C]; null: none.</summary>
    internal Block? Normalization { get; private set; }

    /// <summary>The pending gradient of a raw tensor: dy = a * g + b * y + c, coefficients [3, C].</summary>
    internal Block? PendingG { get; private set; }

    internal Block? Coefficients { get; private set; }

    private BatchNorm? _batchNorm;
    private bool _batchStatistics;

    internal void AttachNormalization(BatchNorm batchNorm, Block normalization, bool batchStatistics)
    {
        _batchNorm = batchNorm;
        _batchStatistics = batchStatistics;
        Normalization = normalization;
    }

    /// <summary>Where a consumer is to put its gradient, and whether it must add to what is there.</summary>
    internal (Block Gradient, bool Accumulate) RequestGradient(Tape tape)
    {
        if (Gradient is not null)
            return (Gradient, true);
        Gradient = tape.Allocate(Shape.Count);
        return (Gradient, false);
    }

    /// <summary>Plans the pending gradient of a raw tensor whose consumer has g as the gradient of its (normalised) value.</summary>
    internal void PlanPendingGradient(Tape tape, Block g)
    {
        PendingG = g;
        Coefficients = tape.Allocate(3L * Shape.Channels);
    }

    /// <summary>The same for a consumer that already has the gradient of the raw value itself.</summary>
    internal void SetGradient(Block g) => PendingG = g;

    /// <summary>Turns the sums that the consumer's backward pass left into the coefficients, and the affine gradients.</summary>
    internal void RunBatchNormBackward(Backend backend, Block gradientSums, int rows, int row, nint weight)
    {
        var wantAffine = _batchNorm is { Gamma: not null } && _batchNorm.Gamma.Gradient != 0 && _batchNorm.WantsGradient;
        backend.BatchNormBackward(new BatchNormBackwardArgs
        {
            GradientSums = gradientSums.Address,
            Normalization = Normalization?.Address ?? 0,
            Weight = weight,
            Coefficients = Coefficients!.Address,
            DGamma = wantAffine ? _batchNorm!.Gamma!.Gradient : 0,
            DBeta = wantAffine ? _batchNorm!.Beta!.Gradient : 0,
            Images = Shape.Images,
            Pixels = Shape.Pixels,
            Channels = Shape.Channels,
            Rows = rows,
            Row = row,
            Training = _batchStatistics ? 1 : 0,
        });
    }
}
