using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Tensors;

namespace PerturbNas.Training;

/// <summary>Sums over the images of some steps: losses (natural logarithm) and correct predictions.</summary>
public record struct Totals(double LossSum, long Correct, long Images)
{
    public readonly double Loss => LossSum / Images;

    public readonly double Accuracy => (double)Correct / Images;

    public static Totals operator +(Totals a, Totals b) => new(a.LossSum + b.LossSum, a.Correct + b.Correct, a.Images + b.Images);
}

/// <summary>
/// Trains a supernet step by step, first-order DARTS: an alpha step on a validation batch (left out where alpha is fixed), then a weight
/// step on a training batch. Everything random is addressed by the step's number, so training can go on from any step.
/// </summary>
public sealed class SupernetTrainer : IDisposable
{
    private readonly Supernet _network;
    private readonly Backend _backend;
    private readonly Arena _arena;
    private readonly BatchLoader _train, _validation;
    private readonly bool _updatesAlpha;
    private readonly ulong _noiseBase;
    private readonly Dictionary<(bool Alpha, int Images), SupernetPass> _passes = [];
    private readonly int _imageSize;
    private readonly float[] _images;
    private readonly int[] _labels;
    private EdgeStates _states;

    /// <param name="noisePurpose">Separates the noise of search (0) and tuning (1).</param>
    public SupernetTrainer(Supernet network, Backend backend, Arena arena, BatchLoader train, BatchLoader validation, bool updatesAlpha,
        EdgeStates states, int noisePurpose)
    {
        (_network, _backend, _arena, _train, _validation, _updatesAlpha) = (network, backend, arena, train, validation, updatesAlpha);
        _states = states;
        _noiseBase = (ulong)noisePurpose << 48;
        Sgd = new Sgd(backend, network.Parameters);
        Adam = new AlphaAdam(backend, network.Alphas);
        var batch = Math.Max(train.BatchSize, validation.BatchSize);
        _imageSize = 3 * network.Size.ImageSize * network.Size.ImageSize;
        _images = new float[batch * _imageSize];
        _labels = new int[batch];
    }

    public Sgd Sgd { get; }

    public AlphaAdam Adam { get; }

    /// <summary>Steps per epoch.</summary>
    public int StepsPerEpoch => _train.Steps;

    /// <summary>Takes the decisions of a selection into account from the next step on.</summary>
    public void SetStates(EdgeStates states)
    {
        _states = states;
        _passes.Clear();
        _network.Parameters.ZeroGradients();
    }

    /// <summary>One alpha step and one weight step.</summary>
    /// <param name="step">Number of the step since the beginning of training; decides data and randomness.</param>
    /// <param name="rate">Learning rate of the weights.</param>
    /// <returns>What the two batches gave before their updates; the first is empty where alpha is fixed.</returns>
    /// <exception cref="UserException">The loss or the gradient is not a finite number; the network is unusable from then on.</exception>
    public (Totals Validation, Totals Train) Step(long step, float rate)
    {
        Totals validation = default;
        if (_updatesAlpha)
        {
            validation = Run(alpha: true, _validation, step);
            Adam.Step();
        }
        var train = Run(alpha: false, _train, step);
        var norm = Sgd.Step(rate);
        if (!double.IsFinite(norm))
            throw NotFinite($"the gradient's norm became {norm}", step);
        return (validation, train);
    }

    public void Dispose()
    {
        Sgd.Dispose();
        Adam.Dispose();
    }

    private Totals Run(bool alpha, BatchLoader loader, long step)
    {
        var images = loader.Fill(step / loader.Steps, (int)(step % loader.Steps), _images, _labels);
        if (!_passes.TryGetValue((alpha, images), out var pass))
        {
            pass = _network.Record(_arena, new TapeOptions(BatchNormMode.Training, !alpha, alpha), images, _states);
            _passes.Add((alpha, images), pass);
        }
        _network.NoisePosition = _noiseBase + 2 * (ulong)step + (alpha ? 0u : 1u);
        pass.Forward(_images.AsSpan(0, images * _imageSize), _labels.AsSpan(0, images));
        Span<double> loss = stackalloc double[1];
        Span<long> correct = stackalloc long[1];
        pass.ReadResults(loss, correct);
        if (!double.IsFinite(loss[0]))
            throw NotFinite($"the {(alpha ? "validation" : "training")} loss became {loss[0]}", step);
        pass.Backward();
        return new Totals(loss[0], correct[0], images);
    }

    private UserException NotFinite(string what, long step) => new($"Training stopped in epoch {step / _train.Steps + 1}, step {step % _train.Steps + 1} of {_train.Steps}: " +
        $"{what}; the last checkpoint is kept, but resuming would stop here again: start anew with another seed, from sound weights.");
}
