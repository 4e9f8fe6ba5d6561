using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Tensors;

namespace PerturbNas.Operators;

/// <summary>
/// Batch normalisation over (variant, channel) (Ioffe and Szegedy 2015): turns the statistics of a raw tensor into the pending
/// normalisation that its consumer applies. Epsilon 1e-5, momentum of the running statistics 0.1.
/// </summary>
public sealed class BatchNorm : Operator
{
    public const float Epsilon = 1e-5f;
    public const float Momentum = 0.1f;

    private readonly Tensor _tensor;
    private readonly BatchNormParameters _parameters;
    private readonly Block _normalization;
    private readonly BatchNormMode _mode;

    private BatchNorm(Tape tape, Tensor tensor, BatchNormParameters parameters)
    {
        _tensor = tensor;
        _parameters = parameters;
        _mode = tape.Options.BatchNorm;
        Wave = tensor.Wave++;
        WantsGradient = tape.Options.WeightGradients;
        _normalization = tape.Allocate(4L * tensor.Shape.Variants * tensor.Shape.Channels);
        tensor.AttachNormalization(this, _normalization, _mode != BatchNormMode.Evaluation);
    }

    /// <summary>Normalises a raw tensor, in place of its pending normalisation.</summary>
    public static Tensor Apply(Tape tape, Tensor raw, BatchNormParameters parameters)
    {
        tape.Record(new BatchNorm(tape, raw, parameters));
        return raw;
    }

    public override string Name => "batch_norm";

    internal Parameter? Gamma => _parameters.Gamma;

    internal Parameter? Beta => _parameters.Beta;

    internal bool WantsGradient { get; }

    public override void Forward(Backend backend)
    {
        var shape = _tensor.Shape;
        backend.BatchNormForward(new BatchNormForwardArgs
        {
            Statistics = _mode == BatchNormMode.Evaluation ? 0 : _tensor.Statistics!.Address,
            Gamma = Gamma?.Address ?? 0,
            Beta = Beta?.Address ?? 0,
            RunningMean = _mode == BatchNormMode.BatchStatistics ? 0 : _parameters.RunningMean.Address,
            RunningVariance = _mode == BatchNormMode.BatchStatistics ? 0 : _parameters.RunningVariance.Address,
            Normalization = _normalization.Address,
            Variants = shape.Variants,
            Images = shape.Images,
            Pixels = shape.Pixels,
            Channels = shape.Channels,
            Epsilon = Epsilon,
            Momentum = Momentum,
        });
    }

    internal override IEnumerable<Block?> ForwardBlocks() => [_tensor.Statistics, _normalization];
}
