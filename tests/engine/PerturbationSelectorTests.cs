using PerturbNas.Autograd;
using PerturbNas.Backends.Reference;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>
/// Perturbation-based selection without tuning against an implementation of its own here: the whole network with one table of mixing weights,
/// in which what is masked, decided or removed is a matter of numbers in rows.
/// </summary>
public sealed class PerturbationSelectorTests
{
    private const string Space = """{"operations": ["none", "skip_connect", "max_pool_3x3"]}""";
    private const int Images = 12, Batch = 5;

    [Theory]
    [InlineData(Criterion.Accuracy, false, 1)]
    [InlineData(Criterion.Accuracy, true, 2)]
    [InlineData(Criterion.Loss, false, 3)]
    [InlineData(Criterion.Loss, true, 1)]
    public void DecidesAsAStraightforwardImplementation(Criterion criterion, bool quirks, long seed)
    {
        using var backend = new ReferenceBackend();
        using var network = new SmallNetwork(backend, Space, channels: 2, images: Images);
        var evaluation = new MaskedEvaluation(network.Network, network.Arena, network.Data, Batch);
        var selector = new PerturbationSelector(network.Network, evaluation, criterion, Racing.Off, seed, quirks, []);
        var decidedBefore = 0;
        for (var round = 0; round < PerturbationSelector.Rounds; round++)
        {
            var remaining = selector.CandidateImages(selector.States, round);
            long scored = 0;
            while (selector.DecideNext(round, images => scored += images, CancellationToken.None) is not null)
            {
            }
            if (round < PerturbationSelector.OperationRounds)
                Assert.Equal(2, selector.Decisions.Count - decidedBefore);
            Assert.Equal(remaining - selector.CandidateImages(selector.States, round + 1), scored);
            decidedBefore = selector.Decisions.Count;
        }
        var chosenNone = Enum.GetValues<CellType>().Sum(type => Enumerable.Range(0, 14).Count(edge => selector.States[type, edge] == 0));
        var replaced = selector.ReplaceNone();
        Assert.Equal(chosenNone, replaced.Count);
        if (criterion == Criterion.Accuracy)
        {
            // The case has what it is to test.
            Assert.NotEmpty(replaced);
            Assert.Contains(selector.Decisions, decision =>
                decision.Candidates.DistinctBy(candidate => candidate.Accuracy).Count() < decision.Candidates.Count);
        }
        Assert.Equal(Enumerable.Range(0, selector.Decisions.Count), selector.Decisions.Select(decision => decision.Index));

        using var reference = new Straightforward(network, criterion, quirks);
        foreach (var decision in selector.Decisions)
            reference.Check(decision);
        reference.CheckGenotype(network.Network.Space.ToGenotype(selector.States));

        // A selector that is given the decisions stands where the first one stood.
        var resumed = new PerturbationSelector(network.Network, evaluation, criterion, Racing.Off, seed, quirks, selector.Decisions);
        foreach (var type in Enum.GetValues<CellType>())
            for (var edge = 0; edge < CellTopology.Edges; edge++)
                Assert.Equal(selector.States[type, edge], resumed.States[type, edge]);
        Assert.Null(resumed.DecideNext(PerturbationSelector.Rounds - 1, null, CancellationToken.None));
    }

    /// <summary>With quirks an edge that was removed is back while its node's others are evaluated: every second comparison differs.</summary>
    [Fact]
    public void QuirksChangeTheLaterComparisonsOfANode()
    {
        using var backend = new ReferenceBackend();
        using var network = new SmallNetwork(backend, Space, channels: 2, images: 4);
        var evaluation = new MaskedEvaluation(network.Network, network.Arena, network.Data, Batch);
        List<Decision>[] decisions = [.. new[] { false, true }.Select(quirks =>
        {
            // Every edge a skip, so that a removed edge matters.
            var operations = Enum.GetValues<CellType>().SelectMany(type => Enumerable.Range(0, CellTopology.Edges).Select(edge => new Decision(
                0, Decision.OperationPhase, CellTopology.NameOf(type), CellTopology.NodeOf(edge), edge, "skip_connect", [])));
            var selector = new PerturbationSelector(network.Network, evaluation, Criterion.Loss, Racing.Off, seed: 1, quirks, operations);
            while (selector.DecideNext(PerturbationSelector.OperationRounds, null, CancellationToken.None) is not null)
            {
            }
            return selector.Decisions.Skip(28).Where(decision => decision.Cell == "normal").ToList();
        })];
        var (plain, quirky) = (decisions[0], decisions[1]);
        Assert.Equal(plain[0].Node, plain.Count); // node n loses n edges
        Assert.True(plain.Count > 1);
        Assert.Equal(plain[0].Candidates, quirky[0].Candidates);
        Assert.Equal(plain[1].Candidates.Select(candidate => candidate.Edge), quirky[1].Candidates.Select(candidate => candidate.Edge));
        Assert.All(plain[1].Candidates.Zip(quirky[1].Candidates), pair => Assert.NotEqual(pair.First.Loss, pair.Second.Loss));
    }

