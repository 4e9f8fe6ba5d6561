using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Reference;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;
using Xunit;

namespace PerturbNas.Tests.Engine;

/// <summary>
/// Gradients of whole supernets: those of the Reference backend against finite differences in double, those of the CPU kernels against the
/// Reference backend.
/// </summary>
public sealed class SupernetGradientTests
{
    private const int Images = 3;
    private static readonly TapeOptions _everything = new(BatchNormMode.BatchStatistics, WeightGradients: true, AlphaGradients: true);

    public static TheoryData<string> Spaces => ["s1", "s2", "s3", "s4", "s5", "darts", """{"operations": ["sep_conv_7x7", "conv_7x1_1x7"]}"""];

    [Theory]
    [MemberData(nameof(Spaces))]
    public void ReferenceGradientsMatchFiniteDifferences(string space)
    {
        using var backend = new ReferenceBackend();
        using var fixture = new Fixture(backend, space);
        fixture.Run(_everything);
        var alphaGradients = fixture.Network.Alphas.GetGradients(CellType.Normal);
        var weightGradients = fixture.Network.Parameters.Weights.ToDictionary(p => p.Name, fixture.Network.Parameters.GetGradient);

        // Alphas: every eleventh; weights: one element of every ninth parameter.
        const double step = 1e-5;
        var alphas = fixture.Network.Alphas.Get(CellType.Normal);
        for (var i = 0; i < alphas.Length; i += 11)
        {
            var index = i;
            var numeric = Difference(delta =>
            {
                var moved = (double[])alphas.Clone();
                moved[index] += delta;
                fixture.Network.Alphas.Set(CellType.Normal, moved);
            });
            AssertClose(numeric, alphaGradients[i], $"alpha {i}");
        }
        for (var w = 0; w < fixture.Network.Parameters.Weights.Count; w += 9)
        {
            var parameter = fixture.Network.Parameters.Weights[w];
            var element = w % parameter.Count;
            var values = new double[parameter.Count];
            backend.Read(parameter.Address, values);
            var kernelGradients = new double[parameter.Count];
            backend.Read(parameter.Gradient, kernelGradients);
            var numeric = Difference(delta =>
            {
                var moved = (double[])values.Clone();
                moved[element] += delta;
                backend.Write(parameter.Address, moved);
            });
            AssertClose(numeric, kernelGradients[element], parameter.Name);
            Assert.Equal(parameter.Count, weightGradients[parameter.Name].Length);
        }

        double Difference(Action<double> move)
        {
            move(step);
            var up = fixture.Loss(Images);
            move(-step);
            var down = fixture.Loss(Images);
            move(0);
            return (up - down) / (2 * step);
        }

        static void AssertClose(double numeric, double analytic, string what) =>
            Assert.True(Math.Abs(numeric - analytic) <= 1e-6 + 1e-4 * Math.Abs(numeric), $"{what}: finite difference {numeric}, gradient {analytic}");
    }

    [Theory]
    [MemberData(nameof(Spaces))]
    public void CpuGradientsMatchReference(string space)
    {
        using var reference = new ReferenceBackend();
        using var cpu = new CpuBackend();
        using var expected = new Fixture(reference, space);
        using var actual = new Fixture(cpu, space);
        var expectedLoss = expected.Run(_everything);
        var actualLoss = actual.Run(_everything);
        Assert.Equal(expectedLoss, actualLoss, 1e-5 * Math.Abs(expectedLoss));
        foreach (var type in Enum.GetValues<CellType>())
            AssertClose(expected.Network.Alphas.GetGradients(type), actual.Network.Alphas.GetGradients(type), ArchitectureParameters.NameOf(type));
        for (var i = 0; i < expected.Network.Parameters.Weights.Count; i++)
        {
            var parameter = expected.Network.Parameters.Weights[i];
            AssertClose(ToDouble(expected.Network.Parameters.GetGradient(parameter)),
                ToDouble(actual.Network.Parameters.GetGradient(actual.Network.Parameters.Weights[i])), parameter.Name);
        }

        static double[] ToDouble(float[] values) => [.. values.Select(value => (double)value)];

        // Float32 rounding through some 40 layers, relative to the size of the gradient as a whole.
        static void AssertClose(double[] expected, double[] actual, string what)
        {
            var scale = Math.Sqrt(expected.Sum(x => x * x));
            var error = Math.Sqrt(expected.Zip(actual, (x, y) => (x - y) * (x - y)).Sum());
            Assert.True(error <= 1e-7 + 1e-4 * scale, $"{what}: error {error:E2} of {scale:E2}");
        }
    }

    private sealed class Fixture : IDisposable
    {
        private readonly Arena _arena;
        private readonly float[] _images;
        private readonly int[] _labels;

        public Fixture(Backend backend, string space)
        {
            var size = new SupernetSize(Channels: 4, Layers: 3, Classes: 5, ImageSize: 8);
            Network = new Supernet(backend, space.StartsWith('{') ? SearchSpace.Parse(space, "test") : SearchSpace.Load(space), size, seed: 3);
            _arena = new Arena(backend);
            var stream = new RandomStream(5, "test images");
            _images = [.. Enumerable.Range(0, Images * 8 * 8 * 3).Select(_ => (float)stream.NextNormal())];
            _labels = [0, 3, 4];
            // Weights of the usual size would leave batch norm of 1x1 images' worth of pixels ill-conditioned; alphas should not be uniform.
            foreach (var type in Enum.GetValues<CellType>())
                Network.Alphas.Set(type, [.. Network.Alphas.Get(type).Select((_, i) => 0.3 * Math.Sin(i))]);
        }

        public Supernet Network { get; }

        public double Run(TapeOptions options)
        {
            var pass = Network.Record(_arena, options, Images, new EdgeStates());
            pass.Forward(_images, _labels);
            pass.Backward();
            return Read(pass);
        }

        public double Loss(int images)
        {
            var pass = Network.Record(_arena, new TapeOptions(BatchNormMode.BatchStatistics), images, new EdgeStates());
            pass.Forward(_images, _labels);
            return Read(pass) / images;
        }

        public void Dispose()
        {
            Network.Dispose();
            _arena.Dispose();
        }

        private static double Read(SupernetPass pass)
        {
            Span<double> loss = stackalloc double[1];
            Span<long> correct = stackalloc long[1];
            pass.ReadResults(loss, correct);
            return loss[0];
        }
    }
}
