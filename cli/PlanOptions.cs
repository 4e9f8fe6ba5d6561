using CommandLine;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Cli;

/// <summary>The size of a search, given by options or taken from a run and then changed by them.</summary>
internal abstract class SizeOptions : ComputeOptions
{
    [Option("run", MetaValue = "RUN", HelpText = "Take what the other options do not say from this run (none by default).")]
    public string? Run { get; set; }

    [Option("space", MetaValue = "NAME|FILE", HelpText = "Search space: s1, s2, s3, s4, s5 (default), darts, or a file that defines one.")]
    public string? Space { get; set; }

    [Option("channels", MetaValue = "N", HelpText = "Channels C of the first cells (16 by default).")]
    public int? Channels { get; set; }

    [Option("layers", MetaValue = "N", HelpText = "Cells (8 by default).")]
    public int? Layers { get; set; }

    [Option("batch", MetaValue = "N", HelpText = "Images per step (64 by default).")]
    public int? Batch { get; set; }

    [Option("data", MetaValue = "NAME", HelpText = "Data set: cifar10, cifar100 or synthetic (default; as large as CIFAR-10, needs no files).")]
    public string? Data { get; set; }

    [Option("data-dir", MetaValue = "DIR", HelpText = "Folder of the data files, or a parent of it (by default $PERTURBNAS_DATA, if set, or ./data).")]
    public string? DataDir { get; set; }

    /// <summary>The configuration that a search of this size has.</summary>
    public virtual SearchConfiguration Configuration()
    {
        var given = new SearchConfiguration
        {
            Space = SearchSpace.Load("s5").ToJson(),
            Method = "darts",
            Data = "synthetic",
            Epochs = 50,
            Batch = 64,
            Channels = 16,
            Layers = 8,
            Seed = 0,
            TrainPortion = 0.5,
        };
        if (Run is not null)
        {
            if (!RunDirectory.Exists(Run))
                throw new UserException($"--run is '{Run}', which holds no run; give the folder that 'search --out' made.");
            using var run = RunDirectory.Open(Run);
            given = SearchConfiguration.Read(run);
        }
        return given with
        {
            Space = Space is null ? given.Space : SearchSpace.Load(Space).ToJson(),
            Channels = Channels ?? given.Channels,
            Layers = Layers ?? given.Layers,
            Batch = Batch ?? given.Batch,
            Data = Data ?? given.Data,
            DataDir = DataDir is null ? given.DataDir : Path.GetFullPath(DataDir),
        };
    }

    public override void Validate()
    {
        base.Validate();
        if (Space is not null && !SearchSpace.BuiltIn.Contains(Space) && !File.Exists(Space))
            throw new UserException($"--space is '{Space}'; choose {string.Join(", ", SearchSpace.BuiltIn)}, or name a file that exists.");
        RequireRange("--channels", Channels, 1, SearchConfiguration.MaxChannels);
        RequireRange("--layers", Layers, 1, SearchConfiguration.MaxLayers);
        RequireRange("--batch", Batch, 1);
        if (Data is not null)
            RequireChoice("--data", Data, "cifar10", "cifar100", "synthetic");
    }
}

/// <summary>Options of `plan`: what a search and a selection would take.</summary>
[Verb("plan", HelpText = "Forecast memory, work and time of a search and of its selection, without running them.")]
internal sealed class PlanOptions : SizeOptions
{
    public static string Examples => """
        perturbnas plan --space s5 --channels 16 --layers 8 --batch 64
        perturbnas plan --run runs/s2 --batch 128 --json
        """;

    [Option("epochs", MetaValue = "N", HelpText = "Epochs of the search (50 by default).")]
    public int? Epochs { get; set; }

    [Option("tune-epochs", Default = 5, MetaValue = "N", HelpText = "Epochs of fine-tuning after every decision of the selection.")]
    public int TuneEpochs { get; set; }

    [Option("train-limit", MetaValue = "N", HelpText = "Use the first N images of the training half only (all by default).")]
    public int? TrainLimit { get; set; }

    [Option("valid-limit", MetaValue = "N", HelpText = "Use the first N images of the validation half only (all by default).")]
    public int? ValidLimit { get; set; }

    public override SearchConfiguration Configuration()
    {
        var given = base.Configuration();
        return given with
        {
            Epochs = Epochs ?? given.Epochs,
            TrainLimit = TrainLimit ?? given.TrainLimit,
            ValidLimit = ValidLimit ?? given.ValidLimit,
        };
    }

    public override void Validate()
    {
        base.Validate();
        RequireRange("--epochs", Epochs, 0);
        RequireRange("--tune-epochs", TuneEpochs, 0);
        RequireRange("--train-limit", TrainLimit, 1);
        RequireRange("--valid-limit", ValidLimit, 1);
    }
}
