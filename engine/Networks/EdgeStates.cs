using PerturbNas.Spaces;

namespace PerturbNas.Networks;

/// <summary>
/// What selection has decided so far, per edge of each cell type: nothing (<see cref="Undecided"/>, the edge is mixed), an operation's index
/// (the edge is just that operation), or <see cref="Removed"/>.
/// </summary>
public sealed class EdgeStates
{
    public const int Undecided = -1;
    public const int Removed = -2;

    private readonly int[][] _states =
    [
        [.. Enumerable.Repeat(Undecided, CellTopology.Edges)],
        [.. Enumerable.Repeat(Undecided, CellTopology.Edges)],
    ];

    public int this[CellType type, int edge]
    {
        get => _states[(int)type][edge];
        set => _states[(int)type][edge] = value;
    }

    public EdgeStates Copy()
    {
        var copy = new EdgeStates();
        for (var type = 0; type < 2; type++)
            _states[type].CopyTo(copy._states[type], 0);
        return copy;
    }
}

/// <summary>
/// What a candidate leaves out: one operation of an edge (its softmax weight becomes zero, the others stay, without renormalising), or the
/// whole edge (<paramref name="Operation"/> = <see cref="WholeEdge"/>). Edge -1: nothing.
/// </summary>
public readonly record struct Mask(CellType Cell, int Edge, int Operation)
{
    public const int WholeEdge = -1;

    /// <summary>The unmasked network.</summary>
    public static Mask None { get; } = new(CellType.Normal, -1, WholeEdge);

    public bool Covers(CellType cell, int edge, int operation) =>
        Edge == edge && Edge >= 0 && Cell == cell && (Operation == operation || Operation == WholeEdge);
}
