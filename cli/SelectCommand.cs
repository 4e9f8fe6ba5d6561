using PerturbNas.Reports;
using PerturbNas.Selection;
using PerturbNas.Training;

namespace PerturbNas.Cli;

/// <summary>Chooses the architecture of a run's supernet.</summary>
internal static class SelectCommand
{
    public static void Run(SelectOptions options, CancellationToken cancellation)
    {
        var terminal = new Terminal(options);
        if (!options.Resume && !options.Restart && SelectionRun.IsUnfinished(options.Run, options.By))
            throw new UserException($"'{options.Run}' holds an unfinished selection by {options.By}; give --resume to go on with it, or --restart to " +
                "begin anew in its place.");
        using var backend = options.CreateBackend(terminal);
        using var run = RunDirectory.OpenExisting(options.Run);
        var resumed = options.Resume ? SelectionRun.ReadConfiguration(options.Run, options.By) : null;
        if (resumed is not null)
            options.RequireAgreement(resumed);
        using var experiment = Experiment.Open(run, backend, search => search with
        {
            TrainLimit = resumed is null ? options.TrainLimit ?? search.TrainLimit : resumed.TrainLimit,
            ValidLimit = resumed is null ? options.ValidLimit ?? search.ValidLimit : resumed.ValidLimit,
        });
        var configuration = resumed ?? new SelectionConfiguration
        {
            By = options.By,
            Criterion = options.Criterion == "acc" ? Criterion.Accuracy : Criterion.Loss,
            TuneEpochs = options.TuneEpochs,
            TrainLimit = experiment.Configuration.TrainLimit,
            ValidLimit = experiment.Configuration.ValidLimit,
            Batch = options.Batch ?? experiment.Configuration.Batch,
            Seed = options.Seed ?? experiment.Configuration.Seed,
            CosineTuning = options.TuneSchedule == "cosine",
            ReferenceQuirks = options.ReferenceQuirks,
            Racing = options.Racing,
        };
        var forecast = Forecast.OfSelection(experiment.Configuration, configuration);
        forecast.RequireMemory(experiment.Backend);
        using var selection = resumed is null ? SelectionRun.Start(experiment, configuration) : SelectionRun.Resume(experiment, configuration);
        if (options.Resume && resumed is null)
            terminal.Note($"there is no selection by {options.By} to resume in '{options.Run}': starting one");
        terminal.Note(forecast.Summary);
        var result = Run(selection, configuration, terminal, cancellation);
        if (options.Json)
        {
            Terminal.WriteJson(result);
            return;
        }
        Console.WriteLine(result.Genotype);
        Console.WriteLine($"the supernet reduced to it: loss {result.Loss:F4}, accuracy {result.Accuracy:P2} on the validation half");
        Console.WriteLine($"decisions: {result.Decisions}; folder: {SelectionRun.FolderOf(options.Run, configuration.By)}");
    }

    /// <summary>Runs a selection to its end.</summary>
    internal static SelectionResult Run(SelectionRun selection, SelectionConfiguration configuration, Terminal terminal,
        CancellationToken cancellation)
    {
        SelectionResult result = null!;
        terminal.Progress($"select by {configuration.By}", progress => result = selection.Run(p => progress.Report(p.ToReport()), cancellation));
        return result;
    }
}
