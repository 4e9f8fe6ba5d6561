using PerturbNas.Backends.Reference;
using PerturbNas.Networks;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>Selection by magnitude on hand-made alphas, space s3: none, skip_connect, sep_conv_3x3.</summary>
public sealed class MagnitudeSelectorTests
{
    private const int None = 0, Skip = 1, Sep = 2;

    [Fact]
    public void KeepsTheStrongestOperationsAndEdges()
    {
        var genotype = Select((alphas, type) =>
        {
            // Node 3 of normal cells: sources 1 and 4 are strong.
            if (type != CellType.Normal)
                return;
            alphas[9 + 1, Sep] = 2;
            alphas[9 + 4, Skip] = 3;
        }, out var states, out var decisions);
        Assert.Equal(new GenotypeEdge("sep_conv_3x3", 1), genotype.Normal[6]);
        Assert.Equal(new GenotypeEdge("skip_connect", 4), genotype.Normal[7]);
        Assert.Equal(EdgeStates.Removed, states[CellType.Normal, 9]);
        Assert.Equal(Sep, states[CellType.Normal, 10]);
        Assert.Equal(EdgeStates.Removed, states[CellType.Normal, 11]);
        Assert.Equal(EdgeStates.Removed, states[CellType.Normal, 12]);
        Assert.Equal(Skip, states[CellType.Normal, 13]);

        // 14 edges, then the weakest edges of nodes 1 (one), 2 (two) and 3; equals: the last one goes.
        var edge10 = decisions[10];
        Assert.Equal((10, "operation", "normal", 3, 10, "sep_conv_3x3"), (edge10.Index, edge10.Phase, edge10.Cell, edge10.Node, edge10.Edge, edge10.Chosen));
        Assert.Equal(["none", "skip_connect", "sep_conv_3x3"], edge10.Candidates.Select(candidate => candidate.Operation));
        Assert.Equal(1, edge10.Candidates.Sum(candidate => candidate.Weight), 1e-12);
        Assert.Equal(Math.Exp(2) / (2 + Math.Exp(2)), edge10.Candidates[Sep].Weight, 1e-6);
        var node3 = decisions.Where(decision => decision is { Phase: "topology", Cell: "normal", Node: 3 }).ToList();
        Assert.Equal([12, 11, 9], node3.Select(decision => decision.Edge));
        Assert.Equal([9, 10, 13], node3[^1].Candidates.Select(candidate => candidate.Edge));
        Assert.Equal(40, decisions.Count);
    }

    [Fact]
    public void TiesGoToTheLowestIndex()
    {
        var genotype = Select((_, _) => { }, out _);
        var expected = Enumerable.Range(0, 4).SelectMany(_ => new[] { new GenotypeEdge("skip_connect", 0), new GenotypeEdge("skip_connect", 1) });
        Assert.Equal(expected, genotype.Normal);
        Assert.Equal(expected, genotype.Reduction);
    }

    [Fact]
    public void NoneIsNeverChosenButTakesItsShareOfTheEdge()
    {
        // Edge 2 (node 1, source 0) has the largest alpha of an operation, but none leaves it the smallest softmax weight.
        var genotype = Select((alphas, _) =>
        {
            alphas[2, None] = 10;
            alphas[2, Sep] = 5;
            alphas[3, Sep] = 1;
            alphas[4, Skip] = 1;
        }, out var states);
        Assert.Equal([new GenotypeEdge("sep_conv_3x3", 1), new GenotypeEdge("skip_connect", 2)], genotype.Reduction.Skip(2).Take(2));
        foreach (var type in Enum.GetValues<CellType>())
            Assert.DoesNotContain(None, Enumerable.Range(0, CellTopology.Edges).Select(edge => states[type, edge]));
    }

    [Fact]
    public void RunWritesTheGenotypeOfItsAlphas()
    {
        using var run = new RunFixture();
        Assert.True(run.Search());
        var checkpoint = run.Bytes("checkpoints", "search.safetensors");
        Assert.True(run.Select(RunFixture.Selection with { By = "magnitude" }));
        var alphas = SafeTensorsFile.Read(run.CheckpointPath);
        var expected = Select((values, type) =>
        {
            var stored = alphas.Float32(ArchitectureParameters.NameOf(type), CellTopology.Edges, 3);
            for (var i = 0; i < stored.Length; i++)
                values[i / 3, i % 3] = stored[i];
        }, out _);
        foreach (var folder in (string[])["", "select-magnitude"])
            Assert.Equal(expected.ToString(), System.Text.Encoding.UTF8.GetString(run.Bytes(folder, "genotype.txt")).TrimEnd('\n'));
        Assert.Equal(checkpoint, run.Bytes("checkpoints", "search.safetensors"));
        Assert.Equal(run.Bytes("select-magnitude", "decisions.jsonl"), run.Bytes("decisions.jsonl"));
        var lines = File.ReadAllLines(Path.Combine(run.Folder, "decisions.jsonl"));
        Assert.Equal(2 * (CellTopology.Edges + 6), lines.Length);
        Assert.StartsWith("""{"index":0,"phase":"operation","cell":"normal","node":0,"edge":0,"chosen":""", lines[0], StringComparison.Ordinal);
        Assert.Contains("\"candidates\":[{\"operation\":\"none\",\"edge\":0,\"weight\":0.3", lines[0], StringComparison.Ordinal);
    }

    private static Genotype Select(Action<double[,], CellType> edit, out EdgeStates states) => Select(edit, out states, out _);

    private static Genotype Select(Action<double[,], CellType> edit, out EdgeStates states, out IReadOnlyList<MagnitudeDecision> decisions)
    {
        using var backend = new ReferenceBackend();
        using var network = new Supernet(backend, SearchSpace.Load("s3"), new SupernetSize(2, 3, 5, 8), seed: 1);
        foreach (var type in Enum.GetValues<CellType>())
        {
            var alphas = new double[CellTopology.Edges, 3];
            edit(alphas, type);
            network.Alphas.Set(type, [.. alphas.Cast<double>()]);
        }
        (decisions, states) = MagnitudeSelector.Select(network);
        return network.Space.ToGenotype(states);
    }
}
