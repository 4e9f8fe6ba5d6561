using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>
/// Max or average pooling 3x3, padding 1 (the average excludes padding). The pooled value is not kept: forward takes its statistics, the
/// mixed sum pools x again while it reads (see <see cref="Tensor.OfPool"/>). The edges that leave a node pool the same value: its statistics
/// are taken once, every edge gets a raw tensor of its own, because each has its own batch norm, and backward adds up their gradients.
/// </summary>
public sealed class Pool : Operator
{
    private readonly Tensor _x;
    private readonly Pooling _pooling;
    private readonly int _stride;
    private readonly Block? _statistics;

    // One per edge.
    private readonly List<Tensor> _outputs = [];
    private PendingGradientArgs[] _gradients = [];
    private Block? _dx;
    private bool _accumulate;

    private Pool(Tape tape, Tensor x, Pooling pooling, int stride, bool normalized)
    {
        (_x, _pooling, _stride) = (x, pooling, stride);
        Wave = x.Wave;
        _statistics = Raw.Statistics(tape, x.Shape.Strided(stride, x.Shape.Channels), normalized);
    }

    /// <summary>The pooled value as a raw tensor, whether or not a batch norm follows (`normalized`).</summary>
    public static Tensor Apply(Tape tape, Tensor x, Pooling pooling, int stride, bool normalized)
    {
        var operation = x.Pools.Find(pool => pool._pooling == pooling && pool._stride == stride);
        if (operation is null)
        {
            operation = new Pool(tape, x, pooling, stride, normalized);
            x.Pools.Add(operation);
            tape.Record(operation);
        }
        var output = Tensor.OfPool(x, pooling, stride, operation._statistics);
        output.Wave = operation.Wave + 1;
        operation._outputs.Add(output);
        return output;
    }

    public override string Name => _pooling == Pooling.Max3x3 ? "max_pool_3x3" : "avg_pool_3x3";

    internal override bool IsPerImage => true;

    internal override bool NeedsBackward => _outputs.Exists(output => output.PendingG is not null);

    public override void Forward(Backend backend)
    {
        if (_statistics is null)
            return;
        var arguments = Arguments() with { Statistics = _statistics.Address };
        if (_pooling == Pooling.Max3x3)
            backend.MaxPoolForward(arguments);
        else
            backend.AvgPoolForward(arguments);
    }

    internal override void PlanBackward(Tape tape)
    {
        (_dx, _accumulate) = _x.RequestGradient(tape);
        // Pinned, because a backend may put the call off.
        _gradients = GC.AllocateArray<PendingGradientArgs>(_outputs.Count(output => output.PendingG is not null), pinned: true);
    }

    public override unsafe void Backward(Backend backend)
    {
        var count = 0;
        foreach (var output in _outputs)
            if (output.PendingG is not null)
                _gradients[count++] = new() { G = output.PendingG.Address, Coefficients = output.Coefficients!.Address };
        var arguments = Arguments() with
        {
            Gradients = (nint)Unsafe.AsPointer(ref MemoryMarshal.GetArrayDataReference(_gradients)),
            GradientCount = count,
            Dx = _dx!.Address,
            Accumulate = _accumulate ? 1 : 0,
        };
        if (_pooling == Pooling.Max3x3)
            backend.MaxPoolBackward(arguments);
        else
            backend.AvgPoolBackward(arguments);
    }

    internal override IEnumerable<Block?> ForwardBlocks() => [_x.Data, _statistics];

    internal override IEnumerable<Block?> BackwardBlocks() =>
        [_x.Data, _dx, .. _outputs.SelectMany(output => new[] { output.PendingG, output.Coefficients })];

    private PoolArgs Arguments() => new()
    {
        X = _x.Data.Address,
        Variants = _x.Shape.Variants,
        Images = _x.Shape.Images,
        Height = _x.Shape.Height,
        Width = _x.Shape.Width,
        Channels = _x.Shape.Channels,
        Stride = _stride,
    };
}
