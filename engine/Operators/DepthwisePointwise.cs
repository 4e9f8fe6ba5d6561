using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>
/// ReLU - depthwise KxK - pointwise 1x1, the body of a dilated convolution and each half of a separable one; padding keeps the extent.
/// The input may be raw: its pending normalisation is applied while loading. The output is raw.
/// </summary>
public sealed class DepthwisePointwise : Operator
{
    private readonly Tensor _x, _y;
    private readonly Parameter _depthwise, _pointwise;
    private readonly int _kernel, _stride, _dilation;
    private readonly bool _weightGradient;
    private Block? _dx, _gradientSums;
    private bool _accumulate;

    private DepthwisePointwise(Tape tape, Tensor x, Parameter depthwise, Parameter pointwise, int outChannels, int kernel, int stride,
        int dilation)
    {
        (_x, _depthwise, _pointwise, _kernel, _stride, _dilation) = (x, depthwise, pointwise, kernel, stride, dilation);
        _weightGradient = tape.Options.WeightGradients;
        _y = Raw.Create(tape, x.Shape.Strided(stride, outChannels), x.NeedsGradient || _weightGradient);
        (Wave, _y.Wave) = (x.Wave, x.Wave + 1);
    }

    public static Tensor Apply(Tape tape, Tensor x, Parameter depthwise, Parameter pointwise, int outChannels, int kernel, int stride,
        int dilation)
    {
        var operation = new DepthwisePointwise(tape, x, depthwise, pointwise, outChannels, kernel, stride, dilation);
        tape.Record(operation);
        return operation._y;
    }

    public override string Name => "depthwise_pointwise";

    internal override bool IsPerImage => true;

    internal override bool NeedsBackward => _y.PendingG is not null;

    public override void Forward(Backend backend) => backend.DepthwisePointwiseForward(Arguments() with
    {
        Y = _y.Data.Address,
        Statistics = _y.Statistics?.Address ?? 0,
    });

    internal override void PlanBackward(Tape tape)
    {
        if (!_x.NeedsGradient)
            return;
        if (!_x.IsRaw)
        {
            (_dx, _accumulate) = _x.RequestGradient(tape);
            return;
        }
        _dx = tape.Allocate(_x.Shape.Count);
        _gradientSums = tape.Allocate(2L * _x.Shape.Images * _x.Shape.Channels);
        _x.PlanPendingGradient(tape, _dx);
    }

    public override void Backward(Backend backend)
    {
        backend.DepthwisePointwiseBackward(Arguments() with
        {
            Y = _y.Data.Address,
            G = _y.PendingG!.Address,
            Coefficients = _y.Coefficients!.Address,
            Dx = _dx?.Address ?? 0,
            GradientSums = _gradientSums?.Address ?? 0,
            DDepthwise = _weightGradient ? _depthwise.Gradient : 0,
            DPointwise = _weightGradient ? _pointwise.Gradient : 0,
            Accumulate = _accumulate ? 1 : 0,
        });
        if (_gradientSums is not null)
            _x.RunBatchNormBackward(backend, _gradientSums, rows: 2, row: 1, weight: 0);
    }

    internal override IEnumerable<Block?> ForwardBlocks() => [_x.Data, _x.Normalization, _y.Data, _y.Statistics];

    internal override IEnumerable<Block?> BackwardBlocks() =>
        [_x.Data, _x.Normalization, _y.Data, _y.PendingG, _y.Coefficients, _dx, _gradientSums, _x.Coefficients];

    private DepthwisePointwiseArgs Arguments() => new()
    {
        X = _x.Data.Address,
        XNormalization = _x.Normalization?.Address ?? 0,
        Depthwise = _depthwise.Address,
        Pointwise = _pointwise.Address,
        Variants = _x.Shape.Variants,
        Images = _x.Shape.Images,
        Height = _x.Shape.Height,
        Width = _x.Shape.Width,
        InChannels = _x.Shape.Channels,
        OutChannels = _y.Shape.Channels,
        Kernel = _kernel,
        Stride = _stride,
        Dilation = _dilation,
    };
}
