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
    private const double LeastEfficiency = 0.9, MostConflicts = 0.05;

    private static readonly (int Size, int Channels)[] Shapes = [(32, 16), (16, 32), (8, 64)];

    // By the beginning of kernels' names: what a kernel may move, as a multiple of what the case must. What is moved again comes from a cache:
    // neighbouring windows and tiles read a pixel, the pixels of a channel its scale and shift, and every block of a product its weights.
    private static readonly Dictionary<string, double> MostTraffic = new()
    {
        ["max_pool_3x3_forward"] = 5,
        ["avg_pool_3x3_forward"] = 5,
        ["max_pool_3x3_backward"] = 5,
        ["avg_pool_3x3_backward"] = 5,
        ["mixed_sum_forward"] = 1.3,
        ["mixed_sum_forward_variants"] = 1.8,
        ["mixed_sum_backward"] = 1.3,
        ["global_average_pool_forward"] = 1.1,
        ["global_average_pool_backward"] = 1.1,
        ["scaled_copy"] = 1.1,
        ["sgd_step"] = 1.1,
        ["adam_step"] = 1.1,
        ["noise_normal"] = 1.1,
        ["depthwise_pointwise_forward"] = 4,
        ["depthwise_pointwise_backward_input"] = 2,
        ["depthwise_pointwise_backward_strided_input"] = 2,
        ["depthwise_pointwise_backward_weights"] = 4,
        ["pointwise_forward"] = 3.5,
        ["pointwise_backward_input"] = 4.5,
        ["pointwise_backward_weights"] = 5,
    };

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
                if (MostTraffic.Keys.Where(key => kernel.StartsWith(key, StringComparison.Ordinal)).MaxBy(key => key.Length) is not { } limited)
                    continue;
                var traffic = (double)counters.TransferredBytes / kernelCase.Cost(pass).Bytes;
                var found = $"{kernel}, {name}: efficiency {counters.GlobalEfficiency:0.00}, traffic {traffic:0.00}, conflicts {counters.ConflictShare:0.00}";
                Assert.True(counters.GlobalEfficiency >= LeastEfficiency, found);
                Assert.True(traffic <= MostTraffic[limited], found);
                Assert.True(counters.ConflictShare <= MostConflicts, found);
            }
        }
    }

    private static IEnumerable<KernelCase> Build()
    {
        foreach (var (size, channels) in Shapes)
        {
            foreach (var maximum in new[] { true, false })
                foreach (var stride in new[] { 1, 2 })
                    yield return KernelCases.Pool(maximum, size, size, channels, stride, new());
            foreach (var (kernel, dilation) in new[] { (3, 1), (5, 1), (3, 2), (5, 2) })
                foreach (var stride in new[] { 1, 2 })
                    yield return KernelCases.DepthwisePointwise(size, size, channels, channels, kernel, stride, dilation, new(Normalization: true));
            yield return KernelCases.Pointwise(size, size, [.. Enumerable.Repeat(new Part(channels), 4)], channels, new());
            var terms = Enumerable.Range(0, 14).Select(t => (1, t % 7 != 2, t)).ToArray();
            yield return KernelCases.MixedSum(1, 2, size * size, channels, terms, terms.Length);
            var variants = Enumerable.Range(0, 14).Select(t => (t < 7 ? 1 : 7, t % 7 != 2, t)).ToArray();
            yield return KernelCases.MixedSum(7, 1, size * size, channels, variants, variants.Length);
        }
        yield return KernelCases.GlobalAveragePool(2, 64, [.. Enumerable.Repeat(new Part(64), 4)]);
        yield return KernelCases.ScaledCopy(1 << 16, weight: true, accumulate: false);
        yield return KernelCases.Sgd(100_001, maxNorm: 5);
        yield return KernelCases.Adam(100_001, 3);
        yield return KernelCases.Noise(1 << 14, 1, 0);
    }
}
