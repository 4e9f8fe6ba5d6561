namespace PerturbNas.Benchmarks;

/// <summary>
/// The search step while every processor is busy with other work: threads that compute without pause, one a processor, of the same priority.
/// A fair scheduler leaves our threads their share, so that a step takes (ours + others) / processors times as long; what takes much longer
/// waits for threads that do not run.
/// </summary>
internal static class BusySuite
{
    public static void Run(BenchmarkOptions options, Report report)
    {
        var size = WorkloadSize.Of(options);
        var others = Environment.ProcessorCount;
        var inProportion = Math.Max(1, (double)(report.Machine.Threads + others) / others);
        var rows = new List<IReadOnlyList<string>>();
        using (var backend = options.NewBackend())
        {
            using var workload = new Workload(size, backend);
            using var trainer = workload.NewTrainer();
            long step = 0;
            Compare("ours", () => Timing.Seconds(() => trainer.Step(step++, SearchStepSuite.Rate)));
        }
        foreach (var mode in Duel.Modes(options))
        {
            using var workloadBackend = options.NewBackend();
            using var workload = new Workload(size, workloadBackend);
            using var peer = Peer.OfSupernet("search-step", mode, size, BenchmarkOptions.ThreadsOf(workloadBackend), workload);
            Compare($"PyTorch, {mode}", () => peer.Repeat().Seconds);
        }
        report.Table(["search step", "alone s", "min-max", "busy s", "min-max", "times slower", "in proportion"], rows);

        void Compare(string name, Func<double> seconds)
        {
            seconds();
            var alone = Repeat();
            Repeats busy;
            using (new OtherWork(others))
                busy = Repeat();
            var slower = busy.Median / alone.Median;
            report.Add(new { Kind = "busy", name, Alone = alone, Busy = busy, TimesSlower = slower, InProportion = inProportion, OtherThreads = others });
            rows.Add(
            [
                name, $"{alone.Median:0.000}", $"{alone.Minimum:0.000}-{alone.Maximum:0.000}", $"{busy.Median:0.000}", $"{busy.Minimum:0.000}-{busy.Maximum:0.000}",
                $"{slower:0.00}", $"{inProportion:0.00}",
            ]);

            Repeats Repeat() => new([.. Enumerable.Range(0, options.TimedRepeats).Select(_ => seconds())]);
        }
    }

    /// <summary>Threads that compute until they are disposed of.</summary>
    private sealed class OtherWork : IDisposable
    {
        private readonly List<Thread> _threads;
        private volatile bool _stop;

        public OtherWork(int threads)
        {
            _threads = [.. Enumerable.Range(0, threads).Select(_ => new Thread(Compute) { IsBackground = true })];
            _threads.ForEach(thread => thread.Start());
        }

        public void Dispose()
        {
            _stop = true;
            _threads.ForEach(thread => thread.Join());
        }

        private void Compute()
        {
            for (var x = 1.0; !_stop && x > 0;)
                x = Math.Sqrt(x + 1);
        }
    }
}
