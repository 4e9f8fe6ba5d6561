using System.Runtime.InteropServices;
using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>Optimisers, learning rates and the loss against PyTorch in double precision (tests/fixtures/optimisers.safetensors).</summary>
public sealed class OptimiserFixtureTests
{
    // The settings themselves (momentum, betas, rates) are float32, in both backends.
    private const double Tolerance = 2e-7;

    private static readonly FixtureFile _file = new("optimisers");

    public static TheoryData<string> Backends => EngineBackends.Names;

    [Theory]
    [MemberData(nameof(Backends))]
    public void SgdClipsAndSteps(string backendName)
    {
        using var backend = EngineBackends.Create(backendName);
        var start = _file.Singles("sgd.parameters");
        using var store = new ParameterStore(backend);
        var weight = store.AddWeight("weight", start.Length);
        store.Seal(seed: 1);
        store.SetValues(weight, start);
        using var sgd = new Sgd(backend, store);
        var (rates, norms) = (_file.Values("sgd.rates"), _file.Values("sgd.norms"));
        Assert.Contains(norms, norm => norm > Sgd.MaximumNorm);
        Assert.Contains(norms, norm => norm < Sgd.MaximumNorm);
        for (var step = 0; step < rates.Length; step++)
        {
            backend.Write(weight.Gradient, Row(_file.Singles("sgd.gradients"), step, start.Length));
            var norm = sgd.Step((float)rates[step]);
            Assert.Equal(norms[step], norm, 1e-12 * norms[step]);
            RelativeError.AssertBelow(Tolerance, Row(_file.Values("sgd.expected"), step, start.Length), store.GetValues(weight), $"step {step}");
        }
    }

    [Theory]
    [MemberData(nameof(Backends))]
    public void AdamStepsAlphas(string backendName)
    {
        using var backend = EngineBackends.Create(backendName);
        var start = _file.Values("adam.parameters");
        var gradients = _file.Singles("adam.gradients");

        // A space with more alphas than the fixture has parameters; those left over are zero and stay zero.
        using var alphas = new ArchitectureParameters(backend, SearchSpace.Load("s5"), seed: 1);
        var padded = new double[CellTopology.Edges * alphas.Columns(CellType.Normal)];
        start.CopyTo(padded, 0);
        alphas.Set(CellType.Normal, padded);
        alphas.Set(CellType.Reduction, new double[padded.Length]);
        using var adam = new AlphaAdam(backend, alphas);
        for (var step = 0; step < gradients.Length / start.Length; step++)
        {
            backend.Write(alphas.Gradients.Address, Row(gradients, step, start.Length));
            adam.Step();
            var actual = alphas.Get(CellType.Normal);
            RelativeError.AssertBelow(Tolerance, Row(_file.Values("adam.expected"), step, start.Length), actual[..start.Length], $"step {step}");
            Assert.All(actual[start.Length..].Concat(alphas.Get(CellType.Reduction)), value => Assert.Equal(0, value));
        }
    }

    [Fact]
    public void CosineScheduleMatchesPyTorch()
    {
        var rates = _file.Values("cosine.rates");
        var schedule = new CosineSchedule(0.025, 0.001);
        for (var epoch = 0; epoch < rates.Length; epoch++)
            Assert.Equal(rates[epoch], schedule.Rate(epoch, rates.Length), 1e-7 * rates[epoch]);
    }

    [Theory]
    [InlineData("reference", "plain", 0f, 1e-8)]
    [InlineData("reference", "smoothed", 0.1f, 1e-8)]
    [InlineData("cpu", "plain", 0f, 3e-7)]
    [InlineData("cpu", "smoothed", 0.1f, 3e-7)]
    public void CrossEntropyMatchesPyTorch(string backendName, string name, float smoothing, double tolerance)
    {
        using var backend = EngineBackends.Create(backendName);
        var (images, classes) = (_file.Shape("cross_entropy.logits")[0], _file.Shape("cross_entropy.logits")[1]);
        var logitValues = _file.Singles("cross_entropy.logits");
        int[] labelValues = [.. _file.Values("cross_entropy.labels").Select(label => (int)label)];
        var size = backend.ElementSize;
        var logits = backend.Allocate(images * classes * size);
        var labels = backend.Allocate(images * sizeof(int));
        var (losses, dlogits) = (backend.Allocate(images * size), backend.Allocate(images * classes * size));
        var (lossSum, correctCount) = (backend.Allocate(sizeof(double)), backend.Allocate(sizeof(long)));
        backend.Write(logits, logitValues);
        backend.Write(labels, labelValues);
        backend.SoftmaxCrossEntropy(new SoftmaxCrossEntropyArgs
        {
            Logits = logits,
            Labels = labels,
            ImageLosses = losses,
            LossSums = lossSum,
            CorrectCounts = correctCount,
            Dlogits = dlogits,
            Variants = 1,
            Images = images,
            Classes = classes,
            Smoothing = smoothing,
            Scale = 1,
        });

        var expected = _file.Values($"cross_entropy.{name}.losses");
        var (actual, gradient) = (new double[images], new double[images * classes]);
        backend.Read(losses, actual);
        backend.Read(dlogits, gradient);
        var sum = new double[1];
        var correct = new long[1];
        backend.ReadBytes(lossSum, MemoryMarshal.AsBytes(sum.AsSpan()));
        backend.ReadBytes(correctCount, MemoryMarshal.AsBytes(correct.AsSpan()));
        RelativeError.AssertBelow(tolerance, expected, actual, "losses");
        RelativeError.AssertBelow(tolerance, [expected.Sum()], sum, "loss sum");
        RelativeError.AssertBelow(tolerance, _file.Values($"cross_entropy.{name}.gradient"), gradient, "gradient");
        Assert.Equal(Enumerable.Range(0, images).Count(i => logitValues[i * classes + labelValues[i]] == Row(logitValues, i, classes).Max()), correct[0]);
        foreach (var address in (nint[])[logits, labels, losses, dlogits, lossSum, correctCount])
            backend.Free(address);
    }

    private static T[] Row<T>(T[] values, int row, int columns) => values[(row * columns)..((row + 1) * columns)];
}
