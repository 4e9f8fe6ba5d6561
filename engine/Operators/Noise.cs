using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>
/// N(0,1) noise of the output's shape, common to all variants: candidates are compared under the same noise. Drawn from the
/// counter-based stream (key, position); the position is asked for at every forward pass.
/// </summary>
public sealed class Noise : Operator
{
    private readonly Tensor _y;
    private readonly ulong _key;
    private readonly Func<ulong> _position;

    private Noise(Tape tape, Shape shape, ulong key, Func<ulong> position)
    {
        (_key, _position) = (key, position);
        _y = new Tensor(tape, shape with { Variants = 1 }, needsGradient: false);
    }

    public static Tensor Apply(Tape tape, Shape shape, ulong key, Func<ulong> position)
    {
        var operation = new Noise(tape, shape, key, position);
        tape.Record(operation);
        return operation._y;
    }

    public override string Name => "noise";

    internal override bool IsFixed => false;

    public override void Forward(Backend backend) =>
        backend.NoiseNormal(new NoiseArgs { Out = _y.Data.Address, Count = _y.Shape.Count, Key = _key, Position = _position() });

    internal override IEnumerable<Block?> ForwardBlocks() => [_y.Data];
}
