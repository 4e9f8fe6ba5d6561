using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>Same seed, same bits: whatever the number of threads, and however often a run was interrupted.</summary>
public sealed class BitEqualityTests : IClassFixture<BitEqualityTests.Uninterrupted>
{
    private static readonly string[][] _searchFiles = [["checkpoints", "search.safetensors"], ["metrics.jsonl"]];

    private static readonly string[][] _selectionFiles =
        [["checkpoints", "selection.safetensors"], ["metrics.jsonl"], ["decisions.jsonl"], ["genotype.txt"], ["result.json"]];

    private readonly Uninterrupted _expected;

    public BitEqualityTests(Uninterrupted expected) => _expected = expected;

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void ThreadsDoNotMatter(int threads)
    {
        using var run = new RunFixture(threads);
        Assert.True(run.Search());
        AssertSameSearch(run);
        Assert.True(run.Select(resume: false));
        AssertSameSelection(run);

        // Again, in place of the first selection.
        if (threads == 1)
        {
            Assert.True(run.Select(resume: false));
            AssertSameSelection(run);
        }
        AssertSameSearch(run);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)] // an epoch's last step
    [InlineData(5)]
    public void SearchCancelledAndResumed(int steps)
    {
        using var run = new RunFixture();
        Assert.False(run.Search(cancelAfter: steps));
        Assert.NotEqual(_expected.Run.Bytes(_searchFiles[0]), run.Bytes(_searchFiles[0]));
        Assert.True(run.Search());
        AssertSameSearch(run);
    }

    [Fact]
    public void SearchCancelledAtEveryStep()
    {
        using var run = new RunFixture();
        for (var step = 0; step < RunFixture.Steps; step++)
            Assert.False(run.Search(cancelAfter: 1));

        // Nothing is left to train; evaluating a finished search changes nothing.
        Assert.True(run.Search());
        AssertSameSearch(run);
    }

    [Fact]
    public void LinesAfterTheCheckpointAreCutOff()
    {
        // A process killed between writing a line and the checkpoint that knows of it.
        using var run = new RunFixture();
        Assert.False(run.Search(cancelAfter: 4));
        File.AppendAllText(Path.Combine(run.Folder, "metrics.jsonl"), "{\"epoch\": 1, \"unfinis");
        Assert.True(run.Search());
        AssertSameSearch(run);
    }

    [Theory]
    [InlineData("scoring", 1)] // before the first decision
    [InlineData("scoring", 2)] // between the decisions of a round
    [InlineData("scoring", 17)]
    [InlineData("scoring", 29)] // topology
    [InlineData("tuning", 1)]
    [InlineData("tuning", 2)] // the end of a round's tuning
    [InlineData("tuning", 31)]
    public void SelectionCancelledAndResumed(string phase, int count)
    {
        using var run = new RunFixture();
        _expected.CopySearchTo(run);
        Assert.False(run.Select(resume: false, count, phase));
        Assert.False(File.Exists(Path.Combine(run.Folder, "select-perturbation", "genotype.txt")));
        Assert.True(run.Select(resume: true));
        AssertSameSelection(run);
        AssertSameSearch(run);

        // Resuming a selection that has ended changes nothing.
        Assert.True(run.Select(resume: true));
        AssertSameSelection(run);
    }

    [Fact]
    public void SelectionCancelledAgainAndAgain()
    {
        using var run = new RunFixture();
        _expected.CopySearchTo(run);
        Assert.False(run.Select(resume: false, 3, "tuning"));
        for (var i = 0; i < 4; i++)
        {
            Assert.False(run.Select(resume: true, 3 + i, "tuning"));
            Assert.False(run.Select(resume: true, 1 + i, "scoring"));
        }
        Assert.True(run.Select(resume: true));
        AssertSameSelection(run);
    }

    [Fact]
    public void BlankLeavesAlphasAsInitialised()
    {
        using var run = new RunFixture(method: "blank");
        var initial = SafeTensorsFile.Read(run.CheckpointPath);
        Assert.True(run.Search());
        Assert.True(run.Select(resume: false));
        foreach (var path in (string[])[run.CheckpointPath, Path.Combine(run.Folder, "select-perturbation", "checkpoints", "selection.safetensors")])
        {
            var trained = SafeTensorsFile.Read(path);
            foreach (var type in Enum.GetValues<CellType>())
                Assert.Equal(Alphas(initial, type), Alphas(trained, type));
            Assert.NotEqual(initial.Float32("stem.0.weight", 12, 3, 3, 3).ToArray(), trained.Float32("stem.0.weight", 12, 3, 3, 3).ToArray());
            Assert.Equal("0", trained.Metadata["adam_steps"]);
        }
        var darts = SafeTensorsFile.Read(_expected.Run.CheckpointPath);
        foreach (var type in Enum.GetValues<CellType>())
            Assert.NotEqual(Alphas(initial, type), Alphas(darts, type));

        static float[] Alphas(SafeTensorsFile file, CellType type) => file.Float32(ArchitectureParameters.NameOf(type), 14, 3).ToArray();
    }

    [Theory]
    [InlineData("stem.0.weight")]
    [InlineData("cells.1.preprocess0.op.1.weight")]
    [InlineData("cells.0._ops.3._ops.2.op.1.weight")]
    [InlineData("cells.2._ops.13._ops.2.op.6.weight")]
    [InlineData("cells.1._ops.0._ops.1.conv_2.weight")]
    [InlineData("classifier.weight")]
    public void NotANumberStopsTheSearch(string name)
    {
        using var run = new RunFixture();
        Assert.False(run.Search(cancelAfter: 4));
        var (checkpoint, metrics) = (run.Bytes(_searchFiles[0]), run.Bytes(_searchFiles[1]));
        var e = Assert.Throws<UserException>(() => run.Search(prepare: experiment =>
        {
            var parameters = experiment.Network.Parameters;
            var weight = parameters.Weights.Single(parameter => parameter.Name == name);
            var values = parameters.GetValues(weight);
            values[0] = float.NaN;
            parameters.SetValues(weight, values);
        }));
        Assert.Contains("epoch 2, step 2 of 3", e.Message);
        Assert.Contains("NaN", e.Message);
        Assert.Equal(checkpoint, run.Bytes(_searchFiles[0]));
        Assert.Equal(metrics, run.Bytes(_searchFiles[1]));

        // The run is as good as before.
        Assert.True(run.Search());
        AssertSameSearch(run);
    }

    private void AssertSameSearch(RunFixture run)
    {
        foreach (var file in _searchFiles)
            Assert.Equal(_expected.Run.Bytes(file), run.Bytes(file));
    }

    private void AssertSameSelection(RunFixture run)
    {
        foreach (var file in _selectionFiles)
            Assert.Equal(_expected.Run.SelectionBytes(file), run.SelectionBytes(file));
        Assert.Equal(run.SelectionBytes("decisions.jsonl"), run.Bytes("decisions.jsonl"));
        Assert.Equal(run.SelectionBytes("genotype.txt"), run.Bytes("genotype.txt"));
    }

    /// <summary>Search and selection on two threads, without interruption.</summary>
    public sealed class Uninterrupted : IDisposable
    {
        public Uninterrupted()
        {
            Assert.True(Run.Search());
            Assert.True(Run.Select(resume: false));
        }

        internal RunFixture Run { get; } = new(threads: 2);

        /// <summary>Gives another run the result of this one's search.</summary>
        internal void CopySearchTo(RunFixture run)
        {
            foreach (var file in _searchFiles)
                File.WriteAllBytes(Path.Combine([run.Folder, .. file]), Run.Bytes(file));
        }

        public void Dispose() => Run.Dispose();
    }
}
