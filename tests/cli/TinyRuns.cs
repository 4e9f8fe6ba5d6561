using PerturbNas.Tests.Data;

namespace PerturbNas.Tests.Cli;

/// <summary>Runs of the smallest sizes, made once as processes and shared by the tests of a class, which leave them as they are.</summary>
public sealed class TinyRuns : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public TinyRuns()
    {
        Searched = Search("searched", "--epochs", "1");
        Untrained = Search("untrained", "--epochs", "0");
    }

    /// <summary>A run of space s2 whose search has finished, of 3 steps.</summary>
    public string Searched { get; }

    /// <summary>The same without training.</summary>
    public string Untrained { get; }

    /// <summary>Options of a search that takes a fraction of a second an epoch: 3 steps, the last one on fewer images.</summary>
    public static string[] Tiny { get; } =
        ["--data", "synthetic", "--space", "s2", "--channels", "2", "--layers", "3", "--batch", "8", "--train-limit", "20", "--valid-limit", "12",
        "--threads", "1"];

    /// <summary>A path for one test's own files.</summary>
    public string NewPath(string name) => _folder[$"{name}-{Guid.NewGuid():N}"];

    /// <summary>A copy of a run's folder, to damage.</summary>
    public string Copy(string run)
    {
        var copy = NewPath("copy");
        TemporaryFolder.Copy(run, copy);
        return copy;
    }

    public void Dispose() => _folder.Dispose();

    private string Search(string name, params string[] arguments)
    {
        CommandLine.Json(["search", .. Tiny, "--out", _folder[name], .. arguments]);
        return _folder[name];
    }
}
