using CommandLine;
using PerturbNas.Data;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>Options of `data`.</summary>
[Verb("data", HelpText = "Fetch a data set, or verify the files of one.")]
internal sealed class DataOptions : Options
{
    public static string Examples => """
        perturbnas data verify cifar10
        perturbnas data verify cifar100 --data-dir ~/data --json
        perturbnas data fetch cifar10 --data-dir ~/data
        """;

    [Value(0, MetaName = "ACTION", Required = true,
        HelpText = "verify: read all files, compare them with the official ones; fetch: download, check and unpack them.")]
    public string Action { get; set; } = "";

    [Value(1, MetaName = "NAME", Required = true, HelpText = "cifar10 or cifar100.")]
    public string Name { get; set; } = "";

    [Option("data-dir", MetaValue = "DIR",
        HelpText = $"Folder of the data files, or a parent of it (by default ${DataFolder.Variable}, if set, or ./{DataFolder.BelowHere}).")]
    public string? DataDir { get; set; }

    [Option("url", MetaValue = "URL", HelpText = "fetch: another place of the archive (by default the data set's authors).")]
    public string? Url { get; set; }

    [Option("sha256", MetaValue = "HEX", HelpText = "fetch: the archive's SHA-256 (by default that of the authors' archive).")]
    public string? Sha256 { get; set; }

    public override void Validate()
    {
        RequireChoice("The action", Action, "verify", "fetch");
        RequireChoice("The data set", Name, "cifar10", "cifar100");
        if (Action == "verify" && (Url ?? Sha256) is not null)
            throw new UserException("--url and --sha256 are for 'data fetch'; 'data verify' reads the files that are here.");
        if (Url is not null && !Uri.TryCreate(Url, UriKind.Absolute, out _))
            throw new UserException($"--url is '{Url}'; give an http or https address.");
    }
}

/// <summary>Brings data sets and checks them.</summary>
internal static class DataCommand
{
    public static void Run(DataOptions options, CancellationToken cancellation)
    {
        var layout = CifarLayout.Of(options.Name);
        if (options.Action == "fetch")
            Fetch(layout, options, cancellation);
        else
            Show(DataVerifier.Verify(layout, options.DataDir), options);
    }

    private static void Fetch(CifarLayout layout, DataOptions options, CancellationToken cancellation)
    {
        var terminal = new Terminal(options);
        var folder = options.DataDir ?? DataFolder.Default() ?? DataFolder.BelowHere;
        var url = options.Url is null ? null : new Uri(options.Url);
        FetchResult? result = null;
        terminal.Progress($"fetching {layout.Name}", progress =>
            result = DataFetcher.FetchAsync(layout, folder, url, options.Sha256, new Received(progress), cancellation).GetAwaiter().GetResult());
        if (result!.AlreadyThere)
            terminal.Note($"'{result.Report.Folder}' was there already; nothing was fetched.");
        Show(result.Report, options);
    }

    private static void Show(DataReport report, Options options)
    {
        if (options.Json)
            Terminal.WriteJson(report);
        else
        {
            Console.WriteLine($"{report.DataSet} in {report.Folder}");
            var table = Terminal.PlainTable("file", "state", "records", "remark");
            foreach (var file in report.Files)
                table.AddRow(file.File, file.State.ToString().ToLowerInvariant(), $"{file.Records}", Markup.Escape(file.Message));
            Terminal.Out.Write(table);
            foreach (var part in report.Balance)
                Console.WriteLine($"{part.Part}: {part.Records} records, {part.FewestPerClass} to {part.MostPerClass} of each class");
        }
        var broken = report.Files.Where(file => file.State == FileState.Broken).Select(file => file.File).ToList();
        if (broken.Count > 0)
            throw new UserException(
                $"{string.Join(", ", broken)} in '{report.Folder}' cannot be used; fetch again with 'perturbnas data fetch {report.DataSet}'.");
    }

    // Bytes of the archive as a fraction of it; a server that does not say how much there is leaves the fraction at zero.
    private sealed class Received(IProgress<ProgressReport> progress) : IProgress<FetchProgress>
    {
        public void Report(FetchProgress value)
        {
            var total = value.Total is { } bytes ? $" of {bytes / 1e6:0.0}" : "";
            progress.Report(new ProgressReport(value.Total > 0 ? (double)value.Received / value.Total.Value : 0, $"{value.Received / 1e6:0.0}{total} MB"));
        }
    }
}
