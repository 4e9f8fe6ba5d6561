namespace PerturbNas.Backends.Planning;

/// <summary>
/// The least that a kernel call has to do, from its arguments alone: the numerator of every FLOP/s and byte/s that is reported, and what a
/// forecast is made of.
/// <list type="bullet">
/// <item>FLOPs are those of the definition, not of an implementation: an addition, multiplication, comparison or elementary function is
/// one, so a multiply-add is two. A convolution counts every tap, those on the padding too (the field's convention); its backward
/// pass by data and its backward pass by weights cost as much as the forward pass each; what a kernel recomputes instead of
/// storing does not count.</item>
/// <item>Bytes: every operand read once, every result written once, as if the caches were endless. A result that is added to is
/// read as well. Vectors of one value per channel and image (statistics, sums) are counted, those of one value per channel are not.</item>
/// <item>A null pointer is a result that nobody asked for: it costs nothing.</item>
/// </list>
/// </summary>
/// <param name="Flops">Floating-point operations.</param>
/// <param name="Bytes">Bytes read and written, reals being float32.</param>
/// <param name="ProductFlops">Of the FLOPs, the multiply-adds of convolutions and linear layers: what shares of the multiply-add limit count.</param>
public readonly record struct Cost(long Flops, long Bytes, long ProductFlops = 0)
{
    private const int Real = sizeof(float);

    // Per element of a raw output: the mean (1) and the sum of squared deviations (3).
    private const int StatisticsFlops = 4;

    // Per element of a pending gradient: dy = a * g + b * y + c.
    private const int PendingFlops = 4;

    // Per element: the sum of g (1), yhat = inverse_deviation * (y - mean) (2), and the sum of g * yhat (2).
    private const int GradientSumFlops = 5;

    // n = scale * y + shift.
    private const int NormalizeFlops = 2;

    public static Cost operator +(Cost a, Cost b) => new(a.Flops + b.Flops, a.Bytes + b.Bytes, a.ProductFlops + b.ProductFlops);

    public static Cost operator *(Cost cost, long times) => new(cost.Flops * times, cost.Bytes * times, cost.ProductFlops * times);

    /// <summary>Seconds that a machine of these limits needs at least: arithmetic or memory, whichever takes longer (Williams et al. 2009).</summary>
    public double SecondsAtLeast(in MachineLimits limits) => Math.Max(Flops / (limits.Gigaflops * 1e9), Bytes / (limits.GigabytesPerSecond * 1e9));

    /// <summary>Forward: 2 K^2 per element between the two convolutions, 2 Cin per element of y, ReLU and normalisation of x, statistics.</summary>
    public static Cost Of(in DepthwisePointwiseArgs a, bool backward)
    {
        var images = (long)a.Variants * a.Images;
        var pixels = images * Strided(a.Height, a.Stride) * Strided(a.Width, a.Stride);
        var x = images * a.Height * a.Width * a.InChannels;
        var y = pixels * a.OutChannels;
        var weights = (long)a.InChannels * (a.Kernel * a.Kernel + a.OutChannels);
        var products = pixels * a.InChannels * 2 * (a.Kernel * a.Kernel + a.OutChannels);
        var pending = a.XNormalization != 0 ? NormalizeFlops : 0;
        if (!backward)
            return new Cost(x * (1 + pending), Real * (x + weights + y)) + Products(products) + Statistics(a.Statistics, y, images * a.OutChannels);
        var cost = Gradient(a.Coefficients, y) + new Cost(x * (1 + pending), Real * (x + weights));
        if (a.Dx != 0)
            cost += Products(products) + Written(x, a.Accumulate);
        if (a.DDepthwise != 0)
            cost += Products(products) + new Cost(0, Real * weights);
        if (a.GradientSums != 0)
            cost += new Cost(GradientSumFlops * x, Real * 2 * images * a.InChannels);
        return cost;
    }

    /// <summary>Forward: 2 Cin per element of y, ReLU of the pixels that are read, statistics. With a stride only every other pixel is read.</summary>
    public static unsafe Cost Of(in PointwiseArgs a, bool backward)
    {
        var parts = new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount);
        var variants = 1;
        long channels = 0, x = 0;
        var pixels = (long)a.Images * Strided(a.Height, a.Stride) * Strided(a.Width, a.Stride);
        foreach (var part in parts)
        {
            variants = Math.Max(variants, part.Variants);
            channels += part.Channels;
            x += part.Variants * pixels * part.Channels;
        }
        var y = variants * pixels * a.OutChannels;
        var weights = channels * a.OutChannels;
        var relu = a.Relu != 0 ? x : 0;
        if (!backward)
            return new Cost(relu, Real * (x + weights + y)) + Products(2 * channels * y) + Statistics(a.Statistics, y, variants * a.Images * a.OutChannels);
        var cost = Gradient(a.Coefficients, y) + new Cost(relu, Real * (x + weights));
        foreach (var part in parts)
        {
            if (part.Dx == 0)
                continue;
            var read = pixels * part.Channels;
            var whole = (long)a.Images * a.Height * a.Width * part.Channels;
            cost += Products(2 * part.Channels * y) + (part.Accumulate != 0 ? Written(read, 1) : Written(whole, 0));
        }
        return a.DWeight != 0 ? cost + Products(2 * channels * y) + new Cost(0, Real * weights) : cost;
    }

    /// <summary>Forward: 2 KH KW Cin per element of y, ReLU of x, statistics.</summary>
    public static Cost Of(in ConvolutionArgs a, bool backward)
    {
        var images = (long)a.Variants * a.Images;
        var height = (a.Height + 2 * a.PaddingH - a.KernelH) / a.StrideH + 1;
        var width = (a.Width + 2 * a.PaddingW - a.KernelW) / a.StrideW + 1;
        var x = images * a.Height * a.Width * a.InChannels;
        var y = images * height * width * a.OutChannels;
        var weights = (long)a.KernelH * a.KernelW * a.InChannels * a.OutChannels;
        var products = 2L * a.KernelH * a.KernelW * a.InChannels * y;
        var relu = a.Relu != 0 ? x : 0;
        if (!backward)
            return new Cost(relu, Real * (x + weights + y)) + Products(products) + Statistics(a.Statistics, y, images * a.OutChannels);
        var cost = Gradient(a.Coefficients, y) + new Cost(relu, Real * (x + weights));
        if (a.Dx != 0)
            cost += Products(products) + Written(x, a.Accumulate);
        return a.DWeight != 0 ? cost + Products(products) + new Cost(0, Real * weights) : cost;
    }

    /// <summary>
    /// Forward, of every pool: 9 comparisons or additions per element of y, statistics; backward: the pending gradients, and of every y that is
    /// taken 1 (max, skip) or 9 (average) per element. Pooling x once more, here or in the mixed sum, instead of reading y is not counted as work.
    /// </summary>
    public static unsafe Cost Of(in PoolArgs a, bool backward)
    {
        const int taps = 9;
        var images = (long)a.Variants * a.Images;
        var x = images * a.Height * a.Width * a.Channels;
        var y = images * Strided(a.Height, a.Stride) * Strided(a.Width, a.Stride) * a.Channels;
        var gradients = new ReadOnlySpan<PoolGradientArgs>((void*)a.Gradients, backward ? a.GradientCount : 0);
        var cost = new Cost(0, Real * (x + gradients.Length * y));
        if (backward)
            cost += Written(x, a.Accumulate);
        foreach (var pooling in Enum.GetValues<Pooling>())
        {
            // The average's division is one multiplication per element.
            var division = pooling == Pooling.Avg3x3 ? 1 : 0;
            var taken = 0;
            foreach (var gradient in gradients)
                taken += gradient.Coefficients[pooling] != 0 ? 1 : 0;
            if (taken > 0)
                cost += new Cost(y * (taken * PendingFlops + (pooling == Pooling.Avg3x3 ? taps : 1) + division), 0);
            if (!backward && (a.Y[pooling] != 0 || a.Statistics[pooling] != 0))
                cost += new Cost(y * (taps + division), a.Y[pooling] != 0 ? Real * y : 0) + Statistics(a.Statistics[pooling], y, images * a.Channels);
        }
        return cost;
    }

    /// <summary>Merges the statistics of the images: 8 per image and channel (Chan et al. 1983).</summary>
    public static Cost Of(in BatchNormForwardArgs a)
    {
        var rows = a.Statistics != 0 ? (long)a.Variants * a.Images * a.Channels : 0;
        return new Cost(8 * rows, Real * 2 * rows);
    }

    /// <summary>Adds up the sums of the images: 2 per image and channel.</summary>
    public static Cost Of(in BatchNormBackwardArgs a)
    {
        var rows = a.GradientSums != 0 ? (long)a.Images * a.Channels : 0;
        return new Cost(2 * rows, Real * 2 * rows);
    }

    /// <summary>
    /// Forward: normalisation of every term, and a multiply-add per term and element of the output; backward: the sums of g and of g * yhat
    /// (plain terms: of g * y) of every term.
    /// </summary>
    public static unsafe Cost Of(in MixedSumArgs a, bool backward)
    {
        var image = (long)a.Images * a.Pixels * a.Channels;
        long terms = 0, read = 0, normalized = 0;
        foreach (var term in new ReadOnlySpan<TermArgs>((void*)a.Terms, a.TermCount))
        {
            terms += term.Variants * image;
            read += term.Pooling == Pooling.None ? term.Variants * image : (long)term.Variants * a.Images * term.Height * term.Width * a.Channels;
            normalized += term.Normalization != 0 ? term.Variants * image : 0;
        }
        return backward
            ? new Cost(image + 4 * normalized + 2 * (terms - normalized), Real * (image + read + (long)a.Images * (1 + a.TermCount) * a.Channels))
            : new Cost(NormalizeFlops * normalized + 2 * a.TermCount * a.Variants * image, Real * (read + a.Variants * image));
    }

    /// <summary>Forward: 1 addition per element; backward: 1 per element of dx.</summary>
    public static unsafe Cost Of(in GlobalAveragePoolArgs a, bool backward)
    {
        var cost = default(Cost);
        foreach (var part in new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount))
        {
            var pooled = (long)part.Variants * a.Images * part.Channels;
            if (!backward)
                cost += new Cost(pooled * a.Pixels, Real * pooled * (a.Pixels + 1));
            else if (part.Dx != 0)
                cost += new Cost(pooled * a.Pixels, Real * pooled) + Written(pooled * a.Pixels, part.Accumulate);
        }
        return cost;
    }

    /// <summary>2 Cin per output and the bias; backward the same each by data and by weights.</summary>
    public static Cost Of(in LinearArgs a, bool backward)
    {
        var x = (long)a.Rows * a.InChannels;
        var y = (long)a.Rows * a.OutChannels;
        var weights = (long)a.InChannels * a.OutChannels;
        if (!backward)
            return new Cost(y, Real * (x + weights + y)) + Products(2 * x * a.OutChannels);
        var cost = new Cost(0, Real * y);
        if (a.Dx != 0)
            cost += new Cost(0, Real * (weights + x)) + Products(2 * x * a.OutChannels);
        return a.DWeight != 0 ? cost + new Cost(y, Real * (x + weights)) + Products(2 * x * a.OutChannels) : cost;
    }

    /// <summary>Per logit: maximum, difference, exponential, sum, and the gradient's two.</summary>
    public static Cost Of(in SoftmaxCrossEntropyArgs a)
    {
        var logits = (long)a.Variants * a.Images * a.Classes;
        return a.Dlogits != 0 ? new Cost(6 * logits, Real * 2 * logits) : new Cost(4 * logits, Real * logits);
    }

    /// <summary>Per parameter: norm 2, clipping 1, decay 2, momentum 2, update 2; three arrays read, two written.</summary>
    public static Cost Of(in SgdArgs a) => new(9 * a.Count, Real * 5 * a.Count);

    /// <summary>Per parameter: decay 2, moments 3 + 4, bias corrections 2, root, sum, quotient, update 2; four arrays read, three written.</summary>
    public static Cost Of(in AdamArgs a) => new(16 * a.Count, Real * 7 * a.Count);

    /// <summary>Per value: half of a logarithm, root, sine and cosine, and the product; integer arithmetic is no FLOP.</summary>
    public static Cost Of(in NoiseArgs a) => new(3 * a.Count, Real * a.Count);

    private static int Strided(int extent, int stride) => (extent + stride - 1) / stride;

    private static Cost Products(long flops) => new(flops, 0, flops);

    private static Cost Statistics(nint statistics, long elements, long rows) =>
        statistics != 0 ? new Cost(StatisticsFlops * elements, Real * 2 * rows) : default;

    // The pending gradient of a raw output: g, and y where there are coefficients.
    private static Cost Gradient(nint coefficients, long elements) =>
        coefficients != 0 ? new Cost(PendingFlops * elements, Real * 2 * elements) : new Cost(0, Real * elements);

    private static Cost Written(long elements, int accumulate) =>
        accumulate != 0 ? new Cost(elements, Real * 2 * elements) : new Cost(0, Real * elements);
}
