using System.Diagnostics;
using PerturbNas.Data;
using PerturbNas.Training;
using Xunit;

namespace PerturbNas.Tests.Data;

public sealed class BatchLoaderTests
{
    [Fact]
    public void Evaluation_goes_in_record_order_with_a_smaller_last_batch()
    {
        var images = Images(10);
        var loader = BatchLoader.InRecordOrder(images, 4);
        Assert.Equal((3, 4, 2), (loader.Steps, loader.BatchCount(1), loader.BatchCount(2)));
        var values = new float[4 * 3072];
        var labels = new int[4];
        for (var step = 0; step < 3; step++)
        {
            var count = loader.Fill(9, step, values, labels);
            Assert.Equal(step == 2 ? 2 : 4, count);
            for (var i = 0; i < count; i++)
            {
                Assert.Equal(images.Labels[step * 4 + i], labels[i]);
                for (var p = 0; p < 1024; p++)
                    for (var channel = 0; channel < 3; channel++)
                        Assert.Equal(
                            Normalised(images, channel, images.Pixels[(step * 4 + i) * 3072 + channel * 1024 + p]),
                            values[i * 3072 + p * 3 + channel]);
            }
        }
    }

    [Fact]
    public void An_epoch_has_every_record_once_in_an_order_of_its_own()
    {
        var images = Images(11, record => record);
        var loader = new BatchLoader(images, 4, 1, "weights", augment: false);
        var first = Order(loader, 0);
        var second = Order(loader, 1);
        Assert.Equal(Enumerable.Range(0, 11), first.Order());
        Assert.Equal(Enumerable.Range(0, 11), second.Order());
        Assert.NotEqual(first, second);

        // Resumed: the second epoch without the first, the steps backwards.
        var resumed = new BatchLoader(images, 4, 1, "weights", augment: false);
        Assert.Equal(second, Order(resumed, 1, backwards: true));
        Assert.Equal(first, Order(resumed, 0));
        Assert.NotEqual(first, Order(new BatchLoader(images, 4, 1, "validation", augment: false), 0));
        Assert.NotEqual(first, Order(new BatchLoader(images, 4, 2, "weights", augment: false), 0));
    }

    [Fact]
    public void The_order_is_that_of_the_named_stream()
    {
        var expected = Enumerable.Range(0, 11).ToArray();
        new RandomStream(1, "data order/weights", 3).Shuffle(expected);
        Assert.Equal(expected, Order(new BatchLoader(Images(11, record => record), 4, 1, "weights", augment: false), 3));
    }

    // Every augmented image must be one of the 81 crops x 2 flips of its record, computed here pixel by pixel from the definition.
    [Fact]
    public void Augmentation_crops_the_padded_image_and_flips()
    {
        var images = Images(40, record => record);
        var loader = new BatchLoader(images, 40, 7, "weights", augment: true);
        var values = new float[40 * 3072];
        var labels = new int[40];
        var tops = new HashSet<int>();
        var lefts = new HashSet<int>();
        var flips = 0;
        for (var epoch = 0; epoch < 3; epoch++)
        {
            loader.Fill(epoch, 0, values, labels);
            for (var i = 0; i < 40; i++)
            {
                var found = 0;
                for (var top = 0; top <= 8; top++)
                    for (var left = 0; left <= 8; left++)
                        foreach (var flip in (bool[])[false, true])
                            if (IsCrop(images, labels[i], values.AsSpan(i * 3072, 3072), top, left, flip))
                            {
                                found++;
                                tops.Add(top);
                                lefts.Add(left);
                                flips += flip ? 1 : 0;
                            }
                Assert.Equal(1, found);
            }
        }
        Assert.Equal(9, tops.Count);
        Assert.Equal(9, lefts.Count);

        // 120 draws: mean 60, standard deviation 5.5.
        Assert.InRange(flips, 40, 80);
    }

    [Fact]
    public void Augmentation_does_not_depend_on_the_batch_or_the_split()
    {
        var source = new SyntheticSource();
        var whole = new BatchLoader(source.Read(DataPart.Train, 16), 16, 3, "weights", augment: true, cutoutLength: 16);
        var half = new BatchLoader(source.ReadSearchSplit(8 / 50_000.0, 8, 8).Validation, 3, 3, "weights", augment: true, cutoutLength: 16);
        var expected = ByRecord(whole, 5);
        foreach (var (image, label) in ByRecord(half, 5))
            Assert.Contains(expected, other => other.Label == label && other.Image.AsSpan().SequenceEqual(image));
        Assert.DoesNotContain(ByRecord(whole, 6), other => other.Image.AsSpan().SequenceEqual(expected[0].Image));
    }

    [Fact]
    public void Cutout_zeroes_one_clipped_square_of_normalised_values()
    {
        var images = Images(200, record => record);
        var plain = new BatchLoader(images, 200, 4, "weights", augment: true);
        var cut = new BatchLoader(images, 200, 4, "weights", augment: true, cutoutLength: 16);
        var before = new float[200 * 3072];
        var after = new float[200 * 3072];
        var labels = new int[200];
        plain.Fill(2, 0, before, labels);
        cut.Fill(2, 0, after, labels);
        var (centresY, centresX) = (new HashSet<int>(), new HashSet<int>());
        for (var i = 0; i < 200; i++)
        {
            int top = 32, bottom = -1, left = 32, right = -1, zeros = 0;
            for (var p = 0; p < 1024; p++)
            {
                var differs = !before.AsSpan(i * 3072 + p * 3, 3).SequenceEqual(after.AsSpan(i * 3072 + p * 3, 3));
                if (!differs)
                    continue;
                Assert.Equal([0f, 0f, 0f], after[(i * 3072 + p * 3)..(i * 3072 + p * 3 + 3)]);
                zeros++;
                (top, bottom) = (Math.Min(top, p / 32), Math.Max(bottom, p / 32));
                (left, right) = (Math.Min(left, p % 32), Math.Max(right, p % 32));
            }

            // A centre c in 0..31 clears c-8..c+7, cut off at the border: 8 to 16 rows, fewer only at a border.
            Assert.Equal((bottom - top + 1) * (right - left + 1), zeros);
            foreach (var (from, to, centres) in ((int, int, HashSet<int>)[])[(top, bottom, centresY), (left, right, centresX)])
            {
                Assert.InRange(to - from + 1, 8, 16);
                Assert.True(to - from + 1 == 16 || from == 0 || to == 31);
                centres.Add(from == 0 ? to - 7 : from + 8);
            }
        }
        Assert.Contains(0, centresY);
        Assert.Contains(31, centresX);
    }

