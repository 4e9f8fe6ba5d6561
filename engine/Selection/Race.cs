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
    /// <exception cref="UserException">It is none of these.</exception>
    public static Racing Parse(string text) => text switch
    {
        "off" => Off,
        "exact" => Exact,
        _ when double.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out var delta) && delta is > 0 and < 1 => new Racing(delta),
        _ => throw new UserException($"--racing is '{text}'; choose off, exact, or an error probability between 0 and 1 such as 0.01."),
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
/// Confident, at level alpha = delta / (races * (candidates - 1)): batches are visited in random order, so the differences x_t (its correct
/// images minus the rival's, the sign such that positive means losing, divided by the batch size) are a sample without replacement from the B
/// batch differences of the full pass. If the candidate were to win, their total would be at most 0, so the conditional mean of x_t given
/// the past would be at most m_t = -(x_1 + ... + x_(t-1)) / (B - t + 1). Then for every fixed bet f in [0, 1) the product of 1 + f (x_t - m_t) /
/// (1 + m_t) is a non-negative supermartingale that starts at 1 (x_t >= -1 keeps the factors non-negative), and so is the mean of
/// the products over a grid of bets. By Ville's inequality it ever reaches 1 / alpha with probability at most alpha. A decision
/// can only go wrong by dropping its true winner, against one of at most candidates - 1 rivals; the union bound over these and over all
/// races gives delta, whatever the number of looks. (Waudby-Smith and Ramdas, "Confidence sequences for sampling without
/// replacement", NeurIPS 2020; "Estimating means of bounded random variables by betting", JRSS B 2024.) The sampling unit is the batch, not
/// the image, because batch norm makes the images of a batch depend on one another.
/// </para>
/// </summary>
public sealed class Race
{
    private static readonly double[] _bets = [0.05, 0.1, 0.2, 0.4, 0.7, 0.95];

    private readonly int _candidates, _batches, _batchSize;
    private readonly long _images;
    private readonly bool _lowestWins;
    private readonly double _alpha;
    private readonly double[,] _differenceSums;
    private readonly double[,,] _wealth;
    private readonly long[] _correct;
    private readonly string?[] _dropped;
    private readonly List<int> _alive;
    private int _seenBatches;
    private long _seenImages;

    /// <param name="images">Images of the full pass.</param>
    /// <param name="batches">Batches of the full pass.</param>
    /// <param name="batchSize">Images of its largest batch.</param>
    /// <param name="lowestWins">
    /// The winner has the fewest correct images, ties: the lowest index (operations); or the most, ties: the highest index (topology).
    /// </param>
    public Race(int candidates, long images, int batches, int batchSize, bool lowestWins, Racing racing)
    {
        (_candidates, _images, _batches, _batchSize, _lowestWins) = (candidates, images, batches, batchSize, lowestWins);
        _alpha = (racing.Delta ?? 0) / (Racing.Races * Math.Max(1, candidates - 1));
        _correct = new long[candidates];
        _dropped = new string?[candidates];
        _alive = [.. Enumerable.Range(0, candidates)];
        _differenceSums = new double[candidates, candidates];
        _wealth = new double[candidates, candidates, _bets.Length];
        for (var i = 0; i < candidates; i++)
            for (var j = 0; j < candidates; j++)
                for (var bet = 0; bet < _bets.Length; bet++)
                    _wealth[i, j, bet] = 1;
    }

    /// <summary>Candidates that can still win, in order.</summary>
    public IReadOnlyList<int> Alive => _alive;

    /// <summary>Why a candidate was dropped; null: it was not.</summary>
    public string? Dropped(int candidate) => _dropped[candidate];

    /// <summary>Takes in a batch and drops who can be dropped.</summary>
    /// <param name="correct">Correct images of each candidate in <see cref="Alive"/>, in that order.</param>
    /// <param name="images">Images of the batch.</param>
    public void Add(ReadOnlySpan<long> correct, int images)
    {
        for (var a = 0; a < _alive.Count; a++)
        {
            _correct[_alive[a]] += correct[a];
            for (var b = 0; b < _alive.Count && _alpha > 0; b++)
                if (a != b)
                    Bet(_alive[a], _alive[b], (double)(_lowestWins ? correct[a] - correct[b] : correct[b] - correct[a]) / _batchSize);
        }
        _seenBatches++;
        _seenImages += images;
        foreach (var candidate in _alive.ToArray())
            _dropped[candidate] = _alive.Where(rival => rival != candidate).Select(rival => Reason(candidate, rival)).FirstOrDefault(reason => reason is not null);
        _alive.RemoveAll(candidate => _dropped[candidate] is not null);
    }

    private void Bet(int candidate, int rival, double x)
    {
        var mean = -_differenceSums[candidate, rival] / (_batches - _seenBatches);
        _differenceSums[candidate, rival] += x;
        if (mean <= -1)
            return; // The exact rule has decided, or is about to.
        for (var bet = 0; bet < _bets.Length; bet++)
            _wealth[candidate, rival, bet] *= 1 + _bets[bet] * (x - mean) / (1 + mean);
    }

    private string? Reason(int candidate, int rival)
    {
        // How far the candidate is behind; it loses a tie to a rival of lower index (operations) or of higher index (topology).
        var behind = _lowestWins ? _correct[candidate] - _correct[rival] : _correct[rival] - _correct[candidate];
        var left = _images - _seenImages;
        var losesTie = _lowestWins ? rival < candidate : rival > candidate;
        if (behind > left || (behind == left && losesTie))
            return $"cannot win: {behind} images behind candidate {rival} with {left} left";
        if (_alpha == 0)
            return null;
        var wealth = 0.0;
        for (var bet = 0; bet < _bets.Length; bet++)
            wealth += _wealth[candidate, rival, bet] / _bets.Length;
        return wealth >= 1 / _alpha
            ? string.Create(CultureInfo.InvariantCulture, $"confident: {behind} images behind candidate {rival}, evidence {wealth:E1} of {1 / _alpha:E1}")
            : null;
    }
}
