using System.Runtime.InteropServices;
using PerturbNas.Backends;
using PerturbNas.Backends.Planning;
using PerturbNas.Tensors;

namespace PerturbNas.Autograd;

/// <summary>How batch norm behaves on a tape.</summary>
public enum BatchNormMode
{
    /// <summary>Statistics of the batch; running statistics are updated.</summary>
    Training,

    /// <summary>Statistics of the batch; running statistics are left alone (selection).</summary>
    BatchStatistics,

    /// <summary>Running statistics.</summary>
    Evaluation,
}

/// <summary>What a tape computes; nothing that is not asked for is computed.</summary>
public sealed record TapeOptions(BatchNormMode BatchNorm, bool WeightGradients = false, bool AlphaGradients = false)
{
    public bool AnyGradients => WeightGradients || AlphaGradients;

    /// <summary>Test seam: false gives every block a place of its own.</summary>
    internal bool ReuseMemory { get; init; } = true;
}

/// <summary>An operator recorded on a tape: its forward and backward computation, and the memory that each uses.</summary>
public abstract class Operator
{
    /// <summary>The operator's name, the same as in kernels/.</summary>
    public abstract string Name { get; }

    /// <summary>How many other operators of the same node must have run before: operators of one wave do not need one another.</summary>
    internal int Wave { get; init; }

    /// <summary>Whether forward and backward are kernels that work image by image (see <see cref="Backend.BeginGroup"/>).</summary>
    internal virtual bool IsPerImage => false;

    /// <summary>Whether <see cref="Forward"/> issues the same calls with the same arguments every time, as long as the blocks stay where they are.</summary>
    internal virtual bool IsFixed => true;

    public abstract void Forward(Backend backend);

    /// <summary>
    /// Whether <see cref="Backward"/> has anything to do: a consumer has asked for a gradient of the output. Known once the consumers have been
    /// planned; where selection has left a value without consumers, there is none.
    /// </summary>
    internal virtual bool NeedsBackward => false;

    /// <summary>Called once, consumers before producers: asks the inputs for gradient memory.</summary>
    internal virtual void PlanBackward(Tape tape)
    {
    }

    public virtual void Backward(Backend backend)
    {
    }

    /// <summary>Every block that <see cref="Forward"/> reads or writes.</summary>
    internal abstract IEnumerable<Block?> ForwardBlocks();

    /// <summary>Every block that <see cref="Backward"/> reads or writes.</summary>
    internal virtual IEnumerable<Block?> BackwardBlocks() => [];
}

/// <summary>
/// The autograd tape: operators are recorded once for given shapes, memory is planned from the life of every block, and then the tape
/// is replayed for every batch, without allocating. Backward visits the operators in reverse and computes only the gradients
/// asked for in <see cref="TapeOptions"/>.
/// </summary>
public sealed class Tape(Backend backend, Arena arena, TapeOptions options)
{
    private const long Alignment = 64, Gap = 65 * Alignment;
    private readonly List<Operator> _operators = [];
    private readonly List<Group> _groups = [];
    private readonly List<Block> _blocks = [];

    // What forward and backward consist of, made anew when the arena has moved; a backend may keep what a fixed stretch issued.
    private List<Stretch> _forward = [], _backward = [];
    private nint _stretchesBase = -1;

    public Backend Backend => backend;

    public TapeOptions Options => options;

    public IReadOnlyList<Operator> Operators => _operators;

    /// <summary>Bytes of arena that the plan needs: known before anything runs.</summary>
    public long PlannedBytes { get; private set; }

    /// <summary>The least that one <see cref="Forward"/> has to do.</summary>
    public Cost ForwardCost => _operators.Aggregate(default(Cost), (sum, operation) => sum + CostOf(operation, backward: false));

    /// <summary>The least that one <see cref="Backward"/> has to do: only what the options ask for.</summary>
    public Cost BackwardCost => _operators.Aggregate(default(Cost), (sum, operation) => sum + CostOf(operation, backward: true));

    internal Block Allocate(long elements) => AllocateBytes(elements * backend.ElementSize);

