using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>Global average pooling of a concatenation that is never formed: [V, N, 1, 1, C].</summary>
public sealed class GlobalAveragePool : Operator
{
    private readonly IReadOnlyList<Tensor> _parts;
    private readonly Tensor _out;
    private readonly (Block? Gradient, bool Accumulate)[] _gradients;

    private GlobalAveragePool(Tape tape, IReadOnlyList<Tensor> parts)
    {
        _parts = parts;
        _gradients = new (Block?, bool)[parts.Count];
        var shape = new Shape(parts.Max(part => part.Shape.Variants), parts[0].Shape.Images, 1, 1, parts.Sum(part => part.Shape.Channels));
        _out = new Tensor(tape, shape, parts.Any(part => part.NeedsGradient));
    }

    public static Tensor Apply(Tape tape, IReadOnlyList<Tensor> parts)
    {
        var operation = new GlobalAveragePool(tape, parts);
        tape.Record(operation);
        return operation._out;
    }

    public override string Name => "global_average_pool";

    internal override bool NeedsBackward => _out.Gradient is not null;

    public override unsafe void Forward(Backend backend)
    {
        var parts = stackalloc PartArgs[_parts.Count];
        backend.GlobalAveragePoolForward(Arguments(parts) with { Out = _out.Data.Address });
    }

    internal override void PlanBackward(Tape tape)
    {
        for (var i = 0; i < _parts.Count; i++)
            if (_parts[i].NeedsGradient)
                _gradients[i] = _parts[i].RequestGradient(tape);
    }

    public override unsafe void Backward(Backend backend)
    {
        var parts = stackalloc PartArgs[_parts.Count];
        backend.GlobalAveragePoolBackward(Arguments(parts) with { G = _out.Gradient!.Address });
    }

    internal override IEnumerable<Block?> ForwardBlocks() => [.. _parts.Select(part => part.Data), _out.Data];

    internal override IEnumerable<Block?> BackwardBlocks() => [.. _gradients.Select(g => g.Gradient), _out.Gradient];

    private unsafe GlobalAveragePoolArgs Arguments(PartArgs* parts)
    {
        for (var i = 0; i < _parts.Count; i++)
        {
            parts[i] = new PartArgs
            {
                X = _parts[i].Data.Address,
                Dx = _gradients[i].Gradient?.Address ?? 0,
                Variants = _parts[i].Shape.Variants,
                Channels = _parts[i].Shape.Channels,
                Accumulate = _gradients[i].Accumulate ? 1 : 0,
            };
        }
        return new GlobalAveragePoolArgs
        {
            Parts = (nint)parts,
            PartCount = _parts.Count,
            Images = _out.Shape.Images,
            Pixels = _parts[0].Shape.Pixels,
        };
    }
}

/// <summary>The linear classifier with bias: logits [V, N, 1, 1, classes].</summary>
public sealed class Linear : Operator
{
    private readonly Tensor _x, _out;
    private readonly Parameter _weight, _bias;
    private readonly bool _weightGradient;
    private (Block? Gradient, bool Accumulate) _dx;

    private Linear(Tape tape, Tensor x, Parameter weight, Parameter bias, int outChannels)
    {
        (_x, _weight, _bias) = (x, weight, bias);
        _weightGradient = tape.Options.WeightGradients;
        _out = new Tensor(tape, x.Shape with { Channels = outChannels }, x.NeedsGradient || _weightGradient);
    }

    public static Tensor Apply(Tape tape, Tensor x, Parameter weight, Parameter bias, int outChannels)
    {
        var operation = new Linear(tape, x, weight, bias, outChannels);
        tape.Record(operation);
        return operation._out;
    }

    public override string Name => "linear";

    internal override bool NeedsBackward => _out.Gradient is not null;

    public override void Forward(Backend backend) => backend.LinearForward(Arguments());

    internal override void PlanBackward(Tape tape)
    {
        if (_x.NeedsGradient)
            _dx = _x.RequestGradient(tape);
        if (_dx.Accumulate)
            throw new InvalidOperationException("a linear layer's input has one consumer");
    }

