using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text.Encodings.Web;
using System.Text.Json;

namespace PerturbNas.Training;

/// <summary>The element types that a <see cref="SafeTensorsFile"/> holds, by their names in the file.</summary>
public enum TensorType
{
    F32,
    F64,
    I64,
    U8,
}

/// <summary>A named tensor of a file.</summary>
/// <param name="Name">Its name, unique in the file.</param>
/// <param name="Type">The type of its elements.</param>
/// <param name="Shape">Its extents, outermost first; empty for a scalar.</param>
/// <param name="Bytes">Its elements, row major, little-endian.</param>
public sealed record SafeTensor(string Name, TensorType Type, IReadOnlyList<long> Shape, byte[] Bytes);

/// <summary>
/// A safetensors file (https://github.com/huggingface/safetensors, "Format"): 8 bytes of header length, a JSON header with each tensor's
/// type, shape and place, then the tensors' bytes. What <see cref="Write"/> writes depends only on the contents, replaces an earlier
/// file in one step, and carries a checksum of the data, which <see cref="Read"/> verifies; files of other programs have none and are
/// read as well.
/// </summary>
public sealed class SafeTensorsFile
{
    private const string MetadataKey = "__metadata__";
    private const string FormatKey = "format";
    private const string FormatFamily = "perturbnas-";
    private const string Format = FormatFamily + "1";
    private const string ChecksumKey = "sha256";

    // The format's own limit.
    private const int MaxHeaderBytes = 100_000_000;

    private readonly SortedDictionary<string, SafeTensor> _tensors = new(StringComparer.Ordinal);

    private string _path = "(not yet written)";

    /// <summary>Free text by key; "format" and "sha256" are set by <see cref="Write"/>.</summary>
    public IDictionary<string, string> Metadata { get; } = new SortedDictionary<string, string>(StringComparer.Ordinal);

    /// <summary>All tensors, ordered by name.</summary>
    public IReadOnlyCollection<SafeTensor> Tensors => _tensors.Values;

    public bool Contains(string name) => _tensors.ContainsKey(name);

    /// <summary>Adds a copy of the values under a name that the file does not have yet.</summary>
    /// <exception cref="ArgumentException">The name is taken, or the shape does not hold the values.</exception>
    public void Add(string name, ReadOnlySpan<long> shape, ReadOnlySpan<float> values) =>
        Add(name, TensorType.F32, shape, MemoryMarshal.AsBytes(values));

    /// <inheritdoc cref="Add(string, ReadOnlySpan{long}, ReadOnlySpan{float})"/>
    public void Add(string name, ReadOnlySpan<long> shape, ReadOnlySpan<double> values) =>
        Add(name, TensorType.F64, shape, MemoryMarshal.AsBytes(values));

    /// <inheritdoc cref="Add(string, ReadOnlySpan{long}, ReadOnlySpan{float})"/>
    public void Add(string name, ReadOnlySpan<long> shape, ReadOnlySpan<long> values) =>
        Add(name, TensorType.I64, shape, MemoryMarshal.AsBytes(values));

    /// <inheritdoc cref="Add(string, ReadOnlySpan{long}, ReadOnlySpan{float})"/>
    public void Add(string name, ReadOnlySpan<long> shape, ReadOnlySpan<byte> values) => Add(name, TensorType.U8, shape, values);

    /// <summary>The values of an F32 tensor, which must have the given shape.</summary>
    /// <exception cref="UserException">The file has no such tensor, or it has another type or shape.</exception>
    public ReadOnlySpan<float> Float32(string name, params ReadOnlySpan<long> shape) =>
        MemoryMarshal.Cast<byte, float>(Bytes(name, TensorType.F32, shape));

    /// <summary>The values of an F64 tensor, which must have the given shape.</summary>
    /// <inheritdoc cref="Float32" path="/exception"/>
    public ReadOnlySpan<double> Float64(string name, params ReadOnlySpan<long> shape) =>
        MemoryMarshal.Cast<byte, double>(Bytes(name, TensorType.F64, shape));