    internal Block AllocateBytes(long bytes)
    {
        var block = new Block(arena, bytes);
        _blocks.Add(block);
        return block;
    }

    internal void Record(Operator operation)
    {
        _groups.Add(new Group(_operators.Count, _operators.Count, _operators.Count + 1));
        _operators.Add(operation);
    }

    /// <summary>
    /// Records the operators of some edges and brings them into waves: all edges' first convolutions and pools, their batch norms, the second
    /// convolutions, their batch norms. Each wave is run as one group. What `beside` records (a mixed sum of other edges) is in one group with the
    /// first wave, in both directions: the one waits for memory, the others compute.
    /// </summary>
    internal void RecordInWaves(Action record, Action? beside = null)
    {
        var besides = Take(beside);
        foreach (var wave in Take(record).GroupBy(operation => operation.Wave).OrderBy(wave => wave.Key))
        {
            foreach (var operation in wave.Where(operation => !operation.IsFixed))
                Record(operation);
            // What does not work image by image would cut the group in two.
            AddGroup([], wave.Where(operation => operation is { IsFixed: true, IsPerImage: false }));
            if (AddGroup(besides, wave.Where(operation => operation.IsPerImage)))
                besides = [];
        }
        besides.ForEach(Record);

        bool AddGroup(List<Operator> beside, IEnumerable<Operator> operators)
        {
            List<Operator> group = [.. operators];
            if (group.Count == 0)
                return false;
            _groups.Add(new Group(_operators.Count, _operators.Count + beside.Count, _operators.Count + beside.Count + group.Count));
            _operators.AddRange(beside);
            _operators.AddRange(group);
            return true;
        }

        List<Operator> Take(Action? action)
        {
            var (first, firstGroup) = (_operators.Count, _groups.Count);
            action?.Invoke();
            var taken = _operators[first..];
            _operators.RemoveRange(first, taken.Count);
            _groups.RemoveRange(firstGroup, _groups.Count - firstGroup);
            return taken;
        }
    }

    /// <summary>Closes the recording: plans the backward pass and lays the blocks out. <paramref name="inputs"/> are written before Forward.</summary>
    public void Plan(params ReadOnlySpan<Block> inputs)
    {
        foreach (var input in inputs)
            Use(input, 0);
        // The operators of a group run side by side: a block that one of them uses is taken for the whole group.
        var end = 2 * _groups.Count;
        for (var group = 0; group < _groups.Count; group++)
            foreach (var operation in OperatorsOf(_groups[group]))
                foreach (var block in operation.ForwardBlocks())
                    Use(block, group);
        for (var group = _groups.Count - 1; group >= 0 && options.AnyGradients; group--)
        {
            var operators = OperatorsOf(_groups[group]);
            for (var i = operators.Length - 1; i >= 0; i--)
            {
                if (!operators[i].NeedsBackward)
                    continue;
                operators[i].PlanBackward(this);
                foreach (var block in operators[i].BackwardBlocks())
                    Use(block, end - 1 - group);
            }
        }
        LayOut();

        static void Use(Block? block, int time)
        {
            if (block is not { Planned: true })
                return;
            block.FirstUse = Math.Min(block.FirstUse, time);
            block.LastUse = Math.Max(block.LastUse, time);
        }
    }

    /// <summary>Keeps a block alive to the end, so that it can be read after the last operator.</summary>
    internal void Keep(Block block)
    {
        block.LastUse = int.MaxValue;
        block.FirstUse = 0;
    }

    public void Forward()
    {
        Reserve();
        foreach (var stretch in _forward)
            Run(stretch);
    }

    /// <summary>Gradients of the loss of the last <see cref="Forward"/>.</summary>
    public void Backward()
    {
        foreach (var stretch in _backward)
            Run(stretch);
    }

    private ReadOnlySpan<Operator> OperatorsOf(Group group) => CollectionsMarshal.AsSpan(_operators)[group.First..group.End];

