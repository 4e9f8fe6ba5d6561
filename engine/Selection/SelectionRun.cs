using System.Text.Json;
using System.Text.Json.Serialization;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Search;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Selection;

/// <summary>Everything that decides a selection, as kept in its folder's config.json.</summary>
public sealed record SelectionConfiguration
{
    public static IReadOnlyList<string> Selectors { get; } = ["magnitude", "perturbation"];

    public int Version { get; init; } = 1;

    public required string By { get; init; }

    public Criterion Criterion { get; init; }

    /// <summary>Epochs of tuning after every round but the last.</summary>
    public required int TuneEpochs { get; init; }

    public int? TrainLimit { get; init; }

    public int? ValidLimit { get; init; }

    public required int Batch { get; init; }

    public required long Seed { get; init; }

    /// <summary>Learning rate of tuning falls along a cosine to zero over each round's epochs, instead of staying at 0.0025.</summary>
    public bool CosineTuning { get; init; }

    public bool ReferenceQuirks { get; init; }

    /// <summary>"off", "exact", or the bound on the probability that any decision differs from that of full passes.</summary>
    public string Racing { get; init; } = "off";

    /// <summary>Learning rate of tuning: a tenth of the search's.</summary>
    [JsonIgnore]
    public CosineSchedule Schedule { get; } = new(0.0025, 0);

    internal void Validate(ConfigurationFile file)
    {
        file.RequireVersion1(Version);
        file.RequireChoice("by", By, Selectors);
        file.RequireRange("tune_epochs", TuneEpochs, 0);
        file.RequireRange("batch", Batch, 1);
        file.RequireRange("train_limit", TrainLimit, 1);
        file.RequireRange("valid_limit", ValidLimit, 1);
        Selection.Racing.Parse(Racing, $"'racing' in '{file.Path}'");
    }

    internal float Rate(int epoch) => CosineTuning ? Schedule.Rate(epoch, TuneEpochs) : (float)Schedule.First;
}

/// <summary>How a selection ended: the genotype, and the supernet reduced to it, on the validation half with batch statistics.</summary>
public sealed record SelectionResult(string By, string Genotype, double Loss, double Accuracy, int Decisions);

/// <summary>
/// A selection in a run's folder (select-magnitude/, select-perturbation/): its configuration, decisions.jsonl, metrics.jsonl of the tuning,
/// checkpoint and genotype.txt. Killed and resumed it ends with the same bytes as one that was not; the run's own
/// checkpoint is left as it is. When it ends, decisions and genotype are also put into the run's folder.
/// </summary>
public sealed class SelectionRun : IDisposable
{
    private const string ConfigurationFileName = "config.json", DecisionsFile = "decisions.jsonl", MetricsFile = "metrics.jsonl", GenotypeFile = "genotype.txt", ResultFile = "result.json";
    private static readonly TimeSpan _checkpointInterval = TimeSpan.FromSeconds(60);

    // A training step costs about three forward passes.
    private const int StepWork = 3;

    private readonly Experiment _experiment;
    private readonly SelectionConfiguration _configuration;
    private readonly RunDirectory _run;
    private readonly SupernetTrainer _trainer;
    private readonly MaskedEvaluation _evaluation;
    private PerturbationSelector _selector;

    // Where the selection stands: the round, the tuning steps done in it, and the tuning steps done in all.
    private int _round;
    private long _roundStep, _step, _decisionsBytes, _metricsBytes;
    private Totals _epochTrain;

    // Progress, in units of one image scored.
    private long _work, _totalWork;

    private SelectionRun(Experiment experiment, SelectionConfiguration configuration, RunDirectory run)
    {
        (_experiment, _configuration, _run) = (experiment, configuration, run);
        var c = experiment.Configuration;
        var (seed, batch) = (configuration.Seed, configuration.Batch);
        _trainer = new SupernetTrainer(experiment.Network, experiment.Backend, experiment.Arena,
            new BatchLoader(experiment.Train, batch, seed, "tuning weights", augment: true, c.Cutout),
            new BatchLoader(experiment.Validation, batch, seed, "tuning alpha", augment: true, c.Cutout),
            c.UpdatesAlpha, new EdgeStates(), noisePurpose: 1);
        _evaluation = new MaskedEvaluation(experiment.Network, experiment.Arena, experiment.Validation, batch);
        _selector = NewSelector([]);
    }

    /// <summary>The folder of a selector in a run's folder.</summary>
    public static string FolderOf(string runFolder, string by) => Path.Combine(runFolder, "select-" + by);

