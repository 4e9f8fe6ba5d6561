using PerturbNas.Spaces;

namespace PerturbNas.Selection;

/// <summary>What candidates are compared by.</summary>
public enum Criterion
{
    /// <summary>Validation accuracy.</summary>
    Accuracy,

    /// <summary>Validation loss.</summary>
    Loss,
}

/// <summary>The score of one candidate of a decision.</summary>
/// <param name="Operation">The operation that was masked, or that the masked edge carries.</param>
/// <param name="Edge">The edge that was masked.</param>
/// <param name="Loss">Mean validation loss of the network without it (natural logarithm).</param>
/// <param name="Accuracy">Validation accuracy of the network without it, a fraction.</param>
/// <param name="Images">Images that it was evaluated on.</param>
/// <param name="Dropped">Why racing dropped it before the last image; null: it was not dropped.</param>
public sealed record CandidateScore(string Operation, int Edge, double Loss, double Accuracy, long Images, string? Dropped = null);

/// <summary>One line of decisions.jsonl: what was compared, and what was chosen.</summary>
/// <param name="Index">Number of the decision.</param>
/// <param name="Phase">"operation": one of an edge's operations is kept; "topology": one of a node's edges is removed; "none_replaced": an
/// edge that had chosen <c>none</c> survived and takes its next-best operation.</param>
/// <param name="Cell">"normal" or "reduction".</param>
/// <param name="Node">Intermediate node 0..3 that the edges lead into.</param>
/// <param name="Edge">The edge that was decided or removed.</param>
/// <param name="Chosen">The operation that is kept ("operation", "none_replaced"), or that of the removed edge ("topology").</param>
/// <param name="Candidates">The scores, in the order of the candidates.</param>
public sealed record Decision(int Index, string Phase, string Cell, int Node, int Edge, string Chosen, IReadOnlyList<CandidateScore> Candidates)
{
    public const string OperationPhase = "operation";
    public const string TopologyPhase = "topology";
    public const string NoneReplacedPhase = "none_replaced";

    internal CellType CellType => Cell == CellTopology.NameOf(CellType.Normal) ? CellType.Normal : CellType.Reduction;

    /// <summary>
    /// Index of the candidate whose absence hurts most, among those not dropped: lowest accuracy or highest loss; ties: the first. It is the
    /// operation to keep.
    /// </summary>
    public static int HurtsMost(IReadOnlyList<CandidateScore> candidates, Criterion criterion)
    {
        var best = -1;
        for (var i = 0; i < candidates.Count; i++)
            if (candidates[i].Dropped is null && (best < 0 || Hurt(candidates[i], criterion) > Hurt(candidates[best], criterion)))
                best = i;
        return best;
    }

    /// <summary>
    /// Index of the candidate whose absence hurts least, among those not dropped: highest accuracy or lowest loss; ties: the last. It is the
    /// edge to remove.
    /// </summary>
    public static int HurtsLeast(IReadOnlyList<CandidateScore> candidates, Criterion criterion)
    {
        var best = -1;
        for (var i = 0; i < candidates.Count; i++)
            if (candidates[i].Dropped is null && (best < 0 || Hurt(candidates[i], criterion) <= Hurt(candidates[best], criterion)))
                best = i;
        return best;
    }

    private static double Hurt(CandidateScore candidate, Criterion criterion) =>
        criterion == Criterion.Accuracy ? -candidate.Accuracy : candidate.Loss;
}
