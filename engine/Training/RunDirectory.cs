using System.Text;
using System.Text.Json;

namespace PerturbNas.Training;

/// <summary>
/// A folder that holds everything about a run: config.json, metrics.jsonl, checkpoints/. It is locked while a process uses it. Files that
/// grow line by line are cut back, on resuming, to the length that the checkpoint knows of, so that a killed run leaves no line twice.
/// config.json is written last when a run is created: without it there is no run, and what was begun is removed again.
/// </summary>
public sealed class RunDirectory : IDisposable
{
    private const string ConfigurationFile = "config.json", LockFile = "lock", CheckpointFolder = "checkpoints";

    // What an open file's lock gives, on every Unix that .NET runs on.
    private static readonly int[] _wouldBlock = [11, 35];

    private readonly FileStream _lock;
    private readonly IReadOnlyList<string> _newFolders;

    private RunDirectory(string path, FileStream @lock, IReadOnlyList<string> newFolders) =>
        (Path, _lock, _newFolders) = (path, @lock, newFolders);

    public static JsonSerializerOptions Json { get; } = new()
    {
        PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower,
        Converters = { new System.Text.Json.Serialization.JsonStringEnumConverter(JsonNamingPolicy.SnakeCaseLower) },
        Encoder = System.Text.Encodings.Web.JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    private static JsonSerializerOptions Indented { get; } = new(Json) { WriteIndented = true };

    public string Path { get; }

    /// <summary>Whether the folder holds a run.</summary>
    public static bool Exists(string path) => File.Exists(System.IO.Path.Combine(path, ConfigurationFile));

    /// <summary>Locks the folder of a run that is there.</summary>
    /// <exception cref="UserException">It holds no run, or another process uses it.</exception>
    public static RunDirectory OpenExisting(string path)
    {
        if (!Directory.Exists(path))
            throw new UserException($"The run folder '{path}' does not exist; give the folder that 'search --out' made.");
        if (!Exists(path))
            throw new UserException($"'{path}' is not a run folder, it has no {ConfigurationFile}; give the folder that 'search --out' made.");
        return Lock(path, []);
    }

    /// <summary>Locks the folder of a run, or of one that is to be; creates it if it is not there.</summary>
    /// <exception cref="UserException">Another process uses it, or it cannot be created.</exception>
    public static RunDirectory Open(string path)
    {
        var newFolders = new List<string>();
        for (var folder = System.IO.Path.GetFullPath(path); folder is not null && !Directory.Exists(folder);
            folder = System.IO.Path.GetDirectoryName(folder))
            newFolders.Add(folder);
        try
        {
            Directory.CreateDirectory(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException($"The run folder '{path}' cannot be created: {e.Message.TrimEnd('.')}; choose another one.", e);
        }
        return Lock(path, newFolders);
    }

    public string PathOf(params ReadOnlySpan<string> parts) => System.IO.Path.Combine([Path, .. parts]);

    /// <summary>Path of a checkpoint; makes its folder.</summary>
    public string CheckpointPath(string name)
    {
        try
        {
            Directory.CreateDirectory(PathOf(CheckpointFolder));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Unwritable(CheckpointFolder, e);
        }
        return PathOf(CheckpointFolder, name + ".safetensors");
    }

    /// <summary>Writes a text file in one piece: it is there whole, or as it was before.</summary>
    public void WriteText(string name, string text)
    {
        var temporary = PathOf(name + ".partial");
        try
        {
            using (var stream = new FileStream(temporary, FileMode.Create, FileAccess.Write, FileShare.None))
            {
                stream.Write(Encoding.UTF8.GetBytes(text));
                stream.Flush(flushToDisk: true);
            }
            File.Move(temporary, PathOf(name), overwrite: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            try
            {
                File.Delete(temporary);
            }
            catch (IOException)
            {
                // The first failure is the one to report.
            }
            throw Unwritable(name, e);
        }
    }

    public void WriteJson<T>(string name, T value) => WriteText(name, JsonSerializer.Serialize(value, Indented) + "\n");

    /// <exception cref="UserException">The file is missing or not what is expected.</exception>
    public T ReadJson<T>(string name)
    {
        try
        {
            return JsonSerializer.Deserialize<T>(File.ReadAllText(PathOf(name)), Json) ?? throw new JsonException("it is empty");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException($"'{PathOf(name)}' cannot be read: {e.Message.TrimEnd('.')}; restore it or start a new run.", e);
        }
        catch (JsonException e)
        {
            throw Damaged(name, e);
        }
    }

    /// <summary>The lines of a file that grows line by line; none where it is not there.</summary>
    public IReadOnlyList<T> ReadLines<T>(string name)
    {
        if (!File.Exists(PathOf(name)))
            return [];
        try
        {
            return [.. File.ReadLines(PathOf(name)).Select(line => JsonSerializer.Deserialize<T>(line, Json)!)];
        }
        catch (JsonException e)
        {
            throw Damaged(name, e);
        }
    }

    /// <summary>Appends one line; returns the file's new length.</summary>
    public long AppendLine<T>(string name, T value)
    {
        try
        {
            using var stream = new FileStream(PathOf(name), FileMode.Append, FileAccess.Write, FileShare.Read);
            stream.Write(Encoding.UTF8.GetBytes(JsonSerializer.Serialize(value, Json) + "\n"));
            stream.Flush(flushToDisk: true);
            return stream.Length;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Unwritable(name, e);
        }
    }

    /// <summary>Cuts a file that grows line by line back to a length that a checkpoint knows of.</summary>
    /// <exception cref="UserException">The file is shorter than that.</exception>
    public void Truncate(string name, long length)
    {
        var file = new FileInfo(PathOf(name));
        if ((file.Exists ? file.Length : 0) < length)
            throw new UserException($"'{file.FullName}' has {(file.Exists ? file.Length : 0)} bytes, but the checkpoint knows of {length}; " +
                "restore the file or start a new run.");
        if (!file.Exists || file.Length == length)
            return;
        try
        {
            using var stream = file.OpenWrite();
            stream.SetLength(length);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Unwritable(name, e);
        }
    }

    /// <summary>Releases the folder; where no run has come about, removes what was begun.</summary>
    public void Dispose()
    {
        try
        {
            if (!Exists(Path))
            {
                File.Delete(PathOf(LockFile));
                foreach (var folder in (string[])[PathOf(CheckpointFolder), .. _newFolders])
                    if (Directory.Exists(folder) && !Directory.EnumerateFileSystemEntries(folder).Any())
                        Directory.Delete(folder);
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // An empty folder that stays does no harm; why there is no run has been said.
        }
        _lock.Dispose();
    }

    private static RunDirectory Lock(string path, IReadOnlyList<string> newFolders)
    {
        try
        {
            return new RunDirectory(path, new FileStream(System.IO.Path.Combine(path, LockFile), FileMode.OpenOrCreate, FileAccess.ReadWrite,
                FileShare.None), newFolders);
        }
        catch (IOException e) when (_wouldBlock.Contains(e.HResult))
        {
            throw new UserException($"The run folder '{path}' is in use by another process; wait for it, or choose another folder.", e);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException($"The run folder '{path}' cannot be written to: {e.Message.TrimEnd('.')}; choose another one, make room or " +
                "change its permissions.", e);
        }
    }

    private UserException Unwritable(string name, Exception e) =>
        new($"'{PathOf(name)}' cannot be written: {e.Message.TrimEnd('.')}; make room or fix the permissions, then resume.", e);

    private UserException Damaged(string name, JsonException e) =>
        new($"'{PathOf(name)}' is damaged in line {e.LineNumber + 1}, byte {e.BytePositionInLine + 1}; restore it or start a new run.", e);
}
