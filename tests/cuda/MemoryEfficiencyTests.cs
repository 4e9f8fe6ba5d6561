using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Tests.Kernels;

namespace PerturbNas.Tests.Cuda;

/// <summary>
/// How the kernels use memory at the shapes of a search (16 channels at 32x32, 32 at 16x16, 64 at 8x8), counted by the emulated device: of the
/// bytes that are moved at least nine tenths are asked for, a bounded multiple of what must be moved is moved at all, and few passes over
/// shared memory are due to conflicts.
/// </summary>
public sealed class MemoryEfficiencyTests
{
    private const double LeastEfficiency = 0.9, MostConflicts = 0.1;

    // What moves less than this share of what its case must (merging partial sums) is not judged.
    private const double Negligible = 0.1;

    private static readonly (int Size, int Channels)[] Shapes = [(32, 16), (16, 32), (8, 64)];

    // By the first part of a kernel's name. What is moved again comes from the first cache: neighbouring windows read a pixel, the pixels of a
    // channel its scale and shift, and every block the weights, which are as large as the activations at 64 channels and two images.
    private static readonly Limit[] Limits =
    [
        new("depthwise_pointwise_forward", Traffic: 3.5),
        new("depthwise_pointwise_backward_input", Traffic: 1.3),
        new("depthwise_pointwise_backward_strided_input", Traffic: 1.3),
        new("depthwise_pointwise_backward_weights", Traffic: 3.5, Conflicts: 0.25),
        new("pointwise_forward", Traffic: 3.2),
        new("pointwise_backward_input", Traffic: 4.5),
        new("pointwise_backward_weights", Traffic: 5),
        new("convolution_forward", Traffic: 1.6),
        new("convolution_backward_weights", Traffic: 3.8),
        new("sum_partials", Traffic: 0.5),
        new("pool_3x3", Traffic: 4.5),
        new("mixed_sum_forward_variants", Traffic: 2),
        // A strip of four pooled pixels reads the rows above and below it, too.
        new("mixed_sum_forward", Traffic: 1.4, Case: "pair"),
        new("mixed_sum_forward", Traffic: 1.3),
        new("mixed_sum_backward", Traffic: 1.5, Case: "pair"),
        new("mixed_sum_backward", Traffic: 1.4),
        new("global_average_pool", Traffic: 1.2),
        new("sgd_sum_squares", Traffic: 0.3),
        new("sgd_step", Traffic: 1.1),
        new("adam_step", Traffic: 1.1),
        new("noise_normal", Traffic: 1.1),
    ];

    private static readonly Dictionary<string, KernelCase> Cases = Build().ToDictionary(kernelCase => kernelCase.Name);

    public static TheoryData<string> Names() => [.. Cases.Keys];

    [EmulatedCudaTheory]
    [MemberData(nameof(Names))]
    public void Moves_little_more_than_it_must(string name)
    {
        var kernelCase = Cases[name];
        using var backend = new CudaBackend(DeviceKind.CudaEmulated);
        using var run = new KernelRun(kernelCase, backend);
        foreach (var pass in kernelCase.Passes())
        {
            run.Prepare(pass, TestBackends.GivenForwardOutputs(kernelCase, pass));
            foreach (var (kernel, counters) in CudaEmulator.Count(() => run.Call(pass)))
            {
                var traffic = (double)counters.TransferredBytes / kernelCase.Cost(pass).Bytes;
                if (traffic < Negligible)
                    continue;
                var limit = Limits.First(limit =>
                    kernel.StartsWith(limit.Kernel, StringComparison.Ordinal) && name.Contains(limit.Case, StringComparison.Ordinal));
                var found = $"{kernel}, {name}: efficiency {counters.GlobalEfficiency:0.00}, traffic {traffic:0.00}, conflicts {counters.ConflictShare:0.00}";
                Assert.True(counters.GlobalEfficiency >= limit.Efficiency, found);
                Assert.True(traffic <= limit.Traffic, found);
                Assert.True(counters.ConflictShare <= limit.Conflicts, found);
            }
        }
    }

    private static IEnumerable<KernelCase> Build()
    {
        foreach (var (size, channels) in Shapes)
        {
            foreach (var taken in new Pooling[][] { [Pooling.Max3x3], [Pooling.Avg3x3], [Pooling.Max3x3, Pooling.Avg3x3] })
                foreach (var stride in new[] { 1, 2 })
                    yield return KernelCases.Pool(taken, size, size, channels, stride, new());
            yield return KernelCases.Pool([Pooling.None, Pooling.Max3x3, Pooling.Avg3x3], size, size, channels, 1, new(), gradients: 3);
            foreach (var (kernel, stride, dilation) in new[] { (3, 1, 1), (5, 1, 1), (5, 1, 2), (3, 2, 1) })
                yield return KernelCases.DepthwisePointwise(size, size, channels, channels, kernel, stride, dilation, new(Normalization: true));
            yield return KernelCases.Pointwise(size, size, [.. Enumerable.Repeat(new Part(channels), 4)], channels, new());
            var terms = Enumerable.Range(0, 14).Select(t => (1, t % 7 != 2, t)).ToArray();
            yield return KernelCases.MixedSum(1, 2, size * size, channels, terms, terms.Length);
            var variants = Enumerable.Range(0, 14).Select(t => (t < 7 ? 1 : 7, t % 7 != 2, t)).ToArray();
            yield return KernelCases.MixedSum(7, 1, size * size, channels, variants, variants.Length);
            var pools = new[] { Pooling.Max3x3, Pooling.Avg3x3 }.Select(pooling => (pooling, size, size, 1)).ToArray();
            yield return KernelCases.MixedSum(1, 2, size * size, channels, terms, terms.Length, pools: pools, pair: 1);
            yield return KernelCases.MixedSum(7, 1, size * size, channels, variants, variants.Length, pools: pools, pair: 1);
        }
        yield return KernelCases.Convolution(32, 32, 3, 48, (3, 3), (1, 1), (1, 1), new(Wanted: Wanted.Weights), relu: false);
        yield return KernelCases.GlobalAveragePool(2, 64, [.. Enumerable.Repeat(new Part(64), 4)]);
        yield return KernelCases.Sgd(100_001, maxNorm: 5);
        yield return KernelCases.Adam(100_001, 3);
        yield return KernelCases.Noise(1 << 14, 1, 0);
    }

    /// <param name="Kernel">The first part of the names of the kernels meant.</param>
    /// <param name="Traffic">Bytes moved at most, as a multiple of what the whole pass of the case must move.</param>
    /// <param name="Case">A part of the names of the cases meant.</param>
    /// <param name="Efficiency">Bytes asked for by lanes over bytes moved, at least. Lanes that ask for the same bytes count each.</param>
    /// <param name="Conflicts">Share of the passes over shared memory that is due to bank conflicts, at most.</param>
    private sealed record Limit(
        string Kernel, double Traffic, string Case = "", double Efficiency = LeastEfficiency, double Conflicts = MostConflicts);
}
