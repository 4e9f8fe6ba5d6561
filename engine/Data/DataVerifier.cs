using System.Security.Cryptography;
using System.Text.Json.Serialization;

namespace PerturbNas.Data;

/// <summary>What is known of a file after <see cref="DataVerifier"/> has read it.</summary>
[JsonConverter(typeof(JsonStringEnumConverter<FileState>))]
public enum FileState
{
    /// <summary>Byte for byte the official file.</summary>
    [JsonStringEnumMemberName("ok")]
    Ok,

    /// <summary>Can be used, but is not the official file: a subset, or changed.</summary>
    [JsonStringEnumMemberName("differs")]
    Differs,

    /// <summary>Cannot be used: missing, of a wrong size, or with labels out of range.</summary>
    [JsonStringEnumMemberName("broken")]
    Broken,
}

/// <summary>The findings about one file.</summary>
/// <param name="File">Its name in the folder.</param>
/// <param name="State">The verdict.</param>
/// <param name="Message">The verdict in words, with the remedy if it is broken.</param>
/// <param name="Bytes">Its size; 0 if it is missing.</param>
/// <param name="Records">Number of whole records of a file that has a plausible size; else 0.</param>
/// <param name="Sha256">Checksum, if the file has a plausible size.</param>
public sealed record FileReport(string File, FileState State, string Message, long Bytes, int Records, string? Sha256);

/// <summary>The class balance of a part of the data set, over its readable files.</summary>
/// <param name="Part">"train" or "test".</param>
/// <param name="Records">Number of records with valid labels.</param>
/// <param name="FewestPerClass">Records of the rarest class.</param>
/// <param name="MostPerClass">Records of the most frequent class.</param>
public sealed record BalanceReport(string Part, int Records, int FewestPerClass, int MostPerClass);

/// <summary>The findings about a data set's folder.</summary>
public sealed record DataReport(
    string DataSet, string Folder, IReadOnlyList<FileReport> Files, IReadOnlyList<BalanceReport> Balance)
{
    /// <summary>The worst state of any file.</summary>
    public FileState State => Files.Max(file => file.State);
}

/// <summary>Reads all files of a data set and compares them with the official ones.</summary>
public static class DataVerifier
{
    private const int RecordsPerRead = 256;

    /// <summary>Verifies a data set in a folder or below it, as the loaders find it.</summary>
    /// <param name="layout">The data set.</param>
    /// <param name="dataFolder">The folder of the files or a parent of it; null: see <see cref="DataFolder.Default"/>.</param>
    /// <exception cref="UserException">There is none of its files.</exception>
    public static DataReport Verify(CifarLayout layout, string? dataFolder = null) =>
        VerifyFolder(layout, Path.GetFullPath(DataFolder.Find(layout, dataFolder)));

    /// <summary>Verifies the files of exactly this folder.</summary>
    public static DataReport VerifyFolder(CifarLayout layout, string folder)
    {
        int[][] counts = [new int[layout.Classes], new int[layout.Classes]];
        var files = layout.Files.Select(file => VerifyFile(layout, folder, file, counts[(int)file.Part])).ToArray();
        return new DataReport(layout.Name, folder, files,
            [.. counts.Select((classes, part) =>
                new BalanceReport(part == (int)DataPart.Train ? "train" : "test", classes.Sum(), classes.Min(), classes.Max()))]);
    }

    private static FileReport VerifyFile(CifarLayout layout, string folder, CifarFile file, int[] classCounts)
    {
        var path = Path.Combine(folder, file.Name);
        var info = new FileInfo(path);
        var bytes = info.Exists ? info.Length : 0;
        try
        {
            var records = layout.CountRecords(folder, file);
            using var stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 0, FileOptions.SequentialScan);
            using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
            var buffer = new byte[RecordsPerRead * layout.RecordBytes];
            string? problem = null;
            for (var done = 0; done < records; done += RecordsPerRead)
            {
                var count = Math.Min(RecordsPerRead, records - done);
                var span = buffer.AsSpan(0, count * layout.RecordBytes);
                stream.ReadExactly(span);
                hash.AppendData(span);
                for (var i = 0; i < count; i++)
                {
                    var labels = span.Slice(i * layout.RecordBytes, layout.LabelBytes);
                    var wrong = WrongLabel(layout, labels);
                    if (wrong < 0)
                        classCounts[labels[^1]]++;
                    else
                        problem ??= $"record {done + i} has label {labels[wrong]} in byte {wrong}, but only "
                            + $"0..{layout.LabelClasses[wrong] - 1} is possible; fetch it again with 'perturbnas data fetch {layout.Name}'";
                }
            }
            var sha256 = Convert.ToHexStringLower(hash.GetHashAndReset());
            var (state, message) =
                problem is not null ? (FileState.Broken, problem)
                : sha256 == file.Sha256 ? (FileState.Ok, "the official file")
                : records < file.Records ? (FileState.Differs, $"has {records} of the {file.Records} records of the official file")
                : (FileState.Differs, "has valid records, but not the bytes of the official file");
            return new FileReport(file.Name, state, message, bytes, records, sha256);
        }
        catch (UserException e)
        {
            return new FileReport(file.Name, FileState.Broken, e.Message.TrimEnd('.'), bytes, 0, null);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return new FileReport(
                file.Name, FileState.Broken, $"cannot be read: {e.Message.TrimEnd('.')}; check its permissions", bytes, 0, null);
        }
    }

    /// <summary>Index of the first label byte that is out of range, or -1.</summary>
    private static int WrongLabel(CifarLayout layout, ReadOnlySpan<byte> labels)
    {
        for (var i = 0; i < labels.Length; i++)
            if (labels[i] >= layout.LabelClasses[i])
                return i;
        return -1;
    }
}
