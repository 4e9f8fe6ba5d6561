using PerturbNas.Autograd;
using PerturbNas.Backends.Cpu;
using PerturbNas.Networks;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>Candidates as variants of one pass: the same bits as one candidate a pass, and nothing computed twice that they share.</summary>
public sealed class MaskedEvaluationTests
{
    private static readonly TapeOptions _scoring = new(BatchNormMode.BatchStatistics);

    public static TheoryData<string, CellType, int> MaskedEdges
    {
        get
        {
            var data = new TheoryData<string, CellType, int>();
            foreach (var space in (string[])["s1", "s3", "s4", "darts"])
                foreach (var (type, edge) in new[] { (CellType.Normal, 0), (CellType.Normal, 13), (CellType.Reduction, 1), (CellType.Reduction, 8) })
                    data.Add(space, type, edge);
            return data;
        }
    }

    [Theory]
    [MemberData(nameof(MaskedEdges))]
    public void CandidatesTogetherScoreAsOneByOne(string space, CellType type, int edge)
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, space, images: 10);
        var evaluation = new MaskedEvaluation(network.Network, network.Arena, network.Data, batchSize: 4);
        var masks = Masks(network, type, edge).Append(new Mask(type, edge, Mask.WholeEdge)).Append(Mask.None).ToList();
        var states = new EdgeStates();
        var together = evaluation.Evaluate(states, masks);
        var apart = masks.Select(mask => evaluation.Evaluate(states, [mask])[0]).ToList();
        Assert.Equal(apart, together);
        Assert.All(together, totals => Assert.Equal(10, totals.Images));

        // Masking something else but none changes the loss.
        var unmasked = together[^1].LossSum;
        var operations = network.Network.Space.Operations(type)[edge];
        for (var o = 0; o < operations.Count; o++)
            Assert.Equal(operations[o] == "none", together[o].LossSum == unmasked);
    }

    [Fact]
    public void MoreCandidatesThanVariantsAreEvaluatedInGroups()
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s5", images: 6);
        var evaluation = new MaskedEvaluation(network.Network, network.Arena, network.Data, batchSize: 4);
        List<Mask> masks = [.. Masks(network, CellType.Normal, 3), .. Masks(network, CellType.Normal, 9), .. Masks(network, CellType.Reduction, 5)];
        Assert.True(masks.Count > network.Network.MaxVariants);
        long images = 0;
        var together = evaluation.Evaluate(new EdgeStates(), masks, done => images += done);
        Assert.Equal(masks.Select(mask => evaluation.Evaluate(new EdgeStates(), [mask])[0]), together);
        Assert.Equal(6 * masks.Count, images);
    }

    [Fact]
    public void BatchLimitTakesTheFirstBatches()
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s2", images: 10);
        var whole = new MaskedEvaluation(network.Network, network.Arena, network.Data, batchSize: 4);
        var limited = new MaskedEvaluation(network.Network, network.Arena, network.Data, batchSize: 4, batchLimit: 2);
        Assert.Equal((3, 10), (whole.Batches, whole.Images));
        Assert.Equal((2, 8), (limited.Batches, limited.Images));
        Assert.Equal(8, limited.Evaluate(new EdgeStates(), [Mask.None])[0].Images);
    }

    [Fact]
    public void EvaluationLeavesRunningStatisticsAndGradientsAlone()
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s3");
        network.FillWeightGradients(123);
        var evaluation = new MaskedEvaluation(network.Network, network.Arena, network.Data, batchSize: 4);
        evaluation.Evaluate(new EdgeStates(), [.. Masks(network, CellType.Normal, 2)]);
        var parameters = network.Network.Parameters;
        Assert.All(network.WeightGradients(), gradient => Assert.Equal(123, gradient));
        Assert.All(parameters.RunningStatistics, statistic => Assert.All(parameters.GetValues(statistic),
            value => Assert.Equal(statistic.Name.EndsWith("var", StringComparison.Ordinal) ? 1 : 0, value)));
    }

    /// <summary>
    /// s2 has one separable convolution (two depthwise_pointwise) an edge. With reduction edge 3 (into node 1) masked, variants begin at node
    /// 1 of the first reduction cell: of that cell's edges only 8 (node 1 to node 2), 12 and 13 (nodes 1 and 2 to node 3) have them.
    /// </summary>
    [Fact]
    public void NothingBeforeTheFirstMaskedEdgeHasVariants()
    {
        const int edge = 3, firstReduction = 1, mixedSumsPerCell = 2 + CellTopology.Nodes;
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s2");
        var masks = Masks(network, CellType.Reduction, edge).Append(Mask.None).ToList();
        var shared = network.Record(_scoring).Tape.Operators;
        var pass = network.Record(_scoring, null, masks);
        var varied = pass.Tape.Operators;
        Assert.Equal(shared.Select(operation => operation.Name), varied.Select(operation => operation.Name));

        // Whether an operator writes more with variants than without. The stem, too, ends in a mixed sum.
        var varies = varied.Zip(shared, (a, b) => Bytes(a) > Bytes(b)).ToList();
        var mixedSums = Enumerable.Range(0, varied.Count).Where(i => varied[i].Name == "mixed_sum").ToList();
        var node1 = mixedSums[1 + firstReduction * mixedSumsPerCell + 2 + CellTopology.NodeOf(edge)];
        Assert.Equal(node1, varies.IndexOf(true));
        var end = mixedSums[(firstReduction + 1) * mixedSumsPerCell];
        var start = mixedSums[firstReduction * mixedSumsPerCell];
        Assert.Equal(6, Enumerable.Range(start, end - start).Count(i => varied[i].Name == "depthwise_pointwise" && varies[i]));
        Assert.Equal(28, Enumerable.Range(start, end - start).Count(i => varied[i].Name == "depthwise_pointwise"));
        Assert.Equal(masks.Count, pass.Loss.Logits.Shape.Variants);

        static long Bytes(Operator operation) => operation.ForwardBlocks().Sum(block => block?.Bytes ?? 0);
    }

    [Fact]
    public void MasksOfAnEdgeWithoutEffectCostNothing()
    {
        // Two unmasked variants of a network are one.
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s2");
        var pass = network.Record(_scoring, null, Mask.None, Mask.None);
        Assert.Equal(1, pass.Loss.Logits.Shape.Variants);
        var (losses, correct) = network.Run(pass);
        Assert.Equal(losses[0], losses[1]);
        Assert.Equal(correct[0], correct[1]);
    }

    [Fact]
    public void DecidedEdgeRunsOneOperation()
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s5");
        var undecided = Count(new EdgeStates());

        // Edge 5 reads the first input of its cell. The one normal cell of three loses every operation of it but one; the two reduction cells
        // lose all of it.
        var states = new EdgeStates();
        states[CellType.Normal, 5] = Operation("sep_conv_5x5");
        states[CellType.Reduction, 5] = EdgeStates.Removed;
        var decided = Count(states);
        // Each of a cell's five sources is pooled once for all edges that leave it, of which others are left.
        foreach (var counts in new[] { undecided, decided })
            Assert.Equal(3 * 5, counts["pool_3x3"]);
        Assert.Equal(undecided["factorized_reduction"] - 2, decided["factorized_reduction"]);
        // Seven operations have six depthwise_pointwise and eight batch norms (one more where the skip reduces).
        Assert.Equal(undecided["depthwise_pointwise"] - 4 - 2 * 6, decided["depthwise_pointwise"]);
        Assert.Equal(undecided["batch_norm"] - 6 - 2 * 9, decided["batch_norm"]);

        // Decided is the same as an alpha that leaves one operation; removed the same as a masked edge.
        var row = network.Network.Alphas.Get(CellType.Normal);
        var columns = network.Network.Alphas.Columns(CellType.Normal);
        row[5 * columns + Operation("sep_conv_5x5")] = 1e4;
        var actual = network.Run(network.Record(_scoring, states));
        network.Network.Alphas.Set(CellType.Normal, row);
        var expected = network.Run(network.Record(_scoring, null, new Mask(CellType.Reduction, 5, Mask.WholeEdge)));
        Assert.Equal(expected.LossSums[0], actual.LossSums[0], 1e-5 * expected.LossSums[0]);

        int Operation(string name) => network.Network.Space.Normal[5].ToList().IndexOf(name);

        Dictionary<string, int> Count(EdgeStates of) =>
            network.Record(_scoring, of).Tape.Operators.CountBy(operation => operation.Name).ToDictionary();
    }

    [Fact]
    public void UnusableWeightsAreNamed()
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s2");
        var weight = network.Network.Parameters.Weights.Single(parameter => parameter.Name == "classifier.bias");
        network.Network.Parameters.SetValues(weight, [float.NaN, 0, 0, 0, 0]);
        var evaluation = new MaskedEvaluation(network.Network, network.Arena, network.Data, batchSize: 4);
        var e = Assert.Throws<UserException>(() => evaluation.Evaluate(new EdgeStates(), [new Mask(CellType.Reduction, 4, 1)]));
        Assert.Contains("batch 0", e.Message);
        Assert.Contains("without reduction edge 4", e.Message);
    }

    private static IEnumerable<Mask> Masks(SmallNetwork network, CellType type, int edge) =>
        Enumerable.Range(0, network.Network.Space.Columns(type)).Select(o => new Mask(type, edge, o));
}
