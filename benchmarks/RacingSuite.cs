using PerturbNas.Networks;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Training;

namespace PerturbNas.Benchmarks;

/// <summary>
/// How often raced decisions are those of the full pass, and what racing saves, on trained supernets: every edge is decided once while all
/// others are undecided ("first") and once when all others have been decided by magnitude ("last"), and every node loses its first edge
/// ("topology"). The full pass is computed once and recorded image by image; races over random orders of its batches are replayed on the record
/// by the engine's own <see cref="Race"/>.
/// </summary>
internal static class RacingSuite
{
    /// <summary>A decision and, for every batch, candidate and image of its full pass, whether the candidate is right.</summary>
    private sealed record Recording(bool LowestWins, int Candidates, int[][] Batches)
    {
        public long Images { get; } = Batches.Sum(batch => (long)batch.Length) / Candidates;

        /// <summary>Correct images of each candidate over some batches.</summary>
        public long[] Correct(IEnumerable<int> batches, IReadOnlyList<int> candidates)
        {
            var correct = new long[Candidates];
            foreach (var batch in batches)
                foreach (var candidate in candidates)
                    correct[candidate] += Of(batch, candidate).ToArray().Sum();
            return correct;
        }

        public ReadOnlySpan<int> Of(int batch, int candidate)
        {
            var images = Batches[batch].Length / Candidates;
            return Batches[batch].AsSpan(candidate * images, images);
        }
    }

    /// <summary>One race: the winner, and the images that all candidates together were given.</summary>
    private sealed record Outcome(int Winner, long CandidateImages);

    public static void Run(BenchmarkOptions options, Report report)
    {
        var racings = new[] { Racing.Exact, new Racing(0.01) };
        var rows = new List<IReadOnlyList<string>>();
        foreach (var folder in options.Runs)
        {
            foreach (var decisions in Record(options, folder).GroupBy(entry => entry.Situation))
            {
                var recordings = decisions.Select(entry => entry.Recording).ToList();
                var gaps = recordings.ConvertAll(Gap);
                var dispersions = recordings.ConvertAll(Dispersion);
                foreach (var racing in racings)
                {
                    var races = recordings.ConvertAll(recording => Replay(recording, racing, options.Orders));
                    var full = recordings.Select(recording => Winner(recording, Enumerable.Range(0, recording.Batches.Length), All(recording))).ToList();
                    var agreeing = races.Select((outcomes, i) => outcomes.Count(outcome => outcome.Winner == full[i])).Sum();
                    var all = recordings.Sum(recording => recording.Images * recording.Candidates);
                    var given = races.Sum(outcomes => outcomes.Average(outcome => (double)outcome.CandidateImages));
                    var factors = new Repeats([.. races.Select((outcomes, i) => recordings[i].Images * recordings[i].Candidates /
                        outcomes.Average(outcome => (double)outcome.CandidateImages))]);
                    var name = Path.GetFileName(Path.TrimEndingDirectorySeparator(folder));
                    report.Add(new
                    {
                        Kind = "racing",
                        Run = name,
                        Situation = decisions.Key,
                        Racing = racing.ToString(),
                        Decisions = recordings.Count,
                        recordings[0].Images,
                        Races = recordings.Count * options.Orders,
                        Agreeing = agreeing,
                        Factor = all / given,
                        FactorOfEachDecision = factors,
                        GapPoints = new Repeats([.. gaps.Select(gap => 100 * gap)]),
                        Dispersion = new Repeats(dispersions),
                    });
                    rows.Add(
                    [
                        $"{name} {decisions.Key}", racing.ToString(), $"{recordings.Count}", $"{recordings[0].Images}",
                        $"{100 * new Repeats(gaps).Median:0.00}", $"{agreeing} of {recordings.Count * options.Orders}", $"{all / given:0.0}",
                        $"{factors.Median:0.0}", $"{factors.Minimum:0.0}-{factors.Maximum:0.0}", $"{new Repeats(dispersions).Median:0.00}",
                        $"{dispersions.Max():0.00}",
                    ]);
                }
            }
        }
        report.Table(
            ["decisions of", "racing", "number", "images", "median gap, points", "races that agree", "images saved, times", "median", "min-max",
                "dispersion", "max"], rows);
    }

    /// <summary>The decisions of a run, from the folder of recordings if they are there.</summary>
    private static IEnumerable<(string Situation, Recording Recording)> Record(BenchmarkOptions options, string folder)
    {
        using var backend = options.NewBackend();
        using var run = RunDirectory.OpenExisting(folder);
        using var experiment = Experiment.Open(run, backend, search => search with { ValidLimit = options.Images });
        using (var search = new Search.SupernetSearch(experiment))
            search.RestoreFinished();
        var network = experiment.Network;
        var evaluation = new MaskedEvaluation(network, experiment.Arena, experiment.Validation, options.Batch);
        foreach (var situation in (string[])["first", "last", "topology"])
        {
            foreach (var type in Enum.GetValues<CellType>())
            {
                var places = situation == "topology" ? Enumerable.Range(1, CellTopology.Nodes - 1) : Enumerable.Range(0, CellTopology.Edges);
                foreach (var place in places.Where(place => place % options.Every == 0))
                {
                    if (situation != "topology" && network.Space.Operations(type)[place].Count == 1)
                        continue;
                    var states = situation == "first" ? new EdgeStates() : DecidedByMagnitude(network);
                    List<Mask> masks;
                    if (situation == "topology")
                    {
                        masks = [.. Enumerable.Range(CellTopology.FirstEdge(place), CellTopology.EdgeCount(place)).Select(edge => new Mask(type, edge, Mask.WholeEdge))];
                    }
                    else
                    {
                        states[type, place] = EdgeStates.Undecided;
                        masks = [.. network.Space.Operations(type)[place].Select((_, operation) => new Mask(type, place, operation))];
                    }
                    yield return (situation, new Recording(situation != "topology", masks.Count,
                        Kept(options, $"{Path.GetFileName(folder)}-{situation}-{CellTopology.NameOf(type)}-{place}-{evaluation.Images}", evaluation.Images,
                            masks.Count, () => evaluation.Record(states, masks))));
                }
            }
        }
    }

