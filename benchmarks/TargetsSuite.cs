using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Search;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Benchmarks;

/// <summary>
/// Everything that has a target, in one run: wanted, reached, and whether that is enough. Rows that need the peer or a trained supernet say so
/// where there is none. Some five minutes with --peer and --run.
/// </summary>
internal static class TargetsSuite
{
    private const int DefaultRepeats = 3, ScoringBatches = 2;

    // Candidates of every fourth edge of both cell types race.
    private static readonly int[] _racedEdges = [0, 4, 8, 12];

    private sealed record Row(string Target, double Wanted, bool AtMost, string Unit, Repeats? Reached, string Remark = "")
    {
        public bool IsReached => Reached is not null && (AtMost ? Reached.Median <= Wanted : Reached.Median >= Wanted);
    }

    public static void Run(BenchmarkOptions options, Report report)
    {
        options.Repeats ??= DefaultRepeats;
        options.Batches = ScoringBatches;
        var (s5, s3) = (WorkloadSize.Of(options) with { Space = "s5" }, WorkloadSize.Of(options) with { Space = "s3" });
        var rows = new List<Row>();

        // First, as the peak of memory is that of the process.
        var (seconds, peak, tuned) = SearchStepSuite.Measure(s5, options, options.Peer ? "tuned" : null, report);
        rows.Add(new("s5 search step, times faster than tuned PyTorch", 10, false, "x", tuned?.Ratio));
        rows.Add(new("s5 search step, times faster than stock PyTorch", 16, false, "x",
            options.Peer ? SearchStepSuite.Measure(s5, options, "stock", report).Duel!.Ratio : null));
        rows.Add(new("s3 search step, times faster than tuned PyTorch", 4, false, "x",
            options.Peer ? SearchStepSuite.Measure(s3, options, "tuned", report).Duel!.Ratio : null));
        rows.AddRange(Score(options, s5, report));
        rows.Add(options.Runs.Any() ? Race(options, report) : new("scoring a trained supernet, raced at 0.01, times faster than tuned PyTorch", 30, false, "x", null,
            "give --run with a trained supernet"));

        using (var backend = options.NewBackend())
        {
            // The machine may be shared: its limits are the best that it showed.
            var again = backend.MeasureLimits();
            var limits = report.Limits.Gigaflops > again.Gigaflops ? report.Limits : again;
            rows.Add(new("share of the FMA limit, fused forward kernels of the supernet", 60, false, "%",
                new Repeats([.. KernelSuite.FusedForwardShare(options, backend, limits).Values.Select(share => 100 * share)]), "all, and least to most of one"));
            var work = SearchStepSuite.Count(s5);
            rows.Add(new("share of the FMA limit, s5 search step", 40, false, "%",
                new Repeats([.. seconds.Values.Select(value => 100 * work.ProductFlops / value / 1e9 / limits.Gigaflops)]),
                $"products only; all FLOPs: {100 * work.Flops / seconds.Median / 1e9 / limits.Gigaflops:0.0} %"));
        }
        rows.Add(new("peak memory, s5 search step", 2.2, true, "GiB", new Repeats([peak / (double)(1L << 30)])));
        var (one, all) = (SearchStepSuite.Measure(s5, options, threads: 1), SearchStepSuite.Measure(s5, options));
        rows.Add(new($"s5 search step, {report.Machine.Threads} threads over one", 1.8, false, "x",
            new Repeats([.. one.Values.Zip(all.Values, (a, b) => a / b)])));

        foreach (var row in rows)
            report.Add(new { Kind = "target", row.Target, row.Wanted, row.Unit, row.Reached, row.IsReached, row.Remark });
        report.Table(["target", "wanted", "reached", "min-max", "", "remark"], rows.Select(row => (IReadOnlyList<string>)
        [
            row.Target, $"{(row.AtMost ? "<=" : ">=")} {row.Wanted} {row.Unit}", row.Reached is null ? "" : $"{row.Reached.Median:0.00}",
            row.Reached is null ? "" : $"{row.Reached.Minimum:0.00}-{row.Reached.Maximum:0.00}",
            row.Reached is null ? "not measured" : row.IsReached ? "reached" : "MISSED",
            row.Reached is null && row.Remark.Length == 0 ? "give --peer" : row.Remark,
        ]));
    }

