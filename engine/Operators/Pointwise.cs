using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>
/// ReLU - pointwise 1x1 convolution of a concatenation that is never formed (its parts stay where they are). With two weights it is the
/// factorized reduction: two stride-2 convolutions into the two halves of the output's channels, the second on the input shifted by
/// one pixel in both axes. The output is raw.
/// </summary>
public sealed class Pointwise : Operator
{
    private readonly IReadOnlyList<Tensor> _parts;
    private readonly Parameter[] _weights;
    private readonly Tensor _y;
    private readonly bool _relu, _weightGradient;
    private readonly (Block? Gradient, bool Accumulate)[] _gradients;

    private Pointwise(Tape tape, IReadOnlyList<Tensor> parts, int outChannels, bool relu, Parameter[] weights)
    {
        (_parts, _weights, _relu) = (parts, weights, relu);
        _weightGradient = tape.Options.WeightGradients;
        _gradients = new (Block?, bool)[parts.Count];
        var shape = parts[0].Shape with { Variants = parts.Max(part => part.Shape.Variants) };
        var needsGradient = _weightGradient || parts.Any(part => part.NeedsGradient);
        _y = Raw.Create(tape, shape.Strided(weights.Length, outChannels), needsGradient);
        Wave = parts.Max(part => part.Wave);
        _y.Wave = Wave + 1;
    }

    /// <summary>A 1x1 convolution of stride 1.</summary>
    public static Tensor Apply(Tape tape, IReadOnlyList<Tensor> parts, Parameter weight, int outChannels, bool relu = true) =>
        Record(tape, new Pointwise(tape, parts, outChannels, relu, [weight]));

    /// <summary>The two convolutions of a factorized reduction; the first gives outChannels / 2 channels.</summary>
    public static Tensor ApplyFactorized(Tape tape, IReadOnlyList<Tensor> parts, Parameter first, Parameter second, int outChannels) =>
        Record(tape, new Pointwise(tape, parts, outChannels, relu: true, [first, second]));

    public override string Name => _weights.Length == 1 ? "pointwise" : "factorized_reduction";

    internal override bool NeedsBackward => _y.PendingG is not null;

    public override void Forward(Backend backend) => Run(backend, backward: false);

    internal override void PlanBackward(Tape tape)
    {
        for (var i = 0; i < _parts.Count; i++)
            if (_parts[i].NeedsGradient)
                _gradients[i] = _parts[i].RequestGradient(tape);
    }

    public override void Backward(Backend backend) => Run(backend, backward: true);

    internal override IEnumerable<Block?> ForwardBlocks() => [.. _parts.Select(part => part.Data), _y.Data, _y.Statistics];

    internal override IEnumerable<Block?> BackwardBlocks() =>
        [.. _parts.Select(part => part.Data), .. _gradients.Select(g => g.Gradient), _y.Data, _y.PendingG, _y.Coefficients];

    private static Tensor Record(Tape tape, Pointwise operation)
    {
        tape.Record(operation);
        return operation._y;
    }

    private unsafe void Run(Backend backend, bool backward)
    {
        var parts = stackalloc PartArgs[_parts.Count];
        for (var half = 0; half < _weights.Length; half++)
        {
            for (var i = 0; i < _parts.Count; i++)
            {
                parts[i] = new PartArgs
                {
                    X = _parts[i].Data.Address,
                    Dx = backward ? _gradients[i].Gradient?.Address ?? 0 : 0,
                    Variants = _parts[i].Shape.Variants,
                    Channels = _parts[i].Shape.Channels,
                    Accumulate = _gradients[i].Accumulate || half > 0 ? 1 : 0,
                };
            }
            var channels = _y.Shape.Channels;
            var firstChannels = _weights.Length == 1 ? channels : channels / 2;
            var arguments = new PointwiseArgs
            {
                Parts = (nint)parts,
                PartCount = _parts.Count,
                Weight = _weights[half].Address,
                Y = _y.Data.Address,
                Relu = _relu ? 1 : 0,
                Images = _y.Shape.Images,
                Height = _parts[0].Shape.Height,
                Width = _parts[0].Shape.Width,
                OutChannels = half == 0 ? firstChannels : channels - firstChannels,
                Stride = _weights.Length,
                Offset = half,
                YChannels = channels,
                YOffset = half == 0 ? 0 : firstChannels,
            };
            if (backward)
            {
                arguments.G = _y.PendingG!.Address;
                arguments.Coefficients = _y.Coefficients!.Address;
                arguments.DWeight = _weightGradient ? _weights[half].Gradient : 0;
                backend.PointwiseBackward(arguments);
            }
            else
            {
                arguments.Statistics = _y.Statistics?.Address ?? 0;
                backend.PointwiseForward(arguments);
            }
        }
    }
}
