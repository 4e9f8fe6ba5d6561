using System.Text.Json;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Tests.Data;
using PerturbNas.Tests.Engine;
using PerturbNas.Training;

namespace PerturbNas.Tests.Cli;

/// <summary>Search, both selections and scoring as their users run them.</summary>
public sealed class EndToEndTests(TinyRuns runs) : IClassFixture<TinyRuns>
{
    private static readonly string[] _s2 = ["skip_connect", "sep_conv_3x3"];

    [Fact]
    public void ScoringPrintsTheUnmaskedNetworkThenEveryCandidate()
    {
        var before = CommandLine.Contents(runs.Searched);
        var score = CommandLine.Json("score", "--run", runs.Searched);
        Assert.Equal(before, CommandLine.Contents(runs.Searched));

        Assert.Equal(["loss", "accuracy", "candidates", "images", "seconds", "candidate_images_per_second"],
            score.EnumerateObject().Select(property => property.Name));
        var candidates = score.GetProperty("candidates").EnumerateArray().ToList();
        var place = 0;
        foreach (var cell in (string[])["normal", "reduction"])
            for (var edge = 0; edge < 14; edge++)
                foreach (var operation in _s2)
                {
                    var candidate = candidates[place++];
                    Assert.Equal(["cell", "edge", "operation", "loss", "accuracy"], candidate.EnumerateObject().Select(property => property.Name));
                    Assert.Equal((cell, edge, operation), (candidate.GetProperty("cell").GetString(), candidate.GetProperty("edge").GetInt32(),
                        candidate.GetProperty("operation").GetString()));
                    AssertScores(candidate, images: 12);
                }
        Assert.Equal(candidates.Count, place);
        AssertScores(score, images: 12);
        Assert.Equal(12, score.GetProperty("images").GetInt64());
        var (seconds, rate) = (score.GetProperty("seconds").GetDouble(), score.GetProperty("candidate_images_per_second").GetDouble());
        Assert.True(seconds > 0);
        Assert.Equal(12 * candidates.Count, seconds * rate, 1e-6);
    }

    [Fact]
    public void ScoringOneEdgeGivesTheSameNumbersAsScoringAll()
    {
        var all = CommandLine.Json("score", "--run", runs.Searched).GetProperty("candidates").EnumerateArray()
            .Where(candidate => candidate.GetProperty("cell").GetString() == "reduction" && candidate.GetProperty("edge").GetInt32() == 3);
        var one = CommandLine.Json("score", "--run", runs.Searched, "--cell", "reduction", "--edge", "3", "--threads", "1");
        Assert.Equal(all.Select(candidate => candidate.GetRawText()), one.GetProperty("candidates").EnumerateArray().Select(c => c.GetRawText()));

        var batches = CommandLine.Json("score", "--run", runs.Searched, "--edge", "3", "--batch", "5", "--batches", "2");
        Assert.Equal((10, 4), (batches.GetProperty("images").GetInt32(), batches.GetProperty("candidates").GetArrayLength()));
        // More images a batch than there are: all of them.
        Assert.Equal(12, CommandLine.Json("score", "--run", runs.Searched, "--edge", "3", "--batch", "2000000000").GetProperty("images").GetInt32());
    }

    [Fact]
    public void BothSelectionsLeaveAGenotypeAndTheirDecisions()
    {
        var run = runs.Copy(runs.Searched);
        var checkpoint = CommandLine.Contents(Path.Combine(run, "checkpoints"));
        var magnitude = CommandLine.Json("select", "--run", run, "--by", "magnitude");
        AssertGenotype(magnitude, Path.Combine(run, "select-magnitude"), run);

        foreach (var criterion in (string[])["acc", "loss"])
        {
            var perturbation = CommandLine.Json("select", "--run", run, "--by", "perturbation", "--criterion", criterion, "--tune-epochs", "0", "--threads", "1");
            AssertGenotype(perturbation, Path.Combine(run, "select-perturbation"), run);
            var decisions = File.ReadAllLines(Path.Combine(run, "decisions.jsonl")).Select(line => JsonDocument.Parse(line).RootElement).ToList();
            Assert.Equal(decisions.Count, perturbation.GetProperty("decisions").GetInt32());
            // 14 edges of two cells, then the removals that leave nodes 1, 2, 3 (of 3, 4, 5 edges) with two edges.
            Assert.Equal((28, 12), (decisions.Count(d => d.GetProperty("phase").GetString() == "operation"),
                decisions.Count(d => d.GetProperty("phase").GetString() == "topology")));
            foreach (var decision in decisions.Where(d => d.GetProperty("phase").GetString() == "operation"))
            {
                var scores = decision.GetProperty("candidates").EnumerateArray().ToList();
                var worst = criterion == "acc"
                    ? scores.MinBy(candidate => candidate.GetProperty("accuracy").GetDouble())
                    : scores.MaxBy(candidate => candidate.GetProperty("loss").GetDouble());
                Assert.Equal(worst.GetProperty("operation").GetString(), decision.GetProperty("chosen").GetString());
            }
        }
        Assert.Equal(checkpoint, CommandLine.Contents(Path.Combine(run, "checkpoints")));
    }

