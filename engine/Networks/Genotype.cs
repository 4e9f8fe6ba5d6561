using System.Text;
using System.Text.RegularExpressions;
using PerturbNas.Spaces;

namespace PerturbNas.Networks;

/// <summary>One surviving edge of a node: the operation and the source that it reads.</summary>
public readonly record struct GenotypeEdge(string Operation, int Source);

/// <summary>
/// The chosen architecture: per cell type two edges for each of the four intermediate nodes, in node order. Its text form is the field's,
/// so that it can be pasted from and into the reference code.
/// </summary>
public sealed partial record Genotype(IReadOnlyList<GenotypeEdge> Normal, IReadOnlyList<GenotypeEdge> Reduction)
{
    public IReadOnlyList<GenotypeEdge> Edges(CellType type) => type == CellType.Normal ? Normal : Reduction;

    public override string ToString()
    {
        var text = new StringBuilder("Genotype(normal=");
        Append(Normal);
        text.Append(", normal_concat=range(2, 6), reduce=");
        Append(Reduction);
        return text.Append(", reduce_concat=range(2, 6))").ToString();

        void Append(IReadOnlyList<GenotypeEdge> edges) =>
            text.Append('[').AppendJoin(", ", edges.Select(edge => $"('{edge.Operation}', {edge.Source})")).Append(']');
    }

    /// <summary>Reads the text form.</summary>
    /// <exception cref="UserException">The text is not a genotype.</exception>
    public static Genotype Parse(string text)
    {
        var match = Form().Match(text.Trim());
        if (!match.Success)
            throw new UserException($"'{text.Trim()}' is not a genotype; expected Genotype(normal=[('sep_conv_3x3', 0), ...], " +
                "normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6)).");
        return new Genotype(Edges(match.Groups["normal"].Value), Edges(match.Groups["reduce"].Value));

        static List<GenotypeEdge> Edges(string list)
        {
            var edges = Pair().Matches(list).Select(pair => new GenotypeEdge(pair.Groups[1].Value, int.Parse(pair.Groups[2].Value))).ToList();
            if (edges.Count != 2 * CellTopology.Nodes)
                throw new UserException($"A genotype's cell has {2 * CellTopology.Nodes} edges, not {edges.Count}: {list}");
            for (var i = 0; i < edges.Count; i++)
            {
                if (!CandidateOperation.Names.Contains(edges[i].Operation))
                    throw new UserException($"Unknown operation '{edges[i].Operation}' in a genotype; known are " +
                        $"{string.Join(", ", CandidateOperation.Names)}.");
                if (edges[i].Source >= 2 + i / 2)
                    throw new UserException($"Edge {i} of a genotype reads source {edges[i].Source}, but node {i / 2} can only read 0..{1 + i / 2}.");
            }
            return edges;
        }
    }

    [GeneratedRegex(@"^Genotype\(\s*normal\s*=\s*\[(?<normal>[^\]]*)\]\s*,\s*normal_concat\s*=\s*(range\(2,\s*6\)|\[2, 3, 4, 5\])\s*,\s*" +
        @"reduce\s*=\s*\[(?<reduce>[^\]]*)\]\s*,\s*reduce_concat\s*=\s*(range\(2,\s*6\)|\[2, 3, 4, 5\])\s*\)$")]
    private static partial Regex Form();

    [GeneratedRegex(@"\(\s*['""](\w+)['""]\s*,\s*(\d{1,9})\s*\)")]
    private static partial Regex Pair();
}
