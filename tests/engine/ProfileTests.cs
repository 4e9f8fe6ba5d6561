using System.Text.Json;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Planning;
using PerturbNas.Reports;
using PerturbNas.Spaces;
using PerturbNas.Tests.Data;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>The profile explains the time of every phase, and its trace is one that viewers read.</summary>
public sealed class ProfileTests
{
    private const int Steps = 2;

    private static SearchConfiguration Configuration { get; } = new()
    {
        Space = SearchSpace.Load("s2").ToJson(),
        Method = "darts",
        Data = "synthetic",
        Epochs = 1,
        Batch = 32,
        Channels = 16,
        Layers = 3,
        Seed = 0,
        TrainPortion = 0.5,
    };

    [Fact]
    public void KernelsExplainTheTimeOfEveryPhase()
    {
        using var backend = new CpuBackend(threads: 1);
        var profile = StepProfile.Measure(Configuration, backend, Steps, CancellationToken.None);
        Assert.Equal(["data", "alpha step", "weight step", "scoring"], profile.Phases.Select(phase => phase.Phase));
        Assert.Equal([3 * Steps, Steps, Steps, Steps], profile.Phases.Select(phase => phase.Passes));
        Assert.Empty(profile.Phases[0].Kernels);
        var forecast = Forecast.OfSearch(Configuration);
        foreach (var phase in profile.Phases.Skip(1))
        {
            Assert.InRange(phase.OtherSeconds, 0, 0.05 * phase.Seconds);
            Assert.Equal(phase.Seconds, phase.OtherSeconds + phase.Kernels.Sum(kernel => kernel.Seconds), 1e-9);
            Assert.True(phase.UnprofiledSeconds > 0);
            if (forecast.Phases.FirstOrDefault(planned => planned.Name == phase.Phase) is not { } planned)
                continue;
            // What ran is what was forecast, kernel by kernel.
            Assert.Equal(planned.Work.Kernels.Keys, phase.Kernels.Select(kernel => kernel.Kernel).Order(StringComparer.Ordinal));
            foreach (var kernel in phase.Kernels)
            {
                Assert.Equal(Steps * planned.Work.Kernels[kernel.Kernel].Calls, kernel.Calls);
                Assert.Equal(planned.Work.Kernels[kernel.Kernel].Cost * Steps, kernel.Cost);
            }
        }
        var scoring = profile.Phases[^1].Kernels.Select(kernel => kernel.Kernel).ToList();
        Assert.DoesNotContain(scoring, kernel => kernel.EndsWith("backward", StringComparison.Ordinal));
    }

    /// <summary>Calls that ran as a group share its time; those before and after it keep their own.</summary>
    [Fact]
    public void AGroupsTimeIsDividedByWhatItsCallsTakeAlone()
    {
        KernelCall[] calls =
        [
            new("a", default, 0, 10), new("b", default, 10, 40, Group: 1), new("c", default, 10, 40, Group: 1), new("d", default, 40, 50, Group: 2),
            new("e", default, 55, 60),
        ];
        Assert.Equal([(0, 10), (10, 20), (20, 40), (40, 50), (55, 60)],
            StepProfile.Divide(calls, [7, 20, 40, 3, 9]).Select(call => (call.Start, call.End)));
    }

    /// <summary>Trace Event Format: complete events with times in microseconds; a phase's kernels lie within its passes, one after the other.</summary>
    [Fact]
    public void TheTraceIsOfCompleteEvents()
    {
        using var folder = new TemporaryFolder();
        using var backend = new CpuBackend(threads: 1);
        var profile = StepProfile.Measure(Configuration with { Channels = 4, Batch = 4 }, backend, Steps, CancellationToken.None);
        profile.WriteTrace(folder["trace.json"]);
        var events = JsonDocument.Parse(File.ReadAllText(folder["trace.json"])).RootElement.EnumerateArray().ToList();
        var tracks = events.Where(e => Text(e, "ph") == "M").ToDictionary(e => e.GetProperty("tid").GetInt32(),
            e => Text(e.GetProperty("args"), "name"));
        Assert.Equal(["data", "alpha step", "weight step", "scoring"], tracks.Values);
        var complete = events.Where(e => Text(e, "ph") == "X").ToList();
        Assert.Equal(events.Count - tracks.Count, complete.Count);
        Assert.Equal(6 * Steps + profile.Phases.Sum(phase => phase.Kernels.Sum(kernel => kernel.Calls)), complete.Count);
        foreach (var track in complete.GroupBy(e => e.GetProperty("tid").GetInt32()))
        {
            var passes = track.Where(e => Text(e, "name") == tracks[track.Key]).ToList();
            var end = 0.0;
            foreach (var kernel in track.Except(passes))
            {
                Assert.True(Start(kernel) >= end - 1e-3);
                end = End(kernel);
                Assert.Contains(passes, pass => Start(pass) <= Start(kernel) + 1e-3 && End(kernel) <= End(pass) + 1e-3);
                Assert.True(kernel.GetProperty("args").GetProperty("bytes").GetInt64() >= 0);
            }
        }
        Assert.Throws<UserException>(() => profile.WriteTrace(folder["none/trace.json"]));

        static string Text(JsonElement e, string name) => e.GetProperty(name).GetString()!;

        static double Start(JsonElement e) => e.GetProperty("ts").GetDouble();

        static double End(JsonElement e) => Start(e) + e.GetProperty("dur").GetDouble();
    }
}
