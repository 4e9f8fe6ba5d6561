using System.Text.Json;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Search;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Benchmarks;

/// <summary>
/// A small search on synthetic images and the whole selection after it: every decision of operations and topology, with tuning between
/// them, checkpoints and all, in a folder that is deleted at the end. The peer makes the same selection from the same supernet, with the same
/// batches and the same order of edges and nodes (peer/selection.py), and neither races.
/// </summary>
internal static class SelectionSuite
{
    private const string Selector = "perturbation";
    private const int Seed = 0, DefaultImages = 128, DefaultRepeats = 1;

    public static void Run(BenchmarkOptions options, Report report)
    {
        var folder = Directory.CreateTempSubdirectory("perturbnas-benchmark-");
        try
        {
            Run(options, report, folder.FullName);
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private static void Run(BenchmarkOptions options, Report report, string folder)
    {
        var images = options.Images ?? DefaultImages;
        using var backend = options.NewBackend();
        using var run = RunDirectory.Open(Path.Combine(folder, "run"));
        using var experiment = Experiment.Create(run, new SearchConfiguration
        {
            Space = SearchSpace.Load(options.Space).ToJson(),
            Method = "darts",
            Data = "synthetic",
            Epochs = options.Epochs,
            Batch = options.Batch,
            Channels = options.Channels,
            Layers = options.Layers,
            Seed = Seed,
            TrainPortion = 0.5,
            TrainLimit = images,
            ValidLimit = images,
        }, backend, initialFile: null);
        double search;
        using (var supernet = new SupernetSearch(experiment))
        {
            supernet.Restore();
            search = Timing.Seconds(() => supernet.Run(null, CancellationToken.None));
        }
        Console.WriteLine($"search: {search:0.00} s");

        var weights = Path.Combine(folder, "weights.safetensors");
        var initialLoss = options.Peer ? WriteForPeer(experiment, options, weights) : 0;
        var (decisions, result) = Select(experiment, options);
        report.Table(["decision", "phase", "cell", "edge", "chosen"], decisions.Select((decision, i) =>
            (IReadOnlyList<string>)[$"{i}", decision.Phase, decision.Cell, $"{decision.Edge}", decision.Chosen]));
        Console.WriteLine(result.Genotype);
        var repeats = options.Repeats ?? DefaultRepeats;
        var rows = new List<IReadOnlyList<string>>();
        if (!options.Peer)
            Show("ours", Timing.Measure(repeats, () => Select(experiment, options)), null, "");
        var order = Path.Combine(folder, "order.json");
        File.WriteAllText(order, JsonSerializer.Serialize(OrderOf(decisions)));
        foreach (var mode in Duel.Modes(options))
        {
            using var peer = new Peer("selection.py", mode, BenchmarkOptions.ThreadsOf(backend), ["--init", weights, "--order", order, "--batch", $"{options.Batch}",
                "--classes", $"{experiment.Train.Classes}", .. Peer.ArgumentsOf(WorkloadSize.Of(options))]);
            Duel.RequireSameLoss("loss of the searched weights", initialLoss, peer.InitialLoss);
            var duel = Duel.Run(repeats, () => Select(experiment, options), 1, peer, report);
            var (agreeing, compared) = Agreement(experiment.Network.Space, decisions, duel.Extra!["decisions"]);
            Show("ours", duel.Ours, null, "");
            Show($"PyTorch, {mode}", duel.Peer, duel.Ratio, $"{agreeing} of {compared}");
            report.Add(new { Kind = "selection_peer", peer.Description, duel, InitialLoss = initialLoss, DecisionsAgreeing = agreeing, DecisionsCompared = compared });
            Console.WriteLine($"accuracy of the reduced supernet: ours {result.Accuracy:P1}, {mode} peer {duel.Extra["accuracy"].GetDouble():P1}; peer's scoring " +
                $"{duel.Extra["scoring_seconds"].GetDouble():0.00} s, tuning {duel.Extra["tuning_seconds"].GetDouble():0.00} s");
        }
        report.Table(["selection", "median s", "min-max s", "times ours", "min-max", "decisions before the first that differs"], rows);

        void Show(string name, Repeats seconds, Repeats? ratio, string agreement)
        {
            rows.Add(
            [
                name, $"{seconds.Median:0.00}", $"{seconds.Minimum:0.00}-{seconds.Maximum:0.00}", ratio is null ? "" : $"{ratio.Median:0.00}",
                ratio is null ? "" : $"{ratio.Minimum:0.00}-{ratio.Maximum:0.00}", agreement,
            ]);
            if (ratio is null)
                report.Add(new { Kind = "selection", SearchSeconds = search, Seconds = seconds, result, decisions, PeakBytes = Memory.PeakBytes() });
        }
    }

    /// <summary>The whole selection, from the searched supernet.</summary>
    private static (IReadOnlyList<Decision> Decisions, SelectionResult Result) Select(Experiment experiment, BenchmarkOptions options)
    {
        using var selection = SelectionRun.Start(experiment, new SelectionConfiguration
        {
            By = Selector,
            TuneEpochs = options.TuneEpochs,
            TrainLimit = experiment.Train.Count,
            ValidLimit = experiment.Validation.Count,
            Batch = options.Batch,
            Seed = Seed,
        });
        var result = selection.Run(null, CancellationToken.None);
        return (selection.Decisions, result);
    }

    /// <summary>
    /// Writes the supernet, the validation half and the batches of all tuning steps, as <see cref="SelectionRun"/> draws them. Returns the loss
    /// of the first validation batch.
    /// </summary>
    private static double WriteForPeer(Experiment experiment, BenchmarkOptions options, string path)
    {
        var file = Workload.WeightsOf(experiment.Network);
        var validation = BatchLoader.InRecordOrder(experiment.Validation, experiment.Validation.Count);
        Add("", validation, 1, [experiment.Validation.Count]);
        var train = new BatchLoader(experiment.Train, options.Batch, Seed, "tuning weights", augment: true);
        if (experiment.Train.Count % train.BatchSize != 0)
            throw new UserException($"--images is {experiment.Train.Count}, which is no multiple of the {train.BatchSize} images of a batch, as the peer needs; " +
                "give a multiple.");
        var steps = (PerturbationSelector.Rounds - 1) * options.TuneEpochs * train.Steps;
        Add("weight_", train, steps, [steps, train.BatchSize]);
        Add("alpha_", new BatchLoader(experiment.Validation, options.Batch, Seed, "tuning alpha", augment: true), steps, [steps, train.BatchSize]);
        file.Write(path);
        return new MaskedEvaluation(experiment.Network, experiment.Arena, experiment.Validation, options.Batch, batchLimit: 1)
            .Evaluate(new EdgeStates(), [Mask.None])[0].Loss;

        void Add(string prefix, BatchLoader loader, int steps, long[] shape)
        {
            var side = experiment.Train.Height;
            var (images, labels) = (new float[steps * loader.BatchSize * 3 * side * side], new int[steps * loader.BatchSize]);
            var size = loader.BatchSize * 3 * side * side;
            for (var step = 0; step < steps; step++)
                loader.Fill(step / loader.Steps, step % loader.Steps, images.AsSpan(step * size, size), labels.AsSpan(step * loader.BatchSize, loader.BatchSize));
            file.Add(prefix + "images", [.. shape, 3, side, side], ToNchw(images, side * side));
            file.Add(prefix + "labels", shape, [.. labels.Select(label => (long)label)]);
        }
    }

    private static float[] ToNchw(float[] nhwc, int pixels)
    {
        var nchw = new float[nhwc.Length];
        for (var i = 0; i < nhwc.Length; i++)
        {
            var (image, pixel, channel) = (i / (3 * pixels), i / 3 % pixels, i % 3);
            nchw[(image * 3 + channel) * pixels + pixel] = nhwc[i];
        }
        return nchw;
    }

    /// <summary>Which edges and nodes came in which order, as the peer reads it.</summary>
    private static Dictionary<string, object> OrderOf(IReadOnlyList<Decision> decisions) => new[] { "normal", "reduction" }.ToDictionary(PeersCell, cell =>
    {
        var own = decisions.Where(decision => decision.Cell == cell).ToList();
        return (object)new
        {
            edges = own.Where(decision => decision.Phase == Decision.OperationPhase).Select(decision => decision.Edge),
            nodes = own.Where(decision => decision.Phase == Decision.TopologyPhase).Select(decision => decision.Node).Distinct(),
        };
    });

    private static string PeersCell(string cell) => cell == "reduction" ? "reduce" : cell;

    /// <summary>Decisions up to the first that differs, after which the two supernets are different ones; and all that are compared.</summary>
    private static (int Agreeing, int Compared) Agreement(SearchSpace space, IReadOnlyList<Decision> decisions, JsonElement peers)
    {
        var ours = decisions.Where(decision => decision.Phase != Decision.NoneReplacedPhase).ToList();
        var theirs = peers.EnumerateArray().ToList();
        return (ours.Zip(theirs).TakeWhile(pair => Same(pair.First, pair.Second)).Count(), ours.Count);

        bool Same(Decision mine, JsonElement peer) => PeersCell(mine.Cell) == peer[0].GetString() && mine.Edge == peer[1].GetInt32() &&
            (mine.Phase == Decision.TopologyPhase
                ? peer[2].ValueKind == JsonValueKind.String
                : space.Operations(mine.Cell == "normal" ? CellType.Normal : CellType.Reduction)[mine.Edge][peer[2].GetInt32()] == mine.Chosen);
    }
}
