namespace PerturbNas.Spaces;

/// <summary>The two cell types; each has its own alpha table.</summary>
public enum CellType
{
    Normal,
    Reduction,
}

/// <summary>
/// The DARTS cell: 2 input nodes and 4 intermediate nodes. Intermediate node i has i + 2 incoming edges, one from each source before it
/// (0 and 1: the cell's inputs, 2 + j: intermediate node j). The 14 edges are numbered node by node, within a node by source.
/// </summary>
public static class CellTopology
{
    public const int Nodes = 4;
    public const int Edges = 14;

    /// <summary>Number of the first edge into intermediate node <paramref name="node"/>.</summary>
    public static int FirstEdge(int node) => node * (node + 3) / 2;

    public static int EdgeCount(int node) => node + 2;

    /// <summary>The intermediate node that an edge leads into.</summary>
    public static int NodeOf(int edge)
    {
        var node = 0;
        while (node + 1 < Nodes && FirstEdge(node + 1) <= edge)
            node++;
        return node;
    }

    /// <summary>The source that an edge comes from.</summary>
    public static int SourceOf(int edge) => edge - FirstEdge(NodeOf(edge));

    /// <summary>Whether cell <paramref name="cell"/> of <paramref name="layers"/> is a reduction cell (at one and two thirds of the depth).</summary>
    public static bool IsReduction(int cell, int layers) => cell == layers / 3 || cell == 2 * layers / 3;

    /// <summary>The name in files and JSON: "normal" or "reduction".</summary>
    public static string NameOf(CellType type) => type == CellType.Normal ? "normal" : "reduction";
}
