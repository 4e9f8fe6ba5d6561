using System.Text;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Tests.Cuda;

/// <summary>The modules of one kernel each that a driver is given.</summary>
public sealed class PtxModulesTests
{
    [EmulatedCudaFact]
    public void A_kernel_alone_stands_on_the_lines_where_its_resource_has_it()
    {
        const string kernel = "linear_backward_input";
        var all = Lines(PtxModules.Read("cuda/linear.sm_80.ptx"));
        var alone = Lines(PtxModules.For(80).ModuleOf(kernel)!);
        Assert.Equal(all.Length, alone.Length);
        for (var i = 0; i < all.Length; i++)
            Assert.True(alone[i].Length == 0 || alone[i] == all[i], $"line {i} is '{alone[i]}', not '{all[i]}'");
        Assert.Contains($".entry {kernel}(", Assert.Single(alone, line => line.Contains(".entry", StringComparison.Ordinal)));
        Assert.Contains(".target sm_80", alone);
        Assert.Single(alone, line => line == "}");
    }

    [EmulatedCudaFact]
    public void There_is_no_module_of_a_kernel_that_does_not_exist() => Assert.Null(PtxModules.For(80).ModuleOf("linear_sideways"));

    private static string[] Lines(byte[] ptx) => Encoding.ASCII.GetString(ptx).Split('\n');
}
