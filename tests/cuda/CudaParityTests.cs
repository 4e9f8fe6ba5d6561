using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Tests.Kernels;

namespace PerturbNas.Tests.Cuda;

/// <summary>Every case of the table on the emulated device, against the oracle, with the CPU's tolerance; and the same bits every time.</summary>
public sealed class CudaParityTests
{
    public static TheoryData<string> Cases() => [.. KernelCases.All.Select(kernelCase => kernelCase.Name)];

    [EmulatedCudaTheory]
    [MemberData(nameof(Cases))]
    public void Equals_reference_and_repeats_its_bits(string name)
    {
        var kernelCase = TestBackends.Case(name);
        // A backend of its own: scratch memory starts unwritten, so that a kernel that reads what it did not write is found.
        using var backend = new CudaBackend(DeviceKind.CudaEmulated);
        try
        {
            foreach (var pass in kernelCase.Passes())
            {
                using var first = new KernelRun(kernelCase, backend);
                var bytes = ParityTests.Run(kernelCase, first, pass);
                ParityTests.AssertClose(kernelCase, first, pass, name);
                using var second = new KernelRun(kernelCase, backend);
                foreach (var (bufferName, again) in ParityTests.Run(kernelCase, second, pass))
                    Assert.True(bytes[bufferName].AsSpan().SequenceEqual(again), $"{name}, {pass}: {bufferName} has other bits the second time");
            }
        }
        catch (CudaException e)
        {
            var fault = CudaEmulator.LastFault;
            CudaEmulator.Reset();
            Assert.Fail($"{e.Message}: {fault}");
        }
    }
}
