using System.Reflection;
using System.Runtime.InteropServices;
using System.Text.Json;
using System.Text.Json.Serialization;
using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using Spectre.Console;

namespace PerturbNas.Benchmarks;

/// <summary>Where and with what a run was measured.</summary>
/// <param name="Gigaflops">Measured limit of float32 multiply-adds with all threads, 10^9 operations a second.</param>
/// <param name="GigabytesPerSecond">Measured limit of the memory triad with all threads, 10^9 bytes a second.</param>
/// <param name="LoadAverage">The system's load of the minute before the run; null where the system does not say.</param>
internal sealed record Machine(
    string Processor, int Cores, int Threads, string Isa, long MemoryBytes, double Gigaflops, double GigabytesPerSecond,
    double? LoadAverage);

/// <summary>
/// What a suite has to show: one line about the machine, tables and notes on stdout, and with --json everything in a file, even where the
/// suite ended early.
/// </summary>
internal sealed class Report : IDisposable
{
    private static readonly JsonSerializerOptions _json = new()
    {
        PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower,
        WriteIndented = true,
        NumberHandling = JsonNumberHandling.AllowNamedFloatingPointLiterals,
        Encoder = System.Text.Encodings.Web.JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    private readonly BenchmarkOptions _options;
    private readonly IAnsiConsole _console;
    private readonly DateTimeOffset _date = DateTimeOffset.Now;
    private readonly string? _commit;
    private readonly List<object> _results = [];
    private readonly List<string> _notes = [];

    public Report(BenchmarkOptions options)
    {
        _options = options;
        _console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Out) });
        // Nothing wraps lines in a pipe; whoever reads them wants one line per row.
        if (Console.IsOutputRedirected)
            _console.Profile.Width = 1000;
        // "version+commit": the SDK appends the commit of the working tree.
        _commit = Assembly.GetExecutingAssembly().GetCustomAttribute<AssemblyInformationalVersionAttribute>()!.InformationalVersion
            .Split('+').ElementAtOrDefault(1);
        var load = ReadLoadAverage();
        using var backend = options.NewBackend();
        Limits = backend.MeasureLimits();
        Machine = Describe(BenchmarkOptions.ThreadsOf(backend), backend is CpuBackend cpu ? cpu.IsaName : backend.Description, load);
        Console.WriteLine($"{options.Suite} on {Machine.Processor}, {Machine.Cores} cores, {Machine.Threads} threads, {Machine.Isa}; " +
            $"limits {Machine.Gigaflops:0} GFLOP/s, {Machine.GigabytesPerSecond:0.0} GB/s; " +
            $"commit {_commit?[..Math.Min(10, _commit.Length)] ?? "unknown"}; {_date:yyyy-MM-dd HH:mm}");
        if (load > 0.5)
            Note($"the machine was busy before the start (load {load:0.0}): do not trust these timings");
    }

    public Machine Machine { get; }

    public MachineLimits Limits { get; }

    /// <summary>Share of the multiply-add limit that work with so many FLOPs in products reaches.</summary>
    public double ShareOfFmaLimit(double productFlops, double seconds) => productFlops / seconds / 1e9 / Limits.Gigaflops;

    /// <summary>A remark for people, also kept in the file.</summary>
    public void Note(string note)
    {
        Console.WriteLine($"note: {note}");
        _notes.Add(note);
    }

    /// <summary>Keeps a result for the file.</summary>
    public void Add(object result) => _results.Add(result);

    /// <summary>Prints rows below their headings; columns after the first are aligned to the right.</summary>
    public void Table(IReadOnlyList<string> headings, IEnumerable<IReadOnlyList<string>> rows)
    {
        var table = new Table { Border = TableBorder.None };
        for (var i = 0; i < headings.Count; i++)
        {
            var alignment = i == 0 ? Justify.Left : Justify.Right;
            table.AddColumn(new TableColumn(Markup.Escape(headings[i])) { Alignment = alignment, NoWrap = true });
        }
        foreach (var row in rows)
            table.AddRow([.. row.Select(Markup.Escape)]);
        _console.Write(table);
    }

    public void Dispose()
    {
        if (_options.Json is null)
            return;
        try
        {
            var run = new { _options.Suite, Date = _date, Commit = _commit, Machine, Options = _options, Results = _results, Notes = _notes };
            File.WriteAllText(_options.Json, JsonSerializer.Serialize(run, _json) + "\n");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            Console.Error.WriteLine($"benchmarks: '{_options.Json}' cannot be written: {e.Message}");
        }
    }

    private Machine Describe(int threads, string isa, double? load)
    {
        var processors = File.Exists("/proc/cpuinfo")
            ? File.ReadAllText("/proc/cpuinfo").Split("\n\n", StringSplitOptions.RemoveEmptyEntries)
            : [];
        var name = processors.Length == 0 ? null : Field(processors[0], "model name");
        var cores = processors.Select(p => (Field(p, "physical id"), Field(p, "core id") ?? Field(p, "processor"))).Distinct().Count();
        return new Machine(
            name ?? RuntimeInformation.ProcessArchitecture.ToString(), cores == 0 ? Environment.ProcessorCount : cores, threads, isa,
            GC.GetGCMemoryInfo().TotalAvailableMemoryBytes, Limits.Gigaflops, Limits.GigabytesPerSecond, load);

        // The value of a "name : value" line.
        static string? Field(string text, string name) => text.Split('\n').Select(line => line.Split(':', 2))
            .FirstOrDefault(pair => pair.Length == 2 && pair[0].Trim() == name)?[1].Trim();
    }

    private static double? ReadLoadAverage() =>
        File.Exists("/proc/loadavg") ? double.Parse(File.ReadAllText("/proc/loadavg").Split(' ')[0]) : null;
}
