using System.Security.Cryptography;
using System.Text.Json;
using PerturbNas.Data;
using Xunit;

namespace PerturbNas.Tests.Data;

public sealed class DataVerifierTests
{
    [Fact]
    public void Reports_every_file_of_a_subset()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder["cifar-100-binary"], 300, 100);
        var report = DataVerifier.Verify(CifarLayout.Cifar100, folder.Path);
        Assert.Equal(("cifar100", folder["cifar-100-binary"], FileState.Differs), (report.DataSet, report.Folder, report.State));
        Assert.Equal(
            new FileReport("train.bin", FileState.Differs, "has 300 of the 50000 records of the official file", 300 * 3074, 300,
                Convert.ToHexStringLower(SHA256.HashData(File.ReadAllBytes(folder["cifar-100-binary/train.bin"])))),
            report.Files[0]);

        // Made-up labels are 7 times the record modulo 100: every 100 records have each class once.
        Assert.Equal([new("train", 300, 3, 3), new("test", 100, 1, 1)], report.Balance);
    }

    [Fact]
    public void Tells_a_changed_file_of_full_size_from_the_official_one()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar10(folder.Path);
        var report = DataVerifier.Verify(CifarLayout.Cifar10, folder.Path);
        Assert.All(report.Files, file => Assert.Equal(FileState.Differs, file.State));
        Assert.All(report.Files, file => Assert.Equal("has valid records, but not the bytes of the official file", file.Message));
        Assert.Equal(50_000, report.Balance[0].Records);
    }

    [Theory]
    [InlineData(100, 3, "record 5 has label 100 in byte 1, but only 0..99 is possible")]
    [InlineData(99, 20, "record 5 has label 20 in byte 0, but only 0..19 is possible")]
    public void Finds_labels_out_of_range(int fine, int coarse, string message)
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder.Path, 10, 10);
        using (var stream = File.OpenWrite(folder["test.bin"]))
        {
            stream.Position = 5 * 3074;
            CifarFiles.WriteRecord(stream, CifarLayout.Cifar100, 5, fine, coarse);
        }
        var report = DataVerifier.Verify(CifarLayout.Cifar100, folder.Path);
        Assert.Equal(FileState.Broken, report.State);
        Assert.Equal(FileState.Differs, report.Files[0].State);
        Assert.Equal((FileState.Broken, 10), (report.Files[1].State, report.Files[1].Records));
        Assert.StartsWith(message, report.Files[1].Message);
        Assert.Equal(9, report.Balance[1].Records);
    }

    [Fact]
    public void Finds_missing_and_truncated_files()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar10(folder.Path);
        File.Delete(folder["data_batch_4.bin"]);
        using (var stream = File.OpenWrite(folder["test_batch.bin"]))
            stream.SetLength(3073);
        var files = DataVerifier.Verify(CifarLayout.Cifar10, folder.Path).Files;
        Assert.Equal((FileState.Broken, 0L, null), (files[3].State, files[3].Bytes, files[3].Sha256));
        Assert.Contains("is missing", files[3].Message);
        Assert.Equal((FileState.Broken, 3073L, null), (files[5].State, files[5].Bytes, files[5].Sha256));
        Assert.Contains("truncated", files[5].Message);
        Assert.Equal(FileState.Differs, files[0].State);
    }

    [Fact]
    public void The_json_has_the_states_in_words()
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder.Path, 1, 1);
        var json = JsonSerializer.Serialize(DataVerifier.Verify(CifarLayout.Cifar100, folder.Path));
        using var document = JsonDocument.Parse(json);
        Assert.Equal("differs", document.RootElement.GetProperty("State").GetString());
        Assert.Equal("train.bin", document.RootElement.GetProperty("Files")[0].GetProperty("File").GetString());
        Assert.Equal("differs", document.RootElement.GetProperty("Files")[0].GetProperty("State").GetString());
    }

    [RealFilesFact("cifar10")]
    public void The_real_cifar10_is_the_official_one()
    {
        var report = DataVerifier.Verify(CifarLayout.Cifar10);
        Assert.Equal(FileState.Ok, report.State);
        Assert.Equal(6, report.Files.Count);
        Assert.Equal([new("train", 50_000, 5000, 5000), new("test", 10_000, 1000, 1000)], report.Balance);
    }

    [RealFilesFact("cifar100")]
    public void The_real_cifar100_can_be_used()
    {
        var report = DataVerifier.Verify(CifarLayout.Cifar100);
        Assert.NotEqual(FileState.Broken, report.State);
        Assert.All(report.Balance, balance => Assert.Equal(balance.FewestPerClass, balance.MostPerClass));
    }
}
