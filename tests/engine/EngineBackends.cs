using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Reference;

namespace PerturbNas.Tests.Engine;

/// <summary>The backends that the engine runs on, by name: rows of a theory.</summary>
internal static class EngineBackends
{
    public static TheoryData<string> Names => ["reference", "cpu"];

    public static Backend Create(string name) => name == "cpu" ? new CpuBackend(threads: 1) : new ReferenceBackend();
}

/// <summary>Errors of whole tensors: ||actual - expected|| / ||expected||.</summary>
internal static class RelativeError
{
    public static void AssertBelow(double tolerance, IReadOnlyList<double> expected, IReadOnlyList<double> actual, string what)
    {
        Assert.Equal(expected.Count, actual.Count);
        var scale = Math.Sqrt(expected.Sum(x => x * x));
        var error = Math.Sqrt(expected.Zip(actual, (x, y) => (x - y) * (x - y)).Sum());
        Assert.True(error <= tolerance * scale, $"{what}: relative error {error / scale:E2} of norm {scale:E2}");
    }

    public static void AssertBelow(double tolerance, IReadOnlyList<double> expected, IReadOnlyList<float> actual, string what) =>
        AssertBelow(tolerance, expected, [.. actual.Select(value => (double)value)], what);
}
