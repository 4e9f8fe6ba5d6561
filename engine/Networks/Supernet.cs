using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Operators;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Networks;

/// <summary>Extents of a supernet.</summary>
/// <param name="Channels">C of the first cells (the stem has 3 C).</param>
/// <param name="Layers">Number of cells.</param>
/// <param name="Classes">Number of classes.</param>
/// <param name="ImageSize">Height and width of the images.</param>
public sealed record SupernetSize(int Channels, int Layers, int Classes, int ImageSize);

/// <summary>
/// The DARTS supernet (Liu et al., ICLR 2019) over a search space: stem, cells of mixed operations, pooling head. Weights and alpha live
/// here; <see cref="Record"/> puts the network on a tape for a given batch size, set of decided edges and set of masked variants.
/// </summary>
public sealed class Supernet : IDisposable
{
    private const int StemMultiplier = 3;
    private const int InputChannels = 3;
    private const int MinimumVariants = 16;

    private readonly Backend _backend;
    private readonly Parameter _stemWeight, _classifierWeight, _classifierBias;
    private readonly BatchNormParameters _stemBatchNorm;
    private readonly Cell[] _cells;
    private readonly MixingTable[] _tables;

    public Supernet(Backend backend, SearchSpace space, SupernetSize size, long seed)
    {
        _backend = backend;
        (Space, Size) = (space, size);
        Parameters = new ParameterStore(backend);
        var stemChannels = StemMultiplier * size.Channels;
        _stemWeight = Parameters.AddWeight("stem.0.weight", stemChannels, InputChannels, 3, 3);
        _stemBatchNorm = Parameters.AddBatchNorm("stem.1", stemChannels, affine: true);

        _cells = new Cell[size.Layers];
        var (beforePrevious, previous, channels, reductionBefore) = (stemChannels, stemChannels, size.Channels, false);
        for (var i = 0; i < size.Layers; i++)
        {
            var type = CellTopology.IsReduction(i, size.Layers) ? CellType.Reduction : CellType.Normal;
            if (type == CellType.Reduction)
                channels *= 2;
            _cells[i] = new Cell(this, i, type, beforePrevious, previous, channels, reductionBefore, seed);
            (beforePrevious, previous, reductionBefore) = (previous, CellTopology.Nodes * channels, type == CellType.Reduction);
        }

        _classifierWeight = Parameters.AddWeight("classifier.weight", size.Classes, previous);
        _classifierBias = Parameters.AddBias("classifier.bias", size.Classes, previous);
        Parameters.Seal(seed);
        Alphas = new ArchitectureParameters(backend, space, seed);
        MaxVariants = Math.Max(MinimumVariants, 1 + Math.Max(space.Columns(CellType.Normal), space.Columns(CellType.Reduction)));
        _tables = [.. Enum.GetValues<CellType>().Select(type => new MixingTable(backend, CellTopology.Edges, space.Columns(type), MaxVariants))];
    }

    public Backend Backend => _backend;

    public SearchSpace Space { get; }

    public SupernetSize Size { get; }

    public ParameterStore Parameters { get; }

    public ArchitectureParameters Alphas { get; }

    /// <summary>The most variants that one pass can evaluate.</summary>
    public int MaxVariants { get; }

    /// <summary>Position in the noise streams of the next forward pass; the caller moves it on.</summary>
    public ulong NoisePosition { get; set; }

    /// <summary>Test seam: gives the noise of (cell, edge) instead of drawing it.</summary>
    internal Func<int, int, Block>? NoiseOverride { get; set; }

    internal MixingTable Table(CellType type) => _tables[(int)type];

