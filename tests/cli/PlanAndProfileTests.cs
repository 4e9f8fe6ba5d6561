using System.Text.Json;
using PerturbNas.Tests.Data;

namespace PerturbNas.Tests.Cli;

/// <summary>The verbs that tell what a run costs, before and while it runs.</summary>
public sealed class PlanAndProfileTests
{
    private static readonly string[] Small = ["--space", "s2", "--channels", "4", "--layers", "3", "--batch", "4", "--threads", "1"];

    [Fact]
    public void PlanForecastsMemoryWorkAndTime()
    {
        var (exitCode, output, error) = CommandLine.Run(["plan", .. Small, "--json"]);
        Assert.Equal((0, ""), (exitCode, error));
        var plan = JsonDocument.Parse(output).RootElement;
        foreach (var part in (ReadOnlySpan<string>)["search", "selection"])
        {
            var memory = plan.GetProperty(part).GetProperty("memory");
            Assert.Equal(memory.GetProperty("total_bytes").GetInt64(), memory.EnumerateObject().Skip(1).Sum(each => each.Value.GetInt64()));
            foreach (var phase in plan.GetProperty(part).GetProperty("phases").EnumerateArray())
                Assert.True(phase.GetProperty("flops").GetInt64() > 0 && phase.GetProperty("seconds").GetDouble() > 0);
        }
        Assert.Contains("search step", CommandLine.Run(["plan", .. Small]).Out, StringComparison.Ordinal);
    }

    [Fact]
    public void ProfileShowsKernelsAndWritesATrace()
    {
        using var folder = new TemporaryFolder();
        var (exitCode, output, error) = CommandLine.Run(["profile", .. Small, "--steps", "1", "--json", "--trace", folder["trace.json"]]);
        Assert.Equal((0, ""), (exitCode, error));
        var profile = JsonDocument.Parse(output).RootElement;
        var phases = profile.GetProperty("phases").EnumerateArray().ToList();
        Assert.Equal(4, phases.Count);
        foreach (var phase in phases)
        {
            var kernels = phase.GetProperty("kernels").EnumerateArray().Sum(kernel => kernel.GetProperty("seconds").GetDouble());
            Assert.Equal(phase.GetProperty("seconds").GetDouble(), kernels + phase.GetProperty("other_seconds").GetDouble(), 1e-9);
        }
        Assert.Equal(phases.Skip(1).Sum(phase => phase.GetProperty("seconds").GetDouble()), profile.GetProperty("explained_seconds").GetDouble(), 1e-9);
        Assert.Equal(phases.Sum(phase => phase.GetProperty("wall_seconds").GetDouble()), profile.GetProperty("wall_seconds").GetDouble(), 1e-9);
        Assert.Equal(profile.GetProperty("explained_seconds").GetDouble() / profile.GetProperty("wall_seconds").GetDouble() - 1,
            profile.GetProperty("gap").GetDouble(), 1e-9);
        Assert.Equal(JsonValueKind.Array, JsonDocument.Parse(File.ReadAllText(folder["trace.json"])).RootElement.ValueKind);
    }

    [Fact]
    public void ARunGivesTheSize()
    {
        using var folder = new TemporaryFolder();
        Assert.Equal(0, CommandLine.Run(["search", .. Small, "--data", "synthetic", "--epochs", "0", "--train-limit", "4", "--valid-limit", "4",
            "--out", folder["run"], "--quiet"]).ExitCode);
        var ofRun = Tapes("plan", "--run", folder["run"], "--json");
        Assert.Equal(ofRun, Tapes(["plan", .. Small, "--train-limit", "4", "--valid-limit", "4", "--json"]));
        Assert.True(Tapes("plan", "--run", folder["run"], "--channels", "8", "--json") > ofRun);

        static long Tapes(params string[] arguments) => JsonDocument.Parse(CommandLine.Run(arguments).Out).RootElement.GetProperty("search")
            .GetProperty("memory").GetProperty("tapes_bytes").GetInt64();
    }

    [Theory]
    [InlineData("'plan' has no option '--colour'", "plan", "--colour", "red")]
    [InlineData("'profile' has no option '--colour'", "profile", "--colour", "red")]
    [InlineData("--steps is 0; give a number from 1 to 10000.", "profile", "--steps", "0")]
    [InlineData("--data is 'mnist'; choose cifar10, cifar100 or synthetic.", "plan", "--data", "mnist")]
    [InlineData("--run is 'nowhere', which holds no run", "profile", "--run", "nowhere")]
    [InlineData("--layers is 0; give a number from 1 to 100.", "plan", "--layers", "0")]
    public void WrongArgumentsAreOneSentence(string expected, params string[] arguments) =>
        Assert.StartsWith($"perturbnas: {expected}", CommandLine.UserError(arguments), StringComparison.Ordinal);
}
