using System.Diagnostics;
using System.Formats.Tar;
using System.IO.Compression;
using System.Net;
using System.Net.Sockets;
using System.Text.Json;
using PerturbNas.Tests.Data;

namespace PerturbNas.Tests.Cli;

/// <summary>The verb `data`.</summary>
public sealed class DataCommandTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [RealFilesFact("cifar10")]
    public void VerifiesTheRealFiles()
    {
        var (exitCode, output, error) = CommandLine.Run("data", "verify", "cifar10", "--json");
        Assert.Equal((0, ""), (exitCode, error));
        var report = JsonDocument.Parse(output).RootElement;
        Assert.Equal("ok", report.GetProperty("state").GetString());
        Assert.Equal(6, report.GetProperty("files").GetArrayLength());
        Assert.Equal(5000, report.GetProperty("balance")[0].GetProperty("fewest_per_class").GetInt32());
    }

    [Fact]
    public void ABrokenFileIsShownAndNamed()
    {
        // CIFAR-100 records: coarse label, fine label, 3072 pixels; the second record's fine label does not exist.
        var records = new byte[2 * 3074];
        records[3074 + 1] = 100;
        File.WriteAllBytes(_folder["train.bin"], records);
        File.WriteAllBytes(_folder["test.bin"], new byte[3074]);
        var (exitCode, output, error) = CommandLine.Run("data", "verify", "cifar100", "--data-dir", _folder.Path);
        Assert.Equal(2, exitCode);
        Assert.Contains("record 1 has label 100", output, StringComparison.Ordinal);
        Assert.Matches(@"^perturbnas: train\.bin in '.*' cannot be used; [^\n]*\.\n$", error);
    }

    [Theory]
    [InlineData("'data' needs ACTION and NAME", "data")]
    [InlineData("'data' needs ACTION and NAME", "data", "verify")]
    [InlineData("The action is 'look'; choose verify or fetch.", "data", "look", "cifar10")]
    [InlineData("The data set is 'mnist'; choose cifar10 or cifar100.", "data", "verify", "mnist")]
    [InlineData("'data' has no use for 'now'", "data", "verify", "cifar10", "now")]
    [InlineData("--url is 'here'; give an http or https address.", "data", "fetch", "cifar10", "--url", "here")]
    [InlineData("--url and --sha256 are for 'data fetch'", "data", "verify", "cifar10", "--url", "http://127.0.0.1/")]
    public void WrongArgumentsAreOneSentence(string expected, params string[] arguments) =>
        Assert.StartsWith($"perturbnas: {expected}", CommandLine.UserError(arguments), StringComparison.Ordinal);

    [Fact]
    public void AServerThatIsNotThereIsOneSentence()
    {
        // Port 9 (discard) of this machine: nothing listens.
        var error = CommandLine.UserError("data", "fetch", "cifar10", "--data-dir", _folder.Path, "--url", "http://127.0.0.1:9/cifar.tar.gz");
        Assert.Contains("http://127.0.0.1:9/cifar.tar.gz", error, StringComparison.Ordinal);
    }

    [Fact]
    public void FetchesAndShowsWhatCame()
    {
        CifarFiles.WriteCifar100(_folder["cifar-100-binary"], 4, 2);
        using var archive = new MemoryStream();
        using (var zipped = new GZipStream(archive, CompressionLevel.Fastest, leaveOpen: true))
            TarFile.CreateFromDirectory(_folder["cifar-100-binary"], zipped, includeBaseDirectory: true);
        using var server = new ArchiveServer(archive.ToArray());
        string[] fetch = ["data", "fetch", "cifar100", "--data-dir", _folder["new"], "--url", server.Url.ToString()];
        var (exitCode, output, error) = CommandLine.Run([.. fetch, "--json"]);
        Assert.Equal((0, ""), (exitCode, error));
        Assert.Equal("differs", JsonDocument.Parse(output).RootElement.GetProperty("state").GetString());

        (exitCode, output, error) = CommandLine.Run(fetch);
        Assert.Equal(0, exitCode);
        Assert.Contains("has 4 of the 50000 records", output, StringComparison.Ordinal);
        Assert.Contains("was there already", error, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("INT")]
    [InlineData("TERM")]
    public void ASignalStopsTheWork(string signal)
    {
        // A server that takes the connection and never answers.
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        using var process = CommandLine.Start(
            ["data", "fetch", "cifar10", "--data-dir", _folder.Path, "--url", $"http://127.0.0.1:{((IPEndPoint)listener.LocalEndpoint).Port}/x"]);
        using var connection = listener.AcceptTcpClient();
        Process.Start("kill", [$"-{signal}", $"{process.Id}"])!.WaitForExit();
        Assert.True(process.WaitForExit(30_000));
        Assert.Equal(130, process.ExitCode);
        Assert.EndsWith("perturbnas: interrupted.\n", process.StandardError.ReadToEnd(), StringComparison.Ordinal);
        Assert.Equal("", process.StandardOutput.ReadToEnd());
    }
}