    /// <summary>
    /// Records the network on a tape. With masks [m_0, m_1, ...] variant v leaves out what m_v says; everything that no mask reaches is
    /// computed once for all variants. Operations that are left out of every variant are not recorded.
    /// </summary>
    public SupernetPass Record(Arena arena, TapeOptions options, int images, EdgeStates states, params IReadOnlyList<Mask> masks)
    {
        if (masks.Count == 0)
            masks = [Mask.None];
        if (masks.Count > MaxVariants)
            throw new ArgumentException($"at most {MaxVariants} variants in one pass, not {masks.Count}", nameof(masks));
        if (options.AnyGradients && masks.Count > 1)
            throw new ArgumentException("gradients are for one variant", nameof(masks));
        var tape = new Tape(_backend, arena, options);
        var input = new Shape(1, images, Size.ImageSize, Size.ImageSize, InputChannels);
        var imageBlock = tape.Allocate(input.Count);
        var labels = tape.AllocateBytes(images * sizeof(int));

        var raw = Convolution.Apply(tape, new Tensor(imageBlock, input), _stemWeight, Window.Square(3, 1, 1), _stemBatchNorm.Gamma!.Count,
            relu: false);
        var stem = MixedSum.Finish(tape, BatchNorm.Apply(tape, raw, _stemBatchNorm));
        IReadOnlyList<Tensor> beforePrevious = [stem], previous = [stem];
        Action? lastNode = null;
        foreach (var cell in _cells)
            (beforePrevious, (previous, lastNode)) = (previous, cell.Apply(tape, beforePrevious, previous, lastNode, states, masks));
        lastNode?.Invoke();

        var pooled = GlobalAveragePool.Apply(tape, previous);
        var logits = Linear.Apply(tape, pooled, _classifierWeight, _classifierBias, Size.Classes);
        var loss = new SoftmaxCrossEntropy(tape, logits, labels);
        tape.Plan(imageBlock, labels);
        return new SupernetPass(this, tape, imageBlock, labels, loss, states.Copy(), masks);
    }

    public void Dispose()
    {
        Parameters.Dispose();
        Alphas.Dispose();
        foreach (var table in _tables)
            table.Dispose();
    }

    /// <summary>A cell: two preprocessed inputs, 14 mixed edges, the four node sums as its (never concatenated) output.</summary>
    private sealed class Cell
    {
        private readonly Supernet _network;
        private readonly CellType _type;
        private readonly FactorizedReduction? _preprocess0Reduction;
        private readonly Preprocess? _preprocess0;
        private readonly Preprocess _preprocess1;
        private readonly CandidateOperation[][] _operations;

        public Cell(Supernet network, int index, CellType type, int beforePrevious, int previous, int channels, bool reductionBefore, long seed)
        {
            (_network, _type) = (network, type);
            var store = network.Parameters;
            var prefix = $"cells.{index}";
            if (reductionBefore)
                _preprocess0Reduction = new FactorizedReduction(store, prefix + ".preprocess0", beforePrevious, channels, affine: false);
            else
                _preprocess0 = new Preprocess(store, prefix + ".preprocess0", beforePrevious, channels, affine: false);
            _preprocess1 = new Preprocess(store, prefix + ".preprocess1", previous, channels, affine: false);
            _operations = new CandidateOperation[CellTopology.Edges][];
            for (var edge = 0; edge < CellTopology.Edges; edge++)
            {
                var (e, stride) = (edge, type == CellType.Reduction && CellTopology.SourceOf(edge) < 2 ? 2 : 1);
                var key = RandomStream.KeyOf(seed, $"noise/{prefix}.edges.{edge}");
                _operations[edge] = [.. network.Space.Operations(type)[edge].Select((name, o) => CandidateOperation.Create(name, store,
                    $"{prefix}._ops.{edge}._ops.{o}", channels, stride, derived: false, MakeNoise))];

                Tensor MakeNoise(Tape tape, Shape shape) => network.NoiseOverride is { } given
                    ? new Tensor(given(index, e), shape)
                    : Noise.Apply(tape, shape, key, () => network.NoisePosition);
            }
        }

