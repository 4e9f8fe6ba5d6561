using System.Security.Cryptography;
using PerturbNas.Data;
using Xunit;

namespace PerturbNas.Tests.Data;

public sealed class SyntheticSourceTests
{
    [Fact]
    public void A_record_depends_on_nothing_but_seed_part_and_number()
    {
        var source = new SyntheticSource(5);
        var all = source.Read(DataPart.Train, 64);
        var (train, validation) = source.ReadSearchSplit(0.0004, 20, 44);
        Assert.Equal(20, validation.FirstRecord);
        Assert.Equal(all.Pixels, (byte[])[.. train.Pixels, .. validation.Pixels]);
        Assert.Equal(all.Labels, (int[])[.. train.Labels, .. validation.Labels]);
        Assert.NotEqual(all.Pixels, new SyntheticSource(6).Read(DataPart.Train, 64).Pixels);
        Assert.NotEqual(all.Pixels, source.Read(DataPart.Test, 64).Pixels);
    }

    // The bytes are part of what a run's seed promises.
    [Fact]
    public void The_pixels_of_a_seed_stay_the_same() => Assert.Equal(
        "028ea7ec7bea67cf642e9fbd8e1c07d4e22ada074b5b12bfba49e29467d91a8b",
        Convert.ToHexStringLower(SHA256.HashData(new SyntheticSource().Read(DataPart.Train, 100).Pixels)));

    [Theory]
    [InlineData(10)]
    [InlineData(1000)]
    public void Every_prefix_is_balanced(int count)
    {
        var counts = new SyntheticSource(3).Read(DataPart.Test, count).Labels.CountBy(label => label).ToDictionary();
        Assert.Equal(10, counts.Count);
        Assert.All(counts.Values, value => Assert.Equal(count / 10, value));
    }

    [Fact]
    public void The_constants_are_those_of_the_images()
    {
        var images = new SyntheticSource(1).Read(DataPart.Train, 4000);
        for (var channel = 0; channel < 3; channel++)
        {
            double sum = 0, squares = 0;
            for (var image = 0; image < images.Count; image++)
                foreach (var value in images.Pixels.AsSpan(image * 3072 + channel * 1024, 1024))
                {
                    sum += value / 255.0;
                    squares += value * value / 65025.0;
                }
            var mean = sum / (images.Count * 1024);
            Assert.Equal(images.Mean[channel], mean, 0.01);
            Assert.Equal(images.Std[channel], Math.Sqrt(squares / (images.Count * 1024) - mean * mean), 0.01);
        }
    }

    // Least squares from the three mean colours (and a constant) to the one-hot classes: one in ten is chance; 4,000 test images
    // put the standard error at 0.5 %, so 13 % is six of them away.
    [Fact]
    public void A_linear_classifier_on_the_mean_colour_is_at_chance()
    {
        var source = new SyntheticSource(2);
        var train = source.Read(DataPart.Train, 4000);
        var normal = new double[4, 4];
        var target = new double[4, 10];
        for (var image = 0; image < train.Count; image++)
        {
            var x = MeanColour(train, image);
            for (var i = 0; i < 4; i++)
            {
                for (var j = 0; j < 4; j++)
                    normal[i, j] += x[i] * x[j];
                target[i, train.Labels[image]] += x[i];
            }
        }
        Solve(normal, target);
        var test = source.Read(DataPart.Test, 4000);
        var correct = 0;
        for (var image = 0; image < test.Count; image++)
        {
            var x = MeanColour(test, image);
            var scores = Enumerable.Range(0, 10).Select(c => Enumerable.Range(0, 4).Sum(i => x[i] * target[i, c])).ToArray();
            if (scores.IndexOf(scores.Max()) == test.Labels[image])
                correct++;
        }
        Assert.InRange(correct / 4000.0, 0.07, 0.13);
    }

    private static double[] MeanColour(ImageSet images, int image)
    {
        var colour = new double[] { 0, 0, 0, 1 };
        for (var channel = 0; channel < 3; channel++)
            foreach (var value in images.Pixels.AsSpan(image * 3072 + channel * 1024, 1024))
                colour[channel] += value / (255.0 * 1024);
        return colour;
    }

    /// <summary>Gauss-Jordan elimination in place: b becomes the solution of a x = b for a positive definite a.</summary>
    private static void Solve(double[,] a, double[,] b)
    {
        var n = a.GetLength(0);
        for (var pivot = 0; pivot < n; pivot++)
            for (var row = 0; row < n; row++)
            {
                if (row == pivot)
                    continue;
                var factor = a[row, pivot] / a[pivot, pivot];
                for (var column = 0; column < n; column++)
                    a[row, column] -= factor * a[pivot, column];
                for (var column = 0; column < b.GetLength(1); column++)
                    b[row, column] -= factor * b[pivot, column];
            }
        for (var row = 0; row < n; row++)
            for (var column = 0; column < b.GetLength(1); column++)
                b[row, column] /= a[row, row];
    }
}
