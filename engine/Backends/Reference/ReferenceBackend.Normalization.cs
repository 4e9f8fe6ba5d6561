namespace PerturbNas.Backends.Reference;

/// <summary>Batch norm, and the mixed sum and skip connection that apply and undo it.</summary>
public sealed unsafe partial class ReferenceBackend
{
    public override void BatchNormForward(in BatchNormForwardArgs a)
    {
        Require(a.Variants > 0 && a.Channels > 0);
        Require(a.Statistics == 0 || a.Images > 0 && a.Pixels > 0 && (a.Images > 1 || a.Pixels > 1));
        Require(a.Normalization != 0);
        Require((a.RunningMean == 0) == (a.RunningVariance == 0));
        Require(a.Statistics != 0 || a.RunningMean != 0);
        Require(a.Statistics == 0 || a.RunningMean == 0 || a.Variants == 1);
        var channels = a.Channels;
        var statistics = LoadOptional(a.Statistics, (long)a.Variants * a.Images * 2 * channels);
        var gamma = LoadOptional(a.Gamma, channels);
        var beta = LoadOptional(a.Beta, channels);
        var runningMean = LoadOptional(a.RunningMean, channels);
        var runningVariance = LoadOptional(a.RunningVariance, channels);
        var normalization = new double[a.Variants * 4 * channels];
        for (var v = 0; v < a.Variants; v++)
            for (var c = 0; c < channels; c++)
            {
                double mean, variance;
                if (statistics == null)
                    (mean, variance) = (runningMean![c], runningVariance![c]);
                else
                {
                    var count = (double)a.Images * a.Pixels;
                    (mean, var squares) = (0, 0.0);
                    for (var image = 0; image < a.Images; image++)
                        mean += statistics[(v * a.Images + image) * 2 * channels + c] / a.Images;
                    for (var image = 0; image < a.Images; image++)
                    {
                        var offset = (v * a.Images + image) * 2 * channels + c;
                        var deviation = statistics[offset] - mean;
                        squares += statistics[offset + channels] + a.Pixels * deviation * deviation;
                    }
                    variance = squares / count;
                    if (runningMean != null)
                    {
                        runningMean[c] += a.Momentum * (mean - runningMean[c]);
                        runningVariance![c] += a.Momentum * (squares / (count - 1) - runningVariance[c]);
                    }
                }
                var inverse = 1 / Math.Sqrt(variance + a.Epsilon);
                var scale = (gamma?[c] ?? 1) * inverse;
                var row = v * 4 * channels + c;
                normalization[row] = scale;
                normalization[row + channels] = (beta?[c] ?? 0) - mean * scale;
                normalization[row + 2 * channels] = inverse;
                normalization[row + 3 * channels] = mean;
            }
        Store(a.Normalization, normalization);
        if (statistics != null && runningMean != null)
        {
            Store(a.RunningMean, runningMean);
            Store(a.RunningVariance, runningVariance!);
        }
    }

    public override void BatchNormBackward(in BatchNormBackwardArgs a)
    {
        Require(a.Images > 0 && a.Pixels > 0 && a.Channels > 0);
        var batchStatistics = a.Normalization != 0 && a.Training != 0;
        Require(a.GradientSums != 0 || !(batchStatistics && a.Coefficients != 0) && a.DGamma == 0 && a.DBeta == 0);
        Require(a.GradientSums == 0 || a.Row >= 1 && a.Row < a.Rows);
        var channels = a.Channels;
        var sums = LoadOptional(a.GradientSums, (long)a.Images * a.Rows * channels);
        var normalization = LoadOptional(a.Normalization, 4 * channels);
        var weight = LoadOptional(a.Weight, 1)?[0] ?? 1;
        var count = (double)a.Images * a.Pixels;
        var coefficients = new double[3 * channels];
        var (dGamma, dBeta) = (new double[channels], new double[channels]);
        for (var c = 0; c < channels; c++)
        {
            // Sums of the gradient of the normalised value, which is weight * g, and of its product with yhat.
            var (sum, product) = (0.0, 0.0);
            for (var image = 0; sums != null && image < a.Images; image++)
            {
                sum += weight * sums[image * a.Rows * channels + c];
                product += weight * sums[(image * a.Rows + a.Row) * channels + c];
            }
            dBeta[c] = sum;
            dGamma[c] = product;
            coefficients[c] = weight * (normalization?[c] ?? 1);
            if (batchStatistics)
            {
                var (scale, inverse, mean) = (normalization![c], normalization[2 * channels + c], normalization[3 * channels + c]);
                coefficients[channels + c] = -scale * inverse * product / count;
                coefficients[2 * channels + c] = scale * (inverse * mean * product - sum) / count;
            }
        }
        Store(a.Coefficients, coefficients);
        Store(a.DGamma, dGamma);
        Store(a.DBeta, dBeta);
    }

