namespace PerturbNas.Benchmarks;

/// <summary>The work of a kernel as a request to a peer; peer/operators.py says what the fields mean.</summary>
internal sealed record PeerOperator(string Operator, int Batch, int Side, int Channels, int Stride = 1, int Kernel = 3, int Dilation = 1,
    int Parts = 1, int Out = 0, int Terms = 0, bool Relu = true)
{
    public string Pass { get; init; } = "forward";
}
