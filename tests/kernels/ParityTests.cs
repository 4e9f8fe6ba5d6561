using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;

namespace PerturbNas.Tests.Kernels;

/// <summary>Every case on the CPU, with every instruction set, against the oracle; and the same bits for any number of threads.</summary>
public class ParityTests
{
    /// <summary>
    /// The largest error allowed, as a share of the root mean square of the output's row. The unit roundoff of float32 is 6e-8; a sum
    /// of L products with errors of random sign is off by about sqrt(L) roundoffs of its typical size, and the worst of some ten
    /// thousand elements by four to five times that. The longest sums of the table (weight gradients over 3 * 32 * 32 pixels) come to
    /// sqrt(3072) * 6e-8 * 5 = 1.7e-5; a wrong, missing or doubled term is off by 1 / sqrt(L) = 2e-2.
    /// </summary>
    private const double Tolerance = 2e-5;

    /// <summary>The smallest normal float32: kernels may flush what is smaller to zero.</summary>
    private const double Denormal = 1.1754944e-38;

    public static TheoryData<string, Isa> Cases()
    {
        var data = new TheoryData<string, Isa>();
        foreach (var kernelCase in KernelCases.All)
            foreach (var isa in TestBackends.InstructionSets)
                data.Add(kernelCase.Name, isa);
        return data;
    }

    [Theory]
    [MemberData(nameof(Cases))]
    public void Equals_reference_and_does_not_depend_on_threads(string name, Isa isa)
    {
        var kernelCase = TestBackends.Case(name);
        foreach (var pass in kernelCase.Passes())
        {
            using var single = new KernelRun(kernelCase, TestBackends.Cpu(isa, 1));
            TestBackends.SpoilScratch(TestBackends.Cpu(isa, 1));
            var bytes = Run(kernelCase, single, pass);
            AssertClose(kernelCase, single, pass, name);
            foreach (var threads in new[] { 1, 2, 3 })
            {
                using var run = new KernelRun(kernelCase, TestBackends.Cpu(isa, threads));
                foreach (var (bufferName, again) in Run(kernelCase, run, pass))
                    Assert.True(
                        bytes[bufferName].AsSpan().SequenceEqual(again),
                        $"{name}, {pass}: {bufferName} has other bits on {threads} threads than in the first run on 1");
            }
        }
    }

    [Fact]
    public void Names_in_the_table_are_unique() =>
        Assert.Equal(KernelCases.All.Count, KernelCases.All.Select(kernelCase => kernelCase.Name).Distinct().Count());

    /// <summary>Runs a pass, checks that it wrote only its outputs, and returns the bytes of all buffers.</summary>
    internal static Dictionary<string, byte[]> Run(KernelCase kernelCase, KernelRun run, KernelPass pass)
    {
        run.Prepare(pass, TestBackends.GivenForwardOutputs(kernelCase, pass));
        var before = run.Bytes();
        run.Call(pass);
        var after = run.Bytes();
        Assert.True(run.BrokenSentinel() is null, $"{kernelCase.Name}, {pass}: {run.BrokenSentinel()}");
        foreach (var buffer in kernelCase.Buffers.Where(buffer => !buffer.IsOutput(pass)))
            Assert.True(
                before[buffer.Name].AsSpan().SequenceEqual(after[buffer.Name]), $"{kernelCase.Name}, {pass}: input {buffer.Name} changed");
        return after;
    }

    /// <summary>Everything that the pass wrote is what the oracle makes of it.</summary>
    internal static void AssertClose(KernelCase kernelCase, KernelRun run, KernelPass pass, string name, double tolerance = Tolerance)
    {
        var outputs = run.Outputs(pass);
        foreach (var buffer in kernelCase.Buffers.Where(buffer => buffer.IsOutput(pass)))
            AssertClose(buffer, TestBackends.Expected(kernelCase, pass)[buffer.Name], outputs[buffer.Name], $"{name}, {pass}", tolerance);
    }

    private static void AssertClose(KernelBuffer buffer, double[] expected, double[] actual, string where, double tolerance)
    {
        var exact = buffer.Kind is BufferKind.Int32 or BufferKind.Int64;
        for (var row = 0; row < buffer.Rows; row++)
        {
            var elements = Enumerable.Range(0, buffer.Count).Where(i => i / buffer.RowLength % buffer.Rows == row).ToArray();
            var finite = elements.Where(i => double.IsFinite(expected[i])).ToArray();
            var scale = Math.Sqrt(finite.Sum(i => expected[i] * expected[i]) / Math.Max(1, finite.Length));
            foreach (var i in elements)
            {
                var same = expected[i].Equals(actual[i]) ||
                    !exact && Math.Abs(expected[i] - actual[i]) <= tolerance * scale + Denormal;
                Assert.True(
                    same, $"{where}: {buffer.Name}[{i}] (row {row}) is {actual[i]:g9}, not {expected[i]:g9}; row scale {scale:g3}");
            }
        }
    }
}
