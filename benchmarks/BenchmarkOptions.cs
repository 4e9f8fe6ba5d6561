using System.Reflection;
using CommandLine;
using CommandLine.Text;
using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Cuda;
using PerturbNas.Spaces;

namespace PerturbNas.Benchmarks;

/// <summary>The command line. Every suite takes the same options; those that a suite has no use for are refused.</summary>
internal sealed class BenchmarkOptions
{
    private const string Usage = """
        Suites:
          kernels      every kernel at the sizes of the supernets and derived networks: GFLOP/s, GB/s, share of the machine's limit; on cuda
                       beside cuBLAS and cuDNN, where they are installed
          search-step  an alpha step and a weight step of the supernet
          scoring      all candidates of one normal and one reduction edge, no racing, per candidate and batch
          selection    a small search and the whole selection after it, tuning included, on synthetic images
          scaling      time against batch, channels, layers, variants and threads, with fitted exponents
          busy         the search step while every processor is busy with other work
          targets      what the project has promised, row by row: wanted, reached, and whether that is enough; s5 of 16 channels, 8 cells
          racing       how often raced decisions of trained supernets are those of full passes, and the images that racing saves

        Examples:
          dotnet run -c Release --project benchmarks -- search-step --peer --json step.json
          dotnet run -c Release --project benchmarks -- kernels --filter "depthwise_pointwise 32x32x16"
          dotnet run -c Release --project benchmarks -- kernels --device cuda --tf32
          dotnet run -c Release --project benchmarks -- scoring --space s3 --batch 96 --peer --peer-mode both
          dotnet run -c Release --project benchmarks -- racing --run runs/s2,runs/s3
          dotnet run -c Release --project benchmarks -- targets --peer --run runs/s3

        Exit codes: 0 done, 1 internal error, 2 something to put right (said on stderr).
        """;

    private const string Help = "'--help' lists suites and options";

    // Every suite, with those of the options below that not every suite has a use for.
    private static readonly Dictionary<string, string[]> _suites = new()
    {
        ["kernels"] = ["--filter", "--peer", "--peer-mode"],
        ["search-step"] = ["--peer", "--peer-mode"],
        ["scoring"] = ["--peer", "--peer-mode", "--edge", "--batches"],
        ["selection"] = ["--peer", "--peer-mode", "--images", "--epochs", "--tune-epochs"],
        ["scaling"] = ["--edge"],
        ["busy"] = ["--peer", "--peer-mode"],
        ["targets"] = ["--peer", "--run"],
        ["racing"] = ["--run", "--images", "--orders", "--every", "--records"],
    };

    [Value(0, MetaName = "SUITE", HelpText = "What to measure; see below.")]
    public string Suite { get; set; } = "";

    [Option("space", Default = "s5", MetaValue = "NAME", HelpText = "Search space: s1 to s5, darts, or a space file.")]
    public string Space { get; set; } = "";

    [Option("channels", Default = 16, MetaValue = "N", HelpText = "Channels C of the first cells.")]
    public int Channels { get; set; }

    [Option("layers", Default = 8, MetaValue = "N", HelpText = "Cells.")]
    public int Layers { get; set; }

    [Option("batch", Default = 64, MetaValue = "N", HelpText = "Images a batch.")]
    public int Batch { get; set; }

    [Option("threads", Default = 0, MetaValue = "N", HelpText = "Threads of both programs; 0: one per processor.")]
    public int Threads { get; set; }

    [Option("device", Default = "cpu", MetaValue = "NAME", HelpText = "What ours runs on: cpu or cuda.")]
    public string Device { get; set; } = "";

    [Option("tf32", HelpText = "cuda: multiply on the tensor cores, whose factors have 10 bits of mantissa instead of 23; so does what is timed beside it.")]
    public bool Tf32 { get; set; }

    [Option("isa", Default = "best", MetaValue = "NAME", HelpText = "Instruction set of our kernels: best, portable, avx2, avx512 or avx512-zen.")]
    public string Isa { get; set; } = "";

    [Option("repeats", MetaValue = "N", HelpText = "Timed repeats, after one that warms up (5; selection: 1).")]
    public int? Repeats { get; set; }

    [Option("peer", HelpText = "Alternate with PyTorch doing the same work, from the same weights.")]
    public bool Peer { get; set; }

