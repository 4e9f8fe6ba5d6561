using PerturbNas.Autograd;
using PerturbNas.Backends.Planning;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Tensors;

namespace PerturbNas.Tests.Engine;

/// <summary>What things cost, and forecasts of whole runs, against counts made by hand and against what runs really use.</summary>
public sealed class PlanTests
{
    private const int Images = 64;

    /// <summary>The paper's supernet on CIFAR-10: some 42 GFLOP forward, and as much again for each of the two gradients.</summary>
    [Fact]
    public void TheSupernetCostsWhatItsArchitectureSays()
    {
        using var backend = new MeteredBackend();
        using var network = new Supernet(backend, SearchSpace.Load("s5"), new SupernetSize(16, 8, 10, 32), seed: 0);
        using var arena = new Arena(backend);
        var alpha = network.Record(arena, new TapeOptions(BatchNormMode.Training, AlphaGradients: true), Images, new EdgeStates()).Tape;
        var weights = network.Record(arena, new TapeOptions(BatchNormMode.Training, WeightGradients: true), Images, new EdgeStates()).Tape;
        var products = Products();
        Assert.InRange(alpha.ForwardCost.Flops, 40e9, 44.5e9);
        // Pools, normalisation, statistics and sums are what is not a product.
        Assert.InRange(alpha.ForwardCost.Flops / products, 1.0, 1.2);
        Assert.Equal(alpha.ForwardCost.Flops, weights.ForwardCost.Flops);
        Assert.InRange(alpha.BackwardCost.Flops / products, 0.97, 1.1);
        Assert.InRange(weights.BackwardCost.Flops / products, 1.97, 2.2);
        Assert.Equal(default, network.Record(arena, new TapeOptions(BatchNormMode.BatchStatistics), Images, new EdgeStates()).Tape.BackwardCost);
    }

    // Two operations per multiply-add of every convolution, cell by cell; in a reduction cell the edges from the inputs have stride 2,
    // which the first half of a separable convolution has already taken.
    private static double Products()
    {
        var products = 2.0 * 27 * 48 * 1024;
        var (beforePrevious, previous, channels, pixels) = (48, 48, 16, 1024);
        for (var cell = 0; cell < 8; cell++)
        {
            var reduction = cell is 2 or 5;
            if (reduction)
                channels *= 2;
            products += 2.0 * (beforePrevious + previous) * channels * pixels;
            if (reduction)
                pixels /= 4;
            products += CellTopology.Edges * 2.0 * channels * pixels * (2 * (9 + channels) + 2 * (25 + channels) + 9 + channels + 25 + channels);
            // The strided skip connections of a reduction cell: two halves of a 1x1 convolution.
            if (reduction)
                products += 8 * 2.0 * channels * channels * pixels;
            (beforePrevious, previous) = (previous, 4 * channels);
        }
        return Images * products;
    }
}
