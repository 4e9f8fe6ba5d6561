namespace PerturbNas.Tensors;

/// <summary>Extents of an activation [V, N, H, W, C]: channels last, with the variant axis first (V = 1: common to all candidates).</summary>
public readonly record struct Shape(int Variants, int Images, int Height, int Width, int Channels)
{
    /// <summary>Pixels of one image: H * W.</summary>
    public int Pixels => Height * Width;

    /// <summary>Number of elements.</summary>
    public long Count => (long)Variants * Images * Height * Width * Channels;

    /// <summary>The output of a convolution or pool that keeps the extent at stride 1: ceil(H / stride) x ceil(W / stride).</summary>
    public Shape Strided(int stride, int channels) =>
        this with { Height = (Height + stride - 1) / stride, Width = (Width + stride - 1) / stride, Channels = channels };
}