    /// <summary>The least that one operator of this tape has to do in one of the passes.</summary>
    public Cost CostOf(Operator operation, bool backward)
    {
        // A block's address tells a result that is asked for from one that is not, so the blocks need their places.
        Reserve();
        if (!backward)
            return MeteredBackend.CostOf(operation.Forward);
        return operation.NeedsBackward ? MeteredBackend.CostOf(operation.Backward) : default;
    }

    /// <summary>Makes sure that the arena holds this tape's plan, so that inputs can be written.</summary>
    public void Reserve()
    {
        arena.Reserve(PlannedBytes);
        if (arena.Base == _stretchesBase)
            return;
        _stretchesBase = arena.Base;
        _forward = [];
        for (var start = 0; start < _groups.Count;)
        {
            var (first, isFixed) = (start, IsFixed(start));
            while (start < _groups.Count && IsFixed(start) == isFixed)
                start++;
            var range = new Range(first, start);
            _forward.Add(new Stretch(isFixed, () => RunForward(range)));
        }
        _backward = [new Stretch(true, RunBackward)];
    }

    private bool IsFixed(int group)
    {
        foreach (var operation in OperatorsOf(_groups[group]))
            if (!operation.IsFixed)
                return false;
        return true;
    }

    private void Run(Stretch stretch)
    {
        if (stretch.IsFixed)
            backend.Replay(stretch, stretch.Work);
        else
            stretch.Work();
    }

    private void RunForward(Range groups)
    {
        foreach (var group in CollectionsMarshal.AsSpan(_groups)[groups])
        {
            backend.BeginGroup();
            foreach (var operation in OperatorsOf(group))
                operation.Forward(backend);
            backend.EndGroup();
        }
    }

    private void RunBackward()
    {
        for (var i = _groups.Count - 1; i >= 0; i--)
        {
            backend.BeginGroup();
            var operators = OperatorsOf(_groups[i]);
            var beside = _groups[i].Middle - _groups[i].First;
            foreach (var operation in operators[..beside])
                if (operation.NeedsBackward)
                    operation.Backward(backend);
            for (var k = operators.Length - 1; k >= beside; k--)
                if (operators[k].NeedsBackward)
                    operators[k].Backward(backend);
            backend.EndGroup();
        }
    }

    /// <summary>Places blocks, those of the longest life first, each at the lowest address that is free for its whole life.</summary>
    private void LayOut()
    {
        var used = _blocks.Where(block => block.LastUse >= 0).ToList();
        used.Sort((a, b) =>
        {
            var byBytes = b.Bytes.CompareTo(a.Bytes);
            return byBytes != 0 ? byBytes : a.FirstUse.CompareTo(b.FirstUse);
        });
        var placed = new List<Block>(used.Count); // ordered by offset
        foreach (var block in used)
        {
            long offset = 0;
            foreach (var other in placed)
            {
                if (options.ReuseMemory && (other.LastUse < block.FirstUse || block.LastUse < other.FirstUse))
                    continue;
                if (other.Offset >= offset + Room(block))
                    break;
                offset = Math.Max(offset, other.Offset + Room(other));
            }
            block.Offset = offset;
            var at = placed.FindIndex(other => other.Offset > offset);
            placed.Insert(at < 0 ? placed.Count : at, block);
            PlannedBytes = Math.Max(PlannedBytes, offset + Room(block));
        }
    }

    /// <summary>
    /// Bytes that a block takes. Many tensors of one extent are read in step; without the gap the same pixels of all of them would compete for the
    /// same few places of a processor's caches, which are assigned by the address modulo some 64 KiB.
    /// </summary>
    private static long Room(Block block) => (block.Bytes + Alignment - 1) / Alignment * Alignment + (block.Bytes < Gap ? 0 : Gap);

    /// <summary>Operators First..End-1, which run side by side; those from First to Middle - 1 come first in backward, too.</summary>
    private readonly record struct Group(int First, int Middle, int End);

    /// <summary>Consecutive work of a pass: fixed, or with arguments that change from batch to batch (noise).</summary>
    private sealed class Stretch(bool isFixed, Action work)
    {
        public bool IsFixed => isFixed;

        public Action Work => work;
    }
}