    // One thread: the networks are too small to share out, and the tests run beside others.
    [Theory]
    [InlineData("s1")]
    [InlineData("s2")]
    [InlineData("s3")]
    [InlineData("s4")]
    [InlineData("s5")]
    [InlineData("darts")]
    [InlineData("custom")]
    public void WeightsOfAnotherProgramCanBeScored(string space)
    {
        var fixture = new FixtureFile(space);
        var (run, file) = (runs.NewPath("init"), runs.NewPath("space"));
        if (space == "custom")
            File.WriteAllText(file, JsonSerializer.Serialize(new { name = space, operations = fixture.Metadata("operations").Split(',') }));
        var search = CommandLine.Json("search", "--data", "synthetic", "--space", space == "custom" ? file : space, "--channels",
            fixture.Metadata("channels"), "--layers", fixture.Metadata("layers"), "--epochs", "0", "--init", FixtureFile.PathOf(space),
            "--train-limit", "4", "--valid-limit", "4", "--threads", "1", "--out", run);
        var checkpoint = SafeTensorsFile.Read(Path.Combine(run, "checkpoints", "search.safetensors"));
        foreach (var tensor in checkpoint.Tensors.Where(tensor => fixture.Contains(tensor.Name)))
            Assert.Equal(fixture.Singles(tensor.Name), checkpoint.Float32(tensor.Name, [.. tensor.Shape]).ToArray());
        Assert.True(fixture.Contains("alphas_reduce") && checkpoint.Contains("alphas_reduce"));

        var score = CommandLine.Json("score", "--run", run, "--edge", "13", "--threads", "1");
        AssertScores(score, images: 4);
        Assert.Equal(search.GetProperty("validation_loss").GetDouble(), score.GetProperty("loss").GetDouble());
        var operations = score.GetProperty("candidates").EnumerateArray().Select(candidate => candidate.GetProperty("operation").GetString()).ToList();
        Assert.Equal(operations.Count, operations.Count(CandidateOperation.Names.Contains));
    }

    [RealFilesFact("cifar10")]
    public void SearchesAndSelectsOnCifar10()
    {
        var run = runs.NewPath("cifar10");
        var search = CommandLine.Json("search", "--data", "cifar10", "--space", "s3", "--channels", "2", "--layers", "3", "--epochs", "1", "--batch",
            "16", "--train-limit", "32", "--valid-limit", "16", "--cutout", "--out", run);
        AssertFinite(search.GetProperty("train_loss"));
        AssertGenotype(CommandLine.Json("select", "--run", run, "--tune-epochs", "0"), Path.Combine(run, "select-perturbation"), run);
    }

    [Fact]
    public void SearchesOnASubsetOfCifar100()
    {
        var data = runs.NewPath("data");
        CifarFiles.WriteCifar100(Path.Combine(data, "cifar-100-binary"), 14, 2);
        // 7 images each, in batches of 6: the last one has a single image.
        var search = CommandLine.Json("search", "--data", "cifar100", "--data-dir", data, "--space", "s4", "--method", "blank", "--channels", "2",
            "--layers", "2", "--epochs", "1", "--batch", "6", "--out", runs.NewPath("cifar100"));
        AssertFinite(search.GetProperty("train_loss"));
        AssertFinite(search.GetProperty("validation_loss"));
    }

    [Fact]
    public void ABatchLargerThanTheDataIsAllOfThem()
    {
        string[] large = [.. TinyRuns.Tiny.Select(argument => argument is "20" or "12" ? "1000" : argument is "8" ? "2000000000" : argument)];
        AssertFinite(CommandLine.Json(["search", .. large, "--epochs", "1", "--out", runs.NewPath("large")]).GetProperty("train_loss"));
    }

    private static void AssertScores(JsonElement scored, int images)
    {
        AssertFinite(scored.GetProperty("loss"));
        var correct = scored.GetProperty("accuracy").GetDouble() * images;
        Assert.InRange(correct, 0, images);
        Assert.Equal(Math.Round(correct), correct, 1e-9);
    }

    private static void AssertFinite(JsonElement loss) => Assert.InRange(loss.GetDouble(), 0, 1000);

    private static void AssertGenotype(JsonElement result, string folder, string run)
    {
        var genotype = result.GetProperty("genotype").GetString()!;
        Assert.Matches(@"^Genotype\(normal=\[(\('\w+', \d\)(, )?){8}\], normal_concat=range\(2, 6\), reduce=\[(\('\w+', \d\)(, )?){8}\], " +
            @"reduce_concat=range\(2, 6\)\)$", genotype);
        Assert.Equal(genotype + "\n", File.ReadAllText(Path.Combine(folder, "genotype.txt")));
        Assert.Equal(genotype + "\n", File.ReadAllText(Path.Combine(run, "genotype.txt")));
    }
}