    [Fact]
    public void EveryEdgeIsDecidedOnceInAnOrderOfTheSeed()
    {
        var orders = new List<string>();
        foreach (var seed in (long[])[1, 1, 2])
        {
            using var backend = new ReferenceBackend();
            using var network = new SmallNetwork(backend, """{"operations": ["skip_connect"]}""", channels: 2, images: 4);
            var selector = new PerturbationSelector(network.Network, new MaskedEvaluation(network.Network, network.Arena, network.Data, Batch),
                Criterion.Accuracy, Racing.Off, seed, referenceQuirks: false, []);
            for (var round = 0; round < PerturbationSelector.Rounds; round++)
                while (selector.DecideNext(round, null, CancellationToken.None) is not null)
                {
                }
            var operations = selector.Decisions.Where(decision => decision.Phase == Decision.OperationPhase).ToList();
            Assert.Equal(Enumerable.Range(0, 28).Select(i => i % 2 == 0 ? "normal" : "reduction"), operations.Select(decision => decision.Cell));
            foreach (var cell in (string[])["normal", "reduction"])
                Assert.Equal(Enumerable.Range(0, 14), operations.Where(decision => decision.Cell == cell).Select(decision => decision.Edge).Order());

            // Per cell type 1 + 2 + 3 edges of nodes 1, 2 and 3 go.
            var topology = selector.Decisions.Where(decision => decision.Phase == Decision.TopologyPhase).ToList();
            Assert.Equal(12, topology.Count);
            Assert.All(topology.CountBy(decision => (decision.Cell, decision.Node)), pair => Assert.Equal(pair.Key.Node, pair.Value));
            Assert.Equal(28 + 12, selector.Decisions.Count);
            orders.Add(string.Join(' ', selector.Decisions.Select(decision => decision.Edge)));
        }
        Assert.Equal(orders[0], orders[1]);
        Assert.NotEqual(orders[0], orders[2]);
    }

    [Fact]
    public void TiesKeepTheFirstOperationAndRemoveTheLastEdge()
    {
        List<CandidateScore> scores = [Score(1.0, 0.5), Score(1.2, 0.25), Score(1.2, 0.25), Score(0.8, 0.75), Score(0.8, 0.75)];
        foreach (var criterion in Enum.GetValues<Criterion>())
        {
            Assert.Equal(1, Decision.HurtsMost(scores, criterion));
            Assert.Equal(4, Decision.HurtsLeast(scores, criterion));
        }

        // The criteria differ where accuracy and loss do.
        scores = [Score(loss: 2, accuracy: 0.9), Score(loss: 1, accuracy: 0.1)];
        Assert.Equal((1, 0), (Decision.HurtsMost(scores, Criterion.Accuracy), Decision.HurtsMost(scores, Criterion.Loss)));
        Assert.Equal((0, 1), (Decision.HurtsLeast(scores, Criterion.Accuracy), Decision.HurtsLeast(scores, Criterion.Loss)));

        static CandidateScore Score(double loss, double accuracy) => new("skip_connect", 0, loss, accuracy, 100);
    }

    /// <summary>Follows the decisions in their order, computing each anew.</summary>
    private sealed class Straightforward : IDisposable
    {
        private readonly SmallNetwork _network;
        private readonly Criterion _criterion;
        private readonly bool _quirks;
        private readonly double[][] _rows;
        private readonly List<SupernetPass> _batches = [];
        private readonly List<Arena> _arenas = [];
        private readonly HashSet<(CellType, int)> _removed = [];
        private readonly Dictionary<(CellType, int), (int Chosen, double[] Hurt)> _decided = [];

        // Removed edges of the node at hand that quirks leave in place until another node is at hand.
        private readonly List<(CellType Type, int Edge)> _pending = [];
        private (CellType, int)? _node;

        public Straightforward(SmallNetwork network, Criterion criterion, bool quirks)
        {
            (_network, _criterion, _quirks) = (network, criterion, quirks);
            _rows = [Rows(CellType.Normal), Rows(CellType.Reduction)];
            var loader = BatchLoader.InRecordOrder(network.Data, Batch);
            for (var step = 0; step < loader.Steps; step++)
            {
                var images = new float[loader.BatchCount(step) * network.Data.ImageSize];
                var labels = new int[loader.BatchCount(step)];
                loader.Fill(0, step, images, labels);

                // In an arena of its own and without reuse of memory, the batch is still there for any number of passes.
                var arena = new Arena(network.Backend);
                var options = new TapeOptions(BatchNormMode.BatchStatistics) { ReuseMemory = false };
                var pass = network.Network.Record(arena, options, labels.Length, new EdgeStates());
                pass.Forward(images, labels);
                _batches.Add(pass);
                _arenas.Add(arena);
            }
        }

        private int Columns => _network.Network.Space.Columns(CellType.Normal);