    public override void MixedSumForward(in MixedSumArgs a)
    {
        CheckMixedSum(a);
        Require(a.Out != 0);
        var perVariant = a.Images * a.Pixels * a.Channels;
        var stride = a.WeightStride;
        var weights = LoadOptional(a.Weights, (long)a.Variants * stride);
        var output = new double[a.Variants * perVariant];
        foreach (var term in new ReadOnlySpan<TermArgs>((void*)a.Terms, a.TermCount))
        {
            // A term is not read where its weight is zero: the operation did not run.
            var column = term.WeightIndex;
            var used = Enumerable.Range(0, a.Variants).Where(v => weights == null || weights[v * stride + column] != 0).ToArray();
            if (used.Length == 0)
                continue;
            Require(term.Y != 0);
            var normalized = NormalizedTerm(a, term);
            foreach (var v in used)
            {
                var weight = weights?[v * stride + column] ?? 1;
                var source = term.Variants == 1 ? 0 : v * perVariant;
                for (var i = 0; i < perVariant; i++)
                    output[v * perVariant + i] += weight * normalized[source + i];
            }
        }
        Store(a.Out, output);
    }

    public override void MixedSumBackward(in MixedSumArgs a)
    {
        CheckMixedSum(a);
        Require(a.Variants == 1);
        Require(a.G != 0);
        foreach (var term in new ReadOnlySpan<TermArgs>((void*)a.Terms, a.TermCount))
            Require(term.Y != 0);
        var g = Load(a.G, (long)a.Images * a.Pixels * a.Channels);
        var rows = 1 + a.TermCount;
        var sums = new double[a.Images * rows * a.Channels];
        PutRow(sums, ImageSums(g, null, a.Images, a.Channels), a.Images, rows, 0, a.Channels);
        for (var t = 0; t < a.TermCount; t++)
        {
            var term = ((TermArgs*)a.Terms)[t];
            var normalization = LoadOptional(term.Normalization, 4 * a.Channels);
            var standardized = Standardize(TermValue(a, term), normalization, a.Channels);
            PutRow(sums, ImageSums(g, standardized, a.Images, a.Channels), a.Images, rows, 1 + t, a.Channels);
            if (a.WeightGradients == 0)
                continue;
            var normalized = NormalizedTerm(a, term);
            var gradient = 0.0;
            for (var i = 0; i < g.Length; i++)
                gradient += g[i] * normalized[i];
            ((double*)a.WeightGradients)[term.WeightIndex] += gradient;
        }
        Store(a.GradientSums, sums);
    }

    private static void CheckMixedSum(in MixedSumArgs a)
    {
        Require(a.Variants > 0 && a.Images > 0 && a.Pixels > 0 && a.Channels > 0 && a.TermCount >= 0);
        Require(a.TermCount == 0 || a.Terms != 0);
        var width = 0; // of a pooled image
        foreach (var term in new ReadOnlySpan<TermArgs>((void*)a.Terms, a.TermCount))
        {
            Require(term.Variants == 1 || term.Variants == a.Variants);
            Require(a.Weights == 0 && a.WeightGradients == 0 || term.WeightIndex >= 0 && term.WeightIndex < a.WeightStride);
            if (term.Pooling != Pooling.None)
            {
                Require(term.Pooling is Pooling.Max3x3 or Pooling.Avg3x3);
                Require(term.Height > 0 && term.Width > 0 && term.Stride is 1 or 2);
                var own = OutputExtent(term.Width, 3, term.Stride, 1);
                Require(OutputExtent(term.Height, 3, term.Stride, 1) * own == a.Pixels);
                Require(width == 0 || width == own);
                width = own;
            }
        }
    }

    /// <summary>The term before normalisation.</summary>
    private static double[] TermValue(in MixedSumArgs a, in TermArgs term) => term.Pooling == Pooling.None
        ? Load(term.Y, (long)term.Variants * a.Images * a.Pixels * a.Channels)
        : Pool(
            new()
            {
                X = term.Y,
                Variants = term.Variants,
                Images = a.Images,
                Height = term.Height,
                Width = term.Width,
                Channels = a.Channels,
                Stride = term.Stride,
            },
            term.Pooling).Y;

    private static double[] NormalizedTerm(in MixedSumArgs a, in TermArgs term) => Normalize(
        TermValue(a, term),
        LoadOptional(term.Normalization, term.Variants * 4 * a.Channels),
        term.Variants,
        a.Channels);
}
