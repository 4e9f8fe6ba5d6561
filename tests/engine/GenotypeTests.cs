using PerturbNas.Networks;

namespace PerturbNas.Tests.Engine;

/// <summary>The text form of genotypes, as the field's programs write it.</summary>
public sealed class GenotypeTests
{
    private const string Text =
        "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1), ('max_pool_3x3', 0), ('dil_conv_3x3', 2), ('sep_conv_5x5', 1), " +
        "('avg_pool_3x3', 3), ('dil_conv_5x5', 2), ('skip_connect', 4)], normal_concat=range(2, 6), reduce=[('max_pool_3x3', 0), " +
        "('skip_connect', 1), ('avg_pool_3x3', 1), ('sep_conv_3x3', 2), ('dil_conv_5x5', 0), ('sep_conv_5x5', 3), ('skip_connect', 0), " +
        "('dil_conv_3x3', 1)], reduce_concat=range(2, 6))";

    [Fact]
    public void ParsesAndWritesTheSameText()
    {
        var genotype = Genotype.Parse(Text);
        Assert.Equal(Text, genotype.ToString());
        Assert.Equal(8, genotype.Normal.Count);
        Assert.Equal(new GenotypeEdge("avg_pool_3x3", 3), genotype.Normal[5]);
        Assert.Equal(new GenotypeEdge("dil_conv_3x3", 1), genotype.Reduction[7]);
    }

    [Fact]
    public void ParsesOtherSpellings()
    {
        var spelling = "  " + Text.Replace("range(2, 6)", "[2, 3, 4, 5]").Replace('\'', '"').Replace("normal=[", "normal = [ ") + "\n";
        Assert.Equal(Text, Genotype.Parse(spelling).ToString());
        Assert.Equal(Text, Genotype.Parse(Text.Replace("range(2, 6)", "range(2,6)").Replace("', ", "',")).ToString());
    }

    [Theory]
    [InlineData("Genotype(", "Cell(", "is not a genotype")]
    [InlineData("range(2, 6)", "range(2, 5)", "is not a genotype")]
    [InlineData("('dil_conv_3x3', 2), ", "", "has 8 edges, not 7")]
    [InlineData("dil_conv_5x5", "conv_9x9", "Unknown operation 'conv_9x9'")]
    [InlineData("('skip_connect', 4)", "('skip_connect', 5)", "Edge 7 of a genotype reads source 5, but node 3 can only read 0..4")]
    [InlineData("('skip_connect', 4)", "('skip_connect', 99999999999)", "has 8 edges, not 7")]
    [InlineData("('skip_connect', 1), ('max", "'skip_connect', 1), ('max", "has 8 edges, not 7")]
    public void NamesWhatIsWrong(string right, string wrong, string message)
    {
        Assert.Contains(right, Text);
        var e = Assert.Throws<UserException>(() => Genotype.Parse(Text.Replace(right, wrong, StringComparison.Ordinal)));
        Assert.Contains(message, e.Message);
    }
}
