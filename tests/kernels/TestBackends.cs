using System.Collections.Concurrent;
using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Cuda;
using PerturbNas.Backends.Reference;

// Kernels bring their own threads and timings share one machine: tests run one after another.
[assembly: CollectionBehavior(DisableTestParallelization = true)]

namespace PerturbNas.Tests.Kernels;

/// <summary>The backends under test, made once: the oracle, and the CPU with every instruction set that this machine has.</summary>
internal static class TestBackends
{
    private static readonly ConcurrentDictionary<(Isa, int), CpuBackend> CpuBackends = [];
    private static readonly ConcurrentDictionary<(string, KernelPass), Dictionary<string, double[]>> Expectations = [];

    private static readonly ConcurrentDictionary<CpuBackend, KernelRun> Spoilers = [];

    private static readonly Lazy<CudaBackend> _cuda = new(() => new CudaBackend(DeviceKind.CudaEmulated));

    public static ReferenceBackend Reference { get; } = new();

    public static IReadOnlyList<Isa> InstructionSets { get; } =
        [.. CpuBackend.Isas.Select(known => known.Isa).Where(isa => TryCreate(isa) != null)];

    public static CpuBackend Cpu(Isa isa, int threads) => CpuBackends.GetOrAdd((isa, threads), key => new CpuBackend(key.Item2, key.Item1));

    /// <summary>
    /// Fills a CPU backend's scratch memory with not-a-numbers: a kernel that reads what it has not written then fails always, not by chance.
    /// </summary>
    public static void SpoilScratch(CpuBackend backend) => Spoilers.GetOrAdd(backend, _ =>
    {
        var largest = KernelCases.All.Where(kernelCase => kernelCase.Name.StartsWith("depthwise_pointwise", StringComparison.Ordinal))
            .MaxBy(kernelCase => kernelCase.Buffers.Sum(buffer => (long)buffer.Count))!;
        var run = new KernelRun(largest, backend);
        foreach (var buffer in largest.Buffers.Where(buffer => buffer.Kind == BufferKind.Real))
            run.Write(buffer, [.. Enumerable.Repeat(double.NaN, buffer.Count)]);
        return run;
    }).Call(KernelPass.Backward);

    /// <summary>The emulated CUDA device.</summary>
    public static CudaBackend Cuda => _cuda.Value;

    public static KernelCase Case(string name) => KernelCases.All.Single(candidate => candidate.Name == name);

    /// <summary>
    /// What the oracle makes of a pass, rounded to float32: the forward outputs so rounded are what every backend's backward pass is given.
    /// </summary>
    public static Dictionary<string, double[]> Expected(KernelCase kernelCase, KernelPass pass) =>
        Expectations.GetOrAdd((kernelCase.Name, pass), _ =>
        {
            using var run = new KernelRun(kernelCase, Reference);
            run.Prepare(pass, GivenForwardOutputs(kernelCase, pass));
            run.Call(pass);
            return run.Outputs(pass);
        });

    public static Dictionary<string, double[]>? GivenForwardOutputs(KernelCase kernelCase, KernelPass pass) =>
        pass == KernelPass.Forward || kernelCase.Forward == null
            ? null
            : Expected(kernelCase, KernelPass.Forward).ToDictionary(
                pair => pair.Key, pair => Array.ConvertAll(pair.Value, value => (double)(float)value));

    private static CpuBackend? TryCreate(Isa isa)
    {
        try
        {
            return Cpu(isa, 1);
        }
        catch (UserException)
        {
            return null;
        }
    }
}
