using PerturbNas.Backends;
using PerturbNas.Search;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Tests.Data;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>A run folder with a small search of synthetic data; each step opens it anew, as a process of its own would.</summary>
internal sealed class RunFixture : IDisposable
{
    private readonly TemporaryFolder _folder = new();
    private readonly int _threads;

    /// <param name="threads">Threads of the CPU backend.</param>
    /// <param name="method">darts or blank.</param>
    /// <param name="device">What to compute on.</param>
    /// <param name="configure">Changes the search's configuration.</param>
    public RunFixture(int threads = 1, string method = "darts", string device = "cpu", Func<SearchConfiguration, SearchConfiguration>? configure = null)
    {
        (_threads, Device) = (threads, device);
        Configuration = new SearchConfiguration
        {
            Space = SearchSpace.Load("s3").ToJson(),
            Method = method,
            Data = "synthetic",
            Epochs = 2,
            Batch = 4,
            Channels = 4,
            Layers = 3,
            Seed = 7,
            TrainPortion = 0.5,
            TrainLimit = 10,
            ValidLimit = 6,
            Cutout = 16,
        };
        if (configure is not null)
            Configuration = configure(Configuration);
        using var backend = NewBackend();
        using var run = RunDirectory.Open(Folder);
        using var experiment = Experiment.Create(run, Configuration, backend, initialFile: null);
    }

    public static SelectionConfiguration Selection { get; } = new()
    {
        By = "perturbation",
        Criterion = Criterion.Accuracy,
        TuneEpochs = 1,
        Batch = 6,
        Seed = 9,
        CosineTuning = true,
    };

    public SearchConfiguration Configuration { get; }

    /// <summary>What to compute on from now on.</summary>
    public string Device { get; set; }

    public string Folder => _folder["run"];

    public string CheckpointPath => Path.Combine(Folder, "checkpoints", "search.safetensors");

    /// <summary>Steps of the whole search: 2 epochs of batches of 4, 4 and 2 images.</summary>
    public static int Steps => 6;

    public byte[] Bytes(params string[] parts) => File.ReadAllBytes(Path.Combine([Folder, .. parts]));

    public byte[] SelectionBytes(params string[] parts) => Bytes(["select-perturbation", .. parts]);

    /// <summary>Opens the run, restores its checkpoint and goes on to the end, or to where the token is cancelled.</summary>
    /// <param name="cancelAfter">Cancel when that many steps have been made; null: never.</param>
    /// <param name="prepare">Called after restoring.</param>
    /// <returns>Whether it came to the end.</returns>
    public bool Search(int? cancelAfter = null, Action<Experiment>? prepare = null)
    {
        using var backend = NewBackend();
        using var run = RunDirectory.Open(Folder);
        using var experiment = Experiment.Open(run, backend);
        using var search = new SupernetSearch(experiment);
        search.Restore();
        prepare?.Invoke(experiment);
        return Completes(cancelAfter, (progress, cancellation) => search.Run(progress, cancellation));
    }

    /// <summary>Selects by perturbation, from the beginning or from where an earlier selection was interrupted.</summary>
    /// <param name="cancelAfter">Cancel when progress has been told that many times in <paramref name="phase"/>; null: never.</param>
    /// <param name="phase">"scoring" or "tuning".</param>
    public bool Select(bool resume, int? cancelAfter = null, string phase = "scoring") =>
        Select(Selection, resume, cancelAfter, phase);

    /// <summary>The same with settings of its own.</summary>
    public bool Select(SelectionConfiguration configuration, bool resume = false, int? cancelAfter = null, string phase = "scoring")
    {
        using var backend = NewBackend();
        using var run = RunDirectory.Open(Folder);
        using var experiment = Experiment.Open(run, backend);
        using var selection = resume ? SelectionRun.Resume(experiment, configuration) : SelectionRun.Start(experiment, configuration);
        return Completes(cancelAfter, (progress, cancellation) => selection.Run(progress, cancellation), phase);
    }

    /// <summary>Brings the run where another one of the same configuration is.</summary>
    public void CopyFrom(RunFixture other)
    {
        Directory.Delete(Folder, true);
        TemporaryFolder.Copy(other.Folder, Folder);
    }

    public void Dispose() => _folder.Dispose();

    private Backend NewBackend() => Devices.Create(Device, _threads);

    private static bool Completes(int? cancelAfter, Action<Action<Progress>, CancellationToken> job, string phase = "search")
    {
        using var cancellation = new CancellationTokenSource();
        if (cancelAfter == 0)
            cancellation.Cancel();
        var told = 0;
        try
        {
            job(progress =>
            {
                if (progress.Phase == phase && ++told == cancelAfter)
                    cancellation.Cancel();
            }, cancellation.Token);
            return true;
        }
        catch (OperationCanceledException)
        {
            return false;
        }
    }
}
