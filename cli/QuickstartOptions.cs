using CommandLine;

namespace PerturbNas.Cli;

/// <summary>Options of `quickstart`: a small search and both selections, start to end.</summary>
[Verb("quickstart", HelpText = "A small search with both selections, start to end, in minutes.")]
internal sealed class QuickstartOptions : ComputeOptions
{
    public static string Examples => """
        perturbnas quickstart
        perturbnas quickstart --data-dir ~/data --out runs/first --seed 1
        """;

    [Option("data-dir", MetaValue = "DIR", HelpText = "Folder of the CIFAR-10 files, or a parent of it (built-in synthetic images by default).")]
    public string? DataDir { get; set; }

    [Option("out", Default = "runs/quickstart", MetaValue = "RUN", HelpText = "Folder of the run, created by it; an interrupted quickstart there goes on.")]
    public string Out { get; set; } = "";

    [Option("seed", Default = 0L, MetaValue = "N", HelpText = "Seed of all randomness; the same seed gives the same bits.")]
    public long Seed { get; set; }
}
