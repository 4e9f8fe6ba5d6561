using System.Diagnostics;
using System.Text.Encodings.Web;
using System.Text.Json;
using System.Text.Json.Serialization;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>
/// What the verbs show. Results go to stdout; notes and progress go to stderr, so that a redirected stdout holds the result alone.
/// With --json or --quiet there are no notes and no progress.
/// </summary>
internal sealed class Terminal(Options options)
{
    private static readonly TimeSpan PlainInterval = TimeSpan.FromSeconds(10);

    private static readonly JsonSerializerOptions JsonFormat = new()
    {
        PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower,
        WriteIndented = true,
        // Genotypes are full of quotes; this is a terminal, not a web page.
        Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
        // A diverged loss is "NaN", not a failure to print.
        NumberHandling = JsonNumberHandling.AllowNamedFloatingPointLiterals,
    };

    private readonly bool _silent = options.Json || options.Quiet;

    /// <summary>Formatted output on stdout.</summary>
    public static IAnsiConsole Out { get; } = Create(Console.Out, Console.IsOutputRedirected);

    private static IAnsiConsole Error { get; } = Create(Console.Error, Console.IsErrorRedirected);

    /// <summary>Prints an object as JSON on stdout, with names in snake_case.</summary>
    public static void WriteJson<T>(T value) => Console.WriteLine(JsonSerializer.Serialize(value, JsonFormat));

    /// <summary>A table without frames, which reads well in a terminal and in a pipe.</summary>
    public static Table PlainTable(params string[] columns)
    {
        var table = new Table { Border = TableBorder.None };
        foreach (var column in columns)
            table.AddColumn(new TableColumn(Markup.Escape(column)) { Padding = new Padding(0, 0, 2, 0) });
        return table;
    }

    /// <summary>A line on stderr for people.</summary>
    public void Note(string line)
    {
        if (!_silent)
            Console.Error.WriteLine(line);
    }

    /// <summary>
    /// Runs work that takes a while and shows how far it is: a bar with the time left in a terminal, a line every ten seconds elsewhere.
    /// </summary>
    /// <param name="title">What is being done.</param>
    /// <param name="work">Is given the progress to report to, from one thread at a time.</param>
    public void Progress(string title, Action<IProgress<ProgressReport>> work)
    {
        if (_silent)
            work(new Reporter(_ => { }));
        else if (Console.IsErrorRedirected)
            ProgressLines(title, work);
        else
            ProgressBar(title, work);
    }

    private static void ProgressBar(string title, Action<IProgress<ProgressReport>> work) =>
        Error.Progress()
            .Columns(new TaskDescriptionColumn { Alignment = Justify.Left }, new ProgressBarColumn(), new PercentageColumn())
            .Start(context =>
            {
                var task = context.AddTask(Markup.Escape(title), maxValue: 1);
                var clock = new Clock();
                work(new Reporter(report =>
                {
                    task.Value = report.Fraction;
                    task.Description = Markup.Escape($"{title} {clock.Describe(report)}");
                }));
            });

    private static void ProgressLines(string title, Action<IProgress<ProgressReport>> work)
    {
        var clock = new Clock();
        var last = TimeSpan.Zero;
        work(new Reporter(report =>
        {
            if (clock.Elapsed - last < PlainInterval)
                return;
            last = clock.Elapsed;
            Console.Error.WriteLine($"{title}: {100 * report.Fraction:0} % {clock.Describe(report)}");
        }));
    }

    private static IAnsiConsole Create(TextWriter writer, bool redirected)
    {
        var console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(writer) });
        // Nothing wraps lines in a pipe; whoever reads them wants one line per row.
        if (redirected)
            console.Profile.Width = 1000;
        return console;
    }

    // Progress<T> would hop to the thread pool, and lines would come late and out of order.
    private sealed class Reporter(Action<ProgressReport> report) : IProgress<ProgressReport>
    {
        public void Report(ProgressReport value) => report(value);
    }

    // Time left, from the pace since the first report: work that was resumed does not start at zero.
    private sealed class Clock
    {
        private readonly Stopwatch _watch = Stopwatch.StartNew();
        private (double Fraction, TimeSpan Time)? _first;

        public TimeSpan Elapsed => _watch.Elapsed;

        public string Describe(ProgressReport report)
        {
            _first ??= (report.Fraction, Elapsed);
            var done = report.Fraction - _first.Value.Fraction;
            var left = done > 0 && report.Fraction < 1
                ? $"{(Elapsed - _first.Value.Time) * ((1 - report.Fraction) / done):d\\.hh\\:mm\\:ss} left".TrimStart('0').TrimStart('.')
                : "";
            return string.Join(", ", new[] { report.Detail, left }.Where(part => part.Length > 0));
        }
    }
}

/// <summary>How far a piece of work is.</summary>
/// <param name="Fraction">Done, 0 to 1.</param>
/// <param name="Detail">What there is to say at this point, such as "epoch 3 of 50, loss 1.234"; may be empty.</param>
internal readonly record struct ProgressReport(double Fraction, string Detail = "");

internal static class ProgressExtensions
{
    /// <summary>The engine's progress as the terminal shows it.</summary>
    public static ProgressReport ToReport(this PerturbNas.Training.Progress progress) =>
        new((double)progress.Done / Math.Max(1, progress.Total), $"{progress.Phase}: {progress.Detail}");
}
