using PerturbNas.Training;

namespace PerturbNas.Data;

/// <summary>
/// Batches of an <see cref="ImageSet"/> as the networks take them: float32 [N, H, W, 3], normalised. Every batch is addressed by epoch
/// and step, so that a resumed run continues where it stopped. A training loader goes through all records once an epoch, in an order
/// drawn for the epoch; augmentation is drawn for the epoch and the record, so that it does not depend on the batch. The last batch
/// of an epoch may be smaller. Not for use by several threads at once.
/// </summary>
public sealed unsafe class BatchLoader
{
    // Algorithm.md, section 3: pad 4, then crop the original size.
    private const int Padding = 4;

    private readonly ImageSet _images;
    private readonly bool _shuffle;
    private readonly bool _augment;
    private readonly int _cutoutLength;
    private readonly long _seed;
    private readonly string _orderPurpose;
    private readonly ulong _augmentationKey;
    private readonly int[] _order;
    private long _orderEpoch = -1;

    // The normalised value of every byte, [3, 256].
    private readonly float[] _values = new float[3 * 256];

    /// <summary>A loader for training: shuffled, and augmented if asked for.</summary>
    /// <param name="images">The images.</param>
    /// <param name="batchSize">Images a batch, at least 1; more than there are: all of them.</param>
    /// <param name="seed">The run's seed.</param>
    /// <param name="purpose">What the batches are for, for example "weights"; loaders of other purposes draw independently.</param>
    /// <param name="augment">Pad 4 and random crop, random horizontal flip.</param>
    /// <param name="cutoutLength">Side of the square that is zeroed after normalisation (16 is usual); 0: none.</param>
    public BatchLoader(ImageSet images, int batchSize, long seed, string purpose, bool augment, int cutoutLength = 0)
        : this(images, batchSize)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(cutoutLength);
        _shuffle = true;
        _augment = augment;
        _cutoutLength = cutoutLength;
        _seed = seed;
        _orderPurpose = $"data order/{purpose}";
        _augmentationKey = RandomStream.KeyOf(seed, $"augmentation/{purpose}");
    }

    private BatchLoader(ImageSet images, int batchSize)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(batchSize, 1);
        _images = images;
        BatchSize = Math.Min(batchSize, images.Count);
        _orderPurpose = "";
        _order = new int[images.Count];
        for (var i = 0; i < _order.Length; i++)
            _order[i] = i;
        for (var channel = 0; channel < 3; channel++)
            for (var value = 0; value < 256; value++)
                _values[channel * 256 + value] = (value / 255f - images.Mean[channel]) / images.Std[channel];
    }

    /// <summary>A loader for evaluation: all images in record order, without augmentation, the same in every epoch.</summary>
    /// <param name="images">The images.</param>
    /// <param name="batchSize">Images a batch, at least 1; more than there are: all of them.</param>
    public static BatchLoader InRecordOrder(ImageSet images, int batchSize) => new(images, batchSize);

    /// <summary>Images of every batch but perhaps the last.</summary>
    public int BatchSize { get; }

    /// <summary>Batches an epoch.</summary>
    public int Steps => (_images.Count + BatchSize - 1) / BatchSize;

    /// <summary>Number of images in a batch: <see cref="BatchSize"/>, or the rest in the last step.</summary>
    /// <param name="step">0..Steps-1.</param>
    public int BatchCount(int step)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(step);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(step, Steps);
        return Math.Min(BatchSize, _images.Count - step * BatchSize);
    }

    /// <summary>
    /// Writes a batch and returns its number of images. Allocates nothing, but for a few small objects when the epoch changes.
    /// </summary>
    /// <param name="epoch">0 or more.</param>
    /// <param name="step">0..Steps-1.</param>
    /// <param name="images">At least [BatchCount(step), H, W, 3].</param>
    /// <param name="labels">At least [BatchCount(step)].</param>
    public int Fill(long epoch, int step, Span<float> images, Span<int> labels)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(epoch);
        var count = BatchCount(step);
        ArgumentOutOfRangeException.ThrowIfLessThan(images.Length, count * _images.ImageSize, nameof(images));
        ArgumentOutOfRangeException.ThrowIfLessThan(labels.Length, count, nameof(labels));
        if (_shuffle && epoch != _orderEpoch)
            OrderFor(epoch);
        for (var i = 0; i < count; i++)
        {
            var index = _order[step * BatchSize + i];
            labels[i] = _images.Labels[index];
            FillImage(epoch, index, images.Slice(i * _images.ImageSize, _images.ImageSize));
        }
        return count;
    }

    // From the identity every time, so that an epoch's order does not depend on the epochs before it.
    private void OrderFor(long epoch)
    {
        for (var i = 0; i < _order.Length; i++)
            _order[i] = i;
        new RandomStream(_seed, _orderPurpose, epoch).Shuffle(_order);
        _orderEpoch = epoch;
    }

    private void FillImage(long epoch, int index, Span<float> image)
    {
        int height = _images.Height, width = _images.Width;
        int top = 0, left = 0;
        var flip = false;
        var record = (ulong)(_images.FirstRecord + index);
        if (_augment)
        {
            var (x0, x1, x2, _) = RandomStream.Philox(_augmentationKey, 2 * record, (ulong)epoch);
            top = Below(x0, 2 * Padding + 1) - Padding;
            left = Below(x1, 2 * Padding + 1) - Padding;
            flip = Below(x2, 2) == 1;
        }

        fixed (float* values = _values, destination = image)
        fixed (byte* pixels = &_images.Pixels[(long)index * _images.ImageSize])
        {
            // Columns of the crop that lie in the image are begin..end-1, mirrored if flipped.
            var begin = Math.Max(0, -left);
            var end = Math.Min(width, width - left);
            for (var y = 0; y < height; y++)
            {
                var row = destination + y * width * 3;
                var sourceY = y + top;
                if (sourceY < 0 || sourceY >= height)
                {
                    Pad(row, width, values);
                    continue;
                }
                var source = pixels + sourceY * width + left + begin;
                if (flip)
                {
                    Pad(row, width - end, values);
                    Convert(source, height * width, row + (width - 1 - begin) * 3, -3, end - begin, values);
                    Pad(row + (width - begin) * 3, begin, values);
                }
                else
                {
                    Pad(row, begin, values);
                    Convert(source, height * width, row + begin * 3, 3, end - begin, values);
                    Pad(row + end * 3, width - end, values);
                }
            }
        }

        if (_cutoutLength > 0)
        {
            var (x0, x1, _, _) = RandomStream.Philox(_augmentationKey, 2 * record + 1, (ulong)epoch);
            int y = Below(x0, height) - _cutoutLength / 2, x = Below(x1, width) - _cutoutLength / 2;
            int from = Math.Max(0, x), to = Math.Min(width, x + _cutoutLength);
            for (var line = Math.Max(0, y); line < Math.Min(height, y + _cutoutLength); line++)
                image.Slice((line * width + from) * 3, (to - from) * 3).Clear();
        }
    }

    // Uniform in 0..bound-1 from one word; for these small bounds the bias is below 2^-26.
    private static int Below(uint word, int bound) => (int)((ulong)word * (uint)bound >> 32);

    // Padding is black before normalisation.
    private static void Pad(float* destination, int count, float* values)
    {
        for (var i = 0; i < count; i++)
        {
            destination[3 * i] = values[0];
            destination[3 * i + 1] = values[256];
            destination[3 * i + 2] = values[512];
        }
    }

    private static void Convert(byte* source, int plane, float* destination, int step, int count, float* values)
    {
        for (var i = 0; i < count; i++)
        {
            destination[0] = values[source[i]];
            destination[1] = values[256 + source[plane + i]];
            destination[2] = values[512 + source[2 * plane + i]];
            destination += step;
        }
    }
}
