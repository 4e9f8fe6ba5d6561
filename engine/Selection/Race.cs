using System.Globalization;
using PerturbNas.Training;

namespace PerturbNas.Selection;

/// <summary>Whether, and how surely, candidates are dropped from a decision before they have seen every image.</summary>
/// <param name="Delta">
/// Bound on the probability that any decision of a whole selection differs from that of full passes; 0: none may differ (exact);
/// null: nothing is dropped.
/// </param>
public readonly record struct Racing(double? Delta)
{
    /// <summary>Races of a whole selection at most: 28 operations, each once more among the others where <c>none</c> wins, 12 removals of edges.</summary>
    public const int Races = 68;

    public static Racing Off { get; } = new(null);

    public static Racing Exact { get; } = new(0);

    public bool IsOff => Delta is null;

    /// <summary>Reads "off", "exact" or a probability.</summary>
    /// <param name="what">What has this text, for the message.</param>
    /// <exception cref="UserException">It is none of these.</exception>
    public static Racing Parse(string? text, string what = "--racing") => text switch
    {
        "off" => Off,
        "exact" => Exact,
        _ when double.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out var delta) && delta is > 0 and < 1 => new Racing(delta),
        _ => throw new UserException($"{what} is '{text}'; choose off, exact, or an error probability between 0 and 1 such as 0.01."),
    };

    public override string ToString() => Delta switch
    {
        null => "off",
        0 => "exact",
        _ => Delta.Value.ToString(CultureInfo.InvariantCulture),
    };
}

/// <summary>
/// A race between the candidates of one decision by their numbers of correct images, batch by batch. A candidate is dropped against a
/// rival in two ways.
/// <para>
/// Exact: it would lose even if every remaining image went its way. What is left then decides as the full pass would, always.
/// </para>
/// <para>
/// Confident, at level alpha = delta / (races * (candidates - 1)). An image's difference d is 1 where it speaks against the candidate (just
/// one of the two is right, and not the one that should be), -1 where it speaks for it, 0 where both are right or both wrong. Batches come
/// in random order, so a batch is a sample without replacement from the images not seen yet. If the candidate were to win, all
/// differences would add up to at most 0, and the unseen ones have a mean of at most m = -(sum of the seen) / (number of the unseen). For a
/// fixed bet f in (0, 1) the factors 1 + f (d - m) / (1 + m) of the unseen images are then never negative and at most 1 on average; by
/// Maclaurin's inequality the product over a sample without replacement has an expectation of at most 1, too. So the product over
/// everything seen is a non-negative supermartingale that starts at 1, and so is the mean of the products of several bets, the wealth. By
/// Ville's inequality it ever reaches 1 / alpha with probability at most alpha. A decision can only go wrong by dropping its true
/// winner, against one of at most candidates - 1 rivals; the union bound over these and over all races gives delta, whatever the number of
/// looks. (Waudby-Smith and Ramdas, "Confidence sequences for sampling without replacement", NeurIPS 2020; "Estimating means of
/// bounded random variables by betting", JRSS B 2024.)
/// </para>
/// <para>
/// The bound assumes that the images of a batch are as good as drawn one by one: that the records were shuffled (CIFAR's are), and that
/// batch norm, which lets the images of a batch depend on one another, does not make them right or wrong together. (Without that no test
/// could be sure after a few batches: one batch that is wrong as a whole could turn the decision.) It is watched: where the differences vary
/// more from batch to batch than those of single images would, the logarithm of the wealth counts in proportion less; and nothing is dropped
/// before some batches have been seen.
/// </para>
/// </summary>
public sealed class Race
{
    private const int LeastBatches = 4;

    private static readonly double[] _bets = [0.02, 0.05, 0.1, 0.2, 0.4, 0.7];

    private readonly int _candidates;
    private readonly long _images;
    private readonly bool _lowestWins;
    private readonly double _evidenceNeeded;
    private readonly Evidence?[,] _evidence;
    private readonly long[] _correct;
    private readonly string?[] _dropped;
    private readonly List<int> _alive;
    private int _seenBatches;
    private long _seenImages;

    /// <param name="images">Images of the full pass.</param>
    /// <param name="lowestWins">
    /// The winner has the fewest correct images, ties: the lowest index (operations); or the most, ties: the highest index (topology).
    /// </param>
    public Race(int candidates, long images, bool lowestWins, Racing racing)
    {
        (_candidates, _images, _lowestWins) = (candidates, images, lowestWins);
        _evidenceNeeded = racing.Delta is > 0 and { } delta ? Math.Log(Racing.Races * Math.Max(1, candidates - 1) / delta) : double.PositiveInfinity;
        _correct = new long[candidates];
        _dropped = new string?[candidates];
        _alive = [.. Enumerable.Range(0, candidates)];
        _evidence = new Evidence?[candidates, candidates];
        for (var i = 0; i < candidates; i++)
            for (var j = 0; j < candidates && racing.Delta > 0; j++)
                _evidence[i, j] = new Evidence();
    }

