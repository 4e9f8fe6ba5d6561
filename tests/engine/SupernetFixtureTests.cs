using PerturbNas.Autograd;
using PerturbNas.Networks;
using PerturbNas.Spaces;

namespace PerturbNas.Tests.Engine;

/// <summary>
/// Whole supernets against PyTorch in double precision (tests/fixtures): one training pass with all that it leaves behind, and the
/// scores of masked candidates. Errors are relative, of a tensor as a whole: ||actual - expected|| / ||expected||.
/// </summary>
public sealed class SupernetFixtureTests
{
    // The Reference backend computes in double, but the fixture's gradients and statistics are float32 and so are epsilon and momentum. The
    // CPU backend rounds to float32 after each of some 40 layers; running means near zero are differences of values near one.
    private static readonly Tolerances _reference = new(Value: 1e-9, Gradient: 1e-7, Statistic: 3e-7);
    private static readonly Tolerances _cpu = new(Value: 3e-6, Gradient: 5e-5, Statistic: 2e-5);

    public static TheoryData<string, string> Networks
    {
        get
        {
            var data = new TheoryData<string, string>();
            foreach (var backend in (string[])["reference", "cpu"])
                foreach (var name in (string[])["s1", "s2", "s3", "s4", "s5", "darts", "custom"])
                    data.Add(backend, name);
            return data;
        }
    }

    [Theory]
    [MemberData(nameof(Networks))]
    public void TrainingPassMatchesPyTorch(string backendName, string name)
    {
        using var backend = EngineBackends.Create(backendName);
        using var fixture = new SupernetFixture(backend, name);
        var (file, network, tolerances) = (fixture.File, fixture.Network, TolerancesOf(backendName));
        var pass = fixture.Record(new TapeOptions(BatchNormMode.Training, WeightGradients: true, AlphaGradients: true));
        fixture.Forward(pass);
        pass.Backward();

        RelativeError.AssertBelow(tolerances.Value, file.Values("expected.logits"), fixture.Logits(pass), "logits");
        var (lossSum, correct) = Assert.Single(SupernetFixture.Results(pass));
        RelativeError.AssertBelow(tolerances.Value, file.Values("expected.loss"), [lossSum / fixture.Images], "loss");
        Assert.Equal(file.Values("expected.correct")[0], correct);
        foreach (var type in Enum.GetValues<CellType>())
        {
            var alphas = ArchitectureParameters.NameOf(type);
            RelativeError.AssertBelow(tolerances.Gradient, file.Values("expected.gradient." + alphas), network.Alphas.GetGradients(type), alphas);
        }
        foreach (var weight in network.Parameters.Weights)
        {
            RelativeError.AssertBelow(tolerances.Gradient, file.Values("expected.gradient." + weight.Name), network.Parameters.GetGradient(weight),
                weight.Name);
        }
        foreach (var statistic in network.Parameters.RunningStatistics)
        {
            RelativeError.AssertBelow(tolerances.Statistic, file.Values("expected." + statistic.Name), network.Parameters.GetValues(statistic),
                statistic.Name);
        }
        var compared = 2 + network.Parameters.Weights.Count + network.Parameters.RunningStatistics.Count;
        Assert.Equal(compared, file.Names.Count(key => key.StartsWith("expected.gradient.", StringComparison.Ordinal) || key.Contains("running_")));
    }

    [Theory]
    [MemberData(nameof(Networks))]
    public void MaskedCandidatesMatchPyTorch(string backendName, string name)
    {
        using var backend = EngineBackends.Create(backendName);
        using var fixture = new SupernetFixture(backend, name);
        var (file, network, tolerances) = (fixture.File, fixture.Network, TolerancesOf(backendName));
        var masks = new List<Mask>();
        var expectedLosses = new List<double>();
        var expectedCorrect = new List<double>();
        foreach (var (type, edge) in ((CellType, int)[])[(CellType.Normal, 7), (CellType.Reduction, 3)])
        {
            masks.AddRange(Enumerable.Range(0, network.Alphas.Columns(type)).Select(o => new Mask(type, edge, o)));
            masks.Add(new Mask(type, edge, Mask.WholeEdge));
            var key = $"masked.{ArchitectureParameters.NameOf(type)}.{edge}";
            expectedLosses.AddRange([.. file.Values(key + ".losses"), .. file.Values(key + ".row.loss")]);
            expectedCorrect.AddRange([.. file.Values(key + ".correct"), .. file.Values(key + ".row.correct")]);
        }

        // All candidates in one pass, of both cell types where there is room; then one candidate a pass, which must give the same bits.
        var together = masks.Chunk(network.MaxVariants).SelectMany(group => fixture.Score(group)).ToList();
        var apart = masks.Select(mask => fixture.Score(mask)[0]).ToList();
        Assert.Equal(apart, together);
        for (var i = 0; i < masks.Count; i++)
        {
            RelativeError.AssertBelow(tolerances.Value, [expectedLosses[i]], [together[i].LossSum / fixture.Images], $"loss with {masks[i]}");
            Assert.Equal(expectedCorrect[i], together[i].Correct);
        }
        // Scoring leaves the running statistics alone.
        Assert.All(network.Parameters.RunningStatistics, statistic => Assert.All(network.Parameters.GetValues(statistic),
            value => Assert.Equal(statistic.Name.EndsWith("var", StringComparison.Ordinal) ? 1 : 0, value)));
    }

    private static Tolerances TolerancesOf(string backend) => backend == "cpu" ? _cpu : _reference;

    private readonly record struct Tolerances(double Value, double Gradient, double Statistic);
}
