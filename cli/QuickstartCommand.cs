using PerturbNas.Networks;
using PerturbNas.Search;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Training;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>What `quickstart --json` prints.</summary>
internal sealed record QuickstartReport(SearchReport Search, SelectionResult Magnitude, SelectionResult Perturbation,
    IReadOnlyList<EdgeDifference> Differences);

/// <summary>An edge that both selections keep or judge differently.</summary>
/// <param name="Magnitude">The operation that alpha prefers, with its weight.</param>
/// <param name="Perturbation">The operation whose masking hurt most, with the accuracies that say so.</param>
internal sealed record EdgeDifference(string Cell, int Edge, string Magnitude, double Weight, string Perturbation,
    IReadOnlyDictionary<string, double> MaskedAccuracies);

/// <summary>
/// The main job at a size that takes a minute or two: search, both selections, and where they differ. Called again it goes on where it
/// was interrupted.
/// </summary>
internal static class QuickstartCommand
{
    public static void Run(QuickstartOptions options, CancellationToken cancellation)
    {
        var terminal = new Terminal(options);
        using var backend = options.CreateBackend(terminal);
        var configuration = Configuration(options);
        var resumed = RunDirectory.Exists(options.Out);
        using var run = resumed ? RunDirectory.OpenExisting(options.Out) : RunDirectory.Open(options.Out);
        using var experiment = resumed
            ? Experiment.Open(run, backend, kept => kept == configuration ? kept : throw new UserException(
                $"'{options.Out}' holds another run than this quickstart would make; give another folder with --out."))
            : Experiment.Create(run, configuration, backend, initialFile: null);
        if (resumed)
            terminal.Note($"going on with the run in '{options.Out}', what is done there is not done again");
        terminal.Note($"quickstart: {configuration.Data} images, space s3 (none, skip_connect, sep_conv_3x3), {configuration.Channels} channels, " +
            $"{configuration.Layers} cells");
        terminal.Note("1. train a supernet in which every edge mixes its operations");
        var search = SearchCommand.Run(experiment, terminal, cancellation);
        var weights = Enum.GetValues<CellType>().ToDictionary(type => type, experiment.Network.Alphas.Softmax);
        terminal.Note("2. choose by magnitude: the largest alpha wins");
        var (magnitude, _) = Select(experiment, "magnitude", terminal, cancellation);
        terminal.Note("3. choose by perturbation: mask one operation at a time, keep the one whose absence hurts most, tune in between");
        var (perturbation, decisions) = Select(experiment, "perturbation", terminal, cancellation);
        var differences = Compare(experiment.Network, weights, decisions);
        if (options.Json)
        {
            Terminal.WriteJson(new QuickstartReport(search, magnitude, perturbation, differences));
            return;
        }
        Show(options, search, magnitude, perturbation, differences);
    }

    private static SearchConfiguration Configuration(QuickstartOptions options) => new()
    {
        Space = SearchSpace.Load("s3").ToJson(),
        Method = "darts",
        Data = options.DataDir is null ? "synthetic" : "cifar10",
        DataDir = options.DataDir is null ? null : Path.GetFullPath(options.DataDir),
        Epochs = 8,
        Batch = 32,
        Channels = 8,
        Layers = 5,
        Seed = options.Seed,
        TrainPortion = 0.5,
        TrainLimit = 768,
        ValidLimit = 512,
    };

    private static (SelectionResult Result, IReadOnlyList<Decision> Decisions) Select(Experiment experiment, string by, Terminal terminal,
        CancellationToken cancellation)
    {
        var configuration = new SelectionConfiguration
        {
            By = by,
            TuneEpochs = 1,
            TrainLimit = experiment.Configuration.TrainLimit,
            ValidLimit = experiment.Configuration.ValidLimit,
            Batch = experiment.Configuration.Batch,
            Seed = experiment.Configuration.Seed,
        };
        using var selection = SelectionRun.ReadConfiguration(experiment.Run.Path, by) == configuration
            ? SelectionRun.Resume(experiment, configuration)
            : SelectionRun.Start(experiment, configuration);
        return (SelectCommand.Run(selection, configuration, terminal, cancellation), selection.Decisions);
    }

    private static List<EdgeDifference> Compare(Supernet network, Dictionary<CellType, double[]> weights, IReadOnlyList<Decision> decisions)
    {
        var differences = new List<EdgeDifference>();
        foreach (var decision in decisions.Where(decision => decision.Phase == Decision.OperationPhase)
            .OrderBy(decision => decision.Cell, StringComparer.Ordinal).ThenBy(decision => decision.Edge))
        {
            var type = decision.Cell == CellTopology.NameOf(CellType.Normal) ? CellType.Normal : CellType.Reduction;
            var columns = network.Alphas.Columns(type);
            var row = weights[type].AsSpan(decision.Edge * columns, columns);
            var best = MagnitudeSelector.Best(network.Space.Operations(type)[decision.Edge], row);
            var operation = network.Space.Operations(type)[decision.Edge][best.Operation];
            if (operation != decision.Chosen)
                differences.Add(new EdgeDifference(decision.Cell, decision.Edge, operation, best.Weight, decision.Chosen,
                    decision.Candidates.ToDictionary(candidate => candidate.Operation, candidate => candidate.Accuracy)));
        }
        return differences;
    }

    private static void Show(QuickstartOptions options, SearchReport search, SelectionResult magnitude, SelectionResult perturbation,
        List<EdgeDifference> differences)
    {
        Console.WriteLine();
        Console.WriteLine($"Supernet after {search.Epochs} epochs: accuracy {search.TrainAccuracy:P1} on the training half (last epoch), " +
            $"{search.ValidationAccuracy:P1} on the validation half (chance 10 %).");
        Console.WriteLine();
        Console.WriteLine("By magnitude:");
        Console.WriteLine(magnitude.Genotype);
        Console.WriteLine($"  the supernet cut down to it, untuned: accuracy {magnitude.Accuracy:P1}, loss {magnitude.Loss:F3}");
        Console.WriteLine("By perturbation:");
        Console.WriteLine(perturbation.Genotype);
        Console.WriteLine($"  the supernet cut down to it, tuned on the way: accuracy {perturbation.Accuracy:P1}, loss {perturbation.Loss:F3}");
        Console.WriteLine();
        Console.WriteLine(differences.Count == 0
            ? "Both prefer the same operation on every edge; genotypes can differ in the edges that they keep."
            : $"They prefer different operations on {differences.Count} of {2 * CellTopology.Edges} edges. Alpha says how strongly an operation is " +
                "mixed in; masking it says what it is worth:");
        if (differences.Count > 0)
        {
            var table = Terminal.PlainTable("cell", "edge", "magnitude keeps", "(weight)", "perturbation keeps", "accuracy without each operation");
            foreach (var d in differences)
            {
                table.AddRow(d.Cell, $"{d.Edge}", d.Magnitude, $"{d.Weight:F3}", d.Perturbation,
                    string.Join(", ", d.MaskedAccuracies.Select(masked => $"{masked.Key} {masked.Value:P1}")));
            }
            Terminal.Out.Write(table);
        }
        Console.WriteLine();
        Console.WriteLine($"Everything is in {options.Out}: config.json, metrics.jsonl, checkpoints/, select-magnitude/, select-perturbation/.");
        Console.WriteLine($"Go on with: ./perturbnas score --run {options.Out} --cell normal --edge 0");
    }
}
