namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    // A block has few channels, so that many rows of threads share the images.
    private const int BatchNormThreads = 256, BatchNormChannels = 32;

    public override void BatchNormForward(in BatchNormForwardArgs a)
    {
        Require(a.Variants >= 1 && a.Channels >= 1, $"every extent must be positive, not V {a.Variants}, C {a.Channels}");
        Require(a.Normalization != 0, "normalization is null");
        Require((a.RunningMean == 0) == (a.RunningVariance == 0), "only one of running mean and running variance is given");
        if (a.Statistics != 0)
        {
            Require(a.Images >= 1 && a.Pixels >= 1, $"every extent must be positive, not N {a.Images}, P {a.Pixels}");
            Require(a.Images > 1 || a.Pixels > 1,
                $"training needs more than one value per channel, not V {a.Variants}, N {a.Images}, P {a.Pixels}, C {a.Channels}");
            Require(a.RunningMean == 0 || a.Variants == 1, $"running statistics are updated with one variant only, not {a.Variants}");
        }
        else
        {
            Require(a.RunningMean != 0, "evaluation needs running mean and variance");
        }
        var block = ChannelBlock.For(a.Channels, a.Statistics != 0 ? a.Images : 1, BatchNormThreads, BatchNormChannels, unit: 1);
        Launch("batch_norm_forward", new Dim3(block.Groups, a.Variants), block.Block, a);
    }

    public override void BatchNormBackward(in BatchNormBackwardArgs a)
    {
        Require(a.Channels >= 1, $"C must be positive, not {a.Channels}");
        var needsSums = a.DGamma != 0 || a.DBeta != 0 || (a.Coefficients != 0 && a.Normalization != 0 && a.Training != 0);
        if (needsSums)
        {
            Require(a.GradientSums != 0, "gradient sums are null");
            Require(a.Images >= 1 && a.Pixels >= 1, $"every extent must be positive, not N {a.Images}, P {a.Pixels}");
            Require(a.Row >= 1 && a.Row < a.Rows, $"row {a.Row} is outside 1..{a.Rows - 1}");
        }
        var block = ChannelBlock.For(a.Channels, needsSums ? a.Images : 1, BatchNormThreads, BatchNormChannels, unit: 1);
        Launch("batch_norm_backward", block.Groups, block.Block, a);
    }
}
