using System.Runtime.CompilerServices;

namespace PerturbNas.Backends.Cuda;

// A batch norm is a few microseconds of work on a few numbers: calls that follow one another wait and are launched together, in the backward pass
// all those of a group (no call of a group needs what another one gives).
public partial class CudaBackend
{
    // A block has few channels, so that many rows of threads share the images.
    private const int BatchNormThreads = 256, BatchNormChannels = 32;

    // As in kernels/cuda/batch_norm.cu.
    private const int BatchNormCallLimit = 56;

    private readonly List<BatchNormForwardArgs> _forwardNorms = [];
    private readonly List<BatchNormBackwardArgs> _backwardNorms = [];
    private bool _grouping;

    public override void BeginGroup() => _grouping = true;

    public override void EndGroup()
    {
        _grouping = false;
        Flush();
    }

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
        if (_forwardNorms is [var first, ..] && (_forwardNorms.Count == BatchNormCallLimit || (first.Channels, first.Variants, first.Images) !=
            (a.Channels, a.Variants, a.Images)))
            LaunchForwardNorms();
        _forwardNorms.Add(a);
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
        if (_backwardNorms is [var first, ..] && (_backwardNorms.Count == BatchNormCallLimit || (first.Channels, first.Images) != (a.Channels, a.Images)))
            LaunchBackwardNorms();
        _backwardNorms.Add(a);
        if (!_grouping)
            LaunchBackwardNorms();
    }

    /// <summary>Launches what waits, before anything else is issued.</summary>
    private protected void Flush()
    {
        LaunchForwardNorms();
        if (!_grouping)
            LaunchBackwardNorms();
    }

    /// <summary>Drops what waits.</summary>
    private void Forget()
    {
        _forwardNorms.Clear();
        _backwardNorms.Clear();
    }

    private void LaunchForwardNorms()
    {
        if (_forwardNorms is not [var first, ..])
            return;
        var calls = default(BatchNormForwardCalls);
        var count = Take<BatchNormForwardArgs>(_forwardNorms, calls);
        var block = ChannelBlock.For(first.Channels, first.Images, BatchNormThreads, BatchNormChannels, unit: 1);
        Launch("batch_norm_forward", new Dim3(block.Groups, first.Variants, count), block.Block, calls);
    }

    private void LaunchBackwardNorms()
    {
        if (_backwardNorms is not [var first, ..])
            return;
        var calls = default(BatchNormBackwardCalls);
        var count = Take<BatchNormBackwardArgs>(_backwardNorms, calls);
        var block = ChannelBlock.For(first.Channels, first.Images, BatchNormThreads, BatchNormChannels, unit: 1);
        Launch("batch_norm_backward", new Dim3(block.Groups, 1, count), block.Block, calls);
    }

    // Empties the list first: the launch flushes.
    private static int Take<T>(List<T> waiting, Span<T> calls)
    {
        var count = waiting.Count;
        waiting.CopyTo(calls);
        waiting.Clear();
        return count;
    }

    [InlineArray(BatchNormCallLimit)]
    private struct BatchNormForwardCalls
    {
        private BatchNormForwardArgs _first;
    }

    [InlineArray(BatchNormCallLimit)]
    private struct BatchNormBackwardCalls
    {
        private BatchNormBackwardArgs _first;
    }
}
