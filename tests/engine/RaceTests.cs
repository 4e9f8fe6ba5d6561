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
            var (correct, lowestWins) = (Draw(trial, spread: trial % 4 * 0.05), trial % 2 == 0);
            Assert.Equal(FullWinner(correct, lowestWins), Run(correct, lowestWins, Racing.Exact, trial).Winner);
        }
    }

    [Fact]
    public void ExactRacingStopsAsSoonAsTheRestCannotMatter()
    {
        // Candidate 0 gets every image wrong, the others every image right: after half of the images nobody can catch up.
        var race = new Race(2, images: 40, batches: 4, batchSize: 10, lowestWins: true, Racing.Exact);
        race.Add([0, 10], 10);
        Assert.Equal([0, 1], race.Alive);
        race.Add([0, 10], 10);
        Assert.Equal([0], race.Alive); // 20 behind with 20 left, and the tie goes to index 0
        Assert.Contains("cannot win", race.Dropped(1), StringComparison.Ordinal);
        Assert.Null(race.Dropped(0));
    }

    [Fact]
    public void ConfidentRacingSavesImagesWhereTheGapIsWide()
    {
        long[,] correct = new long[Candidates, 391];
        var stream = new RandomStream(1, "race test");
        for (var batch = 0; batch < 391; batch++)
            for (var candidate = 0; candidate < Candidates; candidate++)
                correct[candidate, batch] = (candidate == 2 ? 15 : 38) + stream.NextInt(9);
        var (winner, images) = Run(correct, lowestWins: true, new Racing(0.01), order: 3, batchSize: 64);
        Assert.Equal(2, winner);
        Assert.InRange(images, 1, 391L * 64 * Candidates / 5);
    }

    [Fact]
    public void ConfidentRacingErrsFarLessOftenThanItsBound()
    {
        // Races between equals, where every dropped winner is an error: at delta = 0.5 the bound for one race is 0.5 / Races.
        var errors = 0;
        const int trials = 2000;
        for (var trial = 0; trial < trials; trial++)
        {
            var correct = Draw(trial, spread: 0);
            errors += Run(correct, lowestWins: true, new Racing(0.5), trial).Winner == FullWinner(correct, lowestWins: true) ? 0 : 1;
        }
        Assert.InRange(errors, 0, (int)(trials * 0.5 / Racing.Races) + 10);
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

    private static long[,] Draw(int trial, double spread)
    {
        var stream = new RandomStream(trial, "race test");
        var correct = new long[Candidates, Batches];
        for (var candidate = 0; candidate < Candidates; candidate++)
            for (var batch = 0; batch < Batches; batch++)
                for (var image = 0; image < BatchSize; image++)
                    correct[candidate, batch] += stream.NextSingle() < 0.5 + spread * candidate ? 1 : 0;
        return correct;
    }

    private static int FullWinner(long[,] correct, bool lowestWins)
    {
        var totals = Enumerable.Range(0, correct.GetLength(0))
            .Select(candidate => Enumerable.Range(0, correct.GetLength(1)).Sum(batch => correct[candidate, batch])).ToList();
        return lowestWins ? totals.IndexOf(totals.Min()) : totals.LastIndexOf(totals.Max());
    }

    private static (int Winner, long Images) Run(long[,] correct, bool lowestWins, Racing racing, int order, int batchSize = BatchSize)
    {
        var (candidates, count) = (correct.GetLength(0), correct.GetLength(1));
        var batches = Enumerable.Range(0, count).ToArray();
        new RandomStream(order, "race order").Shuffle(batches);
        var race = new Race(candidates, (long)count * batchSize, count, batchSize, lowestWins, racing);
        var totals = new long[candidates];
        long images = 0;
        foreach (var batch in batches)
        {
            var alive = race.Alive.ToArray();
            if (alive.Length == 1)
                break;
            long[] results = [.. alive.Select(candidate => correct[candidate, batch])];
            for (var a = 0; a < alive.Length; a++)
                totals[alive[a]] += results[a];
            images += batchSize * alive.Length;
            race.Add(results, batchSize);
        }
        var left = race.Alive.ToList();
        var best = left[0];
        foreach (var candidate in left.Skip(1))
            if (lowestWins ? totals[candidate] < totals[best] : totals[candidate] >= totals[best])
                best = candidate;
        return (best, images);
    }
}
