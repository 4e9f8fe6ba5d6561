using PerturbNas.Backends;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Networks;

/// <summary>The two alpha tables [14, operations], with their gradients in the same layout: first the normal one, then the reduction one.</summary>
public sealed class ArchitectureParameters : IDisposable
{
    private readonly Backend _backend;
    private readonly int[] _columns;

    internal ArchitectureParameters(Backend backend, SearchSpace space, long seed)
    {
        _backend = backend;
        _columns = [space.Columns(CellType.Normal), space.Columns(CellType.Reduction)];
        Count = CellTopology.Edges * (_columns[0] + _columns[1]);
        Values = Take();
        Gradients = Take();
        foreach (var type in Enum.GetValues<CellType>())
        {
            var stream = new RandomStream(seed, "initialisation/" + NameOf(type));
            var values = new double[CellTopology.Edges * _columns[(int)type]];
            for (var i = 0; i < values.Length; i++)
                values[i] = (float)(1e-3 * stream.NextNormal());
            Set(type, values);
        }

        Block Take() => new(backend.Allocate((long)Count * backend.ElementSize), (long)Count * backend.ElementSize);
    }

    /// <summary>Elements of both tables together.</summary>
    public int Count { get; }

    internal Block Values { get; }

    internal Block Gradients { get; }

    /// <summary>The name in files: alphas_normal, alphas_reduce.</summary>
    public static string NameOf(CellType type) => type == CellType.Normal ? "alphas_normal" : "alphas_reduce";

    public int Columns(CellType type) => _columns[(int)type];

    public double[] Get(CellType type) => Read(Values, type);

    public double[] GetGradients(CellType type) => Read(Gradients, type);

    public void Set(CellType type, ReadOnlySpan<double> values)
    {
        if (values.Length != CellTopology.Edges * Columns(type))
            throw new ArgumentException($"{NameOf(type)} has {CellTopology.Edges * Columns(type)} values, not {values.Length}", nameof(values));
        _backend.Write(Values.Address + Start(type), values);
    }

    /// <summary>softmax(alpha) of one cell type, row by row: [14, operations].</summary>
    public double[] Softmax(CellType type)
    {
        var values = new double[CellTopology.Edges * Columns(type)];
        Softmax(type, values);
        return values;
    }

    /// <summary>The same, into the caller's memory.</summary>
    internal void Softmax(CellType type, Span<double> values)
    {
        _backend.Read(Values.Address + Start(type), values);
        var columns = Columns(type);
        for (var edge = 0; edge < CellTopology.Edges; edge++)
        {
            var row = values.Slice(edge * columns, columns);
            var max = double.NegativeInfinity;
            foreach (var value in row)
                max = Math.Max(max, value);
            var sum = 0.0;
            foreach (ref var value in row)
                sum += value = Math.Exp(value - max);
            foreach (ref var value in row)
                value /= sum;
        }
    }

    /// <summary>
    /// Turns the gradients of the mixing weights w = softmax(alpha) into those of alpha: d alpha_o = w_o (dw_o - sum_j w_j dw_j). Rows of
    /// decided edges get zero: their alpha no longer takes part.
    /// </summary>
    internal void SetGradients(CellType type, ReadOnlySpan<double> mixingGradients, EdgeStates states)
    {
        var columns = Columns(type);
        Span<double> weights = stackalloc double[CellTopology.Edges * columns];
        Span<double> gradients = stackalloc double[weights.Length];
        Softmax(type, weights);
        for (var edge = 0; edge < CellTopology.Edges; edge++)
        {
            if (states[type, edge] != EdgeStates.Undecided)
                continue;
            var start = edge * columns;
            var mean = 0.0;
            for (var o = 0; o < columns; o++)
                mean += weights[start + o] * mixingGradients[start + o];
            for (var o = 0; o < columns; o++)
                gradients[start + o] = weights[start + o] * (mixingGradients[start + o] - mean);
        }
        _backend.Write(Gradients.Address + Start(type), gradients);
    }

    public void Dispose()
    {
        _backend.Free(Values.Address);
        _backend.Free(Gradients.Address);
    }

    private nint Start(CellType type) => type == CellType.Normal ? 0 : CellTopology.Edges * _columns[0] * _backend.ElementSize;

    private double[] Read(Block block, CellType type)
    {
        var values = new double[CellTopology.Edges * Columns(type)];
        _backend.Read(block.Address + Start(type), values);
        return values;
    }
}