    /// <summary>The values of an I64 tensor, which must have the given shape.</summary>
    /// <inheritdoc cref="Float32" path="/exception"/>
    public ReadOnlySpan<long> Int64(string name, params ReadOnlySpan<long> shape) =>
        MemoryMarshal.Cast<byte, long>(Bytes(name, TensorType.I64, shape));

    /// <summary>The values of a U8 tensor, which must have the given shape.</summary>
    /// <inheritdoc cref="Float32" path="/exception"/>
    public ReadOnlySpan<byte> UInt8(string name, params ReadOnlySpan<long> shape) => Bytes(name, TensorType.U8, shape);

    /// <summary>
    /// Writes the file: all bytes go to "PATH.tmp" and to the disk before that replaces PATH, so that a crash or a full disk leaves
    /// the earlier file as it was.
    /// </summary>
    /// <exception cref="UserException">The file cannot be written.</exception>
    public void Write(string path)
    {
        path = Path.GetFullPath(path);
        var temporary = path + ".tmp";

        // Wide elements first, so that every tensor is aligned in the file.
        var ordered = _tensors.Values
            .OrderByDescending(tensor => ElementSize(tensor.Type))
            .ThenBy(tensor => tensor.Name, StringComparer.Ordinal)
            .ToArray();
        using var checksum = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        foreach (var tensor in ordered)
            checksum.AppendData(tensor.Bytes);
        Metadata[FormatKey] = Format;
        Metadata[ChecksumKey] = Convert.ToHexStringLower(checksum.GetHashAndReset());
        var header = Header(ordered);
        var length = new byte[8];
        BinaryPrimitives.WriteInt64LittleEndian(length, header.Length);
        try
        {
            try
            {
                using (var stream = new FileStream(temporary, FileMode.Create, FileAccess.Write, FileShare.None, 1 << 16))
                {
                    stream.Write(length);
                    stream.Write(header);
                    foreach (var tensor in ordered)
                        stream.Write(tensor.Bytes);
                    stream.Flush(true);
                }
                File.Move(temporary, path, true);
            }
            catch
            {
                File.Delete(temporary);
                throw;
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException(
                $"'{path}' cannot be written: {e.Message.TrimEnd('.')}; check that the folder exists, is writable and has space "
                + "(an earlier file of that name is unchanged).", e);
        }
        _path = path;
    }

    /// <summary>Reads a file and checks all that can be checked: header, places, sizes, and the checksum if there is one.</summary>
    /// <exception cref="UserException">The file is missing, damaged, or has tensors of a type that is not supported.</exception>
    public static SafeTensorsFile Read(string path)
    {
        path = Path.GetFullPath(path);
        try
        {
            using var stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 1 << 16, FileOptions.SequentialScan);
            return Parse(path, stream);
        }
        catch (Exception e) when (e is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new UserException($"'{path}' does not exist; check the path.", e);
        }
        catch (EndOfStreamException e)
        {
            throw Damaged(path, "it became shorter while it was read", e);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException($"'{path}' cannot be read: {e.Message.TrimEnd('.')}; check the file and its permissions.", e);
        }
    }

