using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Tests.Kernels;

namespace PerturbNas.Tests.Cuda;

/// <summary>The tensor-core products on the emulated device, against the oracle.</summary>
public sealed class Tf32Tests
{
    /// <summary>
    /// As <see cref="ParityTests"/> has it, with TF32's roundoff of 2^-11 for each of two factors: the worst of some ten thousand elements is
    /// off by about five times sqrt(2) * 2^-11 of their root mean square, twice that where three quarters of these are zero (stride 2).
    /// </summary>
    private const double Tolerance = 7e-3;

    public static TheoryData<string> Cases() => [.. KernelCases.All
        .Where(kernelCase => kernelCase.Operator is "depthwise_pointwise" or "pointwise" or "convolution").Select(kernelCase => kernelCase.Name)];

    [EmulatedCudaTheory]
    [MemberData(nameof(Cases))]
    public void Equals_reference_to_the_precision_of_TF32(string name)
    {
        var kernelCase = TestBackends.Case(name);
        using var backend = new CudaBackend(DeviceKind.CudaEmulated) { Tf32 = true };
        foreach (var pass in kernelCase.Passes())
        {
            using var run = new KernelRun(kernelCase, backend);
            _ = ParityTests.Run(kernelCase, run, pass);
            ParityTests.AssertClose(kernelCase, run, pass, $"{name}, TF32", Tolerance);
        }
    }

    [EmulatedCudaFact]
    public void Multiplies_on_the_tensor_cores_only_if_asked_to()
    {
        var kernelCase = TestBackends.Case(Cases().First().Data);
        foreach (var tf32 in new[] { false, true })
        {
            using var backend = new CudaBackend(DeviceKind.CudaEmulated) { Tf32 = tf32 };
            using var run = new KernelRun(kernelCase, backend);
            run.Prepare(KernelPass.Forward);
            var products = CudaEmulator.Count(() => run.Call(KernelPass.Forward)).Values.Aggregate(0UL, (sum, counters) => sum + counters.MatrixInstructions);
            Assert.Equal(tf32, products > 0);
        }
    }
}
