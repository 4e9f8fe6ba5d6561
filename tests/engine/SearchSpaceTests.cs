using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Tests.Data;

namespace PerturbNas.Tests.Engine;

/// <summary>The built-in spaces and those from files.</summary>
public sealed class SearchSpaceTests
{
    private const string Edge = """["skip_connect", "none"]""";

    [Fact]
    public void S1IsThePapersTable()
    {
        var space = SearchSpace.Load("s1");
        Assert.Equal(["skip_connect", "dil_conv_3x3"], space.Normal[0]);
        Assert.Equal(["skip_connect", "dil_conv_5x5"], space.Normal[2]);
        Assert.Equal(["max_pool_3x3", "skip_connect"], space.Normal[5]);
        Assert.Equal(["skip_connect", "sep_conv_3x3"], space.Normal[9]);
        Assert.Equal(["dil_conv_3x3", "dil_conv_5x5"], space.Normal[13]);
        Assert.Equal(["max_pool_3x3", "avg_pool_3x3"], space.Reduction[0]);
        Assert.Equal(["max_pool_3x3", "dil_conv_3x3"], space.Reduction[1]);
        Assert.Equal(["max_pool_3x3", "sep_conv_3x3"], space.Reduction[6]);
        Assert.Equal(["skip_connect", "dil_conv_3x3"], space.Reduction[7]);
        Assert.Equal(["skip_connect", "dil_conv_5x5"], space.Reduction[13]);
    }

    [Fact]
    public void BuiltInSpacesHaveTheirOperations()
    {
        string[] s5 = ["max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"];
        var expected = new Dictionary<string, string[]>
        {
            ["s2"] = ["skip_connect", "sep_conv_3x3"],
            ["s3"] = ["none", "skip_connect", "sep_conv_3x3"],
            ["s4"] = ["noise", "sep_conv_3x3"],
            ["s5"] = s5,
            ["darts"] = ["none", .. s5],
        };
        Assert.Equal(SearchSpace.BuiltIn, ["s1", .. expected.Keys]);
        foreach (var name in SearchSpace.BuiltIn)
        {
            var space = SearchSpace.Load(name);
            Assert.Equal(name, space.Name);
            foreach (var type in Enum.GetValues<CellType>())
            {
                Assert.Equal(CellTopology.Edges, space.Operations(type).Count);
                Assert.All(space.Operations(type), edge => Assert.Equal(name == "s1" ? edge : expected[name], edge));
                Assert.All(space.Operations(type), edge => Assert.Subset(CandidateOperation.Names.ToHashSet(), edge.ToHashSet()));
            }
            Assert.Equal(space.ToJson(), SearchSpace.Parse(space.ToJson(), "copy").ToJson());
        }
    }

    [Fact]
    public void FilesAreRead()
    {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["space.json"], """{"name": "mine", "operations": ["sep_conv_7x7", "conv_7x1_1x7", "none"]}""");
        var space = SearchSpace.Load(folder["space.json"]);
        Assert.Equal("mine", space.Name);
        Assert.Equal(3, space.Columns(CellType.Reduction));
        Assert.All(space.Normal, edge => Assert.Equal(["sep_conv_7x7", "conv_7x1_1x7", "none"], edge));

        // The two tables may differ in their number of candidates.
        var tables = SearchSpace.Parse($$"""{"normal": {{Table(Edge)}}, "reduction": {{Table("""["noise"]""")}}}""", "test");
        Assert.Equal(("custom", 2, 1), (tables.Name, tables.Columns(CellType.Normal), tables.Columns(CellType.Reduction)));
    }

    public static TheoryData<string, string> Mistakes => new()
    {
        { "{", "not valid JSON" },
        { "[]", "must be a JSON object" },
        { "{}", "needs either 'operations' or both 'normal' and 'reduction'; 'normal' is missing" },
        { $$"""{"normal": {{Table(Edge)}}}""", "'reduction' is missing" },
        { """{"operations": []}""", "'operations' must be a list of at least one operation" },
        { """{"operations": "none"}""", "'operations' must be a list" },
        { """{"operations": ["none", "conv_9x9"]}""", "unknown operation 'conv_9x9' in 'operations'; known are none, noise" },
        { """{"operations": ["none", 3]}""", "unknown operation '3'" },
        { """{"operations": ["none", "noise", "none"]}""", "'operations' names 'none' twice" },
        { """{"name": 5, "operations": ["none"]}""", "'name' is not a text" },
        { $$"""{"normal": {{Table(Edge, 13)}}, "reduction": {{Table(Edge)}}}""", "'normal' has 13 edges, not 14" },
        { $$"""{"normal": {{Table(Edge)}}, "reduction": {{Table(Edge).Replace(Edge + "]", "[]]", StringComparison.Ordinal)}}}""",
            "'reduction[13]' must be a list of at least one operation" },
        { $$"""{"normal": {{Table(Edge).Replace(Edge + "]", """["noise"]]""", StringComparison.Ordinal)}}, "reduction": {{Table(Edge)}}}""",
            "'normal' has 2 candidates at edge 0 but 1 at edge 13" },
    };

    [Theory]
    [MemberData(nameof(Mistakes))]
    public void NamesWhatIsWrong(string json, string message)
    {
        var e = Assert.Throws<UserException>(() => SearchSpace.Parse(json, "my.json"));
        Assert.Contains(message, e.Message);
        Assert.Contains("my.json", e.Message);
    }

    [Fact]
    public void UnknownNameListsTheSpaces()
    {
        var e = Assert.Throws<UserException>(() => SearchSpace.Load("s6"));
        Assert.Contains("'s6'", e.Message);
        Assert.Contains("s1, s2, s3, s4, s5, darts", e.Message);
    }

    private static string Table(string edge, int edges = CellTopology.Edges) => $"[{string.Join(", ", Enumerable.Repeat(edge, edges))}]";
}
