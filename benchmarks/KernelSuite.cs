using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Tests.Kernels;

namespace PerturbNas.Benchmarks;

/// <summary>
/// Every kernel that matters at the shapes of the supernet (C = 16, 32, 64 at 32, 16, 8 pixels a side) and of the derived network (36,
/// 72, 144): time, and how near it is to the machine's limit. Buffers stay where the last call left them in the caches. The peer's
/// operators include batch norm whole, where our kernels leave normalising to whoever reads the result: a mixed sum of ours does more than
/// the peer's, what comes before it does less. On a CUDA device the same goes for NVIDIA's libraries (see <see cref="LibraryPeer"/>).
/// </summary>
internal static class KernelSuite
{
    // How many of those below are the supernet's; the others are the derived network's.
    private const int SupernetLevels = 3, SupernetReduced = 2;

    // Channels and side of an activation, and of one that a stride of 2 is applied to.
    private static readonly (int Channels, int Side)[] _levels = [(16, 32), (32, 16), (64, 8), (36, 32), (72, 16), (144, 8)];
    private static readonly (int Channels, int Side)[] _reduced = [(32, 32), (64, 16), (72, 32), (144, 16)];

    /// <summary>A case with the name of the backward pass that it stands for; all but "backward" skip the forward pass.</summary>
    /// <param name="Peer">The same work as a request to the peer.</param>
    private sealed record Entry(KernelCase Case, PeerOperator Peer, string Backward = "backward")
    {
        /// <summary>The case's name, without what is the same for all of its kind here.</summary>
        public string Name { get; init; } = Case.Name;
    }

    public static void Run(BenchmarkOptions options, Report report)
    {
        using var all = options.NewBackend();
        using var single = options.NewBackend(threads: 1);
        List<(Backend Backend, MachineLimits Limits)> backends = [(single, single.MeasureLimits())];
        if (BenchmarkOptions.ThreadsOf(all) > 1)
            backends.Add((all, report.Limits));
        using var library = backends[^1].Backend is CudaBackend device ? LibraryPeer.Open(device, report.Note) : null;
        var peers = Duel.Modes(options).Select(mode => new Peer("operators.py", mode, BenchmarkOptions.ThreadsOf(all))).ToList();
        try
        {
            Measure(options, report, backends, peers, library);
        }
        finally
        {
            peers.ForEach(peer => peer.Dispose());
        }
    }

    private static void Measure(BenchmarkOptions options, Report report, List<(Backend Backend, MachineLimits Limits)> backends, List<Peer> peers,
        LibraryPeer? library)
    {
        var results = new List<Result>();
        foreach (var entry in Entries(options.Batch))
        {
            var passes = entry.Case.Passes().Where(pass => pass == KernelPass.Backward || entry.Backward == "backward")
                .Select(pass => (Pass: pass, Name: pass == KernelPass.Forward ? "forward" : entry.Backward))
                .Where(pass => $"{entry.Name} {pass.Name}".Contains(options.Filter ?? "", StringComparison.OrdinalIgnoreCase))
                .ToList();
            if (passes.Count == 0)
                continue;
            using var memory = new CaseMemory(entry.Case, backends[0].Backend);
            using var work = library?.Prepare(entry.Peer, entry.Case, memory.Addresses);
            foreach (var (pass, name) in passes)
            {
                foreach (var (backend, limits) in backends)
                    results.Add(Measure(options.TimedRepeats, memory, entry, pass, name, backend, limits, backend == backends[^1].Backend ? peers : [], report));
                if (work is not null && Against(work, options, memory, pass, backends[^1].Backend, report) is { } duel)
                    results[^1].Peers[LibraryPeer.Name] = duel;
            }
        }
        if (results.Count == 0)
            throw new UserException($"No kernel's name and pass contain '{options.Filter}'; run without --filter to see all of them.");
        report.Add(new
        {
            Kind = "kernels",
            SingleThreadLimits = new { backends[0].Limits.Gigaflops, backends[0].Limits.GigabytesPerSecond },
            Results = results
        });
        List<string> names = [.. peers.Select(NameOf), .. library is null ? (string[])[] : [LibraryPeer.Name]];
        report.Table(["kernel", "pass", "threads", "ms", "spread", "GFLOP/s", "products of FMA limit", "GB/s", "of limit", "of nearer limit", "speedup",
            .. names.SelectMany(name => (string[])[$"{name} ms", "times ours", "min-max"])],
            results.Select((result, i) => Row(result, result.Threads > 1 ? results[i - 1] : null, names)));
    }

