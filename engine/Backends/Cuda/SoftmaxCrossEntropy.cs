using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

public unsafe partial class CudaBackend
{
    /// <summary>In page-locked memory, where kernels write it; looked at whenever results are read, which waits for the kernels anyway.</summary>
    private readonly RefusedLabel* _refusedLabel;

    /// <inheritdoc/>
    /// <remarks>Labels outside the classes are refused when something is read from the device after this call.</remarks>
    public override void SoftmaxCrossEntropy(in SoftmaxCrossEntropyArgs a)
    {
        const int threads = 1024;
        Require(a.Variants >= 1 && a.Images >= 1 && a.Classes >= 1,
            $"every extent must be positive, not V {a.Variants}, N {a.Images}, {a.Classes} classes");
        Require(a.Logits != 0 && a.Labels != 0, "logits or labels is null");
        Require(a.LossSums != 0 && a.CorrectCounts != 0, "loss sums or correct counts is null");
        Require(a.Smoothing is >= 0 and <= 1, $"smoothing must be 0 to 1, not {a.Smoothing}");
        Require(a.Dlogits == 0 || a.Variants == 1, $"the gradient takes one variant, not {a.Variants}");
        Launch("softmax_cross_entropy", a.Variants, threads, new SoftmaxCrossEntropyLaunch { A = a, Refused = _refusedLabel });
    }

    private void RefuseLabels()
    {
        var (image, label, classes) = (_refusedLabel->Image, _refusedLabel->Label, _refusedLabel->Classes);
        *_refusedLabel = default;
        Require(classes == 0, $"image {image} has label {label}, outside 0..{classes - 1}", nameof(SoftmaxCrossEntropy));
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct RefusedLabel
    {
        public int Image, Label, Classes;
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct SoftmaxCrossEntropyLaunch
    {
        public SoftmaxCrossEntropyArgs A;
        public RefusedLabel* Refused;
    }
}
