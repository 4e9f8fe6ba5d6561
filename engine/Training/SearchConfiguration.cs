using System.Text.Json.Serialization;
using PerturbNas.Data;
using PerturbNas.Spaces;

namespace PerturbNas.Training;

/// <summary>Everything that decides a search, as kept in config.json. Two searches of the same configuration end with the same bytes.</summary>
public sealed record SearchConfiguration
{
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

    public SearchSpace ParseSpace() => SearchSpace.Parse(Space, "config.json");

    public (ImageSet Train, ImageSet Validation) ReadData() =>
        ImageSource.Open(Data, DataDir, Seed).ReadSearchSplit(TrainPortion, TrainLimit, ValidLimit);
}
