using CommandLine;

namespace PerturbNas.Cli;

/// <summary>Options of `score`: one scoring pass over candidates, without tuning.</summary>
[Verb("score", HelpText = "Score candidate operations by masking each of them, without tuning.")]
internal sealed class ScoreOptions : Options
{
    public static string Examples => """
        perturbnas score --run runs/s2
        perturbnas score --run runs/s2 --cell normal --edge 3 --batches 4 --json
        """;

    [Option("run", Required = true, MetaValue = "RUN", HelpText = "Folder of a run that 'search' has finished.")]
    public string Run { get; set; } = "";

    [Option("cell", MetaValue = "NAME", HelpText = "Score the edges of one cell type: normal or reduction (both by default).")]
    public string? Cell { get; set; }

    [Option("edge", MetaValue = "N", HelpText = "Score one edge, counted from 0 node by node (all by default).")]
    public int? Edge { get; set; }

    [Option("batch", MetaValue = "N", HelpText = "Images per batch (as in the run by default).")]
    public int? Batch { get; set; }

    [Option("batches", MetaValue = "N", HelpText = "Use the first N batches of the validation half (all by default).")]
    public int? Batches { get; set; }

    [Option("threads", Default = 0, MetaValue = "N", HelpText = "Worker threads; 0: one per processor. Results do not depend on it.")]
    public int Threads { get; set; }

    public override void Validate()
    {
        if (Cell is not null)
            RequireChoice("--cell", Cell, "normal", "reduction");
        RequireRange("--edge", Edge, 0, 13);
        RequireRange("--batch", Batch, 1);
        RequireRange("--batches", Batches, 1);
        RequireThreads(Threads);
    }
}

/// <summary>What `score --json` prints.</summary>
/// <param name="Loss">Mean loss of the unmasked supernet.</param>
/// <param name="Accuracy">Accuracy of the unmasked supernet, 0 to 1.</param>
/// <param name="Candidates">Every masked candidate.</param>
/// <param name="Images">Images that every candidate was scored on.</param>
/// <param name="Seconds">Wall time of the scoring.</param>
/// <param name="CandidateImagesPerSecond">Images times candidates, divided by the wall time.</param>
internal sealed record ScoreReport(
    double Loss, double Accuracy, IReadOnlyList<CandidateScore> Candidates, int Images, double Seconds, double CandidateImagesPerSecond);

/// <summary>The supernet with one operation masked.</summary>
/// <param name="Cell">"normal" or "reduction".</param>
/// <param name="Edge">The edge's number.</param>
/// <param name="Operation">The masked operation.</param>
/// <param name="Loss">Mean loss.</param>
/// <param name="Accuracy">Accuracy, 0 to 1.</param>
internal sealed record CandidateScore(string Cell, int Edge, string Operation, double Loss, double Accuracy);
