using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Selection;
using PerturbNas.Training;

namespace PerturbNas.Search;

/// <summary>What a search has to show for itself: the supernet without any masking on the validation half, with batch statistics.</summary>
public sealed record SearchResult(int Epochs, double TrainLoss, double TrainAccuracy, double ValidationLoss, double ValidationAccuracy);

/// <summary>
/// Trains the supernet of an experiment from its last checkpoint to the last epoch (methods <c>darts</c>, first order, and <c>blank</c>, whose
/// alpha stays as it was initialised). metrics.jsonl gets a line an epoch; the checkpoint is written at every epoch's end, every
/// minute, and when cancelled; a search that was killed and resumed ends with the same bytes as one that was not.
/// </summary>
public sealed class SupernetSearch : IDisposable
{
    private const string MetricsFile = "metrics.jsonl";
    private static readonly TimeSpan _checkpointInterval = TimeSpan.FromSeconds(60);

    private readonly Experiment _experiment;
    private readonly SupernetTrainer _trainer;
    private long _step, _totalSteps, _metricsBytes;
    private Totals _epochTrain, _epochValidation, _lastTrain;

    public SupernetSearch(Experiment experiment)
    {
        _experiment = experiment;
        var c = experiment.Configuration;
        _trainer = new SupernetTrainer(experiment.Network, experiment.Backend, experiment.Arena,
            new BatchLoader(experiment.Train, c.Batch, c.Seed, "weights", augment: true, c.Cutout),
            new BatchLoader(experiment.Validation, c.Batch, c.Seed, "alpha", augment: true, c.Cutout),
            c.UpdatesAlpha, new EdgeStates(), noisePurpose: 0);
        _totalSteps = (long)c.Epochs * _trainer.StepsPerEpoch;
    }

    /// <summary>Whether nothing is left to train.</summary>
    public bool Finished => _step == _totalSteps;

    /// <summary>Takes over the state of the run's checkpoint; changes no file.</summary>
    /// <exception cref="UserException">There is none, or it is damaged or of another run.</exception>
    public void Restore()
    {
        var state = Checkpoint.Read(_experiment.CheckpointPath, "search", _experiment.Network, _trainer);
        // A selection may use fewer images than the search, so how many steps make a search is the checkpoint's to say.
        (_step, _totalSteps, _metricsBytes) = (state.GetInt64("step"), state.GetInt64("total_steps"), state.GetInt64("metrics_bytes"));
        (_epochTrain, _epochValidation) = (state.GetTotals("epoch_train"), state.GetTotals("epoch_validation"));
        _lastTrain = state.GetTotals("last_train");
    }

    /// <summary>As <see cref="Restore"/>, for those who need a trained supernet.</summary>
    /// <exception cref="UserException">As there, or the search has not finished.</exception>
    public void RestoreFinished()
    {
        Restore();
        if (!Finished)
            throw new UserException($"The search in '{_experiment.Run.Path}' stands at step {_step} of {_totalSteps}; finish it first with " +
                $"'perturbnas search --out {_experiment.Run.Path} --resume'.");
    }

    /// <summary>Trains to the end.</summary>
    /// <exception cref="OperationCanceledException">Cancelled; the state has been saved.</exception>
    public SearchResult Run(Action<Progress>? progress, CancellationToken cancellation)
    {
        var c = _experiment.Configuration;
        _experiment.Run.Truncate(MetricsFile, _metricsBytes);
        var saved = TimeProvider.System.GetTimestamp();
        while (!Finished)
        {
            var epoch = (int)(_step / _trainer.StepsPerEpoch);
            var (validation, train) = _trainer.Step(_step, c.Schedule.Rate(epoch, c.Epochs));
            _epochTrain += train;
            _epochValidation += validation;
            _step++;
            progress?.Invoke(new Progress("search", _step, _totalSteps,
                $"epoch {epoch + 1}/{c.Epochs}, loss {_epochTrain.Loss:F3}, accuracy {_epochTrain.Accuracy:P1}"));
            if (_step % _trainer.StepsPerEpoch == 0)
                EndEpoch(epoch);
            else if (cancellation.IsCancellationRequested || TimeProvider.System.GetElapsedTime(saved) > _checkpointInterval)
                Save();
            else
                continue;
            saved = TimeProvider.System.GetTimestamp();
            cancellation.ThrowIfCancellationRequested();
        }
        return Evaluate(progress, cancellation);
    }

    /// <summary>Writes the checkpoint.</summary>
    public void Save()
    {
        var state = new CheckpointState("search", _experiment.Configuration.Space);
        state.Set("step", _step);
        state.Set("total_steps", _totalSteps);
        state.Set("metrics_bytes", _metricsBytes);
        state.Set("epoch_train", _epochTrain);
        state.Set("epoch_validation", _epochValidation);
        state.Set("last_train", _lastTrain);
        Checkpoint.Write(_experiment.CheckpointPath, state, _experiment.Network, _trainer);
    }

    public void Dispose() => _trainer.Dispose();

    private void EndEpoch(int epoch)
    {
        var c = _experiment.Configuration;
        _metricsBytes = _experiment.Run.AppendLine(MetricsFile, new EpochMetrics(epoch, c.Schedule.Rate(epoch, c.Epochs), _epochTrain.Loss,
            _epochTrain.Accuracy, c.UpdatesAlpha ? _epochValidation.Loss : null, c.UpdatesAlpha ? _epochValidation.Accuracy : null, _experiment.Backend.Name));
        (_lastTrain, _epochTrain, _epochValidation) = (_epochTrain, default, default);
        Save();
    }

    private SearchResult Evaluate(Action<Progress>? progress, CancellationToken cancellation)
    {
        var evaluation = new MaskedEvaluation(_experiment.Network, _experiment.Arena, _experiment.Validation, _experiment.Configuration.Batch);
        long done = 0;
        var totals = evaluation.Evaluate(new EdgeStates(), [Mask.None],
            images => progress?.Invoke(new Progress("evaluation", done += images, evaluation.Images, "supernet on the validation half")), cancellation)[0];
        return new SearchResult(_experiment.Configuration.Epochs, _lastTrain.Loss, _lastTrain.Accuracy, totals.Loss, totals.Accuracy);
    }

    private sealed record EpochMetrics(int Epoch, float Rate, double TrainLoss, double TrainAccuracy, double? AlphaLoss, double? AlphaAccuracy, string Device);
}
