using System.Formats.Tar;
using System.IO.Compression;
using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using PerturbNas.Data;
using Xunit;

namespace PerturbNas.Tests.Data;

public sealed class DataFetcherTests
{
    private const int Train = 20;
    private const int Test = 5;

    private static readonly CifarLayout _layout = CifarLayout.Cifar100;

    [Fact]
    public async Task Downloads_checks_and_unpacks()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive());
        var progress = new Progress();
        var result = await DataFetcher.FetchAsync(_layout, folder["new/data"], server.Url, Sha256(server.Content), progress);
        Assert.False(result.AlreadyThere);
        Assert.Equal((folder["new/data/cifar-100-binary"], FileState.Differs), (result.Report.Folder, result.Report.State));
        Assert.Equal(new FetchProgress(0, server.Content.Length), progress.Reports[0]);
        Assert.Equal(new FetchProgress(server.Content.Length, server.Content.Length), progress.Reports[^1]);
        AssertFetched(folder["new/data"]);

        // A second call finds the folder and asks the server for nothing.
        Assert.True((await DataFetcher.FetchAsync(_layout, folder["new/data"], server.Url)).AlreadyThere);
        Assert.Equal([0], server.Requests);
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public async Task Continues_an_interrupted_download_if_the_server_can(bool ranges)
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive()) { BreakAfter = 30_000, Ranges = ranges };
        var sha256 = Sha256(server.Content).ToUpperInvariant();
        await Says(() => Fetch(folder, server, sha256), server.Url.ToString(), $"broke after 30000 of {server.Content.Length} bytes", "again to continue");
        Assert.Equal(server.Content[..30_000], File.ReadAllBytes(folder["cifar-100-binary.tar.gz.part"]));
        Assert.False(Directory.Exists(folder["cifar-100-binary"]));

        server.BreakAfter = int.MaxValue;
        var progress = new Progress();
        await DataFetcher.FetchAsync(_layout, folder.Path, server.Url, sha256, progress);
        Assert.Equal([0, 30_000], server.Requests);
        Assert.Equal(new FetchProgress(ranges ? 30_000 : 0, server.Content.Length), progress.Reports[0]);
        AssertFetched(folder.Path);
    }

    [Fact]
    public async Task Uses_an_archive_that_is_complete_already()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive());
        File.WriteAllBytes(folder["cifar-100-binary.tar.gz.part"], server.Content);
        await Fetch(folder, server, Sha256(server.Content));
        Assert.Equal([server.Content.Length], server.Requests);
        AssertFetched(folder.Path);
    }

    [Fact]
    public async Task Starts_anew_if_the_part_is_longer_than_the_archive()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive());
        File.WriteAllBytes(folder["cifar-100-binary.tar.gz.part"], new byte[server.Content.Length + 1]);
        await Fetch(folder, server, Sha256(server.Content));
        Assert.Equal([server.Content.Length + 1, 0], server.Requests);
        AssertFetched(folder.Path);
    }

    [Fact]
    public async Task Refuses_an_archive_with_another_checksum()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive());
        await Says(() => Fetch(folder, server, new string('0', 64)), $"SHA-256 {Sha256(server.Content)} instead of 000", "deleted", "--url");
        Assert.Empty(Directory.GetFileSystemEntries(folder.Path));
    }

    [Theory]
    [InlineData("404 Not Found", "answers 404 NotFound")]
    [InlineData("503 Service Unavailable", "answers 503 ServiceUnavailable")]
    public async Task Says_what_the_server_answers(string status, string message)
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer([]) { Status = status };
        await Says(() => Fetch(folder, server), server.Url.ToString(), message, "--url");
        Assert.Empty(Directory.GetFileSystemEntries(folder.Path));

        // A part that is there stays.
        File.WriteAllBytes(folder["cifar-100-binary.tar.gz.part"], [1, 2]);
        await Says(() => Fetch(folder, server), message);
        Assert.Equal([1, 2], File.ReadAllBytes(folder["cifar-100-binary.tar.gz.part"]));
    }

    [Fact]
    public async Task Says_that_the_server_cannot_be_reached()
    {
        using var folder = new TemporaryFolder();
        var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        var url = new Uri($"http://127.0.0.1:{((IPEndPoint)listener.LocalEndpoint).Port}/a.tar.gz");
        listener.Dispose();
        await Says(() => DataFetcher.FetchAsync(_layout, folder.Path, url), url.ToString(), "cannot be reached", "check the network", "--url");
        Assert.Empty(Directory.GetFileSystemEntries(folder.Path));
        await Says(() => DataFetcher.FetchAsync(_layout, folder.Path, new Uri("ftp://127.0.0.1/a")), "ftp://127.0.0.1/a", "not an http");
    }

    [Theory]
    [InlineData("../evil.bin")]
    [InlineData("cifar-100-binary/../evil.bin")]
    [InlineData("cifar-100-binary/..")]
    [InlineData("/evil.bin")]
    [InlineData("cifar-100-binary/deeper/evil.bin")]
    [InlineData("other/evil.bin")]
    [InlineData("evil.bin")]
    public async Task Refuses_entries_outside_the_folder(string name)
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive(tar => tar.WriteEntry(new PaxTarEntry(TarEntryType.RegularFile, name)
        {
            DataStream = new MemoryStream([1]),
        })));
        await Says(() => DataFetcher.FetchAsync(_layout, folder["data"], server.Url), $"has an entry '{name}'", "only files in cifar-100-binary/");
        Assert.Equal([folder["data"]], Directory.GetFileSystemEntries(folder.Path));
        Assert.Empty(Directory.GetFileSystemEntries(folder["data"]));
    }

    [Theory]
    [InlineData(TarEntryType.SymbolicLink)]
    [InlineData(TarEntryType.HardLink)]
    public async Task Refuses_links(TarEntryType type)
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(
            Archive(tar => tar.WriteEntry(new PaxTarEntry(type, "cifar-100-binary/link") { LinkName = "/etc/passwd" })));
        await Says(() => Fetch(folder, server), $"has an entry 'cifar-100-binary/link' ({type})");
        Assert.Empty(Directory.GetFileSystemEntries(folder.Path));
    }

    [Fact]
    public async Task Refuses_what_is_no_archive_or_ends_early()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(new byte[2000]);
        await Says(() => Fetch(folder, server), "is not a sound .tar.gz");
        server.Content = Archive()[..40_000];
        await Says(() => Fetch(folder, server), "The archive from");
        Assert.Empty(Directory.GetFileSystemEntries(folder.Path));
    }

    [Fact]
    public async Task Refuses_an_archive_with_unusable_files()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive(test: false));
        await Says(() => Fetch(folder, server), "has an unusable test.bin", "is missing");
        Assert.Empty(Directory.GetFileSystemEntries(folder.Path));
    }

    [Fact]
    public async Task Does_not_touch_a_folder_that_is_in_the_way()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive());
        Directory.CreateDirectory(folder["cifar-100-binary"]);
        File.WriteAllText(folder["cifar-100-binary/mine.txt"], "mine");
        await Says(() => Fetch(folder, server), folder["cifar-100-binary"], "cannot be used", "remove it");
        Assert.True(File.Exists(folder["cifar-100-binary/mine.txt"]));
        Assert.Empty(server.Requests);
    }

    // /dev/full takes no byte, as a full disk: the partial file is made a link to it.
    [Fact]
    public async Task Says_that_the_disk_is_full()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive());
        File.CreateSymbolicLink(folder["cifar-100-binary.tar.gz.part"], "/dev/full");
        await Says(() => Fetch(folder, server), folder.Path, "No space left on device", "make room");
    }

    [Fact]
    public async Task Keeps_what_was_received_when_it_is_cancelled()
    {
        using var folder = new TemporaryFolder();
        using var server = new ArchiveServer(Archive());
        using var cancellation = new CancellationTokenSource();
        var progress = new Progress { OnReport = report => { if (report.Received > 0) cancellation.Cancel(); } };
        await Assert.ThrowsAnyAsync<OperationCanceledException>(
            () => DataFetcher.FetchAsync(_layout, folder.Path, server.Url, null, progress, cancellation.Token));
        var received = File.ReadAllBytes(folder["cifar-100-binary.tar.gz.part"]);
        Assert.NotEmpty(received);
        Assert.Equal(server.Content[..received.Length], received);
        await Fetch(folder, server);
        AssertFetched(folder.Path);
    }

    private static Task<FetchResult> Fetch(TemporaryFolder folder, ArchiveServer server, string? sha256 = null) =>
        DataFetcher.FetchAsync(_layout, folder.Path, server.Url, sha256);

    /// <summary>An archive with the official one's structure and made-up records, uncompressed inside so that it has some length.</summary>
    private static byte[] Archive(Action<TarWriter>? more = null, bool test = true)
    {
        using var folder = new TemporaryFolder();
        CifarFiles.WriteCifar100(folder.Path, Train, Test);
        using var archive = new MemoryStream();
        using (var zipped = new GZipStream(archive, CompressionLevel.NoCompression, true))
        using (var tar = new TarWriter(zipped, TarEntryFormat.Pax))
        {
            tar.WriteEntry(new PaxTarEntry(TarEntryType.Directory, "cifar-100-binary/"));
            tar.WriteEntry(folder["train.bin"], "./cifar-100-binary/train.bin");
            if (test)
                tar.WriteEntry(folder["test.bin"], "cifar-100-binary/test.bin");
            tar.WriteEntry(new PaxTarEntry(TarEntryType.RegularFile, "cifar-100-binary/fine_label_names.txt"));
            more?.Invoke(tar);
        }
        return archive.ToArray();
    }

    /// <summary>The folder has the three files of <see cref="Archive"/> and nothing lies beside it.</summary>
    private static void AssertFetched(string dataFolder)
    {
        Assert.Equal([Path.Combine(dataFolder, "cifar-100-binary")], Directory.GetFileSystemEntries(dataFolder));
        Assert.Equal(3, Directory.GetFileSystemEntries(Path.Combine(dataFolder, "cifar-100-binary")).Length);
        var source = ImageSource.Open("cifar100", dataFolder);
        Assert.Equal((Train, Test), (source.Count(DataPart.Train), source.Count(DataPart.Test)));
        CifarFiles.AssertRecord(source.Read(DataPart.Test), Test - 1, _layout, Train + Test - 1);
    }

    private static string Sha256(byte[] bytes) => Convert.ToHexStringLower(SHA256.HashData(bytes));

    private static async Task Says(Func<Task> action, params string[] parts)
    {
        var message = (await Assert.ThrowsAsync<UserException>(action)).Message;
        Assert.All(parts, part => Assert.Contains(part, message));
        Assert.EndsWith(".", message);
    }

    private sealed class Progress : IProgress<FetchProgress>
    {
        public List<FetchProgress> Reports { get; } = [];

        public Action<FetchProgress>? OnReport { get; init; }

        public void Report(FetchProgress value)
        {
            Reports.Add(value);
            OnReport?.Invoke(value);
        }
    }
}
