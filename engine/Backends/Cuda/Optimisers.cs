namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    private const int OptimiserThreads = 256, OptimiserChunk = 4096;

    public override void SgdStep(in SgdArgs a)
    {
        Require(a.Count >= 0, $"count must not be negative: {a.Count}");
        Require((a.Parameters != 0 && a.Gradients != 0 && a.MomentumBuffer != 0) || a.Count == 0,
            "parameters, gradients or momentum buffer is null");
        Require(a.Norm != 0, "norm is null");
        var chunks = ChannelBlock.Blocks(a.Count, OptimiserChunk);
        var launch = new SgdLaunch(a, Scratch((long)chunks * sizeof(double)), ChannelBlock.UnitFor([], a.Parameters, a.Gradients, a.MomentumBuffer));
        if (chunks > 0)
            Launch("sgd_sum_squares", chunks, OptimiserThreads, launch);
        Launch("sgd_norm", 1, OptimiserThreads, launch);
        if (chunks > 0)
            Launch("sgd_step", chunks, OptimiserThreads, launch);
    }

    public override void AdamStep(in AdamArgs a)
    {
        Require(a.Count >= 0, $"count must not be negative: {a.Count}");
        Require((a.Parameters != 0 && a.Gradients != 0 && a.FirstMoment != 0 && a.SecondMoment != 0) || a.Count == 0,
            "parameters, gradients or a moment is null");
        Require(a.Step >= 1, $"step counts from 1, not {a.Step}");
        Require(a.Beta1 is >= 0 and < 1 && a.Beta2 is >= 0 and < 1, $"betas must be in [0, 1), not {a.Beta1}, {a.Beta2}");
        if (a.Count == 0)
            return;
        double beta1 = a.Beta1, beta2 = a.Beta2;
        var stepSize = (float)(a.Rate / (1 - Math.Pow(beta1, a.Step)));
        var root = (float)(1 / Math.Sqrt(1 - Math.Pow(beta2, a.Step)));
        var unit = ChannelBlock.UnitFor([], a.Parameters, a.Gradients, a.FirstMoment, a.SecondMoment);
        Launch("adam_step", ChannelBlock.Blocks(a.Count, OptimiserChunk), OptimiserThreads,
            new AdamLaunch(a, stepSize, root, (float)(1 - beta1), (float)(1 - beta2), unit));
    }

    private readonly record struct SgdLaunch(SgdArgs Call, nint Squares, int Unit);

    private readonly record struct AdamLaunch(AdamArgs Call, float StepSize, float Root, float Rest1, float Rest2, int Unit);
}
