using System.Runtime.InteropServices;
using PerturbNas.Autograd;
using PerturbNas.Backends.Cpu;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>The tape: memory that blocks share changes no bits, only what is asked for is computed, and replaying allocates nothing.</summary>
public sealed partial class TapeTests
{
    private const string Dense = """{"operations": ["sep_conv_7x7", "conv_7x1_1x7", "noise"]}""";
    private static readonly TapeOptions _everything = new(BatchNormMode.BatchStatistics, WeightGradients: true, AlphaGradients: true);

    [Theory]
    [InlineData("s3")]
    [InlineData("s4")]
    [InlineData("s5")]
    [InlineData(Dense)]
    public void MemoryReuseChangesNoBits(string space)
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, space);
        var shared = network.Record(_everything);
        var apart = network.Record(_everything with { ReuseMemory = false });
        Assert.True(shared.Tape.PlannedBytes < 0.7 * apart.Tape.PlannedBytes, $"{shared.Tape.PlannedBytes} of {apart.Tape.PlannedBytes} bytes");

        // What the arena held before must not matter, either: a pass may read only what it has written.
        var expected = Results(apart);
        Assert.Equal(expected, Results(shared));
        Assert.All(expected, value => Assert.True(double.IsFinite(value)));

        double[] Results(SupernetPass pass)
        {
            Poison(network, pass);
            network.FillWeightGradients(float.NaN);
            var (losses, correct) = network.Run(pass);
            return [.. losses, .. correct.Select(count => (double)count), .. network.AlphaGradients(), .. network.WeightGradients()];
        }
    }

    [Theory]
    [InlineData("s4")]
    [InlineData("s5")]
    public void AlphaPassLeavesWeightGradientsAlone(string space)
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, space);
        network.Run(network.Record(_everything));
        var expected = network.AlphaGradients();

        network.FillWeightGradients(123);
        var pass = network.Record(_everything with { WeightGradients = false });
        network.Run(pass);
        Assert.Equal(expected, network.AlphaGradients());
        Assert.All(network.WeightGradients(), gradient => Assert.Equal(123, gradient));

        // Nothing wants a gradient before the first mixed sum: the stem and the preprocessing in front of it have no backward pass.
        var backward = pass.Tape.Operators.Where(operation => operation.NeedsBackward).ToList();
        Assert.Equal("mixed_sum", backward[0].Name);
        Assert.DoesNotContain(pass.Tape.Operators.TakeWhile(operation => operation != backward[0]), operation => operation.NeedsBackward);
    }

    [Theory]
    [InlineData("s4")]
    [InlineData("s5")]
    public void WeightPassLeavesAlphaGradientsAlone(string space)
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, space);
        network.Run(network.Record(_everything));
        var expected = network.WeightGradients();

        float[] sentinels = [.. Enumerable.Repeat(123f, network.Network.Alphas.Count)];
        backend.Write(network.Network.Alphas.Gradients.Address, sentinels);
        network.FillWeightGradients(float.NaN);
        network.Run(network.Record(_everything with { AlphaGradients = false }));
        Assert.Equal(expected, network.WeightGradients());
        Assert.All(network.AlphaGradients(), gradient => Assert.Equal(123, gradient));
    }

    public static TheoryData<string, string> DeadInputs => new()
    {
        { "s3", "none" }, // no edge at all: the logits are the bias
        { "s4", "noise" }, // edges, but none that reads its source
        { "s3", "skip_connect" },
    };

    /// <summary>
    /// Edges that do not read their source may leave cell inputs without consumers. The other edges carry the space's last operation; the
    /// same network, undecided, with one-hot alphas is what the decided one is compared with.
    /// </summary>
    [Theory]
    [MemberData(nameof(DeadInputs))]
    public void ValuesThatNothingReadsNeedNoGradient(string space, string operation)
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, space);
        for (var deadSources = 1; deadSources <= 5; deadSources++)
        {
            var states = new EdgeStates();
            var columns = network.Network.Space.Columns(CellType.Normal);
            var dead = network.Network.Space.Normal[0].ToList().IndexOf(operation);
            foreach (var type in Enum.GetValues<CellType>())
            {
                var alphas = new double[CellTopology.Edges * columns];
                for (var edge = 0; edge < CellTopology.Edges; edge++)
                {
                    states[type, edge] = CellTopology.SourceOf(edge) < deadSources ? dead : columns - 1;
                    alphas[edge * columns + states[type, edge]] = 1e4;
                }
                network.Network.Alphas.Set(type, alphas);
            }

            // Gradients of what a decided network does not run must stay zero; one-hot alphas multiply them by zero.
            network.FillWeightGradients(0);
            var (losses, _) = network.Run(network.Record(_everything, states));
            var (gradients, alphaGradients) = (network.WeightGradients(), network.AlphaGradients());
            network.FillWeightGradients(float.NaN);
            var (expectedLosses, _) = network.Run(network.Record(_everything));
            Assert.Equal(expectedLosses[0], losses[0], 1e-6 * losses[0]);
            RelativeError.AssertBelow(1e-6, network.WeightGradients(), gradients, $"weight gradients, {deadSources} sources unread");
            Assert.All(alphaGradients, gradient => Assert.Equal(0, gradient));
        }
    }

    [Fact]
    public void PassWithoutGradientsHasNoBackwardAndNeedsLessMemory()
    {
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s5");
        var scoring = network.Record(new TapeOptions(BatchNormMode.BatchStatistics));
        Assert.DoesNotContain(scoring.Tape.Operators, operation => operation.NeedsBackward);
        Assert.True(scoring.Tape.PlannedBytes < network.Record(_everything).Tape.PlannedBytes / 2);
    }

    [Fact]
    public void TrainingStepsAllocateNoMemory()
    {
        const int steps = 8;
        const long managedBytes = 4 << 10, nativeBytes = 4 << 10;
        using var backend = new CpuBackend(threads: 1);
        using var network = new SmallNetwork(backend, "s5");
        var images = SmallNetwork.NewImages(8, first: 0);
        using var trainer = new SupernetTrainer(network.Network, backend, network.Arena, new BatchLoader(images, 4, 1, "weights", augment: true),
            new BatchLoader(images, 4, 1, "alpha", augment: true), updatesAlpha: true, new EdgeStates(), noisePurpose: 0);
        long step = 0;
        Train();

        // The runtime's own threads allocate native memory when they like: the quietest of a few attempts counts.
        var (managed, native) = (long.MaxValue, long.MaxValue);
        for (var attempt = 0; attempt < 5; attempt++)
        {
            var (managedBefore, nativeBefore) = (GC.GetAllocatedBytesForCurrentThread(), NativeBytesInUse());
            var capacity = network.Arena.Capacity;
            Train();
            managed = Math.Min(managed, GC.GetAllocatedBytesForCurrentThread() - managedBefore);
            native = Math.Min(native, Math.Max(0, NativeBytesInUse() - nativeBefore));
            Assert.Equal(capacity, network.Arena.Capacity);
        }
        Assert.True(managed <= steps * managedBytes, $"{managed / steps} managed bytes a step");
        Assert.True(native <= nativeBytes, $"{native} native bytes in {steps} steps");

        void Train()
        {
            for (var i = 0; i < steps; i++)
                trainer.Step(step++, 0.01f);
        }
    }

    private static void Poison(SmallNetwork network, SupernetPass pass)
    {
        pass.Tape.Reserve();
        float[] notNumbers = [.. Enumerable.Repeat(float.NaN, (int)(network.Arena.Capacity / sizeof(float)))];
        network.Backend.Write(network.Arena.Base, notNumbers);
    }

    /// <summary>Bytes that malloc has given out and not got back, mapped blocks among them.</summary>
    private static long NativeBytesInUse()
    {
        var info = MallocInfo();
        return (long)(info.InUse + info.Mapped);
    }

    [LibraryImport("libc", EntryPoint = "mallinfo2")]
    private static partial MallocInformation MallocInfo();

    // struct mallinfo2 of glibc's malloc.h.
    [StructLayout(LayoutKind.Sequential)]
    private readonly struct MallocInformation
    {
        private readonly nuint _arena, _freeChunks, _fastbins, _mappedBlocks;
        public readonly nuint Mapped;
        private readonly nuint _maximum, _fastbinBytes;
        public readonly nuint InUse;
        private readonly nuint _free, _trimmable;
    }
}