        /// <summary>
        /// Records the cell. A node's sum waits for memory, so that it is recorded beside convolutions that do not need it: those of edges that lead
        /// from older values to later nodes, and for the last node those of the next cell that leave the output of the cell before.
        /// </summary>
        /// <param name="lastOfPrevious">Records the previous cell's last node, which is missing in `previous` until then; null: none is.</param>
        /// <returns>The nodes, and what records the last one.</returns>
        public (IReadOnlyList<Tensor> Nodes, Action LastNode) Apply(Tape tape, IReadOnlyList<Tensor> beforePrevious, IReadOnlyList<Tensor> previous,
            Action? lastOfPrevious, EdgeStates states, IReadOnlyList<Mask> masks)
        {
            var table = _network.Table(_type);
            var terms = new List<Term>[CellTopology.Nodes];
            for (var node = 0; node < CellTopology.Nodes; node++)
                terms[node] = [];
            var raw0 = _preprocess0Reduction?.Apply(tape, beforePrevious) ?? _preprocess0!.Apply(tape, beforePrevious);
            var input0 = MixedSum.Finish(tape, raw0);
            tape.RecordInWaves(
                () =>
                {
                    for (var node = 0; node < CellTopology.Nodes; node++)
                        RecordEdge(node, 0, input0);
                },
                lastOfPrevious);
            var input1 = MixedSum.Finish(tape, _preprocess1.Apply(tape, previous));
            var stride = _type == CellType.Reduction ? 2 : 1;
            var shape = input0.Shape.Strided(stride, input0.Shape.Channels) with { Variants = 1 };
            var nodes = new List<Tensor>();
            for (var node = 0; node < CellTopology.Nodes; node++)
            {
                // The edge from the newest value, then this node beside the next one's edges from older ones.
                var own = node;
                tape.RecordInWaves(() => RecordEdge(own, own + 1, SourceOf(own + 1)));
                if (node + 1 < CellTopology.Nodes)
                    tape.RecordInWaves(
                        () =>
                        {
                            for (var source = 1; source <= own + 1; source++)
                                RecordEdge(own + 1, source, SourceOf(source));
                        },
                        () => RecordNode(own));
            }
            return (nodes, () => RecordNode(CellTopology.Nodes - 1));

            Tensor SourceOf(int source) => source == 1 ? input1 : nodes[source - 2];

            void RecordEdge(int node, int source, Tensor x)
            {
                var edge = CellTopology.FirstEdge(node) + source;
                for (var o = 0; o < table.Operations; o++)
                {
                    var state = states[_type, edge];
                    if ((state != EdgeStates.Undecided && state != o) || masks.All(mask => mask.Covers(_type, edge, o)))
                        continue;
                    if (_operations[edge][o].Apply(tape, x) is { } value)
                        terms[node].Add(new Term(value, edge * table.Operations + o));
                }
            }

            void RecordNode(int node)
            {
                var varies = masks.Count > 1 && masks.Any(mask => mask.Cell == _type && mask.Edge >= 0 && CellTopology.NodeOf(mask.Edge) == node);
                var variants = varies ? masks.Count : terms[node].Select(term => term.Value.Shape.Variants).DefaultIfEmpty(1).Max();
                Term[] ordered = [.. terms[node].OrderBy(term => term.WeightIndex)];
                nodes.Add(MixedSum.Apply(tape, shape with { Variants = variants }, ordered, table));
            }
        }
    }
}

/// <summary>A supernet on a tape: write a batch, run it, read losses and gradients. Runs with the weights and alphas of the moment.</summary>
public sealed class SupernetPass
{
    private readonly Supernet _network;
    private readonly Tape _tape;
    private readonly Block _images, _labels;
    private readonly SoftmaxCrossEntropy _loss;
    private readonly EdgeStates _states;
    private readonly IReadOnlyList<Mask> _masks;

    // Mixing weights of one cell type for all variants.
    private readonly double[] _rows;