        public void Check(Decision decision)
        {
            var type = decision.Cell == "normal" ? CellType.Normal : CellType.Reduction;
            Assert.Equal(CellTopology.NodeOf(decision.Edge), decision.Node);
            switch (decision.Phase)
            {
                case "operation":
                    CheckOperation(type, decision);
                    break;
                case "topology":
                    CheckTopology(type, decision);
                    break;
                default:
                    CheckReplaced(type, decision);
                    break;
            }
        }

        public void Dispose()
        {
            foreach (var arena in _arenas)
                arena.Dispose();
        }

        public void CheckGenotype(Genotype genotype)
        {
            foreach (var type in Enum.GetValues<CellType>())
            {
                var expected = Enumerable.Range(0, 14).Where(edge => !_removed.Contains((type, edge)))
                    .Select(edge => new GenotypeEdge(Name(_decided[(type, edge)].Chosen), CellTopology.SourceOf(edge)));
                Assert.Equal(expected, genotype.Edges(type));
            }
        }

        private void CheckOperation(CellType type, Decision decision)
        {
            var hurt = new double[Columns];
            for (var o = 0; o < Columns; o++)
                hurt[o] = Hurt(type, decision.Edge, o, o + 1, decision.Candidates[o]);
            var chosen = Array.IndexOf(hurt, hurt.Max());
            Assert.Equal(Name(chosen), decision.Chosen);
            _decided.Add((type, decision.Edge), (chosen, hurt));
            for (var o = 0; o < Columns; o++)
                _rows[(int)type][decision.Edge * Columns + o] = o == chosen ? 1 : 0;
        }

        private void CheckTopology(CellType type, Decision decision)
        {
            if (_node != (type, decision.Node))
                RemovePending();
            _node = (type, decision.Node);
            var edges = Enumerable.Range(0, 14)
                .Where(edge => CellTopology.NodeOf(edge) == decision.Node && !_removed.Contains((type, edge))).ToList();
            Assert.Equal(edges, decision.Candidates.Select(candidate => candidate.Edge));
            var hurt = edges.Select((edge, i) => Hurt(type, edge, 0, Columns, decision.Candidates[i])).ToList();
            var removed = edges[hurt.LastIndexOf(hurt.Min())];
            Assert.Equal(removed, decision.Edge);
            Assert.Equal(Name(_decided[(type, removed)].Chosen), decision.Chosen);
            _removed.Add((type, removed));
            _pending.Add((type, removed));
            if (!_quirks)
                RemovePending();
        }

        private void CheckReplaced(CellType type, Decision decision)
        {
            var (chosen, hurt) = _decided[(type, decision.Edge)];
            Assert.Equal("none", Name(chosen));
            Assert.DoesNotContain((type, decision.Edge), _removed);
            var best = hurt[1] >= hurt[2] ? 1 : 2;
            Assert.Equal(Name(best), decision.Chosen);
            _decided[(type, decision.Edge)] = (best, hurt);
        }

        private void RemovePending()
        {
            foreach (var (type, edge) in _pending)
                _rows[(int)type].AsSpan(edge * Columns, Columns).Clear();
            _pending.Clear();
        }

        /// <summary>How much the network suffers without some columns of an edge; asserts that the candidate's score says the same.</summary>
        private double Hurt(CellType type, int edge, int first, int end, CandidateScore candidate)
        {
            var row = _rows[(int)type].AsSpan(edge * Columns, Columns);
            var kept = row.ToArray();
            row[first..end].Clear();
            var (lossSum, correct) = (0.0, 0L);
            Span<double> losses = stackalloc double[1];
            Span<long> counts = stackalloc long[1];
            foreach (var cell in Enum.GetValues<CellType>())
                _network.Network.Table(cell).SetWeights(_rows[(int)cell]);
            foreach (var pass in _batches)
            {
                pass.Tape.Forward();
                pass.ReadResults(losses, counts);
                lossSum += losses[0];
                correct += counts[0];
            }
            kept.CopyTo(row);
            Assert.Equal(edge, candidate.Edge);
            Assert.Equal(first + 1 == end ? Name(first) : Name(_decided[(type, edge)].Chosen), candidate.Operation);
            Assert.Equal(Images, candidate.Images);
            Assert.Equal((double)correct / Images, candidate.Accuracy);
            Assert.Equal(lossSum / Images, candidate.Loss, 1e-12);
            return _criterion == Criterion.Accuracy ? -candidate.Accuracy : candidate.Loss;
        }

        private string Name(int operation) => _network.Network.Space.Normal[0][operation];

        private double[] Rows(CellType type)
        {
            double[] rows = [.. _network.Network.Alphas.Get(type).Select(Math.Exp)];
            for (var edge = 0; edge < CellTopology.Edges; edge++)
            {
                var row = rows.AsSpan(edge * Columns, Columns);
                var sum = row[0] + row[1] + row[2];
                foreach (ref var value in row)
                    value /= sum;
            }
            return rows;
        }
    }
}
