using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Selection;

/// <summary>
/// Perturbation-based architecture selection (DARTS-PT, Wang et al., ICLR 2021, section 4), as a sequence of rounds: 14 rounds decide one
/// normal and one reduction edge each, 3 more thin out one normal and one reduction node each; after every round but the last the
/// supernet is tuned. Which edge or node comes when is drawn from the seed beforehand, so a selection can go on from any round.
/// </summary>
public sealed class PerturbationSelector
{
    /// <summary>Rounds that decide operations.</summary>
    public const int OperationRounds = CellTopology.Edges;

    /// <summary>Rounds that decide the topology of nodes 1, 2 and 3; node 0 has but two edges.</summary>
    public const int TopologyRounds = CellTopology.Nodes - 1;

    public const int Rounds = OperationRounds + TopologyRounds;

    private readonly Supernet _network;
    private readonly MaskedEvaluation _evaluation;
    private readonly Criterion _criterion;
    private readonly Racing _racing;
    private readonly long _seed;
    private readonly bool _referenceQuirks;
    private readonly int[][] _edgeOrder = new int[2][], _nodeOrder = new int[2][];
    private readonly List<Decision> _decisions;

    /// <param name="decisions">The decisions made already (resuming), in order.</param>
    /// <param name="referenceQuirks">Edges of a node that were removed in this round stay present in the evaluation of the others.</param>
    public PerturbationSelector(Supernet network, MaskedEvaluation evaluation, Criterion criterion, Racing racing, long seed,
        bool referenceQuirks, IEnumerable<Decision> decisions)
    {
        if (criterion == Criterion.Loss && !racing.IsOff)
            throw new UserException($"Racing '{racing}' needs the criterion acc: a loss has no upper bound, so no candidate can be dropped early; " +
                "choose --criterion acc or --racing off.");
        (_network, _evaluation, _criterion, _racing, _seed, _referenceQuirks) = (network, evaluation, criterion, racing, seed, referenceQuirks);
        foreach (var type in Enum.GetValues<CellType>())
        {
            var edges = Enumerable.Range(0, CellTopology.Edges).ToArray();
            new RandomStream(seed, $"edge order/{CellTopology.NameOf(type)}").Shuffle(edges);
            var nodes = Enumerable.Range(1, TopologyRounds).ToArray();
            new RandomStream(seed, $"node order/{CellTopology.NameOf(type)}").Shuffle(nodes);
            (_edgeOrder[(int)type], _nodeOrder[(int)type]) = (edges, nodes);
        }
        _decisions = [.. decisions];
        foreach (var decision in _decisions)
            Apply(decision);
    }

    /// <summary>All decisions so far.</summary>
    public IReadOnlyList<Decision> Decisions => _decisions;

    /// <summary>What they make of the supernet's edges.</summary>
    public EdgeStates States { get; } = new();

    /// <summary>The next decision of a round; null: the round has no more, the supernet is to be tuned.</summary>
    public Decision? DecideNext(int round, Action<int>? afterBatch, CancellationToken cancellation)
    {
        foreach (var type in Enum.GetValues<CellType>())
        {
            if (round < OperationRounds)
            {
                var edge = _edgeOrder[(int)type][round];
                if (States[type, edge] == EdgeStates.Undecided)
                    return Record(DecideOperation(type, edge, afterBatch, cancellation));
            }
            else
            {
                var node = _nodeOrder[(int)type][round - OperationRounds];
                if (RemainingEdges(type, node).Count > 2)
                    return Record(RemoveEdge(type, node, afterBatch, cancellation));
            }
        }
        return null;
    }

    /// <summary>
    /// After the last round: surviving edges that chose <c>none</c> take the operation whose absence hurt most among the others.
    /// Returns the decisions that say so.
    /// </summary>
    public IReadOnlyList<Decision> ReplaceNone()
    {
        var replaced = new List<Decision>();
        foreach (var type in Enum.GetValues<CellType>())
        {
            for (var edge = 0; edge < CellTopology.Edges; edge++)
            {
                var operations = _network.Space.Operations(type)[edge];
                if (States[type, edge] < 0 || operations[States[type, edge]] != "none" || operations.Count == 1)
                    continue;
                var others = OperationDecision(type, edge).Candidates.Where(candidate => candidate.Operation != "none").ToList();
                var chosen = others[Decision.HurtsMost(others, _criterion)].Operation;
                replaced.Add(Record(new Decision(_decisions.Count, Decision.NoneReplacedPhase, CellTopology.NameOf(type),
                    CellTopology.NodeOf(edge), edge, chosen, others)));
            }
        }
        return replaced;
    }

