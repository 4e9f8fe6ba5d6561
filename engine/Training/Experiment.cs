using PerturbNas.Backends;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Reports;
using PerturbNas.Search;
using PerturbNas.Spaces;
using PerturbNas.Tensors;

namespace PerturbNas.Training;

/// <summary>What a long job tells whoever watches it, after every batch.</summary>
/// <param name="Phase">What is being done: "search", "scoring", "tuning".</param>
/// <param name="Done">Units of work done, of <paramref name="Total"/>; the unit is the phase's own.</param>
/// <param name="Detail">Where it is: "epoch 3/50, loss 1.234, accuracy 56.7 %".</param>
public readonly record struct Progress(string Phase, long Done, long Total, string Detail);

/// <summary>A run folder with its supernet in memory: what search, selection and scoring have in common.</summary>
public sealed class Experiment : IDisposable
{
    private const string CheckpointName = "search";

    private Forecast? _searchForecast;

    private Experiment(RunDirectory run, SearchConfiguration configuration, Backend backend)
    {
        (Run, Configuration, Backend) = (run, configuration, backend);
        (Train, Validation) = configuration.ReadData();
        Network = new Supernet(backend, configuration.ParseSpace(),
            new SupernetSize(configuration.Channels, configuration.Layers, Train.Classes, Train.Height), configuration.Seed);
        Arena = new Arena(backend);
    }

    public RunDirectory Run { get; }

    public SearchConfiguration Configuration { get; }

    public Backend Backend { get; }

    public Supernet Network { get; }

    public Arena Arena { get; }

    /// <summary>Images that train the weights.</summary>
    public ImageSet Train { get; }

    /// <summary>Images that train alpha and score candidates.</summary>
    public ImageSet Validation { get; }

    /// <summary>What the search takes, from its beginning to its end.</summary>
    public Forecast SearchForecast => _searchForecast ??= Forecast.OfSearch(Configuration);

    /// <summary>Starts a run in a folder that holds none.</summary>
    /// <param name="initialFile">Weights and alphas to start from, under the reference's names; null: drawn from the seed.</param>
    /// <exception cref="UserException">The folder already holds a run, the data or the file cannot be used, or there is not enough memory.</exception>
    public static Experiment Create(RunDirectory run, SearchConfiguration configuration, Backend backend, string? initialFile)
    {
        if (RunDirectory.Exists(run.Path))
            throw new UserException($"'{run.Path}' already holds a run; give --resume to go on with it, or another folder.");
        if (initialFile is not null)
            configuration = configuration with { InitSha256 = Checkpoint.DigestOf(initialFile) };
        var experiment = new Experiment(run, configuration, backend);
        try
        {
            experiment.SearchForecast.RequireMemory(backend);
            if (initialFile is not null)
                Checkpoint.ReadInitial(initialFile, experiment.Network);
            using (var search = new SupernetSearch(experiment))
                search.Save();
            run.WriteJson(SearchConfiguration.FileName, configuration);
            return experiment;
        }
        catch
        {
            File.Delete(experiment.CheckpointPath);
            experiment.Dispose();
            throw;
        }
    }

    /// <summary>Opens the run in a folder; <see cref="SupernetSearch.Restore"/> brings the weights of its last checkpoint.</summary>
    /// <param name="adjust">Checks the configuration, or changes it for this process only, before the data are read.</param>
    public static Experiment Open(RunDirectory run, Backend backend, Func<SearchConfiguration, SearchConfiguration>? adjust = null)
    {
        var configuration = SearchConfiguration.Read(run);
        return new Experiment(run, adjust is null ? configuration : adjust(configuration), backend);
    }

    /// <summary>Path of the checkpoint that search writes and everything else starts from.</summary>
    public string CheckpointPath => Run.CheckpointPath(CheckpointName);

    public void Dispose()
    {
        Network.Dispose();
        Arena.Dispose();
    }
}
