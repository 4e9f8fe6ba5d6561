using PerturbNas.Networks;
using PerturbNas.Spaces;

namespace PerturbNas.Selection;

/// <summary>A candidate of a decision by magnitude.</summary>
/// <param name="Operation">The operation, or the strongest one of the edge.</param>
/// <param name="Weight">Its softmax weight, a fraction.</param>
public sealed record WeighedCandidate(string Operation, int Edge, double Weight);

/// <summary>One line of decisions.jsonl: as <see cref="Decision"/>, but compared are softmax weights.</summary>
public sealed record MagnitudeDecision(int Index, string Phase, string Cell, int Node, int Edge, string Chosen,
    IReadOnlyList<WeighedCandidate> Candidates);

/// <summary>
/// The original DARTS selection: every edge keeps its operation with the largest softmax weight other than <c>none</c>, every node its two
/// edges with the largest such weight. Ties: the lowest index.
/// </summary>
public static class MagnitudeSelector
{
    /// <summary>The decisions that the alphas of the moment stand for, and the edge states that they make.</summary>
    public static (IReadOnlyList<MagnitudeDecision> Decisions, EdgeStates States) Select(Supernet network)
    {
        var states = new EdgeStates();
        var decisions = new List<MagnitudeDecision>();
        foreach (var type in Enum.GetValues<CellType>())
        {
            var weights = network.Alphas.Softmax(type);
            var columns = network.Alphas.Columns(type);
            var best = new List<WeighedCandidate>();
            for (var edge = 0; edge < CellTopology.Edges; edge++)
            {
                var operations = network.Space.Operations(type)[edge];
                var candidates = operations.Select((operation, o) => new WeighedCandidate(operation, edge, weights[edge * columns + o])).ToList();
                var (chosen, weight) = Best(operations, weights.AsSpan(edge * columns, columns));
                states[type, edge] = chosen;
                best.Add(new WeighedCandidate(operations[chosen], edge, weight));
                Record(type, Decision.OperationPhase, best[edge], candidates);
            }
            for (var node = 0; node < CellTopology.Nodes; node++)
            {
                var left = best.GetRange(CellTopology.FirstEdge(node), CellTopology.EdgeCount(node));
                while (left.Count > 2)
                {
                    var removed = left.AsEnumerable().Reverse().MinBy(candidate => candidate.Weight)!;
                    states[type, removed.Edge] = EdgeStates.Removed;
                    Record(type, Decision.TopologyPhase, removed, [.. left]);
                    left.Remove(removed);
                }
            }
        }
        return (decisions, states);

        void Record(CellType type, string phase, WeighedCandidate chosen, IReadOnlyList<WeighedCandidate> candidates) =>
            decisions.Add(new MagnitudeDecision(decisions.Count, phase, CellTopology.NameOf(type), CellTopology.NodeOf(chosen.Edge), chosen.Edge,
                chosen.Operation, candidates));
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
