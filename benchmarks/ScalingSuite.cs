using PerturbNas.Networks;
using PerturbNas.Spaces;

namespace PerturbNas.Benchmarks;

/// <summary>
/// How time grows: the search step against batch, channels, layers and threads around the sizes asked for, and a scoring pass against its
/// variants (candidates of a normal edge); with the exponent b of time = a x^b. Work that grows faster than time means fixed costs.
/// </summary>
internal static class ScalingSuite
{
    public static void Run(BenchmarkOptions options, Report report)
    {
        var size = WorkloadSize.Of(options);
        var rows = new List<IReadOnlyList<string>>();
        Sweep("batch", Around(size.Batch), value => StepOf(size with { Batch = value }));
        Sweep("channels", Around(size.Channels).Where(channels => channels > 1), value => StepOf(size with { Channels = value }));
        Sweep("layers", new[] { size.Layers / 2, size.Layers, 2 * size.Layers }.Where(layers => layers > 0),
            value => StepOf(size with { Layers = value }));
        Sweep("threads", Doublings(report.Machine.Threads),
            value => (SearchStepSuite.Measure(size, options, value), SearchStepSuite.Count(size).ProductFlops));
        using var backend = options.NewBackend();
        using var workload = new Workload(size, backend);
        Sweep("variants", Doublings(workload.Network.Space.Columns(CellType.Normal)), Score);
        report.Table(["time against", "value", "median s", "min-max s", "of FMA limit", "exponent", "exponent of work", "R2"], rows);

        (Repeats, double) StepOf(WorkloadSize changed) => (SearchStepSuite.Measure(changed, options), SearchStepSuite.Count(changed).ProductFlops);

        (Repeats, double) Score(int variants)
        {
            var masks = ScoringSuite.Candidates(workload.Network.Space, CellType.Normal, options.Edge).Take(variants).ToList();
            var evaluation = workload.NewEvaluation(1);
            return (Timing.Measure(options.TimedRepeats, () => evaluation.Evaluate(new EdgeStates(), masks)), ScoringSuite.Count(size, masks).ProductFlops);
        }

        void Sweep(string dimension, IEnumerable<int> values, Func<int, (Repeats Seconds, double Flops)> measure)
        {
            var points = values.Distinct().Select(value => (Value: value, Measured: measure(value))).ToList();
            var (exponent, r2) = Timing.FitPower([.. points.Select(p => ((double)p.Value, p.Measured.Seconds.Median))]);
            var (work, _) = Timing.FitPower([.. points.Select(p => ((double)p.Value, p.Measured.Flops))]);
            report.Add(new
            {
                Kind = "scaling",
                dimension,
                exponent,
                ExponentOfWork = work,
                r2,
                Points = points.Select(p => new { p.Value, p.Measured.Seconds, p.Measured.Flops }).ToList()
            });
            foreach (var (value, (seconds, flops)) in points)
            {
                var last = value == points[^1].Value && points.Count > 1;
                rows.Add(
                [
                    dimension, $"{value}", $"{seconds.Median:0.0000}", $"{seconds.Minimum:0.0000}-{seconds.Maximum:0.0000}",
                    $"{report.ShareOfFmaLimit(flops, seconds.Median):P1}", last ? $"{exponent:0.00}" : "", last ? $"{work:0.00}" : "",
                    last ? $"{r2:0.000}" : "",
                ]);
            }
        }
    }

    private static IEnumerable<int> Around(int value) => new[] { value / 4, value / 2, value }.Where(x => x > 0);

    // 1, 2, 4, ... and the most itself.
    private static IEnumerable<int> Doublings(int most)
    {
        for (var value = 1; value < most; value *= 2)
            yield return value;
        yield return most;
    }
}
