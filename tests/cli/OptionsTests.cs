using PerturbNas.Cli;

namespace PerturbNas.Tests.Cli;

/// <summary>Defaults and checks of the options of the verbs that work on runs.</summary>
public class OptionsTests
{
    private static readonly CommandLineReader Reader =
        new(typeof(SearchOptions), typeof(SelectOptions), typeof(ScoreOptions), typeof(QuickstartOptions));

    [Fact]
    public void SearchDefaultsAreThePapers()
    {
        var options = Assert.IsType<SearchOptions>(Reader.Read(["search", "--out", "runs/a"]));
        Assert.Equal(("s5", "darts", "cifar10"), (options.Space, options.Method, options.Data));
        Assert.Equal((50, 64, 16, 8), (options.Epochs, options.Batch, options.Channels, options.Layers));
        Assert.Equal((0L, 0.5, 0), (options.Seed, options.TrainPortion, options.Threads));
        Assert.Null(options.TrainLimit);
        Assert.False(options.Cutout || options.Resume || options.Json);
    }

    [Fact]
    public void SelectDefaultsAreThePapers()
    {
        var options = Assert.IsType<SelectOptions>(Reader.Read(["select", "--run", "runs/a"]));
        Assert.Equal(("perturbation", "acc", 5, "constant"), (options.By, options.Criterion, options.TuneEpochs, options.TuneSchedule));
        Assert.Null(options.Seed);
        Assert.False(options.ReferenceQuirks);
    }

    [Fact]
    public void ScoreAndQuickstartHaveDefaults()
    {
        var score = Assert.IsType<ScoreOptions>(Reader.Read(["score", "--run", "runs/a", "--edge", "13"]));
        Assert.Equal((null, 13, null), (score.Cell, score.Edge, score.Batches));
        var quickstart = Assert.IsType<QuickstartOptions>(Reader.Read(["quickstart", "--seed", "-5000000000"]));
        Assert.Equal(("runs/quickstart", -5_000_000_000), (quickstart.Out, quickstart.Seed));
    }

    [Theory]
    [InlineData("'search' needs --out", "search")]
    [InlineData("--space is 's9'; choose s1, s2, s3, s4, s5, darts, or name a file", "search --out a --space s9")]
    [InlineData("--method is 'drats'; choose darts or blank.", "search --out a --method drats")]
    [InlineData("--data is 'mnist'; choose cifar10, cifar100 or synthetic.", "search --out a --data mnist")]
    [InlineData("--epochs is -1; give 0 or more.", "search --out a --epochs -1")]
    [InlineData("--train-portion is 1; give a number between 0 and 1", "search --out a --train-portion 1")]
    [InlineData("--train-portion takes a number, not 'half'", "search --out a --train-portion half")]
    [InlineData("--init is 'none.safetensors', which does not exist", "search --out a --init none.safetensors")]
    [InlineData("--out needs a value after it", "search --out --resume")]
    [InlineData("'select' needs --run", "select --by magnitude")]
    [InlineData("--criterion is 'f1'; choose acc or loss.", "select --run a --criterion f1")]
    [InlineData("--tune-epochs is -1; give 0 or more.", "select --run a --tune-epochs -1")]
    [InlineData("--seed takes a whole number, not 'x'", "select --run a --seed x")]
    [InlineData("--edge is 14; give a number from 0 to 13.", "score --run a --edge 14")]
    [InlineData("--cell is 'both'; choose normal or reduction.", "score --run a --cell both")]
    public void WrongValuesAreNamed(string expected, string arguments)
    {
        var error = Assert.Throws<UserException>(() => Reader.Read(arguments.Split(' ')));
        Assert.StartsWith(expected, error.Message, StringComparison.Ordinal);
    }
}
