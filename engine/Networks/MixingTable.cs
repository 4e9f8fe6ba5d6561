using PerturbNas.Backends;
using PerturbNas.Tensors;

namespace PerturbNas.Networks;

/// <summary>
/// The weights of all mixed operations of one cell type, one row per variant: [V, edges * operations], and the gradients of the first row.
/// All cells of the type share it.
/// </summary>
public sealed class MixingTable : IDisposable
{
    private readonly Backend _backend;

    internal MixingTable(Backend backend, int edges, int operations, int maxVariants)
    {
        _backend = backend;
        (Operations, Columns, MaxVariants) = (operations, edges * operations, maxVariants);
        Weights = Take((long)maxVariants * Columns);
        Gradients = Take(Columns);

        Block Take(long count) => new(backend.Allocate(count * backend.ElementSize), count * backend.ElementSize);
    }

    /// <summary>Operations per edge.</summary>
    public int Operations { get; }

    /// <summary>edges * operations; the weight of operation o of edge e is column e * operations + o.</summary>
    public int Columns { get; }

    public int MaxVariants { get; }

    internal Block Weights { get; }

    internal Block Gradients { get; }

    internal nint WeightAddress(int index) => Weights.Address + index * _backend.ElementSize;

    public void SetWeights(ReadOnlySpan<double> rows) => _backend.Write(Weights.Address, rows);

    public void ZeroGradients() => _backend.Zero(Gradients.Address, Gradients.Bytes);

    /// <summary>Reads the gradient of the loss with respect to each weight, after a backward pass.</summary>
    /// <param name="gradients">[Columns].</param>
    public void ReadGradients(Span<double> gradients) => _backend.Read(Gradients.Address, gradients);

    public void Dispose()
    {
        _backend.Free(Weights.Address);
        _backend.Free(Gradients.Address);
    }
}
