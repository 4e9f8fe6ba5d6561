using System.Runtime.CompilerServices;

namespace PerturbNas.Backends.Cuda;

public unsafe partial class CudaBackend
{
    private const int MixedSumTerms = 96, MixedSumPixels = 4, MixedSumThreads = 256, MixedSumChannels = 64;

    public override void MixedSumForward(in MixedSumArgs a)
    {
        CheckMixedSum(a);
        Require(a.Out != 0, "out is null");
        // With variants, a thread has one pixel, but of up to so many variants.
        const int variants = 8;
        var (kernel, stripPixels) = a.Variants == 1 ? ("mixed_sum_forward", MixedSumPixels) : ("mixed_sum_forward_variants", 1);
        var launch = new MixedSumLaunch(a, stripPixels);
        var strips = a.Images * launch.Strips(stripPixels);
        var block = ChannelBlock.For(a.Channels, strips, MixedSumThreads, MixedSumChannels, launch.Unit);
        var blocks = ChannelBlock.Blocks(strips, block.Rows);
        Launch(kernel, new Dim3(blocks, block.Groups, ChannelBlock.Blocks(a.Variants, variants)), block.Block, launch);
    }

    public override void MixedSumBackward(in MixedSumArgs a)
    {
        const int termsPerBlock = 4;
        CheckMixedSum(a);
        Require(a.Variants == 1, $"takes one variant, not {a.Variants}");
        Require(a.G != 0, "g is null");
        var terms = new ReadOnlySpan<TermArgs>((void*)a.Terms, a.TermCount);
        for (var t = 0; t < terms.Length; t++)
            Require(terms[t].Y != 0, $"term {t} has no y");
        if (a.GradientSums == 0 && a.WeightGradients == 0)
            return;
        var sums = a.GradientSums != 0 ? a.GradientSums : Scratch((long)a.Images * (1 + a.TermCount) * a.Channels * sizeof(float));
        var launch = new MixedSumLaunch(a with { GradientSums = sums }, MixedSumPixels);
        var block = ChannelBlock.For(a.Channels, launch.Strips(MixedSumPixels), MixedSumThreads, MixedSumChannels, launch.Unit);
        var groups = Math.Max(1, ChannelBlock.Blocks(a.TermCount, termsPerBlock));
        Launch("mixed_sum_backward", new Dim3(a.Images, block.Groups, groups), block.Block, launch);
        if (a.WeightGradients != 0 && a.TermCount > 0)
            Launch("mixed_sum_weight_gradients", a.TermCount, new Dim3(1, MixedSumThreads), launch);
    }

    private static void CheckMixedSum(in MixedSumArgs a, [CallerMemberName] string kernel = "")
    {
        Require(a.TermCount >= 0 && a.Variants >= 1 && a.Images >= 1 && a.Pixels >= 1 && a.Channels >= 1,
            $"every extent must be positive, not V {a.Variants}, N {a.Images}, P {a.Pixels}, C {a.Channels}, {a.TermCount} terms", kernel);
        Require(a.Terms != 0 || a.TermCount == 0, "terms is null", kernel);
        var terms = new ReadOnlySpan<TermArgs>((void*)a.Terms, a.TermCount);
        var width = 0; // of a pooled image
        for (var t = 0; t < terms.Length; t++)
        {
            Require(terms[t].Variants == 1 || terms[t].Variants == a.Variants,
                $"term {t} has {terms[t].Variants} variants, which is neither 1 nor {a.Variants}", kernel);
            Require((a.Weights == 0 && a.WeightGradients == 0) || (terms[t].WeightIndex >= 0 && terms[t].WeightIndex < a.WeightStride),
                $"term {t} has weight index {terms[t].WeightIndex}, outside 0..{a.WeightStride - 1}", kernel);
            if (terms[t].Pooling == Pooling.None)
                continue;
            Require(terms[t].Pooling is Pooling.Max3x3 or Pooling.Avg3x3, $"term {t} has pooling {(int)terms[t].Pooling}, which is none", kernel);
            Require(terms[t].Height >= 1 && terms[t].Width >= 1 && terms[t].Stride is 1 or 2
                && (long)Ceiling(terms[t].Height, terms[t].Stride) * Ceiling(terms[t].Width, terms[t].Stride) == a.Pixels,
                $"term {t} pools H {terms[t].Height}, W {terms[t].Width} with stride {terms[t].Stride}, which does not give {a.Pixels} pixels", kernel);
            var own = Ceiling(terms[t].Width, terms[t].Stride);
            Require(width == 0 || width == own, $"term {t} is pooled to W {own}, an earlier one to W {width}", kernel);
            width = own;
        }
        if (a.TermCount > MixedSumTerms)
            throw new KernelException($"{kernel}: a sum has at most {MixedSumTerms} terms on a CUDA device, not {a.TermCount}", KernelStatus.NotSupported);
    }

    private readonly struct MixedSumLaunch
    {
        public readonly MixedSumArgs Call;
        public readonly int Unit;
        public readonly int Width;
        public readonly TermArray Terms;

        /// <param name="a">The call.</param>
        /// <param name="stripPixels">Pixels of a strip, one below the other.</param>
        public MixedSumLaunch(in MixedSumArgs a, int stripPixels)
        {
            Call = a;
            var terms = new ReadOnlySpan<TermArgs>((void*)a.Terms, a.TermCount);
            terms.CopyTo(Terms);
            Unit = ChannelBlock.UnitFor([a.Channels], a.Out, a.G, a.GradientSums);
            Width = Ceiling(a.Pixels, stripPixels);
            foreach (var term in terms)
            {
                Unit = Math.Min(Unit, ChannelBlock.UnitFor([a.Channels], term.Y, term.Normalization));
                if (term.Pooling != Pooling.None)
                    Width = Ceiling(term.Width, term.Stride);
            }
        }

        /// <summary>Strips of an image.</summary>
        public long Strips(int stripPixels) => (long)Ceiling(Ceiling(Call.Pixels, Width), stripPixels) * Width;
    }

    [InlineArray(MixedSumTerms)]
    private struct TermArray
    {
        private TermArgs _first;
    }
}