    private static IEnumerable<Row> Score(BenchmarkOptions options, WorkloadSize size, Report report)
    {
        using var backend = options.NewBackend();
        using var workload = new Workload(size, backend, options.Batches);
        using var peer = options.Peer ? Peer.OfSupernet("scoring", "tuned", size, BenchmarkOptions.ThreadsOf(backend), workload) : null;
        if (peer is not null)
            Duel.RequireSameLoss("loss of the initial weights", workload.FirstLoss(), peer.InitialLoss);
        return [.. Enum.GetValues<CellType>().Select(type => new Row(
            $"s5 scoring a candidate, {CellTopology.NameOf(type)} edge {options.Edge}, times faster than tuned PyTorch", 6, false, "x",
            ScoringSuite.Measure(size, workload, options, type, peer, report).Duel?.Ratio))];
    }

    /// <summary>
    /// Decides some edges of a trained supernet on its whole validation half, raced, each as its first decision. PyTorch needs a pass of the
    /// network for every candidate and batch; it is timed at that with a network of the same size.
    /// </summary>
    private static Row Race(BenchmarkOptions options, Report report)
    {
        using var backend = options.NewBackend();
        using var run = RunDirectory.OpenExisting(options.Runs.First());
        using var experiment = Experiment.Open(run, backend);
        using (var search = new SupernetSearch(experiment))
            search.RestoreFinished();
        var (network, c) = (experiment.Network, experiment.Configuration);
        var evaluation = new MaskedEvaluation(network, experiment.Arena, experiment.Validation, c.Batch);
        var size = new WorkloadSize(network.Space.Name, c.Channels, c.Layers, c.Batch);
        using var workload = new Workload(size, backend);
        using var peer = options.Peer ? Peer.OfSupernet("scoring", "tuned", size, BenchmarkOptions.ThreadsOf(backend), workload) : null;
        if (peer is not null)
            Duel.RequireSameLoss("loss of the initial weights", workload.FirstLoss(), peer.InitialLoss);
        var (ratios, agreeing, decisions) = (new List<double>(), 0, 0);
        double given = 0, all = 0;
        foreach (var type in Enum.GetValues<CellType>())
        {
            foreach (var edge in _racedEdges)
            {
                var masks = ScoringSuite.Candidates(network.Space, type, edge);
                var order = new RandomStream(c.Seed, "racing order", CellTopology.Edges * (int)type + edge);
                (Totals Totals, string? Dropped)[] raced = [];
                var seconds = Timing.Seconds(() => raced = evaluation.Evaluate(new EdgeStates(), masks, new Racing(0.01), lowestWins: true, order));
                var full = evaluation.Evaluate(new EdgeStates(), masks);
                agreeing += Winner(full.Select(totals => (totals, (string?)null))) == Winner(raced) ? 1 : 0;
                decisions++;
                given += raced.Sum(candidate => candidate.Totals.Images);
                all += full.Sum(candidate => candidate.Images);
                if (peer is not null)
                    ratios.Add(peer.Repeat().Seconds * masks.Count * evaluation.Batches / seconds);
            }
        }
        return new Row($"{size.Space} scoring of the run '{Path.GetFileName(run.Path)}', raced at 0.01, times faster than tuned PyTorch", 30, false, "x",
            ratios.Count > 0 ? new Repeats(ratios) : null,
            $"{(peer is null ? "give --peer; " : "")}{agreeing} of {decisions} decisions as in the full pass; images saved {all / given:0.0} times");

        int Winner(IEnumerable<(Totals Totals, string? Dropped)> candidates) => Decision.HurtsMost(
            [.. candidates.Select(each => new CandidateScore("", 0, each.Totals.Loss, each.Totals.Accuracy, each.Totals.Images, each.Dropped))], Criterion.Accuracy);
    }
}
