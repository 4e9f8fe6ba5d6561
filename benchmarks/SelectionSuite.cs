using System.Diagnostics;
using PerturbNas.Search;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Benchmarks;

/// <summary>
/// A small search on synthetic images and the whole selection after it: every decision of operations and topology, with tuning between
/// them, checkpoints and all, in a folder that is deleted at the end.
/// </summary>
internal static class SelectionSuite
{
    private const string Selector = "perturbation";
    private const int DefaultImages = 128;

    public static void Run(BenchmarkOptions options, Report report)
    {
        var folder = Directory.CreateTempSubdirectory("perturbnas-benchmark-");
        try
        {
            Run(options, report, folder.FullName);
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private static void Run(BenchmarkOptions options, Report report, string folder)
    {
        using var backend = options.NewBackend();
        using var run = RunDirectory.Open(folder);
        using var experiment = Experiment.Create(run, new SearchConfiguration
        {
            Space = SearchSpace.Load(options.Space).ToJson(),
            Method = "darts",
            Data = "synthetic",
            Epochs = options.Epochs,
            Batch = options.Batch,
            Channels = options.Channels,
            Layers = options.Layers,
            Seed = 0,
            TrainPortion = 0.5,
            TrainLimit = options.Images ?? DefaultImages,
            ValidLimit = options.Images ?? DefaultImages,
        }, backend, initialFile: null);
        var phases = new Dictionary<string, double>();
        double search;
        using (var supernet = new SupernetSearch(experiment))
        {
            supernet.Restore();
            search = Timing.Seconds(() => supernet.Run(null, CancellationToken.None));
        }

        using var selection = SelectionRun.Start(experiment, new SelectionConfiguration
        {
            By = Selector,
            TuneEpochs = options.TuneEpochs,
            TrainLimit = options.Images ?? DefaultImages,
            ValidLimit = options.Images ?? DefaultImages,
            Batch = options.Batch,
            Seed = 0,
        });
        SelectionResult result = null!;
        var last = Stopwatch.GetTimestamp();
        var seconds = Timing.Seconds(() => result = selection.Run(
            progress =>
            {
                phases[progress.Phase] = phases.GetValueOrDefault(progress.Phase) + Stopwatch.GetElapsedTime(last).TotalSeconds;
                last = Stopwatch.GetTimestamp();
            },
            CancellationToken.None));

        report.Table(["decision", "phase", "cell", "edge", "chosen"], selection.Decisions.Select((decision, i) =>
            (IReadOnlyList<string>)[$"{i}", decision.Phase, decision.Cell, $"{decision.Edge}", decision.Chosen]));
        Console.WriteLine(result.Genotype);
        report.Table(["part", "s"],
        [
            ["search", $"{search:0.00}"],
            .. phases.Select(phase => (IReadOnlyList<string>)[$"selection: {phase.Key}", $"{phase.Value:0.00}"]),
            ["selection, whole", $"{seconds:0.00}"],
        ]);
        report.Add(new
        {
            Kind = "selection",
            SearchSeconds = search,
            SelectionSeconds = seconds,
            PhaseSeconds = phases,
            Result = result,
            selection.Decisions,
            PeakBytes = Memory.PeakBytes()
        });
    }
}
