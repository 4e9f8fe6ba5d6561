using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using Xunit.Abstractions;

namespace PerturbNas.Tests.Kernels;

/// <summary>Operators x backends: how many of the table's cases run, and that those that do not say so by name.</summary>
public class SupportMatrixTests(ITestOutputHelper output)
{
    [Fact]
    public void Every_case_runs_or_is_named_as_not_supported()
    {
        var backends = new List<(string Name, Backend Backend)> { ("reference", TestBackends.Reference) };
        foreach (var isa in TestBackends.InstructionSets)
            backends.Add(($"cpu {TestBackends.Cpu(isa, 1).IsaName}", TestBackends.Cpu(isa, 1)));
        using var cuda = new CudaLaunchCounter();
        backends.Add(("cuda", cuda));
        output.WriteLine($"{"",-24}{string.Concat(backends.Select(backend => $"{backend.Name,16}"))}");
        var unsupported = new List<string>();
        foreach (var kernels in KernelCases.All
            .SelectMany(kernelCase => kernelCase.Passes().Select(pass => (Case: kernelCase, Pass: pass)))
            .GroupBy(entry => $"{entry.Case.Operator} {entry.Pass}"))
        {
            var line = $"{kernels.Key,-32}";
            foreach (var (name, backend) in backends)
            {
                var supported = kernels.Count(entry => Runs(entry.Case, entry.Pass, backend));
                line += $"{$"{supported}/{kernels.Count()}",16}";
                if (supported < kernels.Count())
                    unsupported.Add($"{kernels.Key} on {name}");
            }
            output.WriteLine(line);
        }
        Assert.Empty(unsupported);
    }

    private static bool Runs(KernelCase kernelCase, KernelPass pass, Backend backend)
    {
        using var run = new KernelRun(kernelCase, backend);
        run.Prepare(pass, TestBackends.GivenForwardOutputs(kernelCase, pass));
        try
        {
            run.Call(pass);
            return true;
        }
        catch (KernelException e) when (e.Status == KernelStatus.NotSupported)
        {
            Assert.NotEqual("", e.Message);
            return false;
        }
    }
}
