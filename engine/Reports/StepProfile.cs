using System.Diagnostics;
using System.Text.Json;
using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Backends.Planning;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Reports;

/// <summary>All calls of one kernel in a phase.</summary>
public sealed record KernelProfile(string Kernel, int Calls, double Seconds, Cost Cost)
{
    public double Gigaflops => Cost.Flops / Seconds / 1e9;

    public double GigabytesPerSecond => Cost.Bytes / Seconds / 1e9;

    /// <summary>Share of the roofline min(multiply-add rate, bandwidth * FLOPs per byte): 1 at the machine's limit.</summary>
    public double LimitShare(MachineLimits limits) => Cost.SecondsAtLeast(limits) / Seconds;
}

/// <summary>A phase, run several times.</summary>
/// <param name="Passes">How often it ran.</param>
/// <param name="Seconds">Wall-clock time of all passes together.</param>
/// <param name="UnprofiledSeconds">The same of as many passes, taken in turns with these, that nobody looked into.</param>
/// <param name="Kernels">Its kernels, those that take longest first.</param>
public sealed record PhaseProfile(string Phase, int Passes, double Seconds, double UnprofiledSeconds, IReadOnlyList<KernelProfile> Kernels)
{
    /// <summary>What is not in kernels: the tape's own work, mixing weights, reading results; all of a phase without kernels.</summary>
    public double OtherSeconds => Seconds - Kernels.Sum(kernel => kernel.Seconds);
}

/// <summary>
/// Where the time of a search and of scoring goes: runs some alpha steps, weight steps and scoring passes of one edge as the trainer and the
/// masked evaluation do, after some to warm up, and times every kernel call. Calls that ran as a group share the group's time in
/// proportion to what they take one by one.
/// </summary>
public sealed class StepProfile
{
    private readonly List<(string Phase, long Start, long End)> _spans = [];
    private readonly List<(int Span, KernelCall Call)> _calls = [];
    private readonly Dictionary<string, long> _unprofiled = [];

    private StepProfile()
    {
    }

    /// <summary>The phases in the order in which they ran.</summary>
    public IReadOnlyList<PhaseProfile> Phases { get; private set; } = [];

    /// <summary>Measures.</summary>
    /// <param name="configuration">Space, size, batch and data; weights are drawn from its seed.</param>
    /// <param name="inner">The backend to measure.</param>
    /// <param name="steps">Passes of each phase, at least 1.</param>
    /// <param name="cancellation">Checked between passes.</param>
    public static StepProfile Measure(SearchConfiguration configuration, Backend inner, int steps, CancellationToken cancellation)
    {
        var profile = new StepProfile();
        var batch = configuration.Batch;
        // A few batches are enough; they come round again.
        var limit = batch * Math.Min(steps, 4);
        var (train, validation) = (configuration with
        {
            TrainLimit = Math.Min(configuration.TrainLimit ?? limit, limit),
            ValidLimit = Math.Min(configuration.ValidLimit ?? limit, limit),
        }).ReadData();
        using var backend = new MeteredBackend(inner);
        using var network = new Supernet(backend, configuration.ParseSpace(),
            new SupernetSize(configuration.Channels, configuration.Layers, train.Classes, train.Height), configuration.Seed);
        using var arena = new Arena(backend);
        using var sgd = new Sgd(backend, network.Parameters);
        using var adam = new AlphaAdam(backend, network.Alphas);
        var states = new EdgeStates();

        var alphas = new BatchLoader(validation, batch, configuration.Seed, "alpha", augment: true, configuration.Cutout);
        var weights = new BatchLoader(train, batch, configuration.Seed, "weights", augment: true, configuration.Cutout);
        var scoring = BatchLoader.InRecordOrder(validation, batch);
        Mask[] masks = [.. network.Space.Operations(CellType.Normal)[0].Select((_, o) => new Mask(CellType.Normal, 0, o))];
        Run("alpha step", alphas, Pass(new TapeOptions(BatchNormMode.Training, AlphaGradients: true)), adam.Step);
        Run("weight step", weights, Pass(new TapeOptions(BatchNormMode.Training, WeightGradients: true)),
            () => sgd.Step((float)configuration.Schedule.First));
        Run("scoring", scoring, Pass(new TapeOptions(BatchNormMode.BatchStatistics), masks), null);
        profile.Summarise();
        return profile;

        SupernetPass Pass(TapeOptions options, params IReadOnlyList<Mask> variants) =>
            network.Record(arena, options, Math.Min(batch, Math.Min(train.Count, validation.Count)), states, variants);

        void Run(string phase, BatchLoader loader, SupernetPass pass, Action? update)
        {
            var images = new float[loader.BatchSize * train.ImageSize];
            var labels = new int[loader.BatchSize];
            var losses = new double[pass.Variants];
            var correct = new long[pass.Variants];
            // Only batches that are full: the pass is recorded for one size.
            var batches = Math.Max(1, loader.Steps - 1);
            loader.Fill(0, 0, images, labels);
            Once(null);
            var calls = new List<KernelCall>();
            backend.PassesGroups = false;
            Once(calls.Add);
            backend.PassesGroups = true;
            long[] alone = [.. calls.Select(call => call.End - call.Start)];
            for (var step = 0; step < steps; step++)
            {
                cancellation.ThrowIfCancellationRequested();
                var start = Stopwatch.GetTimestamp();
                loader.Fill(0, step % batches, images, labels);
                profile.Close("data", start);
                start = Stopwatch.GetTimestamp();
                calls.Clear();
                Once(calls.Add);
                profile.Close(phase, start);
                profile._calls.AddRange(Divide(calls, alone).Select(call => (profile._spans.Count - 1, call)));
                start = Stopwatch.GetTimestamp();
                Once(null);
                profile._unprofiled[phase] = profile._unprofiled.GetValueOrDefault(phase) + Stopwatch.GetTimestamp() - start;
            }

            void Once(Action<KernelCall>? called)
            {
                backend.Called = called;
                pass.Forward(images.AsSpan(0, pass.Images * train.ImageSize), labels.AsSpan(0, pass.Images));
                pass.ReadResults(losses, correct);
                if (update is not null)
                {
                    pass.Backward();
                    update();
                }
                backend.Called = null;
            }
        }
    }

