using System.Net;
using System.Net.Sockets;
using System.Text;

namespace PerturbNas.Tests.Data;

/// <summary>A small HTTP server on 127.0.0.1 that serves one archive, with the faults that a download must survive.</summary>
internal sealed class ArchiveServer : IDisposable
{
    private readonly TcpListener _listener = new(IPAddress.Loopback, 0);
    private readonly Task _serving;

    public ArchiveServer(byte[] content)
    {
        Content = content;
        _listener.Start();
        Url = new Uri($"http://127.0.0.1:{((IPEndPoint)_listener.LocalEndpoint).Port}/archive.tar.gz");
        _serving = ServeAsync();
    }

    public Uri Url { get; }

    public byte[] Content { get; set; }

    /// <summary>Closes the connection after so many bytes of an answer.</summary>
    public int BreakAfter { get; set; } = int.MaxValue;

    public bool Ranges { get; set; } = true;

    /// <summary>Answers every request so, if set.</summary>
    public string? Status { get; set; }

    /// <summary>First byte asked for by each request.</summary>
    public List<int> Requests { get; } = [];

    public void Dispose()
    {
        _listener.Stop();
        _serving.Wait();
        _listener.Dispose();
    }

    private async Task ServeAsync()
    {
        while (true)
        {
            TcpClient client;
            try
            {
                client = await _listener.AcceptTcpClientAsync();
            }
            catch (Exception e) when (e is SocketException or InvalidOperationException)
            {
                // Stopped while it waited, or before it could.
                return;
            }
            using (client)
                await AnswerAsync(client.GetStream());
        }
    }

    private async Task AnswerAsync(NetworkStream stream)
    {
        var from = 0;
        using var reader = new StreamReader(stream, Encoding.ASCII, leaveOpen: true);
        while (await reader.ReadLineAsync() is { Length: > 0 } line)
            if (line.StartsWith("Range: bytes=", StringComparison.OrdinalIgnoreCase))
                from = int.Parse(line["Range: bytes=".Length..].TrimEnd('-'));
        Requests.Add(from);

        string status;
        ReadOnlyMemory<byte> body = default;
        if (Status is not null)
            status = Status;
        else if (from == 0 || !Ranges)
            (status, body) = ("200 OK", Content);
        else if (from < Content.Length)
            (status, body) = ($"206 Partial Content\r\nContent-Range: bytes {from}-{Content.Length - 1}/{Content.Length}", Content.AsMemory(from));
        else
            status = $"416 Range Not Satisfiable\r\nContent-Range: bytes */{Content.Length}";
        await stream.WriteAsync(Encoding.ASCII.GetBytes(
            $"HTTP/1.1 {status}\r\nContent-Length: {body.Length}\r\nConnection: close\r\n\r\n"));
        await stream.WriteAsync(body[..Math.Min(body.Length, BreakAfter)]);
    }
}
