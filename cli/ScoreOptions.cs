using CommandLine;

namespace PerturbNas.Cli;

/// <summary>Options of `score`: one scoring pass over candidates, without tuning.</summary>
[Verb("score", HelpText = "Score candidate operations by masking each of them, without tuning.")]
internal sealed class ScoreOptions : ComputeOptions
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

    [Option("batch", MetaValue = "N", HelpText = "Images per batch; more than there are: all of them (as in the run by default).")]
    public int? Batch { get; set; }

    [Option("batches", MetaValue = "N", HelpText = "Use the first N batches of the validation half (all by default).")]
    public int? Batches { get; set; }

    [Option("racing", Default = "off", MetaValue = "off|exact|DELTA",
        HelpText = "Let the operations of each edge race, by accuracy: drop those that cannot win any more (exact), or that will not with this " +
            "error probability over a whole selection, such as 0.01.")]
    public string Racing { get; set; } = "";

    public override void Validate()
    {
        base.Validate();
        if (Cell is not null)
            RequireChoice("--cell", Cell, "normal", "reduction");
        RequireRange("--edge", Edge, 0, 13);
        RequireRange("--batch", Batch, 1);
        RequireRange("--batches", Batches, 1);
        Selection.Racing.Parse(Racing);
    }
}
