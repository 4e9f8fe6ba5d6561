using CommandLine;

namespace PerturbNas.Cli;

/// <summary>Options of `profile`: where the time goes.</summary>
[Verb("profile", HelpText = "Run a few steps and scoring passes and show the time of every kernel against the machine's limits.")]
internal sealed class ProfileOptions : SizeOptions
{
    public static string Examples => """
        perturbnas profile --space s5 --steps 5
        perturbnas profile --run runs/s2 --trace trace.json --json
        """;

    [Option("steps", Default = 3, MetaValue = "N", HelpText = "Alpha steps, weight steps and scoring passes to run.")]
    public int Steps { get; set; }

    [Option("trace", MetaValue = "FILE", HelpText = "Write every kernel call as a Chrome trace, which opens in Perfetto (none by default).")]
    public string? Trace { get; set; }

    public override void Validate()
    {
        base.Validate();
        RequireRange("--steps", Steps, 1, 10_000);
    }
}