    /// <summary>Starts a selection from the run's supernet, in place of an earlier one by the same selector.</summary>
    /// <exception cref="UserException">The search has not finished, or its checkpoint cannot be used; an earlier selection is untouched.</exception>
    public static SelectionRun Start(Experiment experiment, SelectionConfiguration configuration)
    {
        var run = RunDirectory.Open(FolderOf(experiment.Run.Path, configuration.By));
        var selection = new SelectionRun(experiment, configuration, run);
        try
        {
            using (var search = new SupernetSearch(experiment))
                search.RestoreFinished();
            foreach (var stale in (ReadOnlySpan<string>)[ConfigurationFileName, DecisionsFile, MetricsFile, GenotypeFile, ResultFile, "checkpoints/selection.safetensors"])
                if (File.Exists(run.PathOf(stale)))
                    File.Delete(run.PathOf(stale));
            run.WriteJson(ConfigurationFileName, configuration);
            return selection;
        }
        catch
        {
            selection.Dispose();
            throw;
        }
    }

    /// <summary>Goes on with a selection that was interrupted.</summary>
    public static SelectionRun Resume(Experiment experiment, SelectionConfiguration configuration)
    {
        var selection = new SelectionRun(experiment, configuration, RunDirectory.Open(FolderOf(experiment.Run.Path, configuration.By)));
        try
        {
            if (File.Exists(selection.CheckpointPath))
            {
                selection.Restore();
            }
            else
            {
                using var search = new SupernetSearch(experiment);
                search.RestoreFinished();
                selection._run.Truncate(DecisionsFile, 0);
                selection._run.Truncate(MetricsFile, 0);
            }
            return selection;
        }
        catch
        {
            selection.Dispose();
            throw;
        }
    }

    /// <summary>The configuration of the selection in a folder, to resume it; null: there is none.</summary>
    public static SelectionConfiguration? ReadConfiguration(string runFolder, string by)
    {
        var folder = FolderOf(runFolder, by);
        if (!RunDirectory.Exists(folder))
            return null;
        using var run = RunDirectory.OpenExisting(folder);
        var configuration = run.ReadJson<SelectionConfiguration>(ConfigurationFileName);
        configuration.Validate(new ConfigurationFile(run.PathOf(ConfigurationFileName)));
        return configuration;
    }

    /// <summary>Whether a run's folder holds a selection that was begun and did not end.</summary>
    public static bool IsUnfinished(string runFolder, string by)
    {
        var folder = FolderOf(runFolder, by);
        return RunDirectory.Exists(folder) && !File.Exists(Path.Combine(folder, ResultFile));
    }

    public IReadOnlyList<Decision> Decisions => _selector.Decisions;

    private string CheckpointPath => _run.CheckpointPath("selection");

    /// <summary>Selects to the end.</summary>
    /// <exception cref="OperationCanceledException">Cancelled; the state has been saved.</exception>
    public SelectionResult Run(Action<Progress>? progress, CancellationToken cancellation)
    {
        var (states, decisions) = _configuration.By == "magnitude" ? Weigh() : Perturb(progress, cancellation);
        var genotype = _experiment.Network.Space.ToGenotype(states);
        var totals = _evaluation.Evaluate(states, [Mask.None], null, cancellation)[0];
        var result = new SelectionResult(_configuration.By, genotype.ToString(), totals.Loss, totals.Accuracy, decisions);
        _run.WriteText(GenotypeFile, result.Genotype + "\n");
        _experiment.Run.WriteText(GenotypeFile, result.Genotype + "\n");
        _experiment.Run.WriteText(DecisionsFile, File.ReadAllText(_run.PathOf(DecisionsFile)));
        _run.WriteJson(ResultFile, result);
        return result;
    }

    public void Dispose()
    {
        _trainer.Dispose();
        _run.Dispose();
    }

    private PerturbationSelector NewSelector(IEnumerable<Decision> decisions) => new(_experiment.Network, _evaluation, _configuration.Criterion,
        Selection.Racing.Parse(_configuration.Racing), _configuration.Seed, _configuration.ReferenceQuirks, decisions);

    private (EdgeStates States, int Decisions) Weigh()
    {
        var (decisions, states) = MagnitudeSelector.Select(_experiment.Network);
        _run.WriteText(DecisionsFile, string.Concat(decisions.Select(decision => JsonSerializer.Serialize(decision, RunDirectory.Json) + "\n")));
        return (states, decisions.Count);
    }