    [Fact]
    public void Refuses_steps_and_buffers_that_do_not_fit()
    {
        var loader = BatchLoader.InRecordOrder(Images(5), 2);
        Assert.Throws<ArgumentOutOfRangeException>(() => loader.Fill(0, 3, new float[2 * 3072], new int[2]));
        Assert.Throws<ArgumentOutOfRangeException>(() => loader.Fill(0, -1, new float[2 * 3072], new int[2]));
        Assert.Throws<ArgumentOutOfRangeException>(() => loader.Fill(0, 0, new float[2 * 3072 - 1], new int[2]));
        Assert.Throws<ArgumentOutOfRangeException>(() => loader.Fill(0, 0, new float[2 * 3072], new int[1]));
        Assert.Equal(1, loader.Fill(0, 2, new float[3072], new int[1]));
    }

    [Fact]
    public void Fill_allocates_nothing_and_is_fast()
    {
        var loader = new BatchLoader(Images(512), 64, 1, "weights", augment: true, cutoutLength: 16);
        var values = new float[64 * 3072];
        var labels = new int[64];
        for (var i = 0; i < 200; i++)
            loader.Fill(0, i % 8, values, labels);
        var allocated = GC.GetAllocatedBytesForCurrentThread();
        var best = TimeSpan.MaxValue;
        for (var i = 0; i < 200; i++)
        {
            var start = Stopwatch.GetTimestamp();
            loader.Fill(0, i % 8, values, labels);
            var elapsed = Stopwatch.GetElapsedTime(start);
            best = elapsed < best ? elapsed : best;
        }
        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - allocated);
        Assert.True(best < TimeSpan.FromMilliseconds(1), $"64 images took {best.TotalMilliseconds} ms.");
    }

    [RealFilesFact("cifar10")]
    public void Real_images_come_out_normalised()
    {
        var images = ImageSource.Open("cifar10").Read(DataPart.Train, 1000);
        var values = new float[1000 * 3072];
        BatchLoader.InRecordOrder(images, 1000).Fill(0, 0, values, new int[1000]);
        Assert.Equal(0, values.Average(), 0.05);
        Assert.Equal(1, Math.Sqrt(values.Average(value => value * (double)value)), 0.05);
    }

    private static ImageSet Images(int count, Func<int, int>? label = null)
    {
        var pixels = new byte[count * 3072];
        for (var i = 0; i < pixels.Length; i++)
            pixels[i] = CifarFiles.Pixel(i / 3072, i % 3072 * 3 + i / 7);
        return new ImageSet
        {
            Name = "made up",
            Classes = count,
            Height = 32,
            Width = 32,
            FirstRecord = 0,
            Pixels = pixels,
            Labels = [.. Enumerable.Range(0, count).Select(label ?? (record => record % 7))],
            Mean = CifarLayout.Cifar10.Mean,
            Std = CifarLayout.Cifar10.Std,
        };
    }

    private static float Normalised(ImageSet images, int channel, byte value) =>
        (value / 255f - images.Mean[channel]) / images.Std[channel];

    private static bool IsCrop(ImageSet images, int record, ReadOnlySpan<float> values, int top, int left, bool flip)
    {
        for (var y = 0; y < 32; y++)
            for (var x = 0; x < 32; x++)
            {
                var sourceY = y + top - 4;
                var sourceX = (flip ? 31 - x : x) + left - 4;
                for (var channel = 0; channel < 3; channel++)
                {
                    var inside = sourceY is >= 0 and < 32 && sourceX is >= 0 and < 32;
                    var value = inside ? images.Pixels[record * 3072 + channel * 1024 + sourceY * 32 + sourceX] : (byte)0;
                    if (values[(y * 32 + x) * 3 + channel] != Normalised(images, channel, value))
                        return false;
                }
            }
        return true;
    }

    private static int[] Order(BatchLoader loader, int epoch, bool backwards = false)
    {
        var batches = new int[loader.Steps][];
        var values = new float[loader.BatchSize * 3072];
        for (var i = 0; i < loader.Steps; i++)
        {
            var step = backwards ? loader.Steps - 1 - i : i;
            batches[step] = new int[loader.BatchCount(step)];
            loader.Fill(epoch, step, values, batches[step]);
        }
        return [.. batches.SelectMany(batch => batch)];
    }

    private static List<(float[] Image, int Label)> ByRecord(BatchLoader loader, int epoch)
    {
        var result = new List<(float[], int)>();
        var values = new float[loader.BatchSize * 3072];
        var labels = new int[loader.BatchSize];
        for (var step = 0; step < loader.Steps; step++)
        {
            var count = loader.Fill(epoch, step, values, labels);
            for (var i = 0; i < count; i++)
                result.Add((values[(i * 3072)..((i + 1) * 3072)], labels[i]));
        }
        return result;
    }
}
