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
/// <param name="Launches">Launches that these calls are on a CUDA device.</param>
/// <param name="Cost">The least that they have to do.</param>
/// <param name="Sample">The counters of the smaller pass.</param>
/// <param name="SampleCost">The least that its calls have to do.</param>
public sealed record EmulatedKernel(string Kernel, int Calls, long Launches, Cost Cost, EmulatedCounters Sample, Cost SampleCost)
{
    /// <summary>Float operations executed over those of the operator's definition; 1 where nothing is computed twice.</summary>
    public double FlopFactor => SampleCost.Flops == 0 ? 1 : Math.Max(1, (double)Sample.FloatOperations / SampleCost.Flops);

    /// <summary>Bytes moved over the least: what is read again, and what was not asked for, counts as if no cache had it.</summary>
    public double ByteFactor => SampleCost.Bytes == 0 ? 1 : Math.Max(1, (double)Sample.TransferredBytes / SampleCost.Bytes);

    /// <summary>Seconds at full size on a device with these limits: the roofline of the operations executed and the bytes moved.</summary>
    public double SecondsAtLeast(MachineLimits limits) =>
        Math.Max(Cost.Flops * FlopFactor / limits.Gigaflops, Cost.Bytes * ByteFactor / limits.GigabytesPerSecond) / 1e9;
}

/// <summary>A phase with its kernels, those with the longest predicted time first.</summary>
public sealed record EmulatedPhase(string Phase, IReadOnlyList<EmulatedKernel> Kernels)
{
    public long Launches => Kernels.Sum(kernel => kernel.Launches);

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
        var sample = new Dictionary<(string, string), (EmulatedCounters Counters, Cost Cost)>();
        var before = emulated.Emulated;
        Run(sampleSize, emulated, (phase, call) =>
        {
            var after = emulated.Emulated;
            var sum = sample.GetValueOrDefault((phase, call.Kernel));
            sample[(phase, call.Kernel)] = (sum.Counters + (after - before), sum.Cost + call.Cost);
            before = after;
        }, cancellation);

        using var counter = new CudaLaunchCounter();
        var full = new Dictionary<(string Phase, string Kernel), (int Calls, long Launches, Cost Cost)>();
        long launched = 0;
        Run(configuration, counter, (phase, call) =>
        {
            var launches = counter.Launches.Values.Sum();
            var sum = full.GetValueOrDefault((phase, call.Kernel));
            full[(phase, call.Kernel)] = (sum.Calls + 1, sum.Launches + launches - launched, sum.Cost + call.Cost);
            launched = launches;
        }, cancellation);
        var limits = emulated.MeasureLimits();
        return
        [
            .. full.GroupBy(entry => entry.Key.Phase).Select(phase => new EmulatedPhase(phase.Key,
            [
                .. phase.Select(entry =>
                {
                    var (counters, cost) = sample.GetValueOrDefault(entry.Key);
                    return new EmulatedKernel(entry.Key.Kernel, entry.Value.Calls, entry.Value.Launches, entry.Value.Cost, counters, cost);
                }).OrderByDescending(kernel => kernel.SecondsAtLeast(limits)),
            ])),
        ];
    }

    /// <summary>Launches of one alpha step and one weight step together, at any size without a device.</summary>
    public static long LaunchesPerSearchStep(SearchConfiguration configuration)
    {
        using var counter = new CudaLaunchCounter();
        long scoring = 0, before = 0;
        Run(configuration, counter, (phase, _) =>
        {
            var launches = counter.Launches.Values.Sum();
            scoring += phase == "scoring" ? launches - before : 0;
            before = launches;
        }, CancellationToken.None);
        return before - scoring;
    }

    private static void Run(SearchConfiguration configuration, Backend inner, Action<string, KernelCall> called, CancellationToken cancellation)
    {
        const int classes = 10, imageSize = 32;
        using var backend = new MeteredBackend(inner);
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
        Pass("scoring", new TapeOptions(BatchNormMode.BatchStatistics), masks, null);

        void Pass(string phase, TapeOptions options, IReadOnlyList<Mask> variants, Action? update)
        {
            cancellation.ThrowIfCancellationRequested();
            var pass = network.Record(arena, options, configuration.Batch, new EdgeStates(), variants);
            backend.Called = call => called(phase, call);
            pass.Forward(images, labels);
            if (update is not null)
            {
                pass.Backward();
                update();
            }
            backend.Called = null;
        }
    }
}
