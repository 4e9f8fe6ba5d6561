namespace PerturbNas.Data;

/// <summary>
/// A data set by name. Sources know their sizes without reading images, and read only the records that are asked for.
/// </summary>
public abstract class ImageSource
{
    /// <summary>The names that <see cref="Open"/> takes.</summary>
    public static IReadOnlyList<string> Names { get; } = ["cifar10", "cifar100", "synthetic"];

    public abstract string Name { get; }

    public abstract int Classes { get; }

    public abstract int Height { get; }

    public abstract int Width { get; }

    public abstract IReadOnlyList<float> Mean { get; }

    public abstract IReadOnlyList<float> Std { get; }

    /// <summary>Where the records come from, for messages.</summary>
    public abstract string Location { get; }

    /// <summary>Opens a data set.</summary>
    /// <param name="name">One of <see cref="Names"/>.</param>
    /// <param name="dataFolder">The folder of the files or a parent of it; null: see <see cref="DataFolder.Default"/>.</param>
    /// <param name="syntheticSeed">The seed that "synthetic" is drawn from; the others do not use it.</param>
    /// <exception cref="UserException">The name is unknown or the files are not there.</exception>
    public static ImageSource Open(string name, string? dataFolder = null, long syntheticSeed = 0) => name switch
    {
        "cifar10" => new CifarSource(CifarLayout.Cifar10, dataFolder),
        "cifar100" => new CifarSource(CifarLayout.Cifar100, dataFolder),
        "synthetic" => new SyntheticSource(syntheticSeed),
        _ => throw new UserException($"Unknown data set '{name}'; choose one of {string.Join(", ", Names)}."),
    };

    /// <summary>Number of records of a part.</summary>
    /// <exception cref="UserException">A file is missing or its size is wrong.</exception>
    public abstract int Count(DataPart part);

    /// <summary>Reads the first <paramref name="limit"/> records of a part, or all of them.</summary>
    /// <exception cref="UserException">
    /// A file is missing, has a wrong size or a label out of range, or has fewer records than asked for.
    /// </exception>
    public ImageSet Read(DataPart part, int? limit = null)
    {
        var count = Count(part);
        return Read(part, 0, Limited(limit, count, part == DataPart.Train ? "training" : "test"));
    }

    /// <summary>
    /// The search's split of the training records, in file order: the first floor(<paramref name="trainPortion"/> * count) train
    /// the weights, the others train alpha and score candidates. Limits take the first records of each.
    /// </summary>
    /// <param name="trainPortion">Between 0 and 1, both excluded.</param>
    /// <param name="trainLimit">At most the records of the first part; null: all of them.</param>
    /// <param name="validationLimit">At most the records of the second part; null: all of them.</param>
    /// <exception cref="UserException">As <see cref="Read(DataPart, int?)"/>, or the portion leaves a part empty.</exception>
    public (ImageSet Train, ImageSet Validation) ReadSearchSplit(
        double trainPortion = 0.5, int? trainLimit = null, int? validationLimit = null)
    {
        var count = Count(DataPart.Train);
        if (!(trainPortion > 0 && trainPortion < 1))
            throw new UserException($"The train portion {trainPortion} is not between 0 and 1; 0.5 is usual.");
        var split = (int)Math.Floor(trainPortion * count);
        if (split == 0 || split == count)
            throw new UserException(
                $"The train portion {trainPortion} of the {count} training records of {Location} leaves one part empty; 0.5 is usual.");
        return (Read(DataPart.Train, 0, Limited(trainLimit, split, "training (weights)")),
            Read(DataPart.Train, split, Limited(validationLimit, count - split, "validation (alpha)")));
    }

    /// <summary>Reads records first..first+labels.Length-1 of a part.</summary>
    /// <param name="part">The part.</param>
    /// <param name="first">Index of the first record in the part.</param>
    /// <param name="pixels">[labels.Length, 3, Height, Width].</param>
    /// <param name="labels">One label a record.</param>
    protected abstract void ReadRecords(DataPart part, int first, byte[] pixels, int[] labels);

    private ImageSet Read(DataPart part, int first, int count)
    {
        var pixels = GC.AllocateUninitializedArray<byte>(checked(count * 3 * Height * Width));
        var labels = new int[count];
        ReadRecords(part, first, pixels, labels);
        return new ImageSet
        {
            Name = Name,
            Classes = Classes,
            Height = Height,
            Width = Width,
            FirstRecord = first,
            Pixels = pixels,
            Labels = labels,
            Mean = Mean,
            Std = Std,
        };
    }

    private int Limited(int? limit, int count, string what)
    {
        if (limit is null)
            return count;
        if (limit < 1)
            throw new UserException($"The limit of {limit} {what} records must be at least 1.");
        if (limit > count)
            throw new UserException(
                $"The limit of {limit} {what} records is more than the {count} of {Location}; ask for at most {count}.");
        return limit.Value;
    }
}
