using PerturbNas.Networks;
using PerturbNas.Spaces;

namespace PerturbNas.Selection;

/// <summary>
/// The original DARTS selection: every edge keeps its operation with the largest softmax weight other than <c>none</c>, every node its two
/// edges with the largest such weight. Ties: the lowest index.
/// </summary>
public static class MagnitudeSelector
{
    /// <summary>The genotype that the alphas of the moment stand for, and the edge states that make the supernet it.</summary>
    public static (Genotype Genotype, EdgeStates States) Select(Supernet network)
    {
        var states = new EdgeStates();
        foreach (var type in Enum.GetValues<CellType>())
        {
            var weights = network.Alphas.Softmax(type);
            var columns = network.Alphas.Columns(type);
            for (var node = 0; node < CellTopology.Nodes; node++)
            {
                var edges = Enumerable.Range(CellTopology.FirstEdge(node), CellTopology.EdgeCount(node)).ToList();
                var best = edges.ToDictionary(edge => edge, edge => Best(network.Space.Operations(type)[edge], weights.AsSpan(edge * columns, columns)));
                var kept = edges.OrderByDescending(edge => best[edge].Weight).Take(2).ToHashSet();
                foreach (var edge in edges)
                    states[type, edge] = kept.Contains(edge) ? best[edge].Operation : EdgeStates.Removed;
            }
        }
        return (network.Space.ToGenotype(states), states);
    }

    /// <summary>The operation of an edge with the largest weight other than <c>none</c>; an edge that offers nothing else has weight 0.</summary>
    public static (int Operation, double Weight) Best(IReadOnlyList<string> operations, ReadOnlySpan<double> weights)
    {
        var best = -1;
        for (var o = 0; o < operations.Count; o++)
            if (operations[o] != "none" && (best < 0 || weights[o] > weights[best]))
                best = o;
        return best < 0 ? (0, 0) : (best, weights[best]);
    }
}
