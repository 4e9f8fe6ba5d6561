namespace PerturbNas.Data;

/// <summary>A file of records of a data set.</summary>
/// <param name="Name">The file's name.</param>
/// <param name="Part">The part that its records belong to.</param>
/// <param name="Records">Number of records of the official file.</param>
/// <param name="Sha256">SHA-256 of the official file.</param>
public sealed record CifarFile(string Name, DataPart Part, int Records, string Sha256);

/// <summary>
/// The binary layout of CIFAR-10 and CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html): records of label bytes followed by
/// 3072 pixel bytes, 1024 red, 1024 green, 1024 blue, each row by row.
/// </summary>
/// <remarks>
/// Checksums of CIFAR-10's files: of real files whose SHA-1s are those that MXNet Gluon checks. Checksums of the archives and of
/// CIFAR-100's files: as several loaders publish them (TorchVision for Ruby, GoMLX, MLDatasets.jl).
/// </remarks>
public sealed class CifarLayout
{
    public const int Size = 32;

    public const int PixelBytes = 3 * Size * Size;

    public static CifarLayout Cifar10 { get; } = new()
    {
        Name = "cifar10",
        LabelClasses = [10],
        MayBeSubset = false,
        Folders = ["", "cifar-10-batches-bin", "cifar-10/cifar-10-batches-bin", "cifar-10"],
        Files =
        [
            new("data_batch_1.bin", DataPart.Train, 10_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
            new("data_batch_2.bin", DataPart.Train, 10_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
            new("data_batch_3.bin", DataPart.Train, 10_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
            new("data_batch_4.bin", DataPart.Train, 10_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
            new("data_batch_5.bin", DataPart.Train, 10_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
            new("test_batch.bin", DataPart.Test, 10_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
        ],
        Mean = [0.49139968f, 0.48215827f, 0.44653124f],
        Std = [0.24703233f, 0.24348505f, 0.26158768f],
        ArchiveFolder = "cifar-10-batches-bin",
        ArchiveUrl = new Uri("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),
        ArchiveSha256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    };

    public static CifarLayout Cifar100 { get; } = new()
    {
        Name = "cifar100",
        LabelClasses = [20, 100],
        MayBeSubset = true,
        Folders =
        [
            "", "cifar-100-binary", "cifar-100/cifar-100-binary", "cifar-100-binary-subset", "cifar-100/cifar-100-binary-subset",
            "cifar-100",
        ],
        Files =
        [
            new("train.bin", DataPart.Train, 50_000, "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"),
            new("test.bin", DataPart.Test, 10_000, "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),
        ],
        Mean = [0.5071f, 0.4865f, 0.4409f],
        Std = [0.2673f, 0.2564f, 0.2762f],
        ArchiveFolder = "cifar-100-binary",
        ArchiveUrl = new Uri("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"),
        ArchiveSha256 = "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    };

    private CifarLayout()
    {
    }

    /// <summary>The data set's name in commands.</summary>
    public required string Name { get; init; }

    /// <summary>
    /// For every label byte before the pixels, its number of values; the last is the class (CIFAR-100: coarse, then fine).
    /// </summary>
    public required IReadOnlyList<int> LabelClasses { get; init; }

    public int LabelBytes => LabelClasses.Count;

    public int Classes => LabelClasses[^1];

    /// <summary>Whether a file may have fewer records than the official one.</summary>
    public required bool MayBeSubset { get; init; }

    /// <summary>Where the files may lie below a data folder; the first that has any of them counts.</summary>
    public required IReadOnlyList<string> Folders { get; init; }

    /// <summary>The files in the order of their records.</summary>
    public required IReadOnlyList<CifarFile> Files { get; init; }

    public required IReadOnlyList<float> Mean { get; init; }

    public required IReadOnlyList<float> Std { get; init; }

    /// <summary>The folder that the official archive unpacks to.</summary>
    public required string ArchiveFolder { get; init; }

    /// <summary>The archive at the data set's authors.</summary>
    public required Uri ArchiveUrl { get; init; }

    public required string ArchiveSha256 { get; init; }

    /// <summary>Bytes of a record.</summary>
    public int RecordBytes => LabelBytes + PixelBytes;

    /// <summary>The layout of a data set that comes in files.</summary>
    /// <exception cref="UserException">The data set has no files or is unknown.</exception>
    public static CifarLayout Of(string name) => name switch
    {
        "cifar10" => Cifar10,
        "cifar100" => Cifar100,
        _ => throw new UserException($"The data set '{name}' has no files to fetch or verify; choose cifar10 or cifar100."),
    };

    /// <summary>Number of records of a file, from its size.</summary>
    /// <param name="folder">The folder of the files.</param>
    /// <param name="file">One of <see cref="Files"/>.</param>
    /// <exception cref="UserException">The file is missing, or its size is not that of a whole, plausible number of records.</exception>
    public int CountRecords(string folder, CifarFile file)
    {
        var info = new FileInfo(Path.Combine(folder, file.Name));
        var remedy = $"fetch it again with 'perturbnas data fetch {Name}'";
        if (!info.Exists)
            throw new UserException($"'{info.FullName}' is missing; {remedy}.");
        var official = (long)file.Records * RecordBytes;
        if (info.Length > official)
            throw new UserException($"'{info.FullName}' has {info.Length} bytes, more than the {official} of the official file; {remedy}.");
        if (!MayBeSubset && info.Length != official)
            throw new UserException($"'{info.FullName}' is truncated: it has {info.Length} bytes of {official}; {remedy}.");
        if (info.Length == 0 || info.Length % RecordBytes != 0)
            throw new UserException(
                $"'{info.FullName}' has {info.Length} bytes, which is not a whole number of records of {RecordBytes} bytes; {remedy}.");
        return (int)(info.Length / RecordBytes);
    }
}