    private static SafeTensorsFile Parse(string path, FileStream stream)
    {
        Span<byte> lengthBytes = stackalloc byte[8];
        if (stream.Length < lengthBytes.Length)
            throw Damaged(path, $"it has only {stream.Length} bytes");
        stream.ReadExactly(lengthBytes);
        var headerLength = BinaryPrimitives.ReadUInt64LittleEndian(lengthBytes);
        if (headerLength > MaxHeaderBytes || headerLength > (ulong)(stream.Length - lengthBytes.Length))
            throw Damaged(path, $"its header should have {headerLength} bytes, but the file has {stream.Length}");
        var header = new byte[headerLength];
        stream.ReadExactly(header);

        var file = new SafeTensorsFile { _path = path };
        var entries = Entries(path, header, file.Metadata);

        // Only our own files say what their "sha256" is of.
        file.Metadata.TryGetValue(FormatKey, out var format);
        string? expected = null;
        if (format == Format)
            file.Metadata.TryGetValue(ChecksumKey, out expected);
        else if (format is not null && format.StartsWith(FormatFamily, StringComparison.Ordinal))
            throw new UserException($"'{path}' has format '{format}', but this version reads '{Format}'; use the version that wrote it.");

        var dataLength = stream.Length - stream.Position;
        long end = 0;
        foreach (var entry in entries)
        {
            if (entry.Begin != end)
                throw Damaged(path, $"tensor '{entry.Name}' begins at byte {entry.Begin} of the data instead of {end}");
            end = entry.End;
            if (end > dataLength)
                throw Damaged(path, $"it is truncated: tensor '{entry.Name}' ends at byte {end} of the data, which has {dataLength}");
        }
        if (end != dataLength)
            throw Damaged(path, $"it has {dataLength - end} bytes after the last tensor");

        using var checksum = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        foreach (var entry in entries)
        {
            var bytes = GC.AllocateUninitializedArray<byte>((int)(entry.End - entry.Begin));
            stream.ReadExactly(bytes);
            if (expected is not null)
                checksum.AppendData(bytes);
            file._tensors.Add(entry.Name, new SafeTensor(entry.Name, entry.Type, entry.Shape, bytes));
        }
        if (expected is not null)
        {
            var actual = Convert.ToHexStringLower(checksum.GetHashAndReset());
            if (actual != expected)
                throw Damaged(path, $"its data has SHA-256 {actual} instead of {expected}");
        }
        return file;
    }

    private static List<Entry> Entries(string path, byte[] header, IDictionary<string, string> metadata)
    {
        var entries = new List<Entry>();
        try
        {
            using var document = JsonDocument.Parse(header, new JsonDocumentOptions { AllowDuplicateProperties = false });
            if (document.RootElement.ValueKind != JsonValueKind.Object)
                throw Damaged(path, "its header is not a JSON object");
            foreach (var property in document.RootElement.EnumerateObject())
            {
                if (property.Name != MetadataKey)
                {
                    entries.Add(ParseEntry(path, property));
                    continue;
                }
                if (property.Value.ValueKind != JsonValueKind.Object)
                    throw Damaged(path, $"its {MetadataKey} is not a JSON object");
                foreach (var item in property.Value.EnumerateObject())
                    metadata[item.Name] = item.Value.ValueKind == JsonValueKind.String
                        ? item.Value.GetString()!
                        : throw Damaged(path, $"'{item.Name}' in its {MetadataKey} is not a string");
            }
        }
        catch (JsonException e)
        {
            throw Damaged(path, $"its header is not valid JSON ({e.Message.TrimEnd('.')})", e);
        }
        entries.Sort((a, b) => (a.Begin, a.End).CompareTo((b.Begin, b.End)));
        return entries;
    }

    private static Entry ParseEntry(string path, JsonProperty property)
    {
        var name = property.Name;
        if (property.Value.ValueKind != JsonValueKind.Object
            || !property.Value.TryGetProperty("dtype", out var dtype) || dtype.ValueKind != JsonValueKind.String
            || !property.Value.TryGetProperty("shape", out var shapeValue) || Numbers(shapeValue) is not { } shape
            || !property.Value.TryGetProperty("data_offsets", out var offsetsValue) || Numbers(offsetsValue) is not [var begin, var end]
            || end < begin)
            throw Damaged(path, $"the header's entry of tensor '{name}' is not a type, a shape and two ordered offsets");
        if (!Enum.TryParse<TensorType>(dtype.GetString(), out var type) || !Enum.IsDefined(type) || type.ToString() != dtype.GetString())
            throw new UserException(
                $"Tensor '{name}' of '{path}' has type {dtype.GetString()}, but only {string.Join(", ", Enum.GetNames<TensorType>())} "
                + "are read; convert it in the program that wrote it.");
        var bytes = ByteCount(type, shape);
        if (bytes is null || bytes != end - begin)
            throw Damaged(path, $"tensor '{name}' of type {type} and shape [{Text(shape)}] does not fill its {end - begin} bytes");
        if (bytes > Array.MaxLength)
            throw new UserException($"Tensor '{name}' of '{path}' has {bytes} bytes, but at most {Array.MaxLength} are read; split it.");
        return new Entry(name, type, shape, begin, end);
    }

