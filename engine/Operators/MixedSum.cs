using System.Runtime.InteropServices;
using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>One operation's output in a mixed sum, with the place of its weight in the mixing table's row.</summary>
public readonly record struct Term(Tensor Value, int WeightIndex);

/// <summary>
/// A node: the sum over all incoming edges and operations of weight times (normalised) value, in one pass. With one term and no mixing
/// table it finishes a raw tensor. Its backward yields the weights' gradients (hence alpha's), the batch-norm sums, and passes its own
/// gradient on as the pending gradient of every raw term.
/// </summary>
public sealed class MixedSum : Operator
{
    private readonly IReadOnlyList<Term> _terms;
    private readonly MixingTable? _table;
    private readonly Tensor _out;
    private readonly bool _weightGradients;
    private Block? _gradientSums;

    // Pinned, because a backend may put the call off.
    private readonly TermArgs[] _arguments;

    private MixedSum(Tape tape, Shape shape, IReadOnlyList<Term> terms, MixingTable? table)
    {
        (_terms, _table) = (terms, table);
        _arguments = GC.AllocateArray<TermArgs>(terms.Count, pinned: true);
        _weightGradients = table is not null && tape.Options.AlphaGradients;
        _out = new Tensor(tape, shape, _weightGradients || terms.Any(term => term.Value.NeedsGradient));
    }

    /// <summary>The sum of weighted terms; <paramref name="shape"/> has the variants of the result.</summary>
    public static Tensor Apply(Tape tape, Shape shape, IReadOnlyList<Term> terms, MixingTable table) =>
        Record(tape, new MixedSum(tape, shape, terms, table));

    /// <summary>Finishes raw tensors by adding their normalised values.</summary>
    public static Tensor Finish(Tape tape, params Tensor[] raw) =>
        Record(tape, new MixedSum(tape, raw[0].Shape, [.. raw.Select(tensor => new Term(tensor, 0))], null));

    public override string Name => "mixed_sum";

    internal override bool NeedsBackward => _out.Gradient is not null;

    public override void Forward(Backend backend) => backend.MixedSumForward(Arguments() with { Out = _out.Data.Address });

    internal override void PlanBackward(Tape tape)
    {
        var g = _out.Gradient!;
        _gradientSums = tape.Allocate((long)_out.Shape.Images * (1 + _terms.Count) * _out.Shape.Channels);
        foreach (var (value, _) in _terms)
            if (value.NeedsGradient)
                value.PlanPendingGradient(tape, g);
    }

    public override void Backward(Backend backend)
    {
        backend.MixedSumBackward(Arguments() with
        {
            G = _out.Gradient!.Address,
            GradientSums = _gradientSums!.Address,
            WeightGradients = _weightGradients ? _table!.Gradients.Address : 0,
        });
        for (var i = 0; i < _terms.Count; i++)
        {
            var (value, weightIndex) = _terms[i];
            if (value.NeedsGradient)
                value.RunBatchNormBackward(backend, _gradientSums!, 1 + _terms.Count, 1 + i, _table?.WeightAddress(weightIndex) ?? 0);
        }
    }

    internal override IEnumerable<Block?> ForwardBlocks() =>
        [.. _terms.SelectMany(term => new[] { term.Value.Data, term.Value.Normalization }), _out.Data];

    internal override IEnumerable<Block?> BackwardBlocks() =>
    [
        .. _terms.SelectMany(term => new[] { term.Value.Data, term.Value.Normalization, term.Value.Coefficients }),
        _gradientSums,
        _out.Gradient,
    ];

    private static Tensor Record(Tape tape, MixedSum operation)
    {
        tape.Record(operation);
        return operation._out;
    }

    private MixedSumArgs Arguments()
    {
        for (var i = 0; i < _terms.Count; i++)
        {
            _arguments[i] = new TermArgs
            {
                Y = _terms[i].Value.Data.Address,
                Normalization = _terms[i].Value.Normalization?.Address ?? 0,
                Variants = _terms[i].Value.Shape.Variants,
                WeightIndex = _terms[i].WeightIndex,
                Pooling = _terms[i].Value.Pooling,
                Height = _terms[i].Value.Pooled.Height,
                Width = _terms[i].Value.Pooled.Width,
                Stride = _terms[i].Value.Pooled.Stride,
            };
        }
        return new MixedSumArgs
        {
            Terms = Marshal.UnsafeAddrOfPinnedArrayElement(_arguments, 0),
            Weights = _table?.Weights.Address ?? 0,
            TermCount = _terms.Count,
            Variants = _out.Shape.Variants,
            Images = _out.Shape.Images,
            Pixels = _out.Shape.Pixels,
            Channels = _out.Shape.Channels,
            WeightStride = _table?.Columns ?? 0,
        };
    }
}
