using PerturbNas.Search;
using PerturbNas.Training;

namespace PerturbNas.Cli;

/// <summary>What `search --json` prints; losses are means (natural logarithm), accuracies fractions.</summary>
internal sealed record SearchReport(string Run, string Space, string Method, int Epochs, double TrainLoss, double TrainAccuracy,
    double ValidationLoss, double ValidationAccuracy);

/// <summary>Trains a supernet, from its beginning or from where it was interrupted.</summary>
internal static class SearchCommand
{
    public static void Run(SearchOptions options, CancellationToken cancellation)
    {
        var terminal = new Terminal(options);
        using var backend = options.CreateBackend(terminal);
        var resumed = options.Resume && RunDirectory.Exists(options.Out);
        using var run = resumed ? RunDirectory.OpenExisting(options.Out) : RunDirectory.Open(options.Out);
        using var experiment = resumed
            ? Experiment.Open(run, backend, options.Resumed)
            : Experiment.Create(run, options.ToConfiguration(), backend, options.Init);
        var report = Run(experiment, terminal, cancellation);
        if (options.Json)
        {
            Terminal.WriteJson(report);
            return;
        }
        Console.WriteLine($"searched {report.Space} by {report.Method} for {report.Epochs} epochs");
        if (report.Epochs > 0)
            Console.WriteLine($"training half, last epoch:  loss {report.TrainLoss:F4}, accuracy {report.TrainAccuracy:P2}");
        Console.WriteLine($"validation half:            loss {report.ValidationLoss:F4}, accuracy {report.ValidationAccuracy:P2}");
        Console.WriteLine($"run folder:                 {report.Run}");
    }

    /// <summary>Trains an experiment from its last checkpoint to the end.</summary>
    internal static SearchReport Run(Experiment experiment, Terminal terminal, CancellationToken cancellation)
    {
        using var search = new SupernetSearch(experiment);
        search.Restore();
        experiment.SearchForecast.RequireMemory(experiment.Backend);
        terminal.Note(experiment.SearchForecast.Summary);
        SearchResult result = null!;
        terminal.Progress("search", progress => result = search.Run(p => progress.Report(p.ToReport()), cancellation));
        return new SearchReport(experiment.Run.Path, experiment.Network.Space.Name, experiment.Configuration.Method, result.Epochs,
            result.TrainLoss, result.TrainAccuracy, result.ValidationLoss, result.ValidationAccuracy);
    }
}