    /// <summary>A recording from its file in the folder of recordings, one byte an entry; made, and kept there, if it is not.</summary>
    private static int[][] Kept(BenchmarkOptions options, string name, long images, int candidates, Func<int[][]> record)
    {
        if (options.Records is null)
            return record();
        var path = Path.Combine(options.Records, name);
        if (!File.Exists(path))
        {
            File.WriteAllBytes(path + ".partial", [.. record().SelectMany(batch => batch).Select(right => (byte)right)]);
            File.Move(path + ".partial", path);
        }
        int[] all = Array.ConvertAll(File.ReadAllBytes(path), right => (int)right);
        return all.Length == images * candidates
            ? [.. all.Chunk(options.Batch * candidates)]
            : throw new UserException($"'{path}' has {all.Length} bytes where {images * candidates} are expected; delete it, or name another folder.");
    }

    private static EdgeStates DecidedByMagnitude(Supernet network)
    {
        var states = new EdgeStates();
        foreach (var type in Enum.GetValues<CellType>())
        {
            var (weights, columns) = (network.Alphas.Softmax(type), network.Alphas.Columns(type));
            for (var edge = 0; edge < CellTopology.Edges; edge++)
                states[type, edge] = MagnitudeSelector.Best(network.Space.Operations(type)[edge], weights.AsSpan(edge * columns, columns)).Operation;
        }
        return states;
    }

    private static List<Outcome> Replay(Recording recording, Racing racing, int orders)
    {
        var outcomes = new List<Outcome>();
        for (var order = 0; order < orders; order++)
        {
            var batches = Enumerable.Range(0, recording.Batches.Length).ToArray();
            new RandomStream(order, "racing benchmark").Shuffle(batches);
            var race = new Race(recording.Candidates, recording.Images, recording.LowestWins, racing);
            var seen = 0;
            long given = 0;
            while (seen < batches.Length && race.Alive.Count > 1)
            {
                var batch = batches[seen++];
                int[] correct = [.. race.Alive.SelectMany(candidate => recording.Of(batch, candidate).ToArray())];
                given += correct.Length;
                race.Add(correct);
            }
            outcomes.Add(new Outcome(Winner(recording, batches.Take(seen), race.Alive), given));
        }
        return outcomes;
    }

    private static int[] All(Recording recording) => [.. Enumerable.Range(0, recording.Candidates)];

    /// <summary>As <see cref="Decision.HurtsMost"/> and <see cref="Decision.HurtsLeast"/> have it.</summary>
    private static int Winner(Recording recording, IEnumerable<int> batches, IReadOnlyList<int> candidates)
    {
        var correct = recording.Correct(batches, candidates);
        return recording.LowestWins ? candidates.MinBy(candidate => correct[candidate]) : candidates.Reverse().MaxBy(candidate => correct[candidate]);
    }

    /// <summary>Accuracy between the winner and the second.</summary>
    private static double Gap(Recording recording)
    {
        long[] ordered = [.. recording.Correct(Enumerable.Range(0, recording.Batches.Length), All(recording)).Order()];
        return (double)(recording.LowestWins ? ordered[1] - ordered[0] : ordered[^1] - ordered[^2]) / recording.Images;
    }

    /// <summary>
    /// Variance of a batch's sum of differences between the winner and a rival, over that of as many single images: 1 where the images of a batch
    /// are right or wrong independently; the mean over the rivals.
    /// </summary>
    private static double Dispersion(Recording recording)
    {
        var winner = Winner(recording, Enumerable.Range(0, recording.Batches.Length), All(recording));
        return All(recording).Where(rival => rival != winner).Average(rival =>
        {
            var sums = new List<double>();
            double squares = 0;
            for (var batch = 0; batch < recording.Batches.Length; batch++)
            {
                var differences = recording.Of(batch, winner).ToArray().Zip(recording.Of(batch, rival).ToArray(), (a, b) => (double)(a - b)).ToList();
                sums.Add(differences.Sum());
                squares += differences.Sum(difference => difference * difference);
            }
            var size = (double)recording.Images / sums.Count;
            var mean = sums.Sum() / recording.Images;
            var single = squares / recording.Images - mean * mean;
            return single == 0 ? 1 : sums.Sum(sum => Math.Pow(sum - size * mean, 2)) / (sums.Count - 1) / (size * single);
        });
    }
}