    [Option("peer-mode", Default = "tuned", MetaValue = "NAME",
        HelpText = "tuned (channels last, an allocator that keeps memory), stock, or both one after the other.")]
    public string PeerMode { get; set; } = "";

    [Option("filter", MetaValue = "TEXT", HelpText = "kernels: only cases whose name and pass contain this text.")]
    public string? Filter { get; set; }

    [Option("edge", Default = 7, MetaValue = "N", HelpText = "scoring, scaling: the edge, 0 to 13, whose candidates are scored.")]
    public int Edge { get; set; }

    [Option("batches", Default = 4, MetaValue = "N", HelpText = "scoring: batches a repeat.")]
    public int Batches { get; set; }

    [Option("images", MetaValue = "N", HelpText = "selection: images of each half of the data (128); racing: of the validation half (all).")]
    public int? Images { get; set; }

    [Option("epochs", Default = 1, MetaValue = "N", HelpText = "selection: epochs of the search.")]
    public int Epochs { get; set; }

    [Option("tune-epochs", Default = 1, MetaValue = "N", HelpText = "selection: epochs of tuning after every decision.")]
    public int TuneEpochs { get; set; }

    [Option("run", MetaValue = "RUN,...", Separator = ',', HelpText = "racing, targets: folders of runs that 'perturbnas search' has finished.")]
    public IEnumerable<string> Runs { get; set; } = [];

    [Option("orders", Default = 20, MetaValue = "N", HelpText = "racing: random orders of the batches that every decision is raced in.")]
    public int Orders { get; set; }

    [Option("every", Default = 1, MetaValue = "N", HelpText = "racing: decide every Nth edge and node only.")]
    public int Every { get; set; }

    [Option("records", MetaValue = "FOLDER", HelpText = "racing: keep the recorded full passes here, and use those that are here (none by default).")]
    public string? Records { get; set; }

    [Option("json", MetaValue = "FILE", HelpText = "Write everything that was measured to this file.")]
    public string? Json { get; set; }

    /// <summary>Timed repeats of what takes seconds.</summary>
    internal int TimedRepeats => Repeats ?? 5;

    /// <summary>A backend as the options ask for it, with this many threads or as many as they say.</summary>
    public Backend NewBackend(int? threads = null) => Device == "cuda" ? new CudaBackend(DeviceKind.Cuda) { Tf32 = Tf32 } : new CpuBackend(
        threads ?? Threads, Isa == "best" ? Backends.Cpu.Isa.Best : CpuBackend.Isas.Single(known => known.Name == Isa).Isa);

    /// <summary>A backend's worker threads; those of the peer beside a CUDA device, whose host side has one.</summary>
    public static int ThreadsOf(Backend backend) => backend is CpuBackend cpu ? cpu.Threads : 1;

    /// <summary>The options that the arguments stand for, checked; null if they ask for help, which has been printed.</summary>
    /// <exception cref="UserException">The arguments cannot be understood or used.</exception>
    public static BenchmarkOptions? Read(string[] arguments)
    {
        arguments = [.. arguments.Select(argument => argument is "-h" or "-?" ? "--help" : argument)];
        RequireValues(arguments);
        using var parser = new Parser(settings =>
        {
            settings.HelpWriter = null;
            settings.AutoVersion = false;
            settings.ParsingCulture = System.Globalization.CultureInfo.InvariantCulture;
        });
        var result = parser.ParseArguments<BenchmarkOptions>(arguments);
        if (result is Parsed<BenchmarkOptions> parsed)
        {
            parsed.Value.Validate(arguments);
            return parsed.Value;
        }
        var errors = ((NotParsed<BenchmarkOptions>)result).Errors.ToList();
        if (!errors.Any(error => error is HelpRequestedError))
            throw new UserException(Sentence(errors[0]));
        var help = HelpText.AutoBuild(
            result,
            text =>
            {
                text.Heading = "Benchmarks of PerturbNas: dotnet run -c Release --project benchmarks -- SUITE [OPTIONS]";
                text.Copyright = "";
                text.AutoVersion = false;
                text.AdditionalNewLineAfterOption = false;
                text.MaximumDisplayWidth = 120;
                return text;
            },
            error => error);
        Console.WriteLine($"{help.ToString().Trim()}\n\n{Usage}");
        return null;
    }