    internal SupernetPass(Supernet network, Tape tape, Block images, Block labels, SoftmaxCrossEntropy loss, EdgeStates states,
        IReadOnlyList<Mask> masks)
    {
        (_network, _tape, _images, _labels, _loss, _states, _masks) = (network, tape, images, labels, loss, states, masks);
        Images = loss.Logits.Shape.Images;
        _rows = new double[masks.Count * Math.Max(network.Table(CellType.Normal).Columns, network.Table(CellType.Reduction).Columns)];
    }

    /// <summary>Images per batch.</summary>
    public int Images { get; }

    public int Variants => _masks.Count;

    public Tape Tape => _tape;

    /// <summary>The loss; its logits have one variant where no mask reaches them.</summary>
    public SoftmaxCrossEntropy Loss => _loss;

    /// <summary>Runs forward. Images are normalised, NHWC; labels 0..classes-1.</summary>
    public void Forward(ReadOnlySpan<float> images, ReadOnlySpan<int> labels)
    {
        _tape.Reserve();
        _tape.Backend.Write(_images.Address, images);
        _tape.Backend.Write(_labels.Address, labels);
        foreach (var type in Enum.GetValues<CellType>())
            _network.Table(type).SetWeights(MixingRows(type));
        _tape.Forward();
    }

    /// <summary>
    /// Runs backward after a forward pass: weight gradients are left in the parameter store, alpha gradients in
    /// <see cref="ArchitectureParameters"/>, each only where the tape's options ask for them.
    /// </summary>
    public void Backward()
    {
        if (!_tape.Options.AlphaGradients)
        {
            _tape.Backward();
            return;
        }
        foreach (var type in Enum.GetValues<CellType>())
            _network.Table(type).ZeroGradients();
        _tape.Backward();
        foreach (var type in Enum.GetValues<CellType>())
        {
            var gradients = _rows.AsSpan(0, _network.Table(type).Columns);
            _network.Table(type).ReadGradients(gradients);
            _network.Alphas.SetGradients(type, gradients, _states);
        }
    }

    /// <summary>The sum of losses and the number of correct images of every variant.</summary>
    public void ReadResults(Span<double> lossSums, Span<long> correct)
    {
        var computed = _loss.Logits.Shape.Variants;
        _loss.ReadLossSums(_tape.Backend, lossSums[..computed]);
        _loss.ReadCorrectCounts(_tape.Backend, correct[..computed]);
        if (computed == 1)
        {
            lossSums[1..Variants].Fill(lossSums[0]);
            correct[1..Variants].Fill(correct[0]);
        }
    }

    /// <summary>For every variant and image of the batch: 1 where the largest logit is the label's, else 0.</summary>
    /// <param name="correct">[Variants, Images].</param>
    public void ReadCorrect(Span<int> correct)
    {
        var computed = _loss.Logits.Shape.Variants;
        _loss.ReadCorrect(_tape.Backend, correct[..(computed * Images)]);
        for (var v = computed; v < Variants; v++)
            correct[..Images].CopyTo(correct.Slice(v * Images, Images));
    }

    /// <summary>The mixing weights of every variant: softmax(alpha), one-hot where decided, zero where removed or masked.</summary>
    private ReadOnlySpan<double> MixingRows(CellType type)
    {
        var columns = _network.Table(type).Columns;
        var operations = _network.Table(type).Operations;
        var first = _rows.AsSpan(0, columns);
        _network.Alphas.Softmax(type, first);
        for (var edge = 0; edge < CellTopology.Edges; edge++)
        {
            var state = _states[type, edge];
            for (var o = 0; o < operations && state != EdgeStates.Undecided; o++)
                first[edge * operations + o] = state == o ? 1 : 0;
        }
        // From the last variant, so that the first row is there to copy until its own masks are applied.
        for (var v = _masks.Count - 1; v >= 0; v--)
        {
            for (var column = 0; column < columns; column++)
                _rows[v * columns + column] = _masks[v].Covers(type, column / operations, column % operations) ? 0 : first[column];
        }
        return _rows.AsSpan(0, _masks.Count * columns);
    }
}
