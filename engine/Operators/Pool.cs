using System.Runtime.InteropServices;
using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>
/// The operations without weights on a value x: max and average pooling 3x3 with padding 1 (the average excludes padding), and the skip
/// connection, which is x itself. No value is kept: forward takes the pools' statistics, the mixed sum pools x again while it reads (see
/// <see cref="Tensor.OfPool"/>). The edges that leave a node take the same x: its statistics are taken once, every edge gets a raw tensor of
/// its own, because each has its own batch norm and weight, and backward adds up all their gradients.
/// </summary>
public sealed class Pool : Operator
{
    private readonly Tensor _x;
    private readonly int _stride;
    private readonly Block?[] _statistics = new Block?[Enum.GetValues<Pooling>().Length];

    // One per edge and operation.
    private readonly List<Tensor> _outputs = [];
    private PoolGradientArgs[] _gradients = [];
    private Block? _dx;
    private bool _accumulate;

    private Pool(Tensor x, int stride)
    {
        (_x, _stride) = (x, stride);
        Wave = x.Wave;
    }

    /// <summary>x, pooled or as it is, as a raw tensor, whether or not a batch norm follows (`normalized`).</summary>
    public static Tensor Apply(Tape tape, Tensor x, Pooling pooling, int stride, bool normalized)
    {
        var operation = x.Pools.Find(pool => pool._stride == stride);
        if (operation is null)
        {
            operation = new Pool(x, stride);
            x.Pools.Add(operation);
            tape.Record(operation);
        }
        ref var statistics = ref operation._statistics[(int)pooling];
        statistics ??= Raw.Statistics(tape, x.Shape.Strided(stride, x.Shape.Channels), normalized);
        var output = Tensor.OfPool(x, pooling, stride, statistics);
        output.Wave = operation.Wave + 1;
        operation._outputs.Add(output);
        return output;
    }

    public override string Name => "pool_3x3";

    internal override bool IsPerImage => true;

    internal override bool NeedsBackward => _outputs.Exists(output => output.PendingG is not null);

    public override void Forward(Backend backend)
    {
        var statistics = default(PoolingAddresses);
        for (var i = 0; i < _statistics.Length; i++)
            statistics[(Pooling)i] = _statistics[i]?.Address ?? 0;
        if (Array.Exists(_statistics, block => block is not null))
            backend.PoolForward(Arguments() with { Statistics = statistics });
    }

    internal override void PlanBackward(Tape tape)
    {
        (_dx, _accumulate) = _x.RequestGradient(tape);
        // Pinned, because a backend may put the call off.
        _gradients = GC.AllocateArray<PoolGradientArgs>(_outputs.Count(output => output.PendingG is not null), pinned: true);
    }

    public override void Backward(Backend backend)
    {
        // What one node takes in several ways is one entry.
        Array.Clear(_gradients);
        var count = 0;
        foreach (var output in _outputs)
        {
            if (output.PendingG is null)
                continue;
            var i = 0;
            while (i < count && (_gradients[i].G != output.PendingG.Address || _gradients[i].Coefficients[output.Pooling] != 0))
                i++;
            count = Math.Max(count, i + 1);
            _gradients[i].G = output.PendingG.Address;
            _gradients[i].Coefficients[output.Pooling] = output.Coefficients!.Address;
        }
        backend.PoolBackward(Arguments() with
        {
            Gradients = Marshal.UnsafeAddrOfPinnedArrayElement(_gradients, 0),
            GradientCount = count,
            Dx = _dx!.Address,
            Accumulate = _accumulate ? 1 : 0,
        });
    }

    internal override IEnumerable<Block?> ForwardBlocks() => [_x.Data, .. _statistics];

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
