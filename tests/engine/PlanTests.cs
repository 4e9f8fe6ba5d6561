using PerturbNas.Autograd;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Planning;
using PerturbNas.Networks;
using PerturbNas.Reports;
using PerturbNas.Search;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Tests.Data;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>What things cost, and forecasts of whole runs, against counts made by hand and against what runs really use.</summary>
public sealed class PlanTests
{
    private const int Images = 64;

    /// <summary>The paper's supernet on CIFAR-10: some 42 GFLOP forward, and as much again for each of the two gradients.</summary>
    [Fact]
    public void TheSupernetCostsWhatItsArchitectureSays()
    {
        using var backend = new MeteredBackend();
        using var network = new Supernet(backend, SearchSpace.Load("s5"), new SupernetSize(16, 8, 10, 32), seed: 0);
        using var arena = new Arena(backend);
        var alpha = network.Record(arena, new TapeOptions(BatchNormMode.Training, AlphaGradients: true), Images, new EdgeStates()).Tape;
        var weights = network.Record(arena, new TapeOptions(BatchNormMode.Training, WeightGradients: true), Images, new EdgeStates()).Tape;
        var products = Products();
        Assert.InRange(alpha.ForwardCost.Flops, 40e9, 44.5e9);
        // Pools, normalisation, statistics and sums are what is not a product.
        Assert.InRange(alpha.ForwardCost.Flops / products, 1.0, 1.2);
        // The stem's input, the image, wants no gradient.
        const double classifier = 2.0 * Images * 256 * 10, stem = 2.0 * Images * 27 * 48 * 1024;
        Assert.Equal(products + classifier, alpha.ForwardCost.ProductFlops);
        Assert.Equal(2 * (products + classifier) - stem, weights.BackwardCost.ProductFlops);
        Assert.Equal(alpha.ForwardCost.Flops, weights.ForwardCost.Flops);
        Assert.InRange(alpha.BackwardCost.Flops / products, 0.97, 1.1);
        Assert.InRange(weights.BackwardCost.Flops / products, 1.97, 2.2);
        Assert.Equal(default, network.Record(arena, new TapeOptions(BatchNormMode.BatchStatistics), Images, new EdgeStates()).Tape.BackwardCost);
    }

    /// <summary>What was forecast is what a real search takes, to the byte and to the operation; a selection stays below its forecast.</summary>
    [Fact]
    public void RunsTakeWhatWasForecast()
    {
        using var folder = new TemporaryFolder();
        using var cpu = new CpuBackend(threads: 1);
        using var run = RunDirectory.Open(folder["run"]);
        // Batches of 4 and 2 images.
        var configuration = Configuration("s2", channels: 4, layers: 3, batch: 4) with { TrainLimit = 6, ValidLimit = 6 };
        using (var backend = new MeteredBackend(cpu))
        using (var experiment = Experiment.Create(run, configuration, backend, initialFile: null))
        using (var search = new SupernetSearch(experiment))
        {
            search.Run(null, CancellationToken.None);
            var forecast = experiment.SearchForecast;
            Assert.Equal(forecast.Phases[^1].Work.Total, backend.Total);
            Assert.Equal(forecast.Memory.Tapes + forecast.Memory.Parameters, backend.PeakBytes);
        }

        var selecting = new SelectionConfiguration { By = "perturbation", TuneEpochs = 1, TrainLimit = 6, ValidLimit = 6, Batch = 4, Seed = 0 };
        using (var backend = new MeteredBackend(cpu))
        using (var experiment = Experiment.Open(run, backend))
        using (var selection = SelectionRun.Start(experiment, selecting))
        {
            selection.Run(null, CancellationToken.None);
            var forecast = Forecast.OfSelection(configuration, selecting);
            Assert.InRange((double)backend.Total.Flops / forecast.Phases[^1].Work.Total.Flops, 0.5, 1);
            // Selection tunes for the first time when two edges have been decided.
            Assert.InRange((double)backend.PeakBytes / (forecast.Memory.Tapes + forecast.Memory.Parameters), 0.9, 1);
        }
    }

