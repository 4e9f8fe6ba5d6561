using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Training;

namespace PerturbNas.Tests.Kernels;

/// <summary>
/// The y of a large batch, and a dx whose sums are asked for, are written past the cache (kernels/cpu/depthwise_pointwise.cpp); the case
/// table has none as large. What is written must be, bit for bit, what the same images give one at a time.
/// </summary>
public class StreamedOutputTests
{
    private const int Images = 17, Extent = 32, Channels = 16, Kernel = 5;
    private const int ImageSize = Extent * Extent * Channels;

    public static TheoryData<Isa> InstructionSets => [.. TestBackends.InstructionSets];

    [Theory]
    [MemberData(nameof(InstructionSets))]
    public void Depthwise_pointwise_gives_the_bits_of_single_images(Isa isa)
    {
        Assert.True(Images * ImageSize > 1 << 18, "the batch must be larger than what stays in the cache");
        var backend = TestBackends.Cpu(isa, 2);
        var blocks = new List<nint>();
        var x = Take(Images * ImageSize);
        var g = Take(Images * ImageSize);
        var arguments = new DepthwisePointwiseArgs
        {
            XNormalization = Take(4 * Channels),
            Depthwise = Take(Kernel * Kernel * Channels),
            Pointwise = Take(Channels * Channels),
            Coefficients = Take(3 * Channels),
            Variants = 1,
            Height = Extent,
            Width = Extent,
            InChannels = Channels,
            OutChannels = Channels,
            Kernel = Kernel,
            Stride = 1,
            Dilation = 1,
        };

        var together = Run(0, Images);
        var alone = Enumerable.Range(0, Images).Select(image => Run(image, 1)).ToList();
        for (var output = 0; output < together.Length; output++)
            Assert.Equal(together[output], alone.SelectMany(outputs => outputs[output]));
        Assert.DoesNotContain(together, output => output.Contains(float.NaN));
        blocks.ForEach(backend.Free);

        // y, statistics, dx and its sums of `count` images.
        float[][] Run(int first, int count)
        {
            int[] sizes = [ImageSize, 2 * Channels, ImageSize, 2 * Channels];
            nint[] outputs = [.. sizes.Select(size => backend.Allocate(count * size * sizeof(float)))];
            for (var i = 0; i < outputs.Length; i++)
                backend.Write(outputs[i], Enumerable.Repeat(float.NaN, count * sizes[i]).ToArray());
            var at = (nint)first * ImageSize * sizeof(float);
            var run = arguments with { X = x + at, Images = count, Y = outputs[0] };
            backend.DepthwisePointwiseForward(run with { Statistics = outputs[1] });
            backend.DepthwisePointwiseBackward(run with { G = g + at, Dx = outputs[2], GradientSums = outputs[3] });
            return [.. outputs.Select((address, i) =>
            {
                var values = new float[count * sizes[i]];
                backend.Read(address, values);
                backend.Free(address);
                return values;
            })];
        }

        nint Take(int count)
        {
            var address = backend.Allocate(count * sizeof(float));
            blocks.Add(address);
            var stream = new RandomStream(1, $"block {blocks.Count}");
            backend.Write(address, Enumerable.Range(0, count).Select(_ => (float)stream.NextNormal()).ToArray());
            return address;
        }
    }
}
