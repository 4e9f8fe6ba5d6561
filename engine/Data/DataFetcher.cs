using System.Formats.Tar;
using System.IO.Compression;
using System.Net;
using System.Net.Http.Headers;
using System.Security.Cryptography;

namespace PerturbNas.Data;

/// <summary>How far a download is.</summary>
/// <param name="Received">Bytes of the archive on the disk.</param>
/// <param name="Total">Bytes of the archive, if the server says so.</param>
public readonly record struct FetchProgress(long Received, long? Total);

/// <summary>What <see cref="DataFetcher"/> did.</summary>
/// <param name="AlreadyThere">The folder existed and could be used; nothing was downloaded.</param>
/// <param name="Report">The findings about the files.</param>
public sealed record FetchResult(bool AlreadyThere, DataReport Report);

/// <summary>
/// Downloads a data set's archive, checks it, and unpacks it. An interrupted download leaves ARCHIVE.part, which the next call
/// continues if the server can. The data set's folder appears at the end, complete and verified, or not at all.
/// </summary>
public static class DataFetcher
{
    private const int BufferBytes = 1 << 17;

    // Far above the 180 MB of the real sets; stops an archive that would fill the disk.
    private const long MaxUnpackedBytes = 1L << 30;

    private static readonly TimeSpan _stallTimeout = TimeSpan.FromSeconds(60);

    /// <summary>Fetches a data set into a new folder below <paramref name="dataFolder"/>.</summary>
    /// <param name="layout">The data set.</param>
    /// <param name="dataFolder">Where the data set's folder shall appear; created if need be.</param>
    /// <param name="url">Another place of the archive (http or https); null: the data set's authors.</param>
    /// <param name="sha256">
    /// The archive's SHA-256 in hex; null: the known one for the authors' archive, none for another <paramref name="url"/>. The
    /// files inside are compared with the official ones in any case; see the result.
    /// </param>
    /// <param name="progress">Told of every piece received.</param>
    /// <param name="cancellation">Stops; what was received stays for the next call.</param>
    /// <exception cref="UserException">
    /// The server cannot be reached or has no such file, the connection broke, the disk is full, the archive is not what was
    /// expected, or an unusable folder is in the way.
    /// </exception>
    public static async Task<FetchResult> FetchAsync(
        CifarLayout layout, string dataFolder, Uri? url = null, string? sha256 = null, IProgress<FetchProgress>? progress = null,
        CancellationToken cancellation = default)
    {
        dataFolder = Path.GetFullPath(dataFolder);
        var target = Path.Combine(dataFolder, layout.ArchiveFolder);
        if (Directory.Exists(target))
        {
            var there = DataVerifier.VerifyFolder(layout, target);
            if (there.State == FileState.Broken)
                throw new UserException($"'{target}' exists but cannot be used; remove it, or fetch to another folder with --data-dir.");
            return new FetchResult(true, there);
        }
        sha256 ??= url is null ? layout.ArchiveSha256 : null;
        url ??= layout.ArchiveUrl;
        if (!url.IsAbsoluteUri || url.Scheme is not ("http" or "https"))
            throw new UserException($"'{url}' is not an http or https address; give one with --url.");

        var part = Path.Combine(dataFolder, Path.GetFileName(layout.ArchiveUrl.LocalPath) + ".part");
        var unpacking = target + ".unpacking";
        try
        {
            Directory.CreateDirectory(dataFolder);
            try
            {
                await DownloadAsync(url, part, progress, cancellation).ConfigureAwait(false);
            }
            catch
            {
                if (new FileInfo(part) is { Exists: true, Length: 0 })
                    File.Delete(part);
                throw;
            }
            if (sha256 is not null)
                await CheckAsync(url, part, sha256, cancellation).ConfigureAwait(false);
            if (Directory.Exists(unpacking))
                Directory.Delete(unpacking, true);
            try
            {
                await UnpackAsync(layout, url, part, unpacking, cancellation).ConfigureAwait(false);
                var report = DataVerifier.VerifyFolder(layout, unpacking);
                if (report.Files.FirstOrDefault(file => file.State == FileState.Broken) is { } broken)
                    throw Rejected(url, part, $"has an unusable {broken.File} ({broken.Message})");
                Directory.Move(unpacking, target);
                File.Delete(part);
                return new FetchResult(false, report with { Folder = target });
            }
            finally
            {
                if (Directory.Exists(unpacking))
                    Directory.Delete(unpacking, true);
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException(
                $"'{dataFolder}' cannot be written: {e.Message.TrimEnd('.')}; make room and check its permissions, or fetch to another "
                + "folder with --data-dir.", e);
        }
    }

    private static async Task DownloadAsync(Uri url, string part, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        // The whole may take hours; what is limited is the wait for the next bytes.
        using var client = new HttpClient { Timeout = Timeout.InfiniteTimeSpan };
        using var stall = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        using var file = new FileStream(part, FileMode.OpenOrCreate, FileAccess.Write, FileShare.None, 0);
        var buffer = new byte[BufferBytes];
        try
        {
            stall.CancelAfter(_stallTimeout);
            using var response = await StartAsync(client, url, file, stall.Token).ConfigureAwait(false);
            if (response is null)
                return;
            var total = response.Content.Headers.ContentLength is { } length ? file.Position + length : (long?)null;
            using var body = await response.Content.ReadAsStreamAsync(stall.Token).ConfigureAwait(false);
            progress?.Report(new FetchProgress(file.Position, total));
            while (true)
            {
                stall.CancelAfter(_stallTimeout);
                var read = await ReadAsync(url, body, buffer, file.Position, total, stall.Token).ConfigureAwait(false);
                if (read == 0)
                    break;
                await file.WriteAsync(buffer.AsMemory(0, read), cancellation).ConfigureAwait(false);
                progress?.Report(new FetchProgress(file.Position, total));
            }
            file.Flush(true);
        }
        catch (HttpRequestException e)
        {
            throw new UserException(
                $"'{url}' cannot be reached: {e.Message.TrimEnd('.')}; check the network and the proxy, or give another address with "
                + "--url.", e);
        }
        catch (OperationCanceledException e) when (!cancellation.IsCancellationRequested)
        {
            throw new UserException(
                $"'{url}' sent nothing for {_stallTimeout.TotalSeconds} seconds; run the same command again to continue after "
                + $"{file.Position} bytes.", e);
        }
    }

    /// <summary>
    /// Asks for what the file lacks and leaves the file's position where the answer goes; null if the file is complete already.
    /// </summary>
    private static async Task<HttpResponseMessage?> StartAsync(
        HttpClient client, Uri url, FileStream file, CancellationToken cancellation)
    {
        while (true)
        {
            using var request = new HttpRequestMessage(HttpMethod.Get, url);
            if (file.Length > 0)
                request.Headers.Range = new RangeHeaderValue(file.Length, null);
            var response = await client.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, cancellation).ConfigureAwait(false);
            var range = response.Content.Headers.ContentRange;
            if (response.StatusCode == HttpStatusCode.PartialContent && range?.From == file.Length)
            {
                file.Position = file.Length;
                return response;
            }
            if (response.StatusCode == HttpStatusCode.OK)
            {
                // The whole archive: there was nothing to continue, or the server cannot.
                if (file.Length > 0)
                    file.SetLength(0);
                return response;
            }
            var status = response.StatusCode;
            response.Dispose();
            if (file.Length == 0 || status is not (HttpStatusCode.RequestedRangeNotSatisfiable or HttpStatusCode.PartialContent))
                throw new UserException(
                    $"'{url}' answers {(int)status} {status}; check the address, or give another with --url.");
            if (status == HttpStatusCode.RequestedRangeNotSatisfiable && range?.Length == file.Length)
                return null;

            // What is on the disk belongs to another archive.
            file.SetLength(0);
        }
    }

