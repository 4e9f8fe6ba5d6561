using PerturbNas.Autograd;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Selection;

/// <summary>
/// Evaluates a supernet with things left out (DARTS-PT, section 4): all candidates on the same batches in record order, without
/// augmentation, with the batch's own statistics, without gradients, and with the running statistics left alone. Candidates are variants
/// of one pass, so what no mask reaches is computed once.
/// </summary>
public sealed class MaskedEvaluation(Supernet network, Arena arena, ImageSet images, int batchSize, int? batchLimit = null)
{
    // Scoring draws its noise far from training's positions, the same for every candidate.
    private const ulong NoiseBase = 1UL << 56;

    private readonly BatchLoader _loader = BatchLoader.InRecordOrder(images, batchSize);
    private readonly float[] _images = new float[Math.Min(batchSize, images.Count) * images.ImageSize];
    private readonly int[] _labels = new int[Math.Min(batchSize, images.Count)];

    /// <summary>Batches that every candidate is evaluated on.</summary>
    public int Batches => Math.Min(batchLimit ?? _loader.Steps, _loader.Steps);

    /// <summary>Images that every candidate is evaluated on.</summary>
    public long Images => Enumerable.Range(0, Batches).Sum(step => (long)_loader.BatchCount(step));

    /// <summary>Loss and accuracy of every candidate, in the order of <paramref name="masks"/>.</summary>
    /// <param name="states">What has been decided already.</param>
    /// <param name="masks">The candidates.</param>
    /// <param name="afterBatch">Called after every batch of every group of candidates with the candidate-images done.</param>
    /// <param name="cancellation">Checked between batches.</param>
    /// <exception cref="UserException">A loss is not a finite number.</exception>
    public Totals[] Evaluate(EdgeStates states, IReadOnlyList<Mask> masks, Action<int>? afterBatch = null,
        CancellationToken cancellation = default)
    {
        var totals = new Totals[masks.Count];
        for (var first = 0; first < masks.Count; first += network.MaxVariants)
        {
            var group = masks.Skip(first).Take(network.MaxVariants).ToList();
            var results = totals.AsSpan(first, group.Count);
            SupernetPass? pass = null;
            for (var step = 0; step < Batches; step++)
            {
                cancellation.ThrowIfCancellationRequested();
                pass = RunBatch(pass, states, group, step, results);
                afterBatch?.Invoke(pass.Images * group.Count);
            }
        }
        return totals;
    }

    /// <summary>
    /// Lets the candidates of one decision race: batches of the full pass in random order, until one candidate is left or the images are
    /// used up. Candidates that were dropped have the totals of the images that they were given.
    /// </summary>
    /// <param name="lowestWins">As in <see cref="Race"/>.</param>
    /// <param name="order">The stream that the order of the batches is drawn from.</param>
    /// <returns>Totals and the reason for dropping (null: kept to the end) of every candidate.</returns>
    public (Totals Totals, string? Dropped)[] Evaluate(EdgeStates states, IReadOnlyList<Mask> masks, Racing racing, bool lowestWins,
        RandomStream order, Action<int>? afterBatch = null, CancellationToken cancellation = default)
    {
        if (racing.IsOff)
            return [.. Evaluate(states, masks, afterBatch, cancellation).Select(totals => (totals, (string?)null))];
        var batches = Enumerable.Range(0, Batches).ToArray();
        order.Shuffle(batches);
        var race = new Race(masks.Count, Images, lowestWins, racing);
        var totals = new Totals[masks.Count];
        SupernetPass? pass = null;
        for (var seen = 0; seen < batches.Length && (seen == 0 || race.Alive.Count > 1); seen++)
        {
            cancellation.ThrowIfCancellationRequested();
            var group = race.Alive.Select(candidate => masks[candidate]).ToList();
            var results = new Totals[group.Count];
            pass = RunBatch(pass, states, group, batches[seen], results);
            for (var a = 0; a < group.Count; a++)
                totals[race.Alive[a]] += results[a];
            var correct = new int[group.Count * pass.Images];
            pass.ReadCorrect(correct);
            race.Add(correct);
            afterBatch?.Invoke(pass.Images * group.Count);
        }
        return [.. totals.Select((total, candidate) => (total, race.Dropped(candidate)))];
    }

    /// <summary>
    /// Which images every candidate gets right in the full pass: for every batch, for every candidate, for every image, 1 or 0.
    /// </summary>
    /// <param name="masks">At most <see cref="Supernet.MaxVariants"/>.</param>
    public int[][] Record(EdgeStates states, IReadOnlyList<Mask> masks, CancellationToken cancellation = default)
    {
        var batches = new int[Batches][];
        SupernetPass? pass = null;
        for (var step = 0; step < Batches; step++)
        {
            cancellation.ThrowIfCancellationRequested();
            pass = RunBatch(pass, states, masks, step, new Totals[masks.Count]);
            pass.ReadCorrect(batches[step] = new int[masks.Count * pass.Images]);
        }
        return batches;
    }

    // Evaluates one batch, on the pass of the batch before if that fits.
    private SupernetPass RunBatch(SupernetPass? pass, EdgeStates states, IReadOnlyList<Mask> group, int step, Span<Totals> results)
    {
        var count = _loader.Fill(0, step, _images, _labels);
        if (pass?.Images != count || pass.Variants != group.Count)
            pass = network.Record(arena, new TapeOptions(BatchNormMode.BatchStatistics), count, states, group);
        network.NoisePosition = NoiseBase + (ulong)step;
        pass.Forward(_images.AsSpan(0, count * images.ImageSize), _labels.AsSpan(0, count));
        Add(pass, count, results, group, step);
        return pass;
    }

    private static void Add(SupernetPass pass, int images, Span<Totals> totals, IReadOnlyList<Mask> masks, int step)
    {
        Span<double> losses = stackalloc double[masks.Count];
        Span<long> correct = stackalloc long[masks.Count];
        pass.ReadResults(losses, correct);
        for (var v = 0; v < masks.Count; v++)
        {
            if (!double.IsFinite(losses[v]))
            {
                var what = masks[v].Edge < 0 ? "unmasked" : $"without {CellTopology.NameOf(masks[v].Cell)} edge {masks[v].Edge}";
                throw new UserException($"Scoring stopped at batch {step}: the loss of the network {what} is {losses[v]}; " +
                    "the supernet's weights are unusable, search again.");
            }
            totals[v] += new Totals(losses[v], correct[v], images);
        }
    }
}