    public override void Backward(Backend backend) => backend.LinearBackward(Arguments() with
    {
        G = _out.Gradient!.Address,
        Dx = _dx.Gradient?.Address ?? 0,
        DWeight = _weightGradient ? _weight.Gradient : 0,
        DBias = _weightGradient ? _bias.Gradient : 0,
    });

    internal override IEnumerable<Block?> ForwardBlocks() => [_x.Data, _out.Data];

    internal override IEnumerable<Block?> BackwardBlocks() => [_x.Data, _out.Gradient, _dx.Gradient];

    private LinearArgs Arguments() => new()
    {
        X = _x.Data.Address,
        Weight = _weight.Address,
        Bias = _bias.Address,
        Out = _out.Data.Address,
        Rows = _x.Shape.Variants * _x.Shape.Images,
        InChannels = _x.Shape.Channels,
        OutChannels = _out.Shape.Channels,
    };
}

/// <summary>
/// Softmax cross-entropy: per variant the sum of the losses (natural logarithm) over the images and the number of correct ones. It is the end
/// of the tape: its gradient is that of the mean loss.
/// </summary>
public sealed class SoftmaxCrossEntropy : Operator
{
    private readonly Tensor _logits;
    private readonly Block _labels, _imageCorrect, _lossSums, _correctCounts;
    private Block? _dlogits;

    /// <param name="labels">int32 [N].</param>
    public SoftmaxCrossEntropy(Tape tape, Tensor logits, Block labels)
    {
        (_logits, _labels) = (logits, labels);
        var shape = logits.Shape;
        _imageCorrect = Kept(tape, shape.Variants * shape.Images * sizeof(int));
        _lossSums = Kept(tape, shape.Variants * sizeof(double));
        _correctCounts = Kept(tape, shape.Variants * sizeof(long));
        tape.Keep(logits.Data);
        tape.Record(this);
    }

    public override string Name => "softmax_cross_entropy";

    public Tensor Logits => _logits;

    internal override bool NeedsBackward => _logits.NeedsGradient;

    public override void Forward(Backend backend) => Run(backend, 0);

    internal override void PlanBackward(Tape tape) => (_dlogits, _) = _logits.RequestGradient(tape);

    public override void Backward(Backend backend) => Run(backend, _dlogits!.Address);

    /// <summary>Per variant: sum of losses.</summary>
    public void ReadLossSums(Backend backend, Span<double> sums) =>
        backend.ReadBytes(_lossSums.Address, System.Runtime.InteropServices.MemoryMarshal.AsBytes(sums));

    /// <summary>Per variant: number of images whose largest logit is the label's.</summary>
    public void ReadCorrectCounts(Backend backend, Span<long> counts) =>
        backend.ReadBytes(_correctCounts.Address, System.Runtime.InteropServices.MemoryMarshal.AsBytes(counts));

    /// <summary>Per variant and image, [V, N]: 1 where the largest logit is the label's, else 0.</summary>
    public void ReadCorrect(Backend backend, Span<int> correct) =>
        backend.ReadBytes(_imageCorrect.Address, System.Runtime.InteropServices.MemoryMarshal.AsBytes(correct));

    internal override IEnumerable<Block?> ForwardBlocks() => [_logits.Data, _labels];

    internal override IEnumerable<Block?> BackwardBlocks() => [_logits.Data, _labels, _dlogits];

    private static Block Kept(Tape tape, long bytes)
    {
        var block = tape.AllocateBytes(bytes);
        tape.Keep(block);
        return block;
    }

    private void Run(Backend backend, nint dlogits) => backend.SoftmaxCrossEntropy(new SoftmaxCrossEntropyArgs
    {
        Logits = _logits.Data.Address,
        Labels = _labels.Address,
        ImageCorrect = _imageCorrect.Address,
        LossSums = _lossSums.Address,
        CorrectCounts = _correctCounts.Address,
        Dlogits = dlogits,
        Variants = _logits.Shape.Variants,
        Images = _logits.Shape.Images,
        Classes = _logits.Shape.Channels,
        Scale = 1,
    });
}
