using CommandLine;
using PerturbNas.Selection;

namespace PerturbNas.Cli;

/// <summary>Options of `select`: choose the architecture from a trained supernet.</summary>
[Verb("select", HelpText = "Choose the architecture of a run's supernet.")]
internal sealed class SelectOptions : ComputeOptions
{
    public static string Examples => """
        perturbnas select --run runs/s2 --by magnitude
        perturbnas select --run runs/s2 --by perturbation --tune-epochs 5
        perturbnas select --run runs/s2 --criterion loss --valid-limit 2000
        """;

    [Option("run", Required = true, MetaValue = "RUN", HelpText = "Folder of a run that 'search' has finished.")]
    public string Run { get; set; } = "";

    [Option("by", Default = "perturbation", MetaValue = "NAME",
        HelpText = "perturbation: keep what hurts most when masked; magnitude: keep the largest alpha.")]
    public string By { get; set; } = "";

    [Option("criterion", Default = "acc", MetaValue = "NAME", HelpText = "What masking is judged by: acc (accuracy) or loss.")]
    public string Criterion { get; set; } = "";

    [Option("tune-epochs", Default = 5, MetaValue = "N", HelpText = "Epochs of fine-tuning after every decision.")]
    public int TuneEpochs { get; set; }

    [Option("tune-schedule", Default = "constant", MetaValue = "NAME", HelpText = "Learning rate of the tuning: constant or cosine.")]
    public string TuneSchedule { get; set; } = "";

    [Option("valid-limit", MetaValue = "N", HelpText = "Judge on the first N images of the validation half (as in the run by default).")]
    public int? ValidLimit { get; set; }

    [Option("train-limit", MetaValue = "N", HelpText = "Tune on the first N images of the training half (as in the run by default).")]
    public int? TrainLimit { get; set; }

    [Option("batch", MetaValue = "N", HelpText = "Images per step (as in the run by default).")]
    public int? Batch { get; set; }

    [Option("seed", MetaValue = "N", HelpText = "Seed of the order of the edges and of the tuning (as in the run by default).")]
    public long? Seed { get; set; }

    [Option("reference-quirks", HelpText = "Judge a node's edges as the paper's code does: deleted ones stay present in the comparison.")]
    public bool ReferenceQuirks { get; set; }

    [Option("racing", Default = "off", MetaValue = "off|exact|DELTA",
        HelpText = "Drop candidates early: exact, where they cannot win any more; or with this probability that any decision differs, such as 0.01.")]
    public string Racing { get; set; } = "";

    [Option("resume", HelpText = "Go on with an interrupted selection, with its own options.")]
    public bool Resume { get; set; }

    [Option("restart", HelpText = "Begin anew, in place of an interrupted selection.")]
    public bool Restart { get; set; }

    /// <exception cref="UserException">An option that is given differs from what the selection was started with.</exception>
    public void RequireAgreement(SelectionConfiguration kept) => RequireAgreement($"the selection by {By} in '{Run}'",
        ("criterion", Criterion, kept.Criterion == Selection.Criterion.Accuracy ? "acc" : "loss"), ("tune-epochs", TuneEpochs, kept.TuneEpochs),
        ("tune-schedule", TuneSchedule, kept.CosineTuning ? "cosine" : "constant"), ("valid-limit", ValidLimit, kept.ValidLimit),
        ("train-limit", TrainLimit, kept.TrainLimit), ("batch", Batch, kept.Batch), ("seed", Seed, kept.Seed),
        ("reference-quirks", ReferenceQuirks, kept.ReferenceQuirks), ("racing", Racing, kept.Racing));

    public override void Validate()
    {
        base.Validate();
        RequireChoice("--by", By, "magnitude", "perturbation");
        RequireChoice("--criterion", Criterion, "acc", "loss");
        RequireChoice("--tune-schedule", TuneSchedule, "constant", "cosine");
        RequireRange("--tune-epochs", TuneEpochs, 0);
        RequireRange("--valid-limit", ValidLimit, 1);
        RequireRange("--train-limit", TrainLimit, 1);
        RequireRange("--batch", Batch, 1);
        Selection.Racing.Parse(Racing);
        if (Resume && Restart)
            throw new UserException("--resume and --restart contradict each other; give one of them.");
    }
}
