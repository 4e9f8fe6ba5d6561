using PerturbNas.Data;
using Xunit;

namespace PerturbNas.Tests.Data;

public sealed class CifarSourceTests
{
    [Fact]
    public void Reads_all_records_with_the_fine_label()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder.Path, 300, 7);
        var source = ImageSource.Open("cifar100", folder.Path);
        Assert.Equal(300, source.Count(DataPart.Train));
        var train = source.Read(DataPart.Train);
        Assert.Equal((300, 100, 32, 32, 0), (train.Count, train.Classes, train.Height, train.Width, train.FirstRecord));
        for (var i = 0; i < 300; i++)
            CifarFiles.AssertRecord(train, i, CifarLayout.Cifar100, i);
        var test = source.Read(DataPart.Test, 3);
        Assert.Equal(3, test.Count);
        CifarFiles.AssertRecord(test, 2, CifarLayout.Cifar100, 302);
    }

    [Fact]
    public void Reads_the_five_training_files_in_order()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar10(folder.Path);
        var source = ImageSource.Open("cifar10", folder.Path);
        var train = source.Read(DataPart.Train);
        Assert.Equal(50_000, train.Count);
        for (var file = 0; file < 5; file++)
            foreach (var record in (int[])[0, 1, 9998, 9999])
                CifarFiles.AssertRecord(train, file * 10_000 + record, CifarLayout.Cifar10, file * 10_000 + record);
        CifarFiles.AssertRecord(source.Read(DataPart.Test), 9999, CifarLayout.Cifar10, 59_999);
    }

    [Fact]
    public void Splits_in_file_order_and_limits_each_half()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar10(folder.Path);
        var source = ImageSource.Open("cifar10", folder.Path);
        var (train, validation) = source.ReadSearchSplit(0.2, 2, 3);
        Assert.Equal((2, 0), (train.Count, train.FirstRecord));
        Assert.Equal((3, 10_000), (validation.Count, validation.FirstRecord));
        CifarFiles.AssertRecord(train, 1, CifarLayout.Cifar10, 1);
        CifarFiles.AssertRecord(validation, 1, CifarLayout.Cifar10, 10_001);

        // A read that crosses from one file into the next.
        var (all, rest) = source.ReadSearchSplit(0.39998);
        Assert.Equal((19_999, 30_001), (all.Count, rest.Count));
        CifarFiles.AssertRecord(rest, 0, CifarLayout.Cifar10, 19_999);
        CifarFiles.AssertRecord(rest, 1, CifarLayout.Cifar10, 20_000);
        CifarFiles.AssertRecord(rest, 30_000, CifarLayout.Cifar10, 49_999);
    }

    [Fact]
    public void Halves_an_odd_number_of_records_rounding_the_first_half_down()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder.Path, 5, 1);
        var (train, validation) = ImageSource.Open("cifar100", folder.Path).ReadSearchSplit();
        Assert.Equal((2, 3), (train.Count, validation.Count));
        CifarFiles.AssertRecord(validation, 0, CifarLayout.Cifar100, 2);
    }

    [Theory]
    [InlineData("cifar-100-binary")]
    [InlineData("cifar-100/cifar-100-binary")]
    [InlineData("cifar-100/cifar-100-binary-subset")]
    [InlineData("cifar-100")]
    [InlineData("")]
    public void Finds_the_files_in_the_folder_or_below(string below)
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder[below], 2, 1);
        Assert.Equal(2, ImageSource.Open("cifar100", folder.Path).Count(DataPart.Train));
    }

    [Fact]
    public void Prefers_the_complete_set_to_a_subset()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder["cifar-100/cifar-100-binary-subset"], 2, 1);
        CifarFiles.WriteCifar100(folder["cifar-100/cifar-100-binary"], 3, 1);
        Assert.Equal(3, ImageSource.Open("cifar100", folder.Path).Count(DataPart.Train));
    }

    [Fact]
    public void Says_which_folder_is_missing_or_empty()
    {
        using var folder = new TemporaryFolder();
        Says(() => ImageSource.Open("cifar10", folder["nowhere"]), $"'{folder["nowhere"]}' does not exist", "--data-dir", "data fetch cifar10");
        Says(() => ImageSource.Open("cifar10", folder.Path), $"'{folder.Path}' has no cifar10 files", "data_batch_1.bin", "--data-dir");
        Says(() => ImageSource.Open("mnist", folder.Path), "'mnist'", "cifar10, cifar100, synthetic");
    }

    [Fact]
    public void Says_which_file_is_missing()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar10(folder.Path);
        File.Delete(folder["data_batch_3.bin"]);
        var source = ImageSource.Open("cifar10", folder.Path);
        Says(() => source.Read(DataPart.Train, 5), folder["data_batch_3.bin"], "missing", "data fetch cifar10");
        Assert.Equal(4, source.Read(DataPart.Test, 4).Count);
    }

    [Theory]
    [InlineData(-1, "truncated: it has 30729999 bytes of 30730000")]
    [InlineData(-3073, "truncated: it has 30726927 bytes of 30730000")]
    [InlineData(1, "has 30730001 bytes, more than the 30730000")]
    public void Refuses_a_cifar10_file_of_another_size(int change, string message)
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar10(folder.Path);
        using (var stream = File.OpenWrite(folder["data_batch_2.bin"]))
            stream.SetLength(30_730_000 + change);
        Says(() => ImageSource.Open("cifar10", folder.Path).Read(DataPart.Train, 1), folder["data_batch_2.bin"], message, "fetch");
    }

    [Theory]
    [InlineData(0, "has 0 bytes, which is not a whole number of records of 3074 bytes")]
    [InlineData(3073, "has 3073 bytes, which is not a whole number of records of 3074 bytes")]
    [InlineData(50_001L * 3074, "has 153703074 bytes, more than the 153700000")]
    public void Refuses_a_cifar100_file_of_an_impossible_size(long size, string message)
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder.Path, 2, 1);
        using (var stream = File.OpenWrite(folder["train.bin"]))
            stream.SetLength(size);
        Says(() => ImageSource.Open("cifar100", folder.Path).Read(DataPart.Train), folder["train.bin"], message, "fetch");
    }

    [Fact]
    public void Names_the_record_with_a_label_out_of_range()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder.Path, 600, 1);
        using (var stream = File.OpenWrite(folder["train.bin"]))
        {
            stream.Position = 517L * 3074;
            CifarFiles.WriteRecord(stream, CifarLayout.Cifar100, 517, 100);
        }
        var source = ImageSource.Open("cifar100", folder.Path);
        Says(() => source.Read(DataPart.Train), "Record 517 of", folder["train.bin"], "label 100", "0..99", "fetch");
        Assert.Equal(517, source.Read(DataPart.Train, 517).Count);
    }

    [Fact]
    public void Refuses_limits_and_portions_that_the_data_does_not_have()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder.Path, 10, 4);
        var source = ImageSource.Open("cifar100", folder.Path);
        Says(() => source.Read(DataPart.Test, 5), "limit of 5 test records", "more than the 4", "at most 4", folder.Path);
        Says(() => source.Read(DataPart.Train, 0), "limit of 0 training records", "at least 1");
        Says(() => source.ReadSearchSplit(0.3, 4), "limit of 4 training (weights) records", "at most 3");
        Says(() => source.ReadSearchSplit(0.3, null, 8), "limit of 8 validation (alpha) records", "at most 7");
        Says(() => source.ReadSearchSplit(1), "train portion 1 is not between 0 and 1");
        Says(() => source.ReadSearchSplit(double.NaN), "train portion NaN");
        Says(() => source.ReadSearchSplit(0.05), "train portion 0.05 of the 10 training records", "one part empty");
    }

    [RealFilesFact("cifar10")]
    public void Real_cifar10_has_the_known_statistics()
    {
        var source = ImageSource.Open("cifar10");
        var train = source.Read(DataPart.Train);
        Assert.Equal((50_000, 10_000), (train.Count, source.Count(DataPart.Test)));

        // The first labels of data_batch_1 (frog, truck, truck, deer, automobile) and of the test batch (cat, ship, ship, airplane).
        Assert.Equal([6, 9, 9, 4, 1], train.Labels[..5]);
        Assert.Equal([3, 8, 8, 0], source.Read(DataPart.Test, 4).Labels);
        Assert.All(train.Labels.CountBy(label => label), count => Assert.Equal(5000, count.Value));
        for (var channel = 0; channel < 3; channel++)
        {
            long sum = 0, squares = 0;
            for (var image = 0; image < train.Count; image++)
                foreach (var value in train.Pixels.AsSpan(image * 3072 + channel * 1024, 1024))
                {
                    sum += value;
                    squares += value * value;
                }
            var mean = sum / (train.Count * 1024.0 * 255);
            Assert.Equal(train.Mean[channel], mean, 6);
            Assert.Equal(train.Std[channel], Math.Sqrt(squares / (train.Count * 1024.0 * 255 * 255) - mean * mean), 6);
        }
    }

    [RealFilesFact("cifar100")]
    public void Real_cifar100_reads_whatever_its_number_of_records()
    {
        var source = ImageSource.Open("cifar100");
        var test = source.Read(DataPart.Test);
        Assert.Equal(source.Count(DataPart.Test), test.Count);

        // Both the official file and the class-balanced subset have the same number of test images of every class.
        var counts = test.Labels.CountBy(label => label).ToDictionary();
        Assert.Equal(100, counts.Count);
        Assert.All(counts.Values, count => Assert.Equal(test.Count / 100, count));
    }

    private static void Says(Action action, params string[] parts)
    {
        var message = Assert.Throws<UserException>(action).Message;
        Assert.All(parts, part => Assert.Contains(part, message));
        Assert.EndsWith(".", message);
    }
}
