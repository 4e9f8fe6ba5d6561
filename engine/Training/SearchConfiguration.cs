using System.Text.Json.Serialization;
using PerturbNas.Data;
using PerturbNas.Spaces;

namespace PerturbNas.Training;

/// <summary>Everything that decides a search, as kept in config.json. Two searches of the same configuration end with the same bytes.</summary>
public sealed record SearchConfiguration
{
    /// <summary>Far beyond what anybody trains, and small enough to be forecast before it is refused for lack of memory.</summary>
    public const int MaxChannels = 512, MaxLayers = 100;

    internal const string FileName = "config.json";

    /// <summary>Methods that <see cref="Method"/> may name: first-order DARTS, and the same with alpha fixed at its initial value.</summary>
    public static IReadOnlyList<string> Methods { get; } = ["darts", "blank"];

    public int Version { get; init; } = 1;

    /// <summary>The space in its JSON form, so that a run does not depend on a file elsewhere.</summary>
    public required string Space { get; init; }

    public required string Method { get; init; }

    /// <summary>cifar10, cifar100 or synthetic.</summary>
    public required string Data { get; init; }

    /// <summary>The data folder; null: the default one.</summary>
    public string? DataDir { get; init; }

    public required int Epochs { get; init; }

    /// <summary>Images per step of each of the two batches.</summary>
    public required int Batch { get; init; }

    public required int Channels { get; init; }

    public required int Layers { get; init; }

    public required long Seed { get; init; }

    /// <summary>Fraction of the training records, in file order, that train the weights; the rest trains alpha.</summary>
    public required double TrainPortion { get; init; }

    public int? TrainLimit { get; init; }

    public int? ValidLimit { get; init; }

    /// <summary>Side of the cutout square, 0: none.</summary>
    public int Cutout { get; init; }

    /// <summary>SHA-256 of the file that the weights were started from; null: drawn from the seed.</summary>
    public string? InitSha256 { get; init; }

    /// <summary>Learning rate of the weights: cosine from 0.025 to 0.001 over the epochs.</summary>
    [JsonIgnore]
    public CosineSchedule Schedule { get; } = new(0.025, 0.001);

    [JsonIgnore]
    public bool UpdatesAlpha => Method == "darts";

    /// <summary>The configuration of a run's folder.</summary>
    /// <exception cref="UserException">The file is missing or damaged, or a value in it cannot be used.</exception>
    public static SearchConfiguration Read(RunDirectory run)
    {
        var configuration = run.ReadJson<SearchConfiguration>(FileName);
        configuration.Validate(new ConfigurationFile(run.PathOf(FileName)));
        return configuration;
    }

    private void Validate(ConfigurationFile file)
    {
        file.RequireVersion1(Version);
        file.RequireChoice("method", Method, Methods);
        file.RequireChoice("data", Data, ImageSource.Names);
        file.RequireRange("epochs", Epochs, 0);
        file.RequireRange("batch", Batch, 1);
        file.RequireRange("channels", Channels, 1, MaxChannels);
        file.RequireRange("layers", Layers, 1, MaxLayers);
        file.RequireRange("train_limit", TrainLimit, 1);
        file.RequireRange("valid_limit", ValidLimit, 1);
        file.RequireRange("cutout", Cutout, 0);
        file.Require("train_portion", TrainPortion, TrainPortion is > 0 and < 1, "it must lie between 0 and 1");
        file.Require("space", Space, Space is not null, "it must be a space in its JSON form");
    }

    public SearchSpace ParseSpace() => SearchSpace.Parse(Space, FileName);

    public (ImageSet Train, ImageSet Validation) ReadData() =>
        ImageSource.Open(Data, DataDir, Seed).ReadSearchSplit(TrainPortion, TrainLimit, ValidLimit);
}

/// <summary>Checks values that a configuration file gave; their types have been checked.</summary>
/// <param name="Path">The file, for messages.</param>
internal readonly record struct ConfigurationFile(string Path)
{
    /// <exception cref="UserException">The value is not valid; the remedy says what would be.</exception>
    public void Require(string name, object? value, bool valid, string remedy)
    {
        if (!valid)
            throw new UserException($"'{Path}' has {name} {(value is string or null ? $"'{value}'" : value)}; {remedy}.");
    }

    public void RequireVersion1(int version) =>
        Require("version", version, version == 1, "this program reads version 1; use the program that wrote it");

    public void RequireChoice(string name, string? value, IReadOnlyList<string> choices) =>
        Require(name, value, value is not null && choices.Contains(value), $"choose {string.Join(", ", choices.SkipLast(1))} or {choices[^1]}");

    public void RequireRange(string name, int? value, int least, int most = int.MaxValue) => Require(name, value,
        value is null || (value >= least && value <= most), most == int.MaxValue ? $"give {least} or more" : $"give a number from {least} to {most}");
}