    /// <summary>A kernel of ours and NVIDIA's libraries in turns, once both have computed the same; null: they have nothing for its shape.</summary>
    private static Duel? Against(LibraryWork work, BenchmarkOptions options, CaseMemory memory, KernelPass pass, Backend backend, Report report)
    {
        void Ours() => memory.Call(pass, backend);
        void Theirs() => work.Run(pass);
        try
        {
            work.Forward();
            Wait(backend, Theirs);
        }
        catch (CudaLibraryException e) when (e.NotSupported)
        {
            report.Note($"{memory.Name}, {pass}: {e.Message}");
            return null;
        }
        Wait(backend, Ours);
        work.RequireSame(pass, options.Tf32);
        var (ours, theirs) = (Timing.CallsThatLast(() => Wait(backend, Ours)), Timing.CallsThatLast(() => Wait(backend, Theirs)));
        return Duel.Run(options.TimedRepeats, () => Wait(backend, () => Timing.Repeat(ours, Ours)), ours,
            () => Wait(backend, () => Timing.Repeat(theirs, Theirs)), theirs);
    }

    private static Result Measure(int repeats, CaseMemory memory, Entry entry, KernelPass pass, string name, Backend backend,
        MachineLimits limits, List<Peer> peers, Report report)
    {
        void Call() => memory.Call(pass, backend);
        var calls = Timing.CallsThatLast(() => Wait(backend, Call));
        void Repeat() => Wait(backend, () => Timing.Repeat(calls, Call));
        var duels = peers.ConvertAll(peer => (Name: NameOf(peer), Duel: Duel.Run(repeats, Repeat, calls, peer, report, entry.Peer with { Pass = name })));
        var seconds = (duels.Count > 0 ? duels[0].Duel.Ours : Timing.Measure(repeats, Repeat)).Per(calls);
        var cost = entry.Case.Cost(pass);
        var scale = 1e-9 / seconds.Median;
        return new Result(entry.Name, name, BenchmarkOptions.ThreadsOf(backend), seconds, scale * cost.Flops, scale * cost.Bytes,
            scale * cost.ProductFlops / limits.Gigaflops, scale * cost.Bytes / limits.GigabytesPerSecond)
        {
            Peers = duels.ToDictionary(duel => duel.Name, duel => duel.Duel),
        };
    }

    private static string NameOf(Peer peer) => $"PyTorch {peer.Mode}";

    // A device goes on by itself after its calls have returned.
    private static void Wait(Backend backend, Action calls)
    {
        backend.BeginTiming();
        calls();
        _ = backend.EndTiming();
    }

    private static IReadOnlyList<string> Row(Result result, Result? single, List<string> peers) =>
    [
        result.Kernel, result.Pass, $"{result.Threads}", $"{1e3 * result.Seconds.Median:0.000}", $"{result.Seconds.Spread:P0}",
        $"{result.Gigaflops:0.0}", $"{result.ShareOfFmaLimit:P0}", $"{result.GigabytesPerSecond:0.0}", $"{result.ShareOfBandwidth:P0}",
        $"{result.ShareOfLimit:P0}", single is null ? "" : $"{single.Seconds.Median / result.Seconds.Median:0.00}",
        .. peers.SelectMany(peer => result.Peers.TryGetValue(peer, out var duel)
            ? (string[])[$"{1e3 * duel.Peer.Median:0.000}", $"{duel.Ratio.Median:0.0}", $"{duel.Ratio.Minimum:0.0}-{duel.Ratio.Maximum:0.0}"]
            : ["", "", ""]),
    ];

