using PerturbNas.Backends.Planning;

namespace PerturbNas.Benchmarks;

/// <summary>
/// An alpha step and a weight step of a supernet, beside the peer's. The useful work is what our engine asks of its kernels, counted by
/// <see cref="Cost"/>: for s5 of 16 channels, 8 layers and batch 64 some 41 GFLOP of products forward, twice that for the alpha
/// step (forward, gradients of activations), three times for the weight step (those of weights as well). The peer computes more: its
/// alpha step takes all weight gradients and throws them away.
/// </summary>
internal static class SearchStepSuite
{
    public const float Rate = 0.025f;

    /// <summary>What the search step of a workload is.</summary>
    public static Cost Count(WorkloadSize size) => Workload.Count(size, workload =>
    {
        using var trainer = workload.NewTrainer();
        trainer.Step(0, Rate);
    });

    /// <summary>Times our step without a peer.</summary>
    public static Repeats Measure(WorkloadSize size, BenchmarkOptions options, int? threads = null)
    {
        using var backend = options.NewBackend(threads);
        using var workload = new Workload(size, backend);
        using var trainer = workload.NewTrainer();
        long step = 0;
        return Timing.Measure(options.TimedRepeats, () => trainer.Step(step++, Rate));
    }

    public static void Run(BenchmarkOptions options, Report report)
    {
        var size = WorkloadSize.Of(options);
        var work = Count(size);
        var forward = Workload.Count(size, workload => workload.FirstLoss());
        Console.WriteLine($"useful work: forward {forward.ProductFlops / 1e9:0.00} GFLOP, search step {work.ProductFlops / 1e9:0.00} GFLOP in products " +
            $"of convolutions and linear layers ({(double)work.ProductFlops / work.Flops:P0} of all FLOPs)");
        report.Add(new { Kind = "work", SearchStep = work, Forward = forward });
        var rows = new List<IReadOnlyList<string>>();
        foreach (var mode in options.Peer ? Duel.Modes(options) : (IEnumerable<string?>)[null])
        {
            var (seconds, peak, duel) = Measure(size, options, mode, report);
            rows.Add(Row("ours", seconds, peak, null));
            if (duel is not null)
                rows.Add(Row($"PyTorch, {mode}", duel.Peer, duel.PeerPeakBytes, duel.Ratio));
        }
        report.Table(["search step", "median s", "min-max s", "peak GiB", "GFLOP/s", "products of FMA limit", "times ours", "min-max"], rows);

        IReadOnlyList<string> Row(string name, Repeats seconds, long peak, Repeats? ratio) =>
        [
            name, $"{seconds.Median:0.000}", $"{seconds.Minimum:0.000}-{seconds.Maximum:0.000}", $"{peak / (double)(1 << 30):0.00}",
            $"{work.Flops / seconds.Median / 1e9:0.0}", $"{report.ShareOfFmaLimit(work.ProductFlops, seconds.Median):P1}",
            ratio is null ? "" : $"{ratio.Median:0.00}", ratio is null ? "" : $"{ratio.Minimum:0.00}-{ratio.Maximum:0.00}",
        ];
    }

    /// <summary>Times our step, beside a peer's unless that is null; the peak is that of this process so far.</summary>
    public static (Repeats Seconds, long PeakBytes, Duel? Duel) Measure(WorkloadSize size, BenchmarkOptions options, string? mode, Report report)
    {
        using var backend = options.NewBackend();
        using var workload = new Workload(size, backend);
        using var trainer = workload.NewTrainer();
        using var peer = mode is null ? null : Peer.OfSupernet("search-step", mode, size, BenchmarkOptions.ThreadsOf(backend), workload);
        var firstLoss = workload.FirstLoss();
        if (peer is not null)
            Duel.RequireSameLoss("loss of the initial weights", firstLoss, peer.InitialLoss);
        long step = 0;
        double lastLoss = 0;
        void Step() => lastLoss = trainer.Step(step++, Rate).Train.Loss;
        var duel = peer is null ? null : Duel.Run(options.TimedRepeats, Step, 1, peer, report);
        var seconds = duel?.Ours ?? Timing.Measure(options.TimedRepeats, Step);
        if (peer is not null && duel is not null)
            Console.WriteLine($"{size.Space}, loss before the first step: ours {firstLoss:F6}, {mode} peer {peer.InitialLoss:F6}; in step {step}: " +
                $"ours {lastLoss:F6}, peer {duel.PeerLoss:F6}");
        var work = Count(size);
        report.Add(new
        {
            Kind = "search_step",
            size.Space,
            Seconds = seconds,
            Gigaflops = work.Flops / seconds.Median / 1e9,
            ShareOfFmaLimit = report.ShareOfFmaLimit(work.ProductFlops, seconds.Median),
            PeakBytes = Memory.PeakBytes(),
            workload.ArenaBytes,
            FirstLoss = firstLoss,
            LastLoss = lastLoss,
            peer?.Description,
            duel,
        });
        return (seconds, Memory.PeakBytes(), duel);
    }
}