    /// <summary>Candidates that can still win, in order.</summary>
    public IReadOnlyList<int> Alive => _alive;

    /// <summary>Why a candidate was dropped; null: it was not.</summary>
    public string? Dropped(int candidate) => _dropped[candidate];

    /// <summary>Takes in a batch and drops who can be dropped.</summary>
    /// <param name="correct">
    /// For each candidate in <see cref="Alive"/>, in that order, for each image of the batch: 1 where the candidate is right, else 0.
    /// </param>
    public void Add(ReadOnlySpan<int> correct)
    {
        var images = correct.Length / _alive.Count;
        for (var a = 0; a < _alive.Count; a++)
        {
            var mine = correct.Slice(a * images, images);
            foreach (var right in mine)
                _correct[_alive[a]] += right;
            for (var b = 0; b < _alive.Count; b++)
            {
                if (a == b || _evidence[_alive[a], _alive[b]] is not { } evidence)
                    continue;
                var (onlyMine, onlyTheirs) = (0, 0);
                for (var i = 0; i < images; i++)
                {
                    var theirs = correct[b * images + i];
                    onlyMine += mine[i] & ~theirs;
                    onlyTheirs += theirs & ~mine[i];
                }
                var (against, inFavour) = _lowestWins ? (onlyMine, onlyTheirs) : (onlyTheirs, onlyMine);
                evidence.Add(against, inFavour, images, _images - _seenImages);
            }
        }
        _seenBatches++;
        _seenImages += images;
        foreach (var candidate in _alive.ToArray())
            _dropped[candidate] = _alive.Where(rival => rival != candidate).Select(rival => Reason(candidate, rival)).FirstOrDefault(reason => reason is not null);
        _alive.RemoveAll(candidate => _dropped[candidate] is not null);
    }

    private string? Reason(int candidate, int rival)
    {
        // How far the candidate is behind; it loses a tie to a rival of lower index (operations) or of higher index (topology).
        var behind = _lowestWins ? _correct[candidate] - _correct[rival] : _correct[rival] - _correct[candidate];
        var left = _images - _seenImages;
        var losesTie = _lowestWins ? rival < candidate : rival > candidate;
        if (behind > left || (behind == left && losesTie))
            return $"cannot win: {behind} images behind candidate {rival} with {left} left";
        if (_seenBatches < LeastBatches || _evidence[candidate, rival] is not { } evidence || !(evidence.Log >= _evidenceNeeded))
            return null;
        return string.Create(CultureInfo.InvariantCulture,
            $"confident: {behind} images behind candidate {rival}, evidence e^{evidence.Log:F1} of e^{_evidenceNeeded:F1}");
    }

    /// <summary>What has been seen against a candidate's winning over one rival.</summary>
    private sealed class Evidence
    {
        // The logarithm of each bet's product.
        private readonly double[] _logWealth = new double[_bets.Length];

        // Over the batches seen: their number, the sums of images, of the two kinds of differing images and, with x a batch's sum of differences
        // and n its images, of n^2, n x and x^2.
        private double _batches, _images, _against, _inFavour, _nn, _nx, _xx;

        /// <summary>The logarithm of the wealth, over the dispersion.</summary>
        public double Log
        {
            get
            {
                var largest = _logWealth.Max();
                return (largest + Math.Log(_logWealth.Average(log => Math.Exp(log - largest)))) / Dispersion;
            }
        }

        // Variance of a batch's sum of differences over that of as many single images; 1 where it is less.
        private double Dispersion
        {
            get
            {
                var mean = (_against - _inFavour) / _images;
                var single = (_against + _inFavour) / _images - mean * mean;
                var squares = _xx - 2 * mean * _nx + mean * mean * _nn;
                return single > 0 && _batches > 1 ? Math.Max(1, squares / (_batches - 1) / (single * _images / _batches)) : 1;
            }
        }

        public void Add(int against, int inFavour, int images, long unseen)
        {
            var mean = (_inFavour - _against) / unseen;
            var x = against - inFavour;
            _batches++;
            _images += images;
            _against += against;
            _inFavour += inFavour;
            _nn += (double)images * images;
            _nx += (double)images * x;
            _xx += (double)x * x;
            if (mean <= -1)
                return; // The exact rule has decided, or is about to.
            for (var i = 0; i < _bets.Length; i++)
            {
                var bet = _bets[i] / (1 + mean);
                _logWealth[i] += against * Math.Log(1 + bet * (1 - mean)) + inFavour * Math.Log(1 - bet * (1 + mean)) +
                    (images - against - inFavour) * Math.Log(1 - bet * mean);
            }
        }
    }
}
