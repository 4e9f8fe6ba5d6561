using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Backends.Planning;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Reports;

/// <summary>One kernel of a phase: what its calls have to do at full size, and what the emulated device saw it do in a smaller one.</summary>
/// <param name="Kernel">The kernel's name as in kernels/.</param>
/// <param name="Calls">Calls in one pass of the phase, at full size.</param>
/// <param name="Cost">The least that they have to do.</param>
/// <param name="Sample">The counters of the smaller pass.</param>
/// <param name="SampleCost">The least that its calls have to do.</param>
public sealed record EmulatedKernel(string Kernel, int Calls, Cost Cost, EmulatedCounters Sample, Cost SampleCost)
{
    /// <summary>Float operations executed over those of the operator's definition; 1 where nothing is computed twice.</summary>
    public double FlopFactor => SampleCost.Flops == 0 ? 1 : Math.Max(1, (double)Sample.FloatOperations / SampleCost.Flops);

    /// <summary>Bytes moved over the least: what is read again, and what was not asked for, counts as if no cache had it.</summary>
    public double ByteFactor => SampleCost.Bytes == 0 ? 1 : Math.Max(1, (double)Sample.TransferredBytes / SampleCost.Bytes);

    /// <summary>Seconds at full size on a device with these limits: the roofline of the operations executed and the bytes moved.</summary>
    public double SecondsAtLeast(MachineLimits limits) =>
        Math.Max(Cost.Flops * FlopFactor / limits.Gigaflops, Cost.Bytes * ByteFactor / limits.GigabytesPerSecond) / 1e9;
}

/// <summary>A phase.</summary>
/// <param name="Launches">Launches of one pass at full size, by the kernel's name in PTX; several calls may share one, or a call take several.</param>
/// <param name="Kernels">Those with the longest predicted time first.</param>
public sealed record EmulatedPhase(string Phase, IReadOnlyDictionary<string, long> Launches, IReadOnlyList<EmulatedKernel> Kernels)
{
    public long LaunchCount => Launches.Values.Sum();

    public double SecondsAtLeast(MachineLimits limits) => Kernels.Sum(kernel => kernel.SecondsAtLeast(limits));
}

/// <summary>
/// What can be said of the CUDA kernels' speed without a GPU: a step and a scoring pass of few images and layers, run on the emulated device and
/// counted, which sees every extent that the full size has; and the launches and the work of the full size, which are exact. From both
/// follows what a device with given limits would take.
/// </summary>
public static class EmulatedProfile
{
    /// <summary>The smaller pass: three cells have all extents of the full size.</summary>
    public const int SampleImages = 2, SampleLayers = 3;

    private const string Scoring = "scoring";

    /// <param name="configuration">The full size.</param>
    /// <param name="emulated">The emulated device.</param>
    /// <param name="cancellation">Checked between passes.</param>
    public static IReadOnlyList<EmulatedPhase> Measure(SearchConfiguration configuration, CudaBackend emulated, CancellationToken cancellation)
    {
        var sampleSize = configuration with
        {
            Batch = Math.Min(configuration.Batch, SampleImages),
            Layers = Math.Min(configuration.Layers, SampleLayers),
        };
        var phase = "";
        var sample = new Dictionary<(string, string), (EmulatedCounters Counters, Cost Cost)>();
        var before = emulated.Emulated;
        using (var metered = new MeteredBackend(emulated) { PassesGroups = false })
        {
            metered.Called = call =>
            {
                var after = emulated.Emulated;
                var sum = sample.GetValueOrDefault((phase, call.Kernel));
                sample[(phase, call.Kernel)] = (sum.Counters + (after - before), sum.Cost + call.Cost);
                before = after;
            };
            Run(sampleSize, metered, next => phase = next, cancellation);
        }

        var full = new Dictionary<(string Phase, string Kernel), (int Calls, Cost Cost)>();
        using (var planned = new MeteredBackend())
        {
            planned.Called = call =>
            {
                var sum = full.GetValueOrDefault((phase, call.Kernel));
                full[(phase, call.Kernel)] = (sum.Calls + 1, sum.Cost + call.Cost);
            };
            Run(configuration, planned, next => phase = next, cancellation);
        }
        var launches = Launches(configuration);
        var limits = emulated.MeasureLimits();
        return
        [
            .. launches.Keys.Select(name => new EmulatedPhase(name, launches[name],
            [
                .. full.Where(entry => entry.Key.Phase == name).Select(entry =>
                {
                    var (counters, cost) = sample.GetValueOrDefault(entry.Key);
                    return new EmulatedKernel(entry.Key.Kernel, entry.Value.Calls, entry.Value.Cost, counters, cost);
                }).OrderByDescending(kernel => kernel.SecondsAtLeast(limits)),
            ])),
        ];
    }

    /// <summary>Launches of one alpha step and one weight step together, at any size and without a device.</summary>
    public static long LaunchesPerSearchStep(SearchConfiguration configuration) =>
        Launches(configuration).Where(phase => phase.Key != Scoring).Sum(phase => phase.Value.Values.Sum());

    private static Dictionary<string, Dictionary<string, long>> Launches(SearchConfiguration configuration)
    {
        using var counter = new CudaLaunchCounter();
        var (phase, before) = ("", new Dictionary<string, long>());
        var launches = new Dictionary<string, Dictionary<string, long>>();
        Run(configuration, counter, next =>
        {
            var after = counter.Launches.ToDictionary();
            if (phase.Length > 0)
                launches[phase] = after.Where(kernel => kernel.Value > before.GetValueOrDefault(kernel.Key))
                    .ToDictionary(kernel => kernel.Key, kernel => kernel.Value - before.GetValueOrDefault(kernel.Key));
            (phase, before) = (next, after);
        }, CancellationToken.None);
        return launches;
    }

    /// <param name="next">Told the name of every phase before it runs, and an empty one after the last.</param>
    private static void Run(SearchConfiguration configuration, Backend backend, Action<string> next, CancellationToken cancellation)
    {
        const int classes = 10, imageSize = 32;
        using var network = new Supernet(backend, configuration.ParseSpace(),
            new SupernetSize(configuration.Channels, configuration.Layers, classes, imageSize), configuration.Seed);
        using var arena = new Arena(backend);
        using var sgd = new Sgd(backend, network.Parameters);
        using var adam = new AlphaAdam(backend, network.Alphas);
        // What the counts do not depend on, as long as it is not all the same.
        var images = new float[configuration.Batch * 3 * imageSize * imageSize];
        var stream = new RandomStream(configuration.Seed, "profile");
        for (var i = 0; i < images.Length; i++)
            images[i] = 2 * stream.NextSingle() - 1;
        var labels = new int[configuration.Batch];
        Mask[] masks = [.. network.Space.Operations(CellType.Normal)[0].Select((_, o) => new Mask(CellType.Normal, 0, o))];
        Pass("alpha step", new TapeOptions(BatchNormMode.Training, AlphaGradients: true), [Mask.None], adam.Step);
        Pass("weight step", new TapeOptions(BatchNormMode.Training, WeightGradients: true), [Mask.None], () => sgd.Step((float)configuration.Schedule.First));
        Pass(Scoring, new TapeOptions(BatchNormMode.BatchStatistics), masks, null);
        next("");

        void Pass(string phase, TapeOptions options, IReadOnlyList<Mask> variants, Action? update)
        {
            cancellation.ThrowIfCancellationRequested();
            var pass = network.Record(arena, options, configuration.Batch, new EdgeStates(), variants);
            next(phase);
            pass.Forward(images, labels);
            if (update is not null)
            {
                pass.Backward();
                update();
            }
        }
    }
}
