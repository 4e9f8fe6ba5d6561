using PerturbNas.Backends.Planning;
using PerturbNas.Networks;
using PerturbNas.Spaces;

namespace PerturbNas.Benchmarks;

/// <summary>
/// Scoring all candidates of one edge, exactly and without racing: they are variants of one pass of ours; the peer, like the paper's code,
/// runs the whole network once for each. Both are given in seconds per candidate and batch.
/// </summary>
internal static class ScoringSuite
{
    /// <summary>The candidates of an edge: without each of its operations in turn.</summary>
    public static List<Mask> Candidates(SearchSpace space, CellType type, int edge) =>
        [.. Enumerable.Range(0, space.Columns(type)).Select(operation => new Mask(type, edge, operation))];

    public static void Run(BenchmarkOptions options, Report report)
    {
        var size = WorkloadSize.Of(options);
        using var backend = options.NewBackend();
        using var workload = new Workload(size, backend, options.Batches);
        var rows = new List<IReadOnlyList<string>>();
        if (!options.Peer)
            ScoreBothTypes(null);
        foreach (var mode in Duel.Modes(options))
        {
            using var peer = Peer.OfSupernet("scoring", mode, size, BenchmarkOptions.ThreadsOf(backend), workload);
            Duel.RequireSameLoss("loss of the initial weights", workload.FirstLoss(), peer.InitialLoss);
            ScoreBothTypes(peer);
        }
        report.Table(
            ["scoring, per candidate and batch", "candidates", "ours s", "min-max s", "GFLOP of products", "of FMA limit", "peer s", "min-max s",
                "times ours", "min-max"], rows);

        void ScoreBothTypes(Peer? peer)
        {
            foreach (var type in Enum.GetValues<CellType>())
                rows.Add(Score(type, peer));
        }

        IReadOnlyList<string> Score(CellType type, Peer? peer)
        {
            var (ours, flops, candidates, duel) = Measure(size, workload, options, type, peer, report);
            return
            [
                $"{CellTopology.NameOf(type)} edge {options.Edge}{(peer is null ? "" : $", PyTorch {peer.Mode}")}", $"{candidates}",
                $"{ours.Median:0.0000}", $"{ours.Minimum:0.0000}-{ours.Maximum:0.0000}", $"{flops / 1e9:0.00}",
                $"{report.ShareOfFmaLimit(flops, ours.Median):P1}",
                duel is null ? "" : $"{duel.Peer.Median:0.000}", duel is null ? "" : $"{duel.Peer.Minimum:0.000}-{duel.Peer.Maximum:0.000}",
                duel is null ? "" : $"{duel.Ratio.Median:0.00}", duel is null ? "" : $"{duel.Ratio.Minimum:0.00}-{duel.Ratio.Maximum:0.00}",
            ];
        }
    }

    /// <summary>Seconds and products per candidate and batch of the candidates of one edge, beside a peer's unless that is null.</summary>
    public static (Repeats Seconds, double ProductFlops, int Candidates, Duel? Duel) Measure(WorkloadSize size, Workload workload,
        BenchmarkOptions options, CellType type, Peer? peer, Report report)
    {
        var masks = Candidates(workload.Network.Space, type, options.Edge);
        var evaluation = workload.NewEvaluation(options.Batches);
        void Evaluate() => evaluation.Evaluate(new EdgeStates(), masks);
        double units = masks.Count * options.Batches;
        var duel = peer is null ? null : Duel.Run(options.TimedRepeats, Evaluate, units, peer, report);
        var seconds = (duel?.Ours ?? Timing.Measure(options.TimedRepeats, Evaluate)).Per(units);
        var flops = (double)Count(size, masks).ProductFlops / masks.Count;
        report.Add(new
        {
            Kind = "scoring",
            Cell = CellTopology.NameOf(type),
            options.Edge,
            Candidates = masks.Count,
            options.Batches,
            SecondsPerCandidateBatch = seconds,
            ProductFlopsPerCandidateBatch = flops,
            ShareOfFmaLimit = report.ShareOfFmaLimit(flops, seconds.Median),
            PeakBytes = Memory.PeakBytes(),
            peer?.Description,
            duel
        });
        return (seconds, flops, masks.Count, duel);
    }

    /// <summary>What our engine asks of its kernels for one batch: less than a forward pass for each candidate.</summary>
    public static Cost Count(WorkloadSize size, List<Mask> masks) =>
        Workload.Count(size, workload => workload.NewEvaluation(1).Evaluate(new EdgeStates(), masks));
}
