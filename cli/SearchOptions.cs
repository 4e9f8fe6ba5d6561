using CommandLine;
using PerturbNas.Data;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Cli;

/// <summary>Options of `search`: train a supernet.</summary>
[Verb("search", HelpText = "Train a supernet: weights and, unless blank, architecture parameters.")]
internal sealed class SearchOptions : ComputeOptions
{
    private const int CutoutLength = 16;

    public static string Examples => """
        perturbnas search --space s2 --data cifar10 --out runs/s2
        perturbnas search --space s5 --method blank --seed 1 --out runs/s5-blank
        perturbnas search --out runs/s2 --resume
        """;

    [Option("space", Default = "s5", MetaValue = "NAME|FILE",
        HelpText = "Search space: s1, s2, s3, s4, s5, darts, or a file that defines one.")]
    public string Space { get; set; } = "";

    [Option("method", Default = "darts", MetaValue = "NAME",
        HelpText = "darts: first order, alpha trained on the validation half; blank: alpha stays as initialised.")]
    public string Method { get; set; } = "";

    [Option("data", Default = "cifar10", MetaValue = "NAME", HelpText = "Data set: cifar10, cifar100 or synthetic (made up, needs no files).")]
    public string Data { get; set; } = "";

    [Option("data-dir", MetaValue = "DIR", HelpText = $"Folder of the data files, or a parent of it (by default ${DataFolder.Variable}, if set, or ./{DataFolder.BelowHere}).")]
    public string? DataDir { get; set; }

    [Option("epochs", Default = 50, MetaValue = "N", HelpText = "Passes over the training half; 0 with --init: a run to score and select from.")]
    public int Epochs { get; set; }

    [Option("batch", Default = 64, MetaValue = "N", HelpText = "Images per step; more than there are: all of them.")]
    public int Batch { get; set; }

    [Option("channels", Default = 16, MetaValue = "N", HelpText = "Channels C of the first cells.")]
    public int Channels { get; set; }

    [Option("layers", Default = 8, MetaValue = "N", HelpText = "Cells; those at one and two thirds are reduction cells.")]
    public int Layers { get; set; }

    [Option("seed", Default = 0L, MetaValue = "N", HelpText = "Seed of all randomness; the same seed gives the same bits.")]
    public long Seed { get; set; }

    [Option("train-portion", Default = 0.5, MetaValue = "X", HelpText = "Share of the training set that trains the weights; the rest trains alpha.")]
    public double TrainPortion { get; set; }

    [Option("train-limit", MetaValue = "N", HelpText = "Use the first N images of the training half only (all by default).")]
    public int? TrainLimit { get; set; }

    [Option("valid-limit", MetaValue = "N", HelpText = "Use the first N images of the validation half only (all by default).")]
    public int? ValidLimit { get; set; }

    [Option("cutout", HelpText = "Augment with cutout, a square of 16 pixels.")]
    public bool Cutout { get; set; }

    [Option("init", MetaValue = "FILE", HelpText = "Start from the weights of a safetensors file (drawn from the seed by default).")]
    public string? Init { get; set; }

    [Option("out", Required = true, MetaValue = "RUN", HelpText = "Folder of the run, created by it.")]
    public string Out { get; set; } = "";

    [Option("resume", HelpText = "Go on with the run in --out where it was interrupted, with its own options.")]
    public bool Resume { get; set; }

    public override void Validate()
    {
        base.Validate();
        if (!SearchSpace.BuiltIn.Contains(Space) && !File.Exists(Space))
            throw new UserException($"--space is '{Space}'; choose {string.Join(", ", SearchSpace.BuiltIn)}, or name a file that exists.");
        RequireChoice("--method", Method, "darts", "blank");
        RequireChoice("--data", Data, "cifar10", "cifar100", "synthetic");
        RequireRange("--epochs", Epochs, 0);
        RequireRange("--batch", Batch, 1);
        RequireRange("--channels", Channels, 1, SearchConfiguration.MaxChannels);
        RequireRange("--layers", Layers, 1, SearchConfiguration.MaxLayers);
        RequireRange("--train-limit", TrainLimit, 1);
        RequireRange("--valid-limit", ValidLimit, 1);
        if (!(TrainPortion > 0 && TrainPortion < 1))
            throw new UserException($"--train-portion is {TrainPortion}; give a number between 0 and 1, 0.5 is usual.");
        if (Init is not null && !File.Exists(Init))
            throw new UserException($"--init is '{Init}', which does not exist; name a safetensors file.");
    }

    /// <summary>The configuration of a new run with these options.</summary>
    public SearchConfiguration ToConfiguration() => new()
    {
        Space = SearchSpace.Load(Space).ToJson(),
        Method = Method,
        Data = Data,
        DataDir = DataDir is null ? null : Path.GetFullPath(DataDir),
        Epochs = Epochs,
        Batch = Batch,
        Channels = Channels,
        Layers = Layers,
        Seed = Seed,
        TrainPortion = TrainPortion,
        TrainLimit = TrainLimit,
        ValidLimit = ValidLimit,
        Cutout = Cutout ? CutoutLength : 0,
    };

    /// <summary>
    /// The configuration of a run that is resumed with these options: its own. Only where its data files lie may have changed.
    /// </summary>
    /// <exception cref="UserException">An option that is given differs from what the run was started with.</exception>
    public SearchConfiguration Resumed(SearchConfiguration kept)
    {
        var given = ToConfiguration();
        var keptSpace = given.Space == kept.Space ? Space : $"another space, '{kept.ParseSpace().Name}',";
        var init = Init is null ? null : Checkpoint.DigestOf(Init);
        var keptInit = init == kept.InitSha256 ? Init : kept.InitSha256 is null ? null : "another file";
        RequireAgreement($"the run in '{Out}'", ("space", Space, keptSpace), ("method", Method, kept.Method), ("data", Data, kept.Data),
            ("epochs", Epochs, kept.Epochs), ("batch", Batch, kept.Batch), ("channels", Channels, kept.Channels), ("layers", Layers, kept.Layers),
            ("seed", Seed, kept.Seed), ("train-portion", TrainPortion, kept.TrainPortion), ("train-limit", TrainLimit, kept.TrainLimit),
            ("valid-limit", ValidLimit, kept.ValidLimit), ("cutout", Cutout, kept.Cutout > 0), ("init", Init, keptInit));
        return DataDir is null ? kept : kept with { DataDir = given.DataDir };
    }
}
