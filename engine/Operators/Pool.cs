using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>
/// Max or average pooling 3x3, padding 1 (the average excludes padding). The edges that leave a node pool the same value: it is pooled
/// once, and every edge gets a raw tensor of its own on the common output, because each has its own batch norm and gradient.
/// </summary>
public sealed class Pool : Operator
{
    private readonly Tensor _x;
    private readonly bool _max;
    private readonly int _stride;
    private readonly Block? _argmax;

    // One per edge; all have the data and the statistics of the first.
    private readonly List<Tensor> _outputs = [];
    private Block? _dx;
    private bool _accumulate;

    private Pool(Tape tape, Tensor x, bool max, int stride, bool normalized)
    {
        (_x, _max, _stride) = (x, max, stride);
        Wave = x.Wave;
        AddOutput(Raw.Create(tape, x.Shape.Strided(stride, x.Shape.Channels), x.NeedsGradient, normalized));
        if (max && x.NeedsGradient)
            _argmax = tape.AllocateBytes(_outputs[0].Shape.Count);
    }

    /// <summary>The pooled value as a raw tensor, whether or not a batch norm follows (`normalized`).</summary>
    public static Tensor Apply(Tape tape, Tensor x, bool max, int stride, bool normalized)
    {
        var earlier = x.Pools.Find(pool => pool._max == max && pool._stride == stride);
        if (earlier is not null)
            return earlier.AddOutput(earlier._outputs[0].Again());
        var operation = new Pool(tape, x, max, stride, normalized);
        x.Pools.Add(operation);
        tape.Record(operation);
        return operation._outputs[0];
    }

    public override string Name => _max ? "max_pool_3x3" : "avg_pool_3x3";

    internal override bool IsPerImage => true;

    internal override bool NeedsBackward => _outputs.Exists(output => output.PendingG is not null);

    public override void Forward(Backend backend)
    {
        var arguments = Arguments() with { Statistics = _outputs[0].Statistics?.Address ?? 0 };
        if (_max)
            backend.MaxPoolForward(arguments);
        else
            backend.AvgPoolForward(arguments);
    }

    internal override void PlanBackward(Tape tape) => (_dx, _accumulate) = _x.RequestGradient(tape);

    public override void Backward(Backend backend)
    {
        var accumulate = _accumulate;
        foreach (var output in _outputs)
        {
            if (output.PendingG is null)
                continue;
            var arguments = Arguments() with
            {
                G = output.PendingG.Address,
                Coefficients = output.Coefficients!.Address,
                Dx = _dx!.Address,
                Accumulate = accumulate ? 1 : 0,
            };
            if (_max)
                backend.MaxPoolBackward(arguments);
            else
                backend.AvgPoolBackward(arguments);
            accumulate = true;
        }
    }

    internal override IEnumerable<Block?> ForwardBlocks() => [_x.Data, _outputs[0].Data, _outputs[0].Statistics, _argmax];

    internal override IEnumerable<Block?> BackwardBlocks() =>
        [_outputs[0].Data, _argmax, _dx, .. _outputs.SelectMany(output => new[] { output.PendingG, output.Coefficients })];

    private Tensor AddOutput(Tensor output)
    {
        output.Wave = Wave + 1;
        _outputs.Add(output);
        return output;
    }

    private PoolArgs Arguments() => new()
    {
        X = _x.Data.Address,
        Y = _outputs[0].Data.Address,
        Argmax = _argmax?.Address ?? 0,
        Variants = _x.Shape.Variants,
        Images = _x.Shape.Images,
        Height = _x.Shape.Height,
        Width = _x.Shape.Width,
        Channels = _x.Shape.Channels,
        Stride = _stride,
    };
}