    /// <summary>
    /// The share of the multiply-add limit that the supernet's depthwise-pointwise convolutions reach in their forward passes: all products over
    /// all time, and the least and the most of a single one.
    /// </summary>
    public static Repeats FusedForwardShare(BenchmarkOptions options, Backend backend, MachineLimits limits)
    {
        var shapes = from level in _levels.Take(SupernetLevels)
                     from kernel in new[] { 3, 5 }
                     from dilation in new[] { 1, 2 }
                     select KernelCases.DepthwisePointwise(level.Side, level.Side, level.Channels, level.Channels, kernel, 1, dilation, new(Images: options.Batch));
        double flops = 0, seconds = 0;
        var shares = new List<double>();
        foreach (var shape in shapes)
        {
            using var memory = new CaseMemory(shape, backend);
            void Call() => memory.Call(KernelPass.Forward, backend);
            var calls = Timing.CallsThatLast(() => Wait(backend, Call));
            var time = Timing.Measure(options.TimedRepeats, () => Wait(backend, () => Timing.Repeat(calls, Call))).Per(calls).Median;
            var products = shape.Cost(KernelPass.Forward).ProductFlops;
            (flops, seconds) = (flops + products, seconds + time);
            shares.Add(products / time / 1e9 / limits.Gigaflops);
        }
        return new Repeats([shares.Min(), flops / seconds / 1e9 / limits.Gigaflops, shares.Max()]);
    }

    private static List<Entry> Entries(int batch)
    {
        var entries = new List<Entry>();
        foreach (var (kernel, dilation) in new[] { (3, 1), (3, 2), (5, 1), (5, 2) })
        {
            PeerOperator Peer(int side, int c, int stride) => new("depthwise_pointwise", batch, side, c, stride, kernel, dilation);
            foreach (var (c, side) in _levels)
                AddGradients(Peer(side, c, 1), o => KernelCases.DepthwisePointwise(side, side, c, c, kernel, 1, dilation, o));
            // The second half of a separable convolution, whose input is normalised while it is loaded.
            foreach (var (c, side) in dilation == 1 ? _levels : [])
                AddGradients(Peer(side, c, 1), o => KernelCases.DepthwisePointwise(side, side, c, c, kernel, 1, 1, o with { Normalization = true }));
            foreach (var (c, side) in _reduced)
                AddGradients(Peer(side, c, 2), o => KernelCases.DepthwisePointwise(side, side, c, c, kernel, 2, dilation, o));
        }

        // Preprocessing: of the stem's output; of a cell's four nodes; of those before a reduction cell, in it and (one half of a
        // factorized reduction) after it; then the skip connection of stride 2, which is the same half.
        AddPointwise(32, [new(48)], 16);
        foreach (var (c, side) in _levels)
            AddPointwise(side, Nodes(c), c);
        foreach (var (c, side) in _reduced)
        {
            AddPointwise(side, Nodes(c / 2), c);
            AddPointwise(side, Nodes(c / 2), c / 2, stride: 2, yChannels: c);
            AddPointwise(side, [new(c)], c / 2, stride: 2, yChannels: c);
        }

        // The two stems, whose image wants no gradient, and dense convolutions.
        foreach (var c in new[] { 48, 108 })
            entries.Add(new(KernelCases.Convolution(
                32, 32, 3, c, (3, 3), (1, 1), (1, 1), new(Images: batch, Wanted: Wanted.Weights), relu: false),
                new("convolution", batch, 32, 3, Out: c, Relu: false)));
        foreach (var (c, side) in _levels.Take(SupernetLevels))
            AddGradients(new("convolution", batch, side, c, Out: c), o => KernelCases.Convolution(side, side, c, c, (3, 3), (1, 1), (1, 1), o));

        // Each pool by itself, as the peers have it.
        foreach (var (name, pooling) in new[] { ("max_pool_3x3", Pooling.Max3x3), ("avg_pool_3x3", Pooling.Avg3x3) })
        {
            foreach (var (c, side) in _levels.Take(SupernetLevels))
                entries.Add(new(KernelCases.Pool([pooling], side, side, c, 1, new(Images: batch)), new(name, batch, side, c)));
            foreach (var (c, side) in _reduced.Take(SupernetReduced))
                entries.Add(new(KernelCases.Pool([pooling], side, side, c, 2, new(Images: batch)), new(name, batch, side, c, Stride: 2)));
        }

        // The first and the last node of a cell of s5: two and five edges of seven operations; skip connections are not normalised.
        foreach (var (c, side) in _levels.Take(SupernetLevels))
            foreach (var count in new[] { 14, 35 })
            {
                (int, bool, int)[] terms = [.. Enumerable.Range(0, count).Select(t => (1, t % 7 != 2, t))];
                entries.Add(new(KernelCases.MixedSum(1, batch, side * side, c, terms, count), new("mixed_sum", batch, side, c, Terms: count))
                {
                    Name = $"mixed_sum v1 n{batch} p{side * side} c{c} {count} terms",
                });
            }
        return entries;

        void AddPointwise(int side, Part[] parts, int outChannels, int stride = 1, int yChannels = 0) => AddGradients(
            new("pointwise", batch, side, parts[0].Channels, stride, Parts: parts.Length, Out: outChannels),
            o => KernelCases.Pointwise(side, side, parts, outChannels, o, stride: stride, yChannels: yChannels));

        // With both gradients, with that of the input alone (the alpha step), and with those of the weights alone.
        void AddGradients(PeerOperator peer, Func<Options, KernelCase> build)
        {
            entries.Add(new(build(new(Images: batch)), peer));
            entries.Add(new(build(new(Images: batch, Wanted: Wanted.Input)), peer, "backward by data"));
            entries.Add(new(build(new(Images: batch, Wanted: Wanted.Weights)), peer, "backward by weights"));
        }
    }