    /// <summary>A search in a process of its own, by the most memory that the system saw it use.</summary>
    [Fact]
    public void PeakMemoryIsForecastWithinTenPercent()
    {
        using var folder = new TemporaryFolder();
        var forecast = Forecast.OfSearch(Configuration("s5", channels: 16, layers: 4, batch: 24) with { TrainLimit = 24, ValidLimit = 24 });
        using var process = Cli.CommandLine.Start(["search", "--space", "s5", "--layers", "4", "--batch", "24", "--train-limit", "24",
            "--valid-limit", "24", "--epochs", "1", "--data", "synthetic", "--out", folder["run"], "--quiet"]);
        long peak = 0;
        while (!process.WaitForExit(20))
            peak = Math.Max(peak, Peak(process.Id));
        Assert.Equal(0, process.ExitCode);
        Assert.InRange(forecast.Memory.Total / (double)peak, 0.9, 1.1);

        // The process may end at any time.
        static long Peak(int process)
        {
            try
            {
                var line = File.ReadLines($"/proc/{process}/status").FirstOrDefault(line => line.StartsWith("VmHWM:", StringComparison.Ordinal));
                return line is null ? 0 : 1024 * long.Parse(line.Split(' ', '\t')[^2]);
            }
            catch (IOException)
            {
                return 0;
            }
        }
    }

    [Fact]
    public void WhatDoesNotFitIsRefusedBeforeAnythingIsWritten()
    {
        using var folder = new TemporaryFolder();
        var error = Cli.CommandLine.UserError("search", "--data", "synthetic", "--batch", "25000", "--channels", "24", "--out", folder["run"]);
        Assert.Matches(@"^perturbnas: This needs about [\d.]+ GiB of memory, but [\d.]+ [GM]iB are available; take a smaller --batch " +
            @"\(it is 25000\) or fewer --channels", error);
        Assert.False(RunDirectory.Exists(folder["run"]));

        var forecast = Forecast.OfSearch(Configuration("s2", channels: 4, layers: 3, batch: 4));
        forecast.RequireMemory(forecast.Memory.Total);
        forecast.RequireMemory(available: null);
        Assert.Throws<UserException>(() => forecast.RequireMemory(forecast.Memory.Total - 1));
    }

    /// <summary>The lowest of the machine's memory and the limits of the process's control group and of those above it counts.</summary>
    [Fact]
    public void AvailableMemoryHeedsControlGroups()
    {
        using var folder = new TemporaryFolder();
        Write("proc/meminfo", "MemTotal:       2000 kB\nMemAvailable:   1000 kB\n");
        Assert.Equal(1000 * 1024, MachineMemory.Available(folder.Path));
        Write("proc/self/cgroup", "0::/a/b\n");
        Write("sys/fs/cgroup/a/b/memory.max", "max\n");
        Write("sys/fs/cgroup/a/b/memory.current", "5000\n");
        Assert.Equal(1000 * 1024, MachineMemory.Available(folder.Path));
        Write("sys/fs/cgroup/a/memory.max", "9000\n");
        Write("sys/fs/cgroup/a/memory.current", "5000\n");
        Write("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 2000\n");
        Assert.Equal(6000, MachineMemory.Available(folder.Path));
        Write("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000\n");
        Write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n");
        Assert.Equal(2000, MachineMemory.Available(folder.Path));
        Assert.Null(MachineMemory.Available(folder["nothing"]));

        void Write(string file, string text)
        {
            Directory.CreateDirectory(Path.GetDirectoryName(folder[file])!);
            File.WriteAllText(folder[file], text);
        }
    }

    private static SearchConfiguration Configuration(string space, int channels, int layers, int batch) => new()
    {
        Space = SearchSpace.Load(space).ToJson(),
        Method = "darts",
        Data = "synthetic",
        Epochs = 1,
        Batch = batch,
        Channels = channels,
        Layers = layers,
        Seed = 0,
        TrainPortion = 0.5,
    };

    // Two operations per multiply-add of every convolution, cell by cell; in a reduction cell the edges from the inputs have stride 2,
    // which the first half of a separable convolution has already taken.
    private static double Products()
    {
        var products = 2.0 * 27 * 48 * 1024;
        var (beforePrevious, previous, channels, pixels) = (48, 48, 16, 1024);
        for (var cell = 0; cell < 8; cell++)
        {
            var reduction = cell is 2 or 5;
            if (reduction)
                channels *= 2;
            products += 2.0 * (beforePrevious + previous) * channels * pixels;
            if (reduction)
                pixels /= 4;
            products += CellTopology.Edges * 2.0 * channels * pixels * (2 * (9 + channels) + 2 * (25 + channels) + 9 + channels + 25 + channels);
            // The strided skip connections of a reduction cell: two halves of a 1x1 convolution.
            if (reduction)
                products += 8 * 2.0 * channels * channels * pixels;
            (beforePrevious, previous) = (previous, 4 * channels);
        }
        return Images * products;
    }
}