    /// <summary>Candidate-images that the decisions from a round on evaluate, given what is decided: for progress.</summary>
    public long CandidateImages(EdgeStates states, int round)
    {
        long candidates = 0;
        foreach (var type in Enum.GetValues<CellType>())
        {
            for (var r = round; r < Rounds; r++)
            {
                if (r < OperationRounds)
                {
                    if (states[type, _edgeOrder[(int)type][r]] == EdgeStates.Undecided)
                        candidates += _network.Space.Columns(type);
                    continue;
                }
                var node = _nodeOrder[(int)type][r - OperationRounds];
                for (var left = EdgesOf(node).Count(edge => states[type, edge] != EdgeStates.Removed); left > 2; left--)
                    candidates += left;
            }
        }
        return candidates * _evaluation.Images;
    }

    private Decision DecideOperation(CellType type, int edge, Action<int>? afterBatch, CancellationToken cancellation)
    {
        var operations = _network.Space.Operations(type)[edge];
        var masks = operations.Select((_, o) => new Mask(type, edge, o)).ToList();
        var scores = Score(States, masks, mask => operations[mask.Operation], "racing order", lowestWins: true, afterBatch, cancellation);
        var chosen = Decision.HurtsMost(scores, _criterion);
        if (operations[chosen] == "none" && operations.Count > 1 && !_racing.IsOff)
        {
            // Should the edge survive, the next-best operation is needed: the others have to race on without none.
            masks.RemoveAt(chosen);
            var others = Score(States, masks, mask => operations[mask.Operation], "racing order without none", lowestWins: true, afterBatch, cancellation);
            scores = [.. scores.Select((score, o) => o == chosen ? score : others[o < chosen ? o : o - 1])];
        }
        return new Decision(_decisions.Count, Decision.OperationPhase, CellTopology.NameOf(type), CellTopology.NodeOf(edge), edge,
            operations[chosen], scores);
    }

    private Decision RemoveEdge(CellType type, int node, Action<int>? afterBatch, CancellationToken cancellation)
    {
        var states = States;
        if (_referenceQuirks)
        {
            states = States.Copy();
            foreach (var removed in EdgesOf(node).Where(edge => states[type, edge] == EdgeStates.Removed))
                states[type, removed] = IndexOf(type, removed, OperationDecision(type, removed).Chosen);
        }
        var masks = RemainingEdges(type, node).Select(edge => new Mask(type, edge, Mask.WholeEdge)).ToList();
        var scores = Score(states, masks, mask => _network.Space.Operations(type)[mask.Edge][States[type, mask.Edge]], "racing order",
            lowestWins: false, afterBatch, cancellation);
        var removedEdge = scores[Decision.HurtsLeast(scores, _criterion)];
        return new Decision(_decisions.Count, Decision.TopologyPhase, CellTopology.NameOf(type), node, removedEdge.Edge, removedEdge.Operation,
            scores);
    }

    private List<CandidateScore> Score(EdgeStates states, List<Mask> masks, Func<Mask, string> operation, string orderPurpose, bool lowestWins,
        Action<int>? afterBatch, CancellationToken cancellation)
    {
        var order = new RandomStream(_seed, orderPurpose, _decisions.Count);
        var results = _evaluation.Evaluate(states, masks, _racing, lowestWins, order, afterBatch, cancellation);
        return [.. masks.Select((mask, i) => new CandidateScore(operation(mask), mask.Edge, results[i].Totals.Loss, results[i].Totals.Accuracy,
            results[i].Totals.Images, results[i].Dropped))];
    }

    private Decision Record(Decision decision)
    {
        _decisions.Add(decision);
        Apply(decision);
        return decision;
    }

    private void Apply(Decision decision) => States[decision.CellType, decision.Edge] = decision.Phase == Decision.TopologyPhase
        ? EdgeStates.Removed
        : IndexOf(decision.CellType, decision.Edge, decision.Chosen);

    private Decision OperationDecision(CellType type, int edge) => _decisions.First(decision =>
        decision.Phase == Decision.OperationPhase && decision.CellType == type && decision.Edge == edge);

    private int IndexOf(CellType type, int edge, string operation)
    {
        var operations = _network.Space.Operations(type)[edge];
        for (var o = 0; o < operations.Count; o++)
            if (operations[o] == operation)
                return o;
        throw new UserException($"decisions.jsonl names operation '{operation}' for {CellTopology.NameOf(type)} edge {edge}, which this space " +
            "does not offer there; the file belongs to another run.");
    }

    private List<int> RemainingEdges(CellType type, int node) => [.. EdgesOf(node).Where(edge => States[type, edge] != EdgeStates.Removed)];

    private static IEnumerable<int> EdgesOf(int node) => Enumerable.Range(CellTopology.FirstEdge(node), CellTopology.EdgeCount(node));
}