    private static Part[] Nodes(int channels) => [new(channels), new(channels), new(channels), new(channels)];

    private sealed record Result(string Kernel, string Pass, int Threads, Repeats Seconds, double Gigaflops, double GigabytesPerSecond,
        double ShareOfFmaLimit, double ShareOfBandwidth)
    {
        /// <summary>The time that the nearer of the two limits would take, over the time taken.</summary>
        public double ShareOfLimit => Math.Max(ShareOfFmaLimit, ShareOfBandwidth);

        /// <summary>What became of the peers, by name.</summary>
        public Dictionary<string, Duel> Peers { get; init; } = [];
    }

    /// <summary>A case's buffers, filled, and its forward pass run once, so that the backward pass finds what it needs.</summary>
    private sealed class CaseMemory : IDisposable
    {
        private readonly Backend _backend;
        private readonly KernelCase _case;
        private readonly Dictionary<string, nint> _blocks = [];
        private readonly KernelAddresses _forward, _backward;

        public CaseMemory(KernelCase kernelCase, Backend backend)
        {
            (_case, _backend) = (kernelCase, backend);
            foreach (var buffer in kernelCase.Buffers)
            {
                var address = backend.Allocate((long)buffer.Count * buffer.ElementSize(backend.ElementSize));
                _blocks.Add(buffer.Name, address);
                if (buffer.Values(kernelCase.Name, continuous: true) is { } values)
                    backend.Write(address, values);
            }
            _backward = new KernelAddresses(_blocks);
            _forward = new KernelAddresses(kernelCase.Buffers.Where(buffer => buffer.Role != BufferRole.BackwardOutput)
                .ToDictionary(buffer => buffer.Name, buffer => _blocks[buffer.Name]));
            Call(KernelPass.Forward, backend);
        }

        public string Name => _case.Name;

        /// <summary>Where all buffers lie.</summary>
        public KernelAddresses Addresses => _backward;

        public void Call(KernelPass pass, Backend backend) =>
            _case.Call(pass)(backend, pass == KernelPass.Forward ? _forward : _backward);

        public void Dispose()
        {
            foreach (var address in _blocks.Values)
                _backend.Free(address);
        }
    }
}
