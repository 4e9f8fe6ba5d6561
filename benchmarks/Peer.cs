using System.Diagnostics;
using System.Text.Json;
using System.Text.Json.Serialization;

namespace PerturbNas.Benchmarks;

/// <summary>A repeat of the peer: see the scripts in peer/.</summary>
internal sealed record PeerRepeat(double Seconds, double Loss, long PeakBytes)
{
    /// <summary>What else the peer had to say.</summary>
    [JsonExtensionData]
    public Dictionary<string, JsonElement>? Extra { get; init; }
}

/// <summary>
/// A PyTorch peer as a child process (a script of peer/ with --lockstep), which works only while <see cref="Repeat"/> waits for it.
/// </summary>
internal sealed class Peer : IDisposable
{
    // "tuned" is half of this, see common.py: without it glibc gives the memory of every activation back and faults it in again.
    private static readonly Dictionary<string, string> _allocator = new()
    {
        ["MALLOC_MMAP_MAX_"] = "0",
        ["MALLOC_TRIM_THRESHOLD_"] = "100000000000",
        ["MALLOC_TOP_PAD_"] = "268435456",
    };

    // Those that the scripts build as we do; s4 draws noise, so its losses differ.
    private static readonly string[] _spaces = ["s1", "s2", "s3", "s5", "darts"];

    private static readonly JsonSerializerOptions _json = new() { PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower };

    private readonly Process _process;
    private readonly Task<string> _errors;

    /// <summary>Starts a peer and waits until it has said what it is.</summary>
    /// <param name="arguments">Of the script, beside mode and threads.</param>
    /// <exception cref="UserException">There is no Python with PyTorch, or the peer fails.</exception>
    public Peer(string script, string mode, int threads, params string[] arguments)
    {
        Mode = mode;
        try
        {
            var start = new ProcessStartInfo(FindPython(), [FindScript(script), "--lockstep", "--mode", mode, "--threads", $"{threads}", .. arguments])
            {
                RedirectStandardInput = true,
                RedirectStandardOutput = true,
                RedirectStandardError = true,
            };
            start.Environment["PYTHONDONTWRITEBYTECODE"] = "1";
            foreach (var (name, value) in _allocator)
                start.Environment[name] = mode == "tuned" ? value : null;
            _process = Process.Start(start)!;
            _errors = _process.StandardError.ReadToEndAsync();
            Description = ReadLine<JsonElement>();
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>A peer that takes steps of a workload's supernet, or scores it: peer.py.</summary>
    /// <exception cref="UserException">As the constructor, or the peer lacks the space.</exception>
    public static Peer OfSupernet(string work, string mode, WorkloadSize size, int threads, Workload workload)
    {
        var init = Path.Combine(Path.GetTempPath(), $"perturbnas-benchmark-{Environment.ProcessId}.safetensors");
        try
        {
            workload.Write(init);
            return new Peer("peer.py", mode, threads, ["--work", work, "--init", init, .. ArgumentsOf(size)]);
        }
        finally
        {
            File.Delete(init);
        }
    }

    /// <summary>Arguments that name a size of a supernet.</summary>
    /// <exception cref="UserException">The peer lacks the space.</exception>
    public static string[] ArgumentsOf(WorkloadSize size) => _spaces.Contains(size.Space)
        ? ["--space", size.Space, "--channels", $"{size.Channels}", "--layers", $"{size.Layers}"]
        : throw new UserException($"The peer cannot be compared in space '{size.Space}'; choose {string.Join(", ", _spaces)}, or leave --peer out.");

    public string Mode { get; }

    /// <summary>Versions and settings as the peer has seen them.</summary>
    public JsonElement Description { get; }

    /// <summary>Loss of the initial weights on the first batch, with batch statistics.</summary>
    public double InitialLoss => Description.GetProperty("initial_loss").GetDouble();

    /// <summary>Processor seconds that the peer has used.</summary>
    public double ProcessorSeconds
    {
        get
        {
            _process.Refresh();
            return _process.TotalProcessorTime.TotalSeconds;
        }
    }

    /// <summary>Runs the peer's work once.</summary>
    /// <param name="request">What to do, where the peer does more than one thing.</param>
    public PeerRepeat Repeat(object? request = null)
    {
        try
        {
            _process.StandardInput.WriteLine(request is null ? "" : JsonSerializer.Serialize(request, _json));
            _process.StandardInput.Flush();
        }
        catch (IOException)
        {
            // It has ended; reading says why.
        }
        return ReadLine<PeerRepeat>();
    }

    public void Dispose()
    {
        if (_process is null)
            return;
        if (!_process.HasExited)
            _process.Kill(entireProcessTree: true);
        _process.WaitForExit();
        _process.Dispose();
    }

    private T ReadLine<T>()
    {
        if (_process.StandardOutput.ReadLine() is { } line)
            return JsonSerializer.Deserialize<T>(line, _json)!;
        _process.WaitForExit();
        var reason = _errors.Result.Split('\n', StringSplitOptions.RemoveEmptyEntries).LastOrDefault()
            ?? "it may have run out of memory, give a smaller --batch";
        throw new UserException($"The peer ended with exit code {_process.ExitCode}: {reason}");
    }

    /// <summary>The first python3, of those on the PATH and the system's own, that can import PyTorch.</summary>
    private static string FindPython()
    {
        var folders = (Environment.GetEnvironmentVariable("PATH") ?? "").Split(Path.PathSeparator, StringSplitOptions.RemoveEmptyEntries);
        var candidates = folders.Append("/usr/bin").Select(folder => Path.Combine(folder, "python3")).Where(File.Exists).Distinct();
        return candidates.FirstOrDefault(HasTorch)
            ?? throw new UserException("No python3 on the PATH can import torch, which --peer needs; run 'apt-get install python3-torch'.");

        static bool HasTorch(string python)
        {
            using var process = Process.Start(new ProcessStartInfo(python, ["-c", "import numpy, torch"])
            {
                RedirectStandardOutput = true,
                RedirectStandardError = true,
            })!;
            process.StandardError.ReadToEnd();
            process.WaitForExit();
            return process.ExitCode == 0;
        }
    }

    private static string FindScript(string name)
    {
        for (var folder = new DirectoryInfo(AppContext.BaseDirectory); folder is not null; folder = folder.Parent)
        {
            var script = Path.Combine(folder.FullName, "benchmarks", "peer", name);
            if (File.Exists(script))
                return script;
        }
        throw new UserException($"benchmarks/peer/{name} is in no folder above {AppContext.BaseDirectory}; " +
            "run the benchmarks from the source tree.");
    }
}