    /// <summary>Gives calls that ran as a group times of their own, one after the other.</summary>
    /// <param name="calls">All calls of a pass.</param>
    /// <param name="alone">What each of them took when it ran alone.</param>
    internal static IEnumerable<KernelCall> Divide(IReadOnlyList<KernelCall> calls, long[] alone)
    {
        for (var first = 0; first < calls.Count;)
        {
            if (calls[first].Group == 0)
            {
                yield return calls[first++];
                continue;
            }
            var end = first;
            while (end < calls.Count && calls[end].Group == calls[first].Group)
                end++;
            var scale = (double)(calls[first].End - calls[first].Start) / Math.Max(1, alone[first..end].Sum());
            double start = calls[first].Start;
            for (; first < end; first++)
            {
                var next = start + scale * alone[first];
                yield return calls[first] with { Start = (long)start, End = (long)next };
                start = next;
            }
        }
    }

    /// <summary>Writes all calls as a Chrome trace (complete events, microseconds; opens in Perfetto), one track a phase.</summary>
    /// <exception cref="UserException">The file cannot be written.</exception>
    public void WriteTrace(string path)
    {
        try
        {
            using var stream = new FileStream(path, FileMode.Create, FileAccess.Write);
            using var json = new Utf8JsonWriter(stream);
            var origin = _spans[0].Start;
            json.WriteStartArray();
            for (var track = 0; track < Phases.Count; track++)
            {
                json.WriteStartObject();
                Head("thread_name", "M", track);
                json.WriteStartObject("args");
                json.WriteString("name", Phases[track].Phase);
                json.WriteEndObject();
                json.WriteEndObject();
            }
            foreach (var (phase, start, end) in _spans)
            {
                json.WriteStartObject();
                Complete(phase, TrackOf(phase), start, end);
                json.WriteEndObject();
            }
            foreach (var (span, call) in _calls)
            {
                json.WriteStartObject();
                Complete(call.Kernel, TrackOf(_spans[span].Phase), call.Start, call.End);
                json.WriteStartObject("args");
                json.WriteNumber("flops", call.Cost.Flops);
                json.WriteNumber("bytes", call.Cost.Bytes);
                json.WriteEndObject();
                json.WriteEndObject();
            }
            json.WriteEndArray();

            void Complete(string name, int track, long start, long end)
            {
                Head(name, "X", track);
                json.WriteNumber("ts", 1e6 * (start - origin) / Stopwatch.Frequency);
                json.WriteNumber("dur", 1e6 * (end - start) / Stopwatch.Frequency);
            }

            void Head(string name, string kind, int track)
            {
                json.WriteString("name", name);
                json.WriteString("ph", kind);
                json.WriteNumber("pid", 1);
                json.WriteNumber("tid", track + 1);
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException($"The trace '{path}' cannot be written: {e.Message.TrimEnd('.')}; name another file.", e);
        }
    }

    private void Close(string phase, long start) => _spans.Add((phase, start, Stopwatch.GetTimestamp()));

    private int TrackOf(string phase) => Phases.Select(profile => profile.Phase).ToList().IndexOf(phase);

    private void Summarise() => Phases =
    [
        .. _spans.GroupBy(span => span.Phase).Select(spans => new PhaseProfile(spans.Key, spans.Count(),
            spans.Sum(span => Seconds(span.Start, span.End)), Seconds(0, _unprofiled.GetValueOrDefault(spans.Key)),
            [
                .. _calls.Where(entry => _spans[entry.Span].Phase == spans.Key).GroupBy(entry => entry.Call.Kernel)
                    .Select(calls => new KernelProfile(calls.Key, calls.Count(), calls.Sum(entry => Seconds(entry.Call.Start, entry.Call.End)),
                        calls.Aggregate(default(Cost), (sum, entry) => sum + entry.Call.Cost)))
                    .OrderByDescending(kernel => kernel.Seconds),
            ])),
    ];

    private static double Seconds(long start, long end) => (double)(end - start) / Stopwatch.Frequency;
}