    private static async Task<int> ReadAsync(
        Uri url, Stream body, byte[] buffer, long received, long? total, CancellationToken cancellation)
    {
        try
        {
            return await body.ReadAsync(buffer, cancellation).ConfigureAwait(false);
        }
        catch (Exception e) when (e is IOException or HttpRequestException)
        {
            throw new UserException(
                $"The connection to '{url}' broke after {received} of {total?.ToString() ?? "unknown"} bytes; run the same command again "
                + "to continue.", e);
        }
    }

    private static async Task CheckAsync(Uri url, string part, string expected, CancellationToken cancellation)
    {
        string actual;
        using (var stream = File.OpenRead(part))
            actual = Convert.ToHexStringLower(await SHA256.HashDataAsync(stream, cancellation).ConfigureAwait(false));
        if (!actual.Equals(expected, StringComparison.OrdinalIgnoreCase))
            throw Rejected(url, part, $"has SHA-256 {actual} instead of {expected}");
    }

    private static async Task UnpackAsync(
        CifarLayout layout, Uri url, string part, string destination, CancellationToken cancellation)
    {
        Directory.CreateDirectory(destination);
        long unpacked = 0;
        using var file = File.OpenRead(part);
        using var unzipped = new GZipStream(file, CompressionMode.Decompress);
        using var reader = new TarReader(unzipped);
        while (true)
        {
            TarEntry? entry;
            try
            {
                entry = await reader.GetNextEntryAsync(false, cancellation).ConfigureAwait(false);
            }
            catch (Exception e) when (e is InvalidDataException or EndOfStreamException or FormatException)
            {
                throw Rejected(url, part, $"is not a sound .tar.gz ({e.Message.TrimEnd('.')})", e);
            }
            if (entry is null)
                return;
            if (entry.EntryType is TarEntryType.Directory or TarEntryType.GlobalExtendedAttributes)
                continue;

            // Plain files directly in the one expected folder, and nothing else: no paths out of it, no links.
            var names = entry.Name.Split('/').Where(name => name != ".").ToArray();
            if (entry.EntryType is not (TarEntryType.RegularFile or TarEntryType.V7RegularFile)
                || names is not [var folder, var name] || folder != layout.ArchiveFolder || name is "" or ".." || name.Contains('\\'))
                throw Rejected(
                    url, part, $"has an entry '{entry.Name}' ({entry.EntryType}), but only files in {layout.ArchiveFolder}/ belong in it");
            unpacked += entry.Length;
            if (unpacked > MaxUnpackedBytes)
                throw Rejected(url, part, $"unpacks to more than {MaxUnpackedBytes} bytes");
            using var output = new FileStream(Path.Combine(destination, name), FileMode.Create, FileAccess.Write, FileShare.None);
            try
            {
                if (entry.DataStream is not null)
                    await entry.DataStream.CopyToAsync(output, cancellation).ConfigureAwait(false);
            }
            catch (Exception e) when (e is InvalidDataException or EndOfStreamException)
            {
                throw Rejected(url, part, $"is not a sound .tar.gz ({e.Message.TrimEnd('.')})", e);
            }
            output.Flush(true);
        }
    }

    /// <summary>The archive is not what it should be: nothing of it may be continued, so it goes.</summary>
    private static UserException Rejected(Uri url, string part, string what, Exception? cause = null)
    {
        File.Delete(part);
        return new UserException(
            $"The archive from '{url}' {what}; it was deleted: run the command again, or give another address with --url.", cause);
    }
}
