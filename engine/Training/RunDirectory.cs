using System.Text;
using System.Text.Json;

namespace PerturbNas.Training;

/// <summary>
/// A folder that holds everything about a run: config.json, metrics.jsonl, checkpoints/. It is locked while a process uses it. Files that
/// grow line by line are cut back, on resuming, to the length that the checkpoint knows of, so that a killed run leaves no line twice.
/// </summary>
public sealed class RunDirectory : IDisposable
{
    private readonly FileStream _lock;

    private RunDirectory(string path, FileStream @lock) => (Path, _lock) = (path, @lock);

    public static JsonSerializerOptions Json { get; } = new()
    {
        PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower,
        Converters = { new System.Text.Json.Serialization.JsonStringEnumConverter(JsonNamingPolicy.SnakeCaseLower) },
        Encoder = System.Text.Encodings.Web.JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    private static JsonSerializerOptions Indented { get; } = new(Json) { WriteIndented = true };

    public string Path { get; }

    /// <summary>Whether the folder holds a run.</summary>
    public static bool Exists(string path) => File.Exists(System.IO.Path.Combine(path, "config.json"));

    /// <summary>Opens a run's folder, creating it if it is not there, and locks it.</summary>
    /// <exception cref="UserException">Another process uses it, or it cannot be created.</exception>
    public static RunDirectory Open(string path)
    {
        try
        {
            Directory.CreateDirectory(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException($"The run folder '{path}' cannot be created: {e.Message.TrimEnd('.')}; choose another one.", e);
        }
        try
        {
            return new RunDirectory(path, new FileStream(System.IO.Path.Combine(path, "lock"), FileMode.OpenOrCreate, FileAccess.ReadWrite,
                FileShare.None));
        }
        catch (IOException e)
        {
            throw new UserException($"The run folder '{path}' is in use by another process; wait for it, or choose another folder.", e);
        }
        catch (UnauthorizedAccessException e)
        {
            throw new UserException($"The run folder '{path}' cannot be written to; choose another one or change its permissions.", e);
        }
    }

    public string PathOf(params ReadOnlySpan<string> parts) => System.IO.Path.Combine([Path, .. parts]);

    /// <summary>Path of a checkpoint; makes its folder.</summary>
    public string CheckpointPath(string name)
    {
        Directory.CreateDirectory(PathOf("checkpoints"));
        return PathOf("checkpoints", name + ".safetensors");
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
            throw new UserException($"'{PathOf(name)}' cannot be written: {e.Message.TrimEnd('.')}; make room or fix the permissions, then resume.", e);
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
        catch (IOException e)
        {
            throw new UserException($"'{Path}' is not a run folder: {name} cannot be read ({e.Message.TrimEnd('.')}); give the folder that " +
                "'search --out' made.", e);
        }
        catch (JsonException e)
        {
            throw new UserException($"'{PathOf(name)}' is damaged: {e.Message.TrimEnd('.')}; restore it or start a new run.", e);
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
            throw new UserException($"'{PathOf(name)}' is damaged: {e.Message.TrimEnd('.')}; restore it or start anew.", e);
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
            throw new UserException($"'{PathOf(name)}' cannot be written: {e.Message.TrimEnd('.')}; make room or fix the permissions, then resume.", e);
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
        if (!file.Exists)
            return;
        using var stream = file.OpenWrite();
        stream.SetLength(length);
    }

    public void Dispose() => _lock.Dispose();
}
