using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Backends.Planning;
using PerturbNas.Networks;
using PerturbNas.Tests.Engine;
using PerturbNas.Tests.Kernels;

namespace PerturbNas.Tests.Cuda;

/// <summary>Passes that are replayed as CUDA graphs: the bits of passes that are not, whatever changes between two of them.</summary>
public sealed class ReplayTests
{
    private static readonly TapeOptions _everything = new(BatchNormMode.BatchStatistics, WeightGradients: true, AlphaGradients: true);

    /// <summary>The first run of a pass is not a replay, the second is captured, the others launch what was captured.</summary>
    [EmulatedCudaTheory]
    [InlineData("s3")]
    [InlineData("s4")] // noise, whose position in its stream changes
    public void Equals_a_pass_that_is_recorded_anew(string space)
    {
        using var network = new SmallNetwork(TestBackends.Cuda, space, channels: 2);
        var replayed = network.Record(_everything);
        for (ulong position = 0; position < 4; position++)
        {
            network.Network.NoisePosition = position;
            var expected = Results(network, network.Record(_everything));
            Assert.Equal(expected, Results(network, replayed));
            // The weights and alphas of the moment count.
            var weight = network.Network.Parameters.Weights[(int)position];
            network.Network.Parameters.SetValues(weight, [.. network.Network.Parameters.GetValues(weight).Select(value => value + 0.125f)]);
            network.Network.Alphas.Set(Spaces.CellType.Normal, [.. network.Network.Alphas.Get(Spaces.CellType.Normal).Select(alpha => alpha + 0.25)]);
        }
    }

    [EmulatedCudaFact]
    public void Goes_on_when_the_memory_has_moved()
    {
        using var network = new SmallNetwork(TestBackends.Cuda, "s3", channels: 2);
        var scoring = network.Record(new TapeOptions(BatchNormMode.BatchStatistics));
        var expected = network.Run(scoring).LossSums;
        for (var run = 0; run < 2; run++)
            Assert.Equal(expected, network.Run(scoring).LossSums);
        var capacity = network.Arena.Capacity;
        network.Run(network.Record(_everything));
        Assert.True(network.Arena.Capacity > capacity);
        for (var run = 0; run < 3; run++)
            Assert.Equal(expected, network.Run(scoring).LossSums);
    }

    [EmulatedCudaFact]
    public void Launches_what_the_pass_launches_and_metering_sees_every_call()
    {
        using var network = new SmallNetwork(TestBackends.Cuda, "s3", channels: 2);
        var pass = network.Record(_everything);
        var first = Launches(() => network.Run(pass));
        for (var run = 0; run < 2; run++)
            Assert.Equal(first, Launches(() => network.Run(pass)));

        using var metered = new MeteredBackend(TestBackends.Cuda);
        using var measured = new SmallNetwork(metered, "s3", channels: 2);
        var (calls, counts) = (0, new List<int>());
        metered.Called = _ => calls++;
        pass = measured.Record(_everything);
        for (var run = 0; run < 3; run++)
        {
            calls = 0;
            measured.Run(pass);
            counts.Add(calls);
        }
        Assert.True(counts[0] > 0 && counts.TrueForAll(count => count == counts[0]), string.Join(", ", counts));

        static string Launches(Action run) =>
            string.Join(", ", CudaEmulator.Count(run).OrderBy(pair => pair.Key, StringComparer.Ordinal).Select(pair => $"{pair.Key} {pair.Value.Launches}"));
    }

    [EmulatedCudaFact]
    public void Is_refused_where_the_host_takes_part()
    {
        var backend = TestBackends.Cuda;
        var address = backend.Allocate(64);
        var key = new object();
        backend.Replay(key, () => { });
        var floats = new float[1];
        Assert.Throws<InvalidOperationException>(() => backend.Replay(key, () => backend.Read(address, floats)));
        Assert.Throws<InvalidOperationException>(() => backend.Replay(key, () => backend.Write(address, [1f])));
        // Nothing is left of the capture that failed.
        backend.Write(address, [3f]);
        backend.Read(address, floats);
        Assert.Equal(3, floats[0]);
        backend.Free(address);
    }

    private static double[] Results(SmallNetwork network, SupernetPass pass)
    {
        network.FillWeightGradients(float.NaN);
        var (losses, correct) = network.Run(pass);
        return [.. losses, .. correct.Select(count => (double)count), .. network.AlphaGradients(), .. network.WeightGradients()];
    }
}
