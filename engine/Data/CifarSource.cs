using Microsoft.Win32.SafeHandles;

namespace PerturbNas.Data;

/// <summary>CIFAR-10 or CIFAR-100 from the official binary files (see <see cref="CifarLayout"/>).</summary>
public sealed class CifarSource : ImageSource
{
    private const int RecordsPerRead = 256;

    private readonly CifarLayout _layout;
    private readonly string _folder;

    /// <param name="layout">Which of the two.</param>
    /// <param name="dataFolder">The folder of the files or a parent of it; null: see <see cref="DataFolder.Default"/>.</param>
    /// <exception cref="UserException">The files are not there.</exception>
    public CifarSource(CifarLayout layout, string? dataFolder = null)
    {
        _layout = layout;
        _folder = DataFolder.Find(layout, dataFolder);
    }

    public override string Name => _layout.Name;

    public override int Classes => _layout.Classes;

    public override int Height => CifarLayout.Size;

    public override int Width => CifarLayout.Size;

    public override IReadOnlyList<float> Mean => _layout.Mean;

    public override IReadOnlyList<float> Std => _layout.Std;

    public override string Location => $"{Name} in '{_folder}'";

    public override int Count(DataPart part) =>
        _layout.Files.Where(file => file.Part == part).Sum(file => _layout.CountRecords(_folder, file));

    protected override void ReadRecords(DataPart part, int first, byte[] pixels, int[] labels)
    {
        var done = 0;
        foreach (var file in _layout.Files.Where(file => file.Part == part))
        {
            var count = _layout.CountRecords(_folder, file);
            var from = first + done;
            if (from < count && done < labels.Length)
            {
                var take = Math.Min(count - from, labels.Length - done);
                ReadFile(file, from, pixels.AsSpan(done * CifarLayout.PixelBytes), labels.AsSpan(done, take));
                done += take;
            }
            first -= count;
        }
    }

    private void ReadFile(CifarFile file, int first, Span<byte> pixels, Span<int> labels)
    {
        var path = Path.Combine(_folder, file.Name);
        var buffer = new byte[Math.Min(labels.Length, RecordsPerRead) * _layout.RecordBytes];
        try
        {
            using var handle = File.OpenHandle(path, options: FileOptions.SequentialScan);
            for (var done = 0; done < labels.Length; done += RecordsPerRead)
            {
                var count = Math.Min(RecordsPerRead, labels.Length - done);
                var bytes = buffer.AsSpan(0, count * _layout.RecordBytes);
                ReadExactly(handle, (long)(first + done) * _layout.RecordBytes, bytes);
                for (var i = 0; i < count; i++)
                {
                    var record = bytes.Slice(i * _layout.RecordBytes, _layout.RecordBytes);
                    var label = record[_layout.LabelBytes - 1];
                    if (label >= Classes)
                        throw new UserException(
                            $"Record {first + done + i} of '{path}' has label {label}, but {Name} has labels 0..{Classes - 1}; "
                            + $"fetch the file again with 'perturbnas data fetch {Name}'.");
                    labels[done + i] = label;
                    record[_layout.LabelBytes..].CopyTo(pixels[((done + i) * CifarLayout.PixelBytes)..]);
                }
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException($"'{path}' cannot be read: {e.Message.TrimEnd('.')}; check the file and its permissions.", e);
        }
    }

    private static void ReadExactly(SafeFileHandle handle, long offset, Span<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            var read = RandomAccess.Read(handle, bytes, offset);
            if (read == 0)
                throw new EndOfStreamException("the file became shorter while it was read");
            offset += read;
            bytes = bytes[read..];
        }
    }
}
