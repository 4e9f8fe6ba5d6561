using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>Max or average pooling 3x3, padding 1 (the average excludes padding); the output is raw, whether or not a batch norm follows.</summary>
public sealed class Pool : Operator
{
    private readonly Tensor _x, _y;
    private readonly bool _max;
    private readonly int _stride;
    private readonly Block? _argmax;
    private Block? _dx;
    private bool _accumulate;

    private Pool(Tape tape, Tensor x, bool max, int stride, bool normalized)
    {
        (_x, _max, _stride) = (x, max, stride);
        _y = Raw.Create(tape, x.Shape.Strided(stride, x.Shape.Channels), x.NeedsGradient, normalized);
        (Wave, _y.Wave) = (x.Wave, x.Wave + 1);
        if (max && x.NeedsGradient)
            _argmax = tape.AllocateBytes(_y.Shape.Count);
    }

    public static Tensor Apply(Tape tape, Tensor x, bool max, int stride, bool normalized)
    {
        var operation = new Pool(tape, x, max, stride, normalized);
        tape.Record(operation);
        return operation._y;
    }

    public override string Name => _max ? "max_pool_3x3" : "avg_pool_3x3";

    internal override bool IsPerImage => true;

    internal override bool NeedsBackward => _y.PendingG is not null;

    public override void Forward(Backend backend)
    {
        var arguments = Arguments() with { Statistics = _y.Statistics?.Address ?? 0 };
        if (_max)
            backend.MaxPoolForward(arguments);
        else
            backend.AvgPoolForward(arguments);
    }

    internal override void PlanBackward(Tape tape) => (_dx, _accumulate) = _x.RequestGradient(tape);

    public override void Backward(Backend backend)
    {
        var arguments = Arguments() with
        {
            G = _y.PendingG!.Address,
            Coefficients = _y.Coefficients!.Address,
            Dx = _dx!.Address,
            Accumulate = _accumulate ? 1 : 0,
        };
        if (_max)
            backend.MaxPoolBackward(arguments);
        else
            backend.AvgPoolBackward(arguments);
    }

    internal override IEnumerable<Block?> ForwardBlocks() => [_x.Data, _y.Data, _y.Statistics, _argmax];

    internal override IEnumerable<Block?> BackwardBlocks() => [_y.Data, _argmax, _y.PendingG, _y.Coefficients, _dx];

    private PoolArgs Arguments() => new()
    {
        X = _x.Data.Address,
        Y = _y.Data.Address,
        Argmax = _argmax?.Address ?? 0,
        Variants = _x.Shape.Variants,
        Images = _x.Shape.Images,
        Height = _x.Shape.Height,
        Width = _x.Shape.Width,
        Channels = _x.Shape.Channels,
        Stride = _stride,
    };
}