    private void Validate(string[] arguments)
    {
        if (Suite.Length == 0)
            throw new UserException($"No suite is given; {Help}.");
        RequireChoice("The suite", Suite, [.. _suites.Keys]);
        if (Device == "cuda-emulated")
            throw new UserException("--device is 'cuda-emulated', which takes the processor's time and has no cuBLAS or cuDNN beside it; choose cpu or cuda.");
        RequireChoice("--device", Device, "cpu", "cuda");
        if (Tf32 && Device != "cuda")
            throw new UserException("--tf32 is for CUDA devices; leave it out, or give --device cuda.");
        RequireChoice("--isa", Isa, ["best", .. CpuBackend.Isas.Select(known => known.Name)]);
        RequireChoice("--peer-mode", PeerMode, "tuned", "stock", "both");
        SearchSpace.Load(Space);
        RequireRange("--channels", Channels, 2, 1024);
        RequireRange("--layers", Layers, 1, 1000);
        RequireRange("--batch", Batch, 1, 1 << 16);
        RequireRange("--threads", Threads, 0, 256);
        RequireRange("--repeats", Repeats ?? 1, 1, 1000);
        RequireRange("--edge", Edge, 0, CellTopology.Edges - 1);
        RequireRange("--batches", Batches, 1, 1000);
        RequireRange("--images", Images ?? 1, 1, 25_000);
        RequireRange("--epochs", Epochs, 1, 1000);
        RequireRange("--tune-epochs", TuneEpochs, 0, 1000);
        RequireRange("--orders", Orders, 1, 1000);
        RequireRange("--every", Every, 1, CellTopology.Edges);
        var given = arguments.Select(argument => argument.Split('=')[0]).ToHashSet();
        foreach (var option in _suites.Values.SelectMany(options => options).Where(given.Contains))
        {
            if (!_suites[Suite].Contains(option))
                throw new UserException($"'{Suite}' has no use for {option}; leave it out, or choose " +
                    $"{string.Join(" or ", _suites.Keys.Where(suite => _suites[suite].Contains(option)))}.");
        }
        if (Suite == "racing" && !Runs.Any())
            throw new UserException("'racing' needs trained supernets; give --run with the folders of runs that 'perturbnas search' has finished.");
        if (Records is not null && !Directory.Exists(Records))
            throw new UserException($"--records is '{Records}', which is no folder; create it, or leave the option out.");
        if (Json is not null && (Directory.Exists(Json) || !Directory.Exists(Path.GetDirectoryName(Path.GetFullPath(Json)))))
            throw new UserException($"--json is '{Json}', which is no file in an existing folder; create the folder or name another file.");
    }

    // CommandLineParser passes over an option at the end that lacks its value, and over arguments that no option takes.
    private static void RequireValues(string[] arguments)
    {
        var takesValue = typeof(BenchmarkOptions).GetProperties()
            .Where(property => property.PropertyType != typeof(bool) && property.GetCustomAttribute<OptionAttribute>() is not null)
            .Select(property => $"--{property.GetCustomAttribute<OptionAttribute>()!.LongName}").ToHashSet();
        var free = 0;
        for (var i = 0; i < arguments.Length; i++)
        {
            if (!arguments[i].StartsWith('-') && ++free > 1)
                throw new UserException($"There is no use for '{arguments[i]}'; {Help}.");
            if (takesValue.Contains(arguments[i]) && (++i == arguments.Length || arguments[i].StartsWith("--", StringComparison.Ordinal)))
                throw new UserException($"{arguments[i - 1]} needs a value after it; {Help}.");
        }
    }

    private static void RequireChoice(string option, string value, params string[] choices)
    {
        if (!choices.Contains(value))
            throw new UserException($"{option} is '{value}'; choose {string.Join(", ", choices[..^1])} or {choices[^1]}.");
    }

    private static void RequireRange(string option, int value, int least, int most)
    {
        if (value < least || value > most)
            throw new UserException($"{option} is {value}; give a number from {least} to {most}.");
    }

    private static string Sentence(Error error) => error switch
    {
        UnknownOptionError e => $"There is no option '--{e.Token}'; {Help}.",
        RepeatedOptionError e => $"--{e.NameInfo.LongName} is given twice; give it once.",
        BadFormatConversionError e => $"--{e.NameInfo.LongName} needs a whole number after it; {Help}.",
        NamedError e => $"--{e.NameInfo.LongName} cannot be used like this; {Help}.",
        _ => $"The arguments cannot be understood ({error.Tag}); {Help}.",
    };
}
