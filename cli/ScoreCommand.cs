using System.Diagnostics;
using System.Text.Json.Serialization;
using PerturbNas.Networks;
using PerturbNas.Search;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Training;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>What `score --json` prints: first the unmasked network, then every masked candidate.</summary>
/// <param name="Loss">Mean loss of the unmasked supernet (natural logarithm).</param>
/// <param name="Accuracy">Accuracy of the unmasked supernet, 0 to 1.</param>
/// <param name="Candidates">Every masked candidate, by cell, edge and operation.</param>
/// <param name="Images">Images that every candidate was scored on.</param>
/// <param name="Seconds">Wall time of the scoring of the candidates.</param>
/// <param name="CandidateImagesPerSecond">Images times candidates, divided by the wall time.</param>
internal sealed record ScoreReport(double Loss, double Accuracy, IReadOnlyList<ScoredCandidate> Candidates, long Images, double Seconds,
    double CandidateImagesPerSecond);

/// <summary>The supernet with one operation masked.</summary>
/// <param name="Images">Images that it was scored on; fewer than the report's where racing dropped it.</param>
/// <param name="Dropped">Why racing dropped it; left out where it did not.</param>
internal sealed record ScoredCandidate(string Cell, int Edge, string Operation, double Loss, double Accuracy,
    [property: JsonIgnore(Condition = JsonIgnoreCondition.WhenWritingNull)] long? Images = null,
    [property: JsonIgnore(Condition = JsonIgnoreCondition.WhenWritingNull)] string? Dropped = null);

/// <summary>One scoring pass over candidates: masks each operation in turn, without tuning; changes nothing in the run.</summary>
internal static class ScoreCommand
{
    public static void Run(ScoreOptions options, CancellationToken cancellation)
    {
        var terminal = new Terminal(options);
        using var backend = options.CreateBackend(terminal);
        using var run = RunDirectory.OpenExisting(options.Run);
        using var experiment = Experiment.Open(run, backend);
        using (var search = new SupernetSearch(experiment))
        {
            search.Restore();
            if (!search.Finished)
                terminal.Note("the search of this run has not finished: scoring its last checkpoint");
        }
        var evaluation = new MaskedEvaluation(experiment.Network, experiment.Arena, experiment.Validation,
            options.Batch ?? experiment.Configuration.Batch, options.Batches);
        var edges = (from type in Enum.GetValues<CellType>()
                     where options.Cell is null || options.Cell == CellTopology.NameOf(type)
                     from edge in Enumerable.Range(0, CellTopology.Edges)
                     where options.Edge is null || options.Edge == edge
                     select (Type: type, Edge: edge)).ToList();
        ScoreReport report = null!;
        terminal.Progress("score", progress => report = Score(experiment.Network, evaluation, edges, options, experiment.Configuration.Seed, progress,
            cancellation));
        if (options.Json)
        {
            Terminal.WriteJson(report);
            return;
        }
        var table = Terminal.PlainTable("cell", "edge", "masked operation", "loss", "accuracy", "change", "images");
        table.AddRow("", "", "(nothing)", $"{report.Loss:F4}", $"{report.Accuracy:P2}", "", $"{report.Images}");
        foreach (var candidate in report.Candidates)
            table.AddRow(candidate.Cell, $"{candidate.Edge}", candidate.Operation, $"{candidate.Loss:F4}", $"{candidate.Accuracy:P2}",
                $"{100 * (candidate.Accuracy - report.Accuracy):+0.00;-0.00;0.00}", $"{candidate.Images ?? report.Images}");
        Terminal.Out.Write(table);
        Console.WriteLine($"{report.Candidates.Count} candidates on {report.Images} images in {report.Seconds:F1} s: " +
            $"{report.CandidateImagesPerSecond:F0} candidate-images per second");
    }

    private static ScoreReport Score(Supernet network, MaskedEvaluation evaluation, List<(CellType Type, int Edge)> edges,
        ScoreOptions options, long seed, IProgress<ProgressReport> progress, CancellationToken cancellation)
    {
        var masks = edges.ConvertAll(e => network.Space.Operations(e.Type)[e.Edge].Select((_, o) => new Mask(e.Type, e.Edge, o)).ToList());
        var total = evaluation.Images * (1 + masks.Sum(group => group.Count));
        long done = 0;
        var states = new EdgeStates();
        var racing = Racing.Parse(options.Racing);
        var unmasked = evaluation.Evaluate(states, [Mask.None], Report, cancellation)[0];
        var clock = Stopwatch.StartNew();
        var candidates = new List<ScoredCandidate>();
        foreach (var group in masks)
        {
            var order = new RandomStream(seed, "racing order", CellTopology.Edges * (int)group[0].Cell + group[0].Edge);
            var results = evaluation.Evaluate(states, group, racing, lowestWins: true, order, Report, cancellation);
            candidates.AddRange(group.Select((mask, i) => new ScoredCandidate(CellTopology.NameOf(mask.Cell), mask.Edge,
                network.Space.Operations(mask.Cell)[mask.Edge][mask.Operation], results[i].Totals.Loss, results[i].Totals.Accuracy,
                racing.IsOff ? null : results[i].Totals.Images, results[i].Dropped)));
        }
        var seconds = clock.Elapsed.TotalSeconds;
        return new ScoreReport(unmasked.Loss, unmasked.Accuracy, candidates, evaluation.Images, seconds,
            candidates.Sum(candidate => candidate.Images ?? evaluation.Images) / seconds);

        void Report(int candidateImages) => progress.Report(new ProgressReport((double)(done += candidateImages) / total));
    }
}