    private static long[]? Numbers(JsonElement value)
    {
        if (value.ValueKind != JsonValueKind.Array)
            return null;
        var numbers = new long[value.GetArrayLength()];
        for (var i = 0; i < numbers.Length; i++)
            if (value[i].ValueKind != JsonValueKind.Number || !value[i].TryGetInt64(out numbers[i]) || numbers[i] < 0)
                return null;
        return numbers;
    }

    private byte[] Header(IReadOnlyList<SafeTensor> ordered)
    {
        using var buffer = new MemoryStream();
        using (var json = new Utf8JsonWriter(buffer, new JsonWriterOptions { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping }))
        {
            json.WriteStartObject();
            json.WriteStartObject(MetadataKey);
            foreach (var (key, value) in Metadata)
                json.WriteString(key, value);
            json.WriteEndObject();
            long offset = 0;
            foreach (var tensor in ordered)
            {
                json.WriteStartObject(tensor.Name);
                json.WriteString("dtype", tensor.Type.ToString());
                json.WriteStartArray("shape");
                foreach (var extent in tensor.Shape)
                    json.WriteNumberValue(extent);
                json.WriteEndArray();
                json.WriteStartArray("data_offsets");
                json.WriteNumberValue(offset);
                json.WriteNumberValue(offset += tensor.Bytes.Length);
                json.WriteEndArray();
                json.WriteEndObject();
            }
            json.WriteEndObject();
        }

        // The data begins at a multiple of 8 bytes.
        while (buffer.Length % 8 != 0)
            buffer.WriteByte((byte)' ');
        return buffer.ToArray();
    }

    private void Add(string name, TensorType type, ReadOnlySpan<long> shape, ReadOnlySpan<byte> bytes)
    {
        var extents = shape.ToArray();
        if (extents.Any(extent => extent < 0) || ByteCount(type, extents) != bytes.Length)
            throw new ArgumentException(
                $"Tensor '{name}' of shape [{Text(extents)}] does not hold {bytes.Length / ElementSize(type)} values.");
        if (name == MetadataKey)
            throw new ArgumentException($"'{MetadataKey}' cannot name a tensor.");
        _tensors.Add(name, new SafeTensor(name, type, extents, bytes.ToArray()));
    }

    private byte[] Bytes(string name, TensorType type, ReadOnlySpan<long> shape)
    {
        const string remedy = "give a file that was written for this network and these settings";
        if (!_tensors.TryGetValue(name, out var tensor))
            throw new UserException($"'{_path}' has no tensor '{name}'; {remedy}.");
        if (tensor.Type != type || !shape.SequenceEqual(tensor.Shape.ToArray()))
            throw new UserException(
                $"Tensor '{name}' of '{_path}' is {tensor.Type} [{Text(tensor.Shape)}], but {type} [{Text(shape.ToArray())}] is needed; "
                + $"{remedy}.");
        return tensor.Bytes;
    }

    private static int ElementSize(TensorType type) => type switch
    {
        TensorType.F64 or TensorType.I64 => 8,
        TensorType.F32 => 4,
        _ => 1,
    };

    /// <summary>Bytes of a tensor, or null if there are more than 2^63.</summary>
    private static long? ByteCount(TensorType type, long[] shape)
    {
        Int128 bytes = ElementSize(type);
        foreach (var extent in shape)
        {
            bytes *= extent;
            if (bytes > long.MaxValue)
                return null;
        }
        return (long)bytes;
    }

    private static string Text(IEnumerable<long> shape) => string.Join(", ", shape);

    private static UserException Damaged(string path, string what, Exception? cause = null) =>
        new($"'{path}' is damaged or not a safetensors file: {what}; use another copy or an earlier checkpoint.", cause);

    private sealed record Entry(string Name, TensorType Type, long[] Shape, long Begin, long End);
}
