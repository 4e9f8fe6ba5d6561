using System.Diagnostics;

namespace PerturbNas.Tests.Cli;

/// <summary>
/// Searches and selections that are killed or interrupted, and resumed until they are done, must leave the same bytes as those that were
/// not.
/// </summary>
public sealed class InterruptionTests(TinyRuns runs) : IClassFixture<TinyRuns>
{
    // Many short epochs: nearly half of the time goes into writing checkpoints and metrics.
    private static readonly string[] _search = ["search", .. TinyRuns.Tiny, "--epochs", "12"];

    [Fact]
    public void AKilledSearchEndsWithTheSameBytes()
    {
        var (whole, killed) = (runs.NewPath("whole"), runs.NewPath("killed"));
        CommandLine.Json([.. _search, "--out", whole]);
        KillUntilDone(Path.Combine(killed, "checkpoints", "search.safetensors.tmp"), [.. _search, "--out", killed, "--resume"]);
        Assert.Equal(CommandLine.Contents(whole), CommandLine.Contents(killed));
        // Nothing is left to do: resuming once more changes nothing.
        CommandLine.Json("search", "--out", killed, "--resume");
        Assert.Equal(CommandLine.Contents(whole), CommandLine.Contents(killed));
    }

    [Fact]
    public void AKilledSelectionEndsWithTheSameBytes()
    {
        var (whole, killed) = (runs.Copy(runs.Searched), runs.Copy(runs.Searched));
        string[] select = ["select", "--tune-epochs", "1", "--train-limit", "8", "--valid-limit", "8", "--threads", "1"];
        CommandLine.Json([.. select, "--run", whole]);
        KillUntilDone(Path.Combine(killed, "select-perturbation", "checkpoints", "selection.safetensors.tmp"),
            [.. select, "--run", killed, "--resume"]);
        Assert.Equal(CommandLine.Contents(whole), CommandLine.Contents(killed));
    }

    [Fact]
    public void AnInterruptedSearchSavesAndCanBeResumed()
    {
        var (whole, interrupted) = (runs.NewPath("whole"), runs.NewPath("interrupted"));
        CommandLine.Json([.. _search, "--out", whole]);
        using (var process = CommandLine.Start([.. _search, "--out", interrupted, "--json"]))
        {
            WaitFor(process, () => File.Exists(Path.Combine(interrupted, "config.json")));
            Process.Start("kill", ["-INT", $"{process.Id}"])!.WaitForExit();
            Assert.True(process.WaitForExit(30_000));
            Assert.Equal("perturbnas: stopping after this step; once more to stop at once.\nperturbnas: interrupted.\n",
                process.StandardError.ReadToEnd());
            Assert.Equal(130, process.ExitCode);
        }
        // An unfinished search is no ground to select from; scoring it is no harm.
        var error = CommandLine.HarmlessUserError(interrupted, "select", "--run", interrupted);
        Assert.Contains($"finish it first with 'perturbnas search --out {interrupted} --resume'", error, StringComparison.Ordinal);
        CommandLine.HarmlessUserError(interrupted, "select", "--run", interrupted, "--by", "magnitude", "--resume", "--quiet");
        CommandLine.Json("score", "--run", interrupted, "--edge", "0");
        CommandLine.Json("search", "--out", interrupted, "--resume");
        Assert.Equal(CommandLine.Contents(whole), CommandLine.Contents(interrupted));
    }

    [Fact]
    public void ARunFolderIsForOneProcessAtATime()
    {
        var run = runs.NewPath("shared");
        using var first = CommandLine.Start(["search", .. TinyRuns.Tiny, "--epochs", "1000000", "--out", run, "--json"]);
        try
        {
            WaitFor(first, () => File.Exists(Path.Combine(run, "config.json")));
            foreach (var second in (string[][])[["search", "--out", run, "--resume"], ["select", "--run", run], ["score", "--run", run]])
                Assert.Contains("is in use by another process", CommandLine.UserError(second), StringComparison.Ordinal);
        }
        finally
        {
            first.Kill();
            first.WaitForExit();
        }
    }

    // Every other kill comes while a checkpoint is being written, the others after longer and longer.
    private static void KillUntilDone(string temporary, string[] arguments)
    {
        var kills = 0;
        for (var delay = TimeSpan.FromMilliseconds(100); ; delay += TimeSpan.FromMilliseconds(150))
        {
            using var process = CommandLine.Start([.. arguments, "--json"]);
            var clock = Stopwatch.StartNew();
            while (!process.HasExited && (kills % 2 == 0 ? clock.Elapsed < delay : clock.Elapsed < delay / 2 || !File.Exists(temporary)))
                Thread.Sleep(TimeSpan.FromMicroseconds(50));
            if (process.HasExited)
            {
                Assert.Equal((0, ""), (process.ExitCode, process.StandardError.ReadToEnd()));
                break;
            }
            process.Kill();
            process.WaitForExit();
            kills++;
        }
        Assert.True(kills >= 3, $"only {kills} kills");
    }

    private static void WaitFor(Process process, Func<bool> condition)
    {
        for (var clock = Stopwatch.StartNew(); !condition(); Thread.Sleep(1))
            Assert.True(!process.HasExited && clock.Elapsed < TimeSpan.FromMinutes(1), "the process ended, or took more than a minute");
    }
}
