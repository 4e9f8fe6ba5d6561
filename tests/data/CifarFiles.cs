using PerturbNas.Data;
using Xunit;

namespace PerturbNas.Tests.Data;

/// <summary>Small made-up CIFAR files whose every byte can be computed.</summary>
internal static class CifarFiles
{
    /// <summary>Label of a made-up record.</summary>
    public static int Label(CifarLayout layout, int record) => record * 7 % layout.Classes;

    /// <summary>Pixel byte of a made-up record, at its position in [3, 32, 32].</summary>
    public static byte Pixel(int record, int position) => (byte)(record * 31 + position * 5 + position / 256);

    /// <summary>Writes a record at the stream's position.</summary>
    public static void WriteRecord(Stream stream, CifarLayout layout, int record, int? label = null, int coarseLabel = 3)
    {
        var bytes = new byte[layout.RecordBytes];
        bytes[0] = (byte)coarseLabel;
        bytes[layout.LabelBytes - 1] = (byte)(label ?? Label(layout, record));
        for (var i = 0; i < CifarLayout.PixelBytes; i++)
            bytes[layout.LabelBytes + i] = Pixel(record, i);
        stream.Write(bytes);
    }

    /// <summary>A CIFAR-100 folder with the given numbers of records; test records continue the numbering.</summary>
    public static void WriteCifar100(string folder, int train, int test)
    {
        Directory.CreateDirectory(folder);
        using (var stream = File.Create(Path.Combine(folder, "train.bin")))
            for (var i = 0; i < train; i++)
                WriteRecord(stream, CifarLayout.Cifar100, i);
        using (var stream = File.Create(Path.Combine(folder, "test.bin")))
            for (var i = 0; i < test; i++)
                WriteRecord(stream, CifarLayout.Cifar100, train + i);
    }

    /// <summary>
    /// A CIFAR-10 folder of full size, sparse: only the first and the last two records of every file are written, numbered as in the
    /// whole data set (test from 50,000); the others are zero.
    /// </summary>
    public static void WriteCifar10(string folder)
    {
        Directory.CreateDirectory(folder);
        var layout = CifarLayout.Cifar10;
        for (var file = 0; file < 6; file++)
        {
            using var stream = File.Create(Path.Combine(folder, layout.Files[file].Name));
            stream.SetLength(10_000L * layout.RecordBytes);
            foreach (var record in (ReadOnlySpan<int>)[0, 1, 9998, 9999])
            {
                stream.Position = (long)record * layout.RecordBytes;
                WriteRecord(stream, layout, file * 10_000 + record);
            }
        }
    }

    /// <summary>Asserts that image <paramref name="index"/> of a set is the made-up record of that number.</summary>
    public static void AssertRecord(ImageSet images, int index, CifarLayout layout, int record)
    {
        Assert.Equal(Label(layout, record), images.Labels[index]);
        for (var i = 0; i < CifarLayout.PixelBytes; i++)
            Assert.Equal(Pixel(record, i), images.Pixels[index * CifarLayout.PixelBytes + i]);
    }
}
