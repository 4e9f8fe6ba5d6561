using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>Kernel extent, stride and padding of a dense convolution, rows then columns.</summary>
public readonly record struct Window(int KernelH, int KernelW, int StrideH, int StrideW, int PaddingH, int PaddingW)
{
    public static Window Square(int kernel, int stride, int padding) => new(kernel, kernel, stride, stride, padding, padding);
}

/// <summary>Optional ReLU - dense convolution without bias; the output is raw.</summary>
public sealed class Convolution : Operator
{
    private readonly Tensor _x, _y;
    private readonly Parameter _weight;
    private readonly Window _window;
    private readonly bool _relu, _weightGradient;
    private Block? _dx;
    private bool _accumulate;

    private Convolution(Tape tape, Tensor x, Parameter weight, Window window, int outChannels, bool relu,
        bool normalized)
    {
        (_x, _weight, _window, _relu) = (x, weight, window, relu);
        _weightGradient = tape.Options.WeightGradients;
        var height = (x.Shape.Height + 2 * window.PaddingH - window.KernelH) / window.StrideH + 1;
        var width = (x.Shape.Width + 2 * window.PaddingW - window.KernelW) / window.StrideW + 1;
        var shape = x.Shape with { Height = height, Width = width, Channels = outChannels };
        _y = Raw.Create(tape, shape, x.NeedsGradient || _weightGradient, normalized);
        (Wave, _y.Wave) = (x.Wave, x.Wave + 1);
    }

    /// <param name="normalized">Whether a batch norm follows (statistics are gathered), or another convolution.</param>
    public static Tensor Apply(Tape tape, Tensor x, Parameter weight, Window window, int outChannels, bool relu,
        bool normalized = true)
    {
        var operation = new Convolution(tape, x, weight, window, outChannels, relu, normalized);
        tape.Record(operation);
        return operation._y;
    }

    public override string Name => "convolution";

    internal override bool NeedsBackward => _y.PendingG is not null;

    public override void Forward(Backend backend) => backend.ConvolutionForward(Arguments() with
    {
        Y = _y.Data.Address,
        Statistics = _y.Statistics?.Address ?? 0,
    });

    internal override void PlanBackward(Tape tape)
    {
        if (!_x.NeedsGradient)
            return;
        if (_x.IsRaw)
            _x.SetGradient(_dx = tape.Allocate(_x.Shape.Count));
        else
            (_dx, _accumulate) = _x.RequestGradient(tape);
    }

    public override void Backward(Backend backend) => backend.ConvolutionBackward(Arguments() with
    {
        Y = _y.Data.Address,
        G = _y.PendingG!.Address,
        Coefficients = _y.Coefficients?.Address ?? 0,
        Dx = _dx?.Address ?? 0,
        DWeight = _weightGradient ? _weight.Gradient : 0,
        Accumulate = _accumulate ? 1 : 0,
    });

    internal override IEnumerable<Block?> ForwardBlocks() => [_x.Data, _y.Data, _y.Statistics];

    internal override IEnumerable<Block?> BackwardBlocks() => [_x.Data, _y.Data, _y.PendingG, _y.Coefficients, _dx];

    private ConvolutionArgs Arguments() => new()
    {
        X = _x.Data.Address,
        Weight = _weight.Address,
        Variants = _x.Shape.Variants,
        Images = _x.Shape.Images,
        Height = _x.Shape.Height,
        Width = _x.Shape.Width,
        InChannels = _x.Shape.Channels,
        OutChannels = _y.Shape.Channels,
        KernelH = _window.KernelH,
        KernelW = _window.KernelW,
        StrideH = _window.StrideH,
        StrideW = _window.StrideW,
        PaddingH = _window.PaddingH,
        PaddingW = _window.PaddingW,
        Relu = _relu ? 1 : 0,
    };
}

/// <summary>Makes the raw output of a convolution, with room for its statistics where the batch's own are used.</summary>
internal static class Raw
{
    public static Tensor Create(Tape tape, Shape shape, bool needsGradient, bool normalized = true) => new(tape, shape, needsGradient)
    {
        IsRaw = true,
        Statistics = Statistics(tape, shape, normalized),
    };

    public static Block? Statistics(Tape tape, Shape shape, bool normalized) => normalized && tape.Options.BatchNorm != BatchNormMode.Evaluation
        ? tape.Allocate(2L * shape.Variants * shape.Images * shape.Channels)
        : null;
}
