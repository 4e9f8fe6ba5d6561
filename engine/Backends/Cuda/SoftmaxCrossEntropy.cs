namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void SoftmaxCrossEntropy(in SoftmaxCrossEntropyArgs a)
    {
        const int threads = 1024;
        Require(a.Variants >= 1 && a.Images >= 1 && a.Classes >= 1,
            $"every extent must be positive, not V {a.Variants}, N {a.Images}, {a.Classes} classes");
        Require(a.Logits != 0 && a.Labels != 0, "logits or labels is null");
        Require(a.LossSums != 0 && a.CorrectCounts != 0, "loss sums or correct counts is null");
        Require(a.Smoothing is >= 0 and <= 1, $"smoothing must be 0 to 1, not {a.Smoothing}");
        Require(a.Dlogits == 0 || a.Variants == 1, $"the gradient takes one variant, not {a.Variants}");
        Launch("softmax_cross_entropy", a.Variants, threads, a);
    }
}
