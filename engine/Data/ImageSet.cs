namespace PerturbNas.Data;

/// <summary>The two parts that a data set's files have.</summary>
public enum DataPart
{
    Train,
    Test,
}

/// <summary>
/// Labelled images in memory: pixels as they lie in the file, [Count, 3, Height, Width], one byte a value, and one label an image.
/// </summary>
public sealed class ImageSet
{
    /// <summary>The data set's name, for example "cifar10".</summary>
    public required string Name { get; init; }

    /// <summary>Number of classes; labels are 0..Classes-1.</summary>
    public required int Classes { get; init; }

    public required int Height { get; init; }

    public required int Width { get; init; }

    /// <summary>
    /// Index of the first image in its part of the data set: 25000 for the second half of CIFAR-10's training records. Augmentation
    /// is drawn for the record, wherever a split has put it.
    /// </summary>
    public required int FirstRecord { get; init; }

    /// <summary>[Count, 3, Height, Width], red, green, blue.</summary>
    public required byte[] Pixels { get; init; }

    public required int[] Labels { get; init; }

    /// <summary>Per channel mean of the data set's training images, values scaled to 0..1 (algorithm.md, section 3).</summary>
    public required IReadOnlyList<float> Mean { get; init; }

    /// <summary>Per channel standard deviation, values scaled to 0..1.</summary>
    public required IReadOnlyList<float> Std { get; init; }

    public int Count => Labels.Length;

    /// <summary>Bytes of one image: 3 * Height * Width.</summary>
    public int ImageSize => 3 * Height * Width;
}
