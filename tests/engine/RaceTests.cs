using PerturbNas.Selection;
using PerturbNas.Training;
using Xunit;

namespace PerturbNas.Tests.Engine;

public sealed class RaceTests
{
    private const int Candidates = 5, Batches = 60, BatchSize = 16;

    [Fact]
    public void ExactRacingDecidesAsTheFullPassWould()
    {
        for (var trial = 0; trial < 400; trial++)
        {
            // Small differences and few images make ties and late turns common.
            var (correct, lowestWins) = (Draw(trial, Batches, candidate => 0.5 + trial % 4 * 0.05 * candidate), trial % 2 == 0);
            Assert.Equal(FullWinner(correct, lowestWins), Run(correct, lowestWins, Racing.Exact, trial).Winner);
        }
    }

    [Fact]
    public void ExactRacingStopsAsSoonAsTheRestCannotMatter()
    {
        // Candidate 0 gets every image wrong, the other every image right: after half of the images nobody can catch up.
        int[] batch = [.. new int[10], .. Enumerable.Repeat(1, 10)];
        var race = new Race(2, images: 40, lowestWins: true, Racing.Exact);
        race.Add(batch);
        Assert.Equal([0, 1], race.Alive);
        race.Add(batch);
        Assert.Equal([0], race.Alive); // 20 behind with 20 left, and the tie goes to index 0
        Assert.Contains("cannot win", race.Dropped(1), StringComparison.Ordinal);
        Assert.Null(race.Dropped(0));
    }

    /// <summary>391 batches of 64: a gap of five points, the images right independently, needs a few thousand of the 25 000 images.</summary>
    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void ConfidentRacingSavesImagesWhereTheGapIsClear(bool lowestWins)
    {
        var correct = Draw(1, batches: 391, candidate => candidate == 2 ? (lowestWins ? 0.65 : 0.75) : 0.7, batchSize: 64);
        var (winner, images) = Run(correct, lowestWins, new Racing(0.01), order: 3);
        Assert.Equal(2, winner);
        Assert.InRange(images, 4L * 64 * Candidates, 391L * 64 * Candidates / 4);
    }

    /// <summary>
    /// Races between equals, where every dropped winner is an error: the bound for one race is delta / Races. With delta = 40 in place of a
    /// probability it is 0.59, so that a test that errs more often than it may would show.
    /// </summary>
    [Fact]
    public void ConfidentRacingErrsLessOftenThanItsBound()
    {
        var (errors, dropped) = (0, 0);
        const int trials = 1000;
        const double delta = 40;
        for (var trial = 0; trial < trials; trial++)
        {
            var correct = Draw(trial, Batches, _ => 0.5);
            var (winner, images) = Run(correct, lowestWins: true, new Racing(delta), trial);
            errors += winner == FullWinner(correct, lowestWins: true) ? 0 : 1;
            dropped += images < Batches * BatchSize * Candidates * 9 / 10 ? 1 : 0;
        }
        Assert.InRange(dropped, trials / 10, trials);
        Assert.InRange(errors, 1, (int)(trials * delta / Racing.Races));
    }

    /// <summary>Batches that are right or wrong as a whole are worth one image each, not 16: they must not look like evidence.</summary>
    [Fact]
    public void BatchesThatAreRightOrWrongTogetherCountLess()
    {
        var stream = new RandomStream(2, "race test");
        var errors = 0;
        const int trials = 200;
        for (var trial = 0; trial < trials; trial++)
        {
            var correct = new int[Batches][];
            for (var batch = 0; batch < Batches; batch++)
            {
                correct[batch] = new int[Candidates * BatchSize];
                for (var candidate = 0; candidate < Candidates; candidate++)
                    correct[batch].AsSpan(candidate * BatchSize, BatchSize).Fill(stream.NextInt(2));
            }
            errors += Run(correct, lowestWins: true, new Racing(0.5), trial).Winner == FullWinner(correct, lowestWins: true) ? 0 : 1;
        }
        Assert.InRange(errors, 0, trials / 50);
    }

    [Theory]
    [InlineData("off", null)]
    [InlineData("exact", 0.0)]
    [InlineData("0.05", 0.05)]
    public void ParsesItsTextForm(string text, double? delta)
    {
        Assert.Equal(delta, Racing.Parse(text).Delta);
        Assert.Equal(text, Racing.Parse(text).ToString());
    }

    [Theory]
    [InlineData("0")]
    [InlineData("1")]
    [InlineData("-0.1")]
    [InlineData("sure")]
    [InlineData("NaN")]
    public void RefusesWhatIsNoProbability(string text) =>
        Assert.Contains(text, Assert.Throws<UserException>(() => Racing.Parse(text)).Message, StringComparison.Ordinal);

    /// <summary>For every batch whether each candidate is right on each image, [candidates, images], as probability says.</summary>
    private static int[][] Draw(int trial, int batches, Func<int, double> probability, int batchSize = BatchSize)
    {
        var stream = new RandomStream(trial, "race test");
        var correct = new int[batches][];
        for (var batch = 0; batch < batches; batch++)
        {
            correct[batch] = new int[Candidates * batchSize];
            for (var i = 0; i < correct[batch].Length; i++)
                correct[batch][i] = stream.NextSingle() < probability(i / batchSize) ? 1 : 0;
        }
        return correct;
    }

    private static int Sum(int[] batch, int candidate) => batch.Skip(candidate * (batch.Length / Candidates)).Take(batch.Length / Candidates).Sum();

    private static int FullWinner(int[][] correct, bool lowestWins)
    {
        var totals = Enumerable.Range(0, Candidates).Select(candidate => correct.Sum(batch => Sum(batch, candidate))).ToList();
        return lowestWins ? totals.IndexOf(totals.Min()) : totals.LastIndexOf(totals.Max());
    }

    private static (int Winner, long Images) Run(int[][] correct, bool lowestWins, Racing racing, int order)
    {
        var batches = Enumerable.Range(0, correct.Length).ToArray();
        new RandomStream(order, "race order").Shuffle(batches);
        var batchSize = correct[0].Length / Candidates;
        var race = new Race(Candidates, (long)correct.Length * batchSize, lowestWins, racing);
        var totals = new long[Candidates];
        long images = 0;
        foreach (var batch in batches)
        {
            var alive = race.Alive.ToArray();
            if (alive.Length == 1)
                break;
            foreach (var candidate in alive)
                totals[candidate] += Sum(correct[batch], candidate);
            images += batchSize * alive.Length;
            race.Add([.. alive.SelectMany(candidate => correct[batch].Skip(candidate * batchSize).Take(batchSize))]);
        }
        var left = race.Alive.ToList();
        var best = left[0];
        foreach (var candidate in left.Skip(1))
            if (lowestWins ? totals[candidate] < totals[best] : totals[candidate] >= totals[best])
                best = candidate;
        return (best, images);
    }
}
