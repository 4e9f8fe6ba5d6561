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
        }, out var states);
        Assert.Equal(new GenotypeEdge("sep_conv_3x3", 1), genotype.Normal[6]);
        Assert.Equal(new GenotypeEdge("skip_connect", 4), genotype.Normal[7]);
        Assert.Equal(EdgeStates.Removed, states[CellType.Normal, 9]);
        Assert.Equal(Sep, states[CellType.Normal, 10]);
        Assert.Equal(EdgeStates.Removed, states[CellType.Normal, 11]);
        Assert.Equal(EdgeStates.Removed, states[CellType.Normal, 12]);
        Assert.Equal(Skip, states[CellType.Normal, 13]);
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
        Assert.False(File.Exists(Path.Combine(run.Folder, "select-magnitude", "decisions.jsonl")));
    }

    private static Genotype Select(Action<double[,], CellType> edit, out EdgeStates states)
    {
        using var backend = new ReferenceBackend();
        using var network = new Supernet(backend, SearchSpace.Load("s3"), new SupernetSize(2, 3, 5, 8), seed: 1);
        foreach (var type in Enum.GetValues<CellType>())
        {
            var alphas = new double[CellTopology.Edges, 3];
            edit(alphas, type);
            network.Alphas.Set(type, [.. alphas.Cast<double>()]);
        }
        (var genotype, states) = MagnitudeSelector.Select(network);
        return genotype;
    }
}