    private (EdgeStates States, int Decisions) Perturb(Action<Progress>? progress, CancellationToken cancellation)
    {
        StartProgress();
        for (; _round < PerturbationSelector.Rounds; _round++, _roundStep = 0)
        {
            if (_roundStep == 0)
                Decide(progress, cancellation);
            if (_round < PerturbationSelector.Rounds - 1)
                Tune(progress, cancellation);
        }
        if (_selector.ReplaceNone() is { Count: > 0 } replaced)
        {
            foreach (var decision in replaced)
                _decisionsBytes = _run.AppendLine(DecisionsFile, decision);
            Save();
        }
        return (_selector.States, _selector.Decisions.Count);
    }

    private void Decide(Action<Progress>? progress, CancellationToken cancellation)
    {
        while (_selector.DecideNext(_round, Scored, cancellation) is { } decision)
        {
            _decisionsBytes = _run.AppendLine(DecisionsFile, decision);
            Save();
        }

        void Scored(int candidateImages) => progress?.Invoke(new Progress("scoring", _work += candidateImages, _totalWork,
            $"round {_round + 1}/{PerturbationSelector.Rounds}"));
    }

    private long TuningWork => (long)_configuration.TuneEpochs * _experiment.Train.Count * StepWork * (_experiment.Configuration.UpdatesAlpha ? 2 : 1);

    private void StartProgress()
    {
        const int tunedRounds = PerturbationSelector.Rounds - 1;
        _totalWork = _selector.CandidateImages(new EdgeStates(), 0) + tunedRounds * TuningWork;
        _work = _totalWork - _selector.CandidateImages(_selector.States, _round) - Math.Max(0, tunedRounds - _round) * TuningWork;
    }

    private void Tune(Action<Progress>? progress, CancellationToken cancellation)
    {
        _trainer.SetStates(_selector.States);
        var saved = TimeProvider.System.GetTimestamp();
        var steps = (long)_configuration.TuneEpochs * _trainer.StepsPerEpoch;
        while (_roundStep < steps)
        {
            var epoch = (int)(_roundStep / _trainer.StepsPerEpoch);
            var rate = _configuration.Rate(epoch);
            _epochTrain += _trainer.Step(_step++, rate).Train;
            _roundStep++;
            progress?.Invoke(new Progress("tuning", _work += TuningWork / steps, _totalWork,
                $"round {_round + 1}/{PerturbationSelector.Rounds}, epoch {epoch + 1}/{_configuration.TuneEpochs}, loss {_epochTrain.Loss:F3}"));
            if (_roundStep % _trainer.StepsPerEpoch == 0)
            {
                _metricsBytes = _run.AppendLine(MetricsFile, new TuningMetrics(_round, epoch, rate, _epochTrain.Loss, _epochTrain.Accuracy,
                    _experiment.Backend.Name));
                _epochTrain = default;
            }
            if (_roundStep == steps || cancellation.IsCancellationRequested || TimeProvider.System.GetElapsedTime(saved) > _checkpointInterval)
            {
                Save();
                saved = TimeProvider.System.GetTimestamp();
                cancellation.ThrowIfCancellationRequested();
            }
        }
    }

    private void Save()
    {
        var state = new CheckpointState("selection", _experiment.Configuration.Space);
        state.Set("round", _round);
        state.Set("round_step", _roundStep);
        state.Set("step", _step);
        state.Set("decisions_bytes", _decisionsBytes);
        state.Set("metrics_bytes", _metricsBytes);
        state.Set("epoch_train", _epochTrain);
        Checkpoint.Write(CheckpointPath, state, _experiment.Network, _trainer);
    }

    private void Restore()
    {
        var state = Checkpoint.Read(CheckpointPath, "selection", _experiment.Network, _trainer);
        _round = (int)state.GetInt64("round");
        (_roundStep, _step) = (state.GetInt64("round_step"), state.GetInt64("step"));
        (_decisionsBytes, _metricsBytes) = (state.GetInt64("decisions_bytes"), state.GetInt64("metrics_bytes"));
        _epochTrain = state.GetTotals("epoch_train");
        _run.Truncate(DecisionsFile, _decisionsBytes);
        _run.Truncate(MetricsFile, _metricsBytes);
        _selector = NewSelector(_run.ReadLines<Decision>(DecisionsFile));
    }

    private sealed record TuningMetrics(int Round, int Epoch, float Rate, double TrainLoss, double TrainAccuracy, string Device);
}
