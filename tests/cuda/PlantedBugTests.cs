using System.Text;
using System.Text.RegularExpressions;
using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Tests.Cuda;

/// <summary>
/// The kernels that ship, each with one small mistake: the emulated device must find it, and name the kernel, the line of its PTX, the block and
/// the thread. Without the mistake the same call goes through.
/// </summary>
public sealed partial class PlantedBugTests
{
    private const string Product = "    product.add(z, l.tiles.width_shift, w, kDepth);\n  }\n\n  const bool aligned = (l.a.out_channels";
    private const string Fused = "depthwise_pointwise", FusedForward = "depthwise_pointwise_forward_k3_s1_c16";

    private static readonly Dictionary<string, Bug> Bugs = new()
    {
        ["a missing barrier between the depthwise tile and its product"] = new(
            Fused, FusedForward, "shared-memory race", "ld.shared",
            [new("depthwise_pointwise.cu", $"    barrier();\n{Product}", Product)],
            DepthwisePointwiseForward),
        ["a tile that is stored beyond the image's edge"] = new(
            Fused, FusedForward, "race between blocks", "st.global",
            [new("depthwise_pointwise.cu", "    if (!place.holds(row, column)) continue;\n    valid |= 1u << i;\n    float* out", "    valid |= 1u << i;\n    float* out")],
            DepthwisePointwiseForward),
        ["an off-by-one at the last row of a tile's window"] = new(
            Fused, FusedForward, "out of bounds", "ld.global",
            [new("depthwise_pointwise.cu", "y >= 0 && y < height && x >= 0", "y >= 0 && y <= height && x >= 0")],
            DepthwisePointwiseForward),
        ["a missing barrier before a sum's memory is read"] = new(
            "batch_norm", "batch_norm_backward", "uninitialised read", "ld.shared",
            [new("channels.h", "    barrier();\n    if (thread.y + half < rows)", "    if (thread.y + half < rows)")],
            BatchNormBackward),
        ["a missing barrier before a sum's memory is used again"] = new(
            "batch_norm", "batch_norm_forward", "shared-memory race", "st.shared",
            [new("channels.h", "  barrier();  // the memory may now be used again\n", "")],
            BatchNormForward),
        ["a missing barrier after a tile was loaded"] = new(
            "linear", "linear_backward_input", "shared-memory race", "ld.shared",
            [new("linear.cu", "    pn::barrier();\n    for (int i", "    for (int i")],
            LinearBackward),
        ["a barrier that only some threads reach"] = new(
            "linear", "linear_backward_input", "barrier divergence", "bar",
            [new("linear.cu", "    pn::barrier();\n    for (int i", "    if (o < a.out_channels) pn::barrier();\n    for (int i")],
            LinearBackward),
        ["an off-by-one at the last row of a tile"] = new(
            "linear", "linear_backward_input", "out of bounds", "st.global",
            [new("linear.cu", "if (row < a.rows && k < a.in_channels) a.dx", "if (row <= a.rows && k < a.in_channels) a.dx")],
            LinearBackward),
        ["an off-by-one at the image's last row"] = new(
            "pools", "pool_3x3_forward", "out of bounds", "ld.global",
            [new("pooled_column.h", "iy_ < shape_.height", "iy_ <= shape_.height")],
            PoolForward),
        ["an off-by-one at the image's last column"] = new(
            "pools", "pool_3x3_forward", "out of bounds", "ld.global",
            [new("pooled_column.h", "ox * shape.stride + 1 < shape.width", "ox * shape.stride + 1 <= shape.width")],
            PoolForward),
        ["a row of threads too many in a sum"] = new(
            "batch_norm", "batch_norm_backward", "uninitialised read", "ld.shared",
            [new("channels.h", "if (thread.y + half < rows)", "if (thread.y + half <= rows)")],
            BatchNormBackward),
        ["a partial sum too many"] = new(
            "optimisers", "sgd_norm", "out of bounds", "ld.global",
            [new("optimisers.cu", "i < chunks; i += pn::kFlatThreads", "i <= chunks; i += pn::kFlatThreads")],
            SgdStep),
        ["a partial sum that nobody wrote"] = new(
            "optimisers", "sgd_sum_squares", "uninitialised read", "ld.global",
            [new("optimisers.cu", "a.squares[pn::block_index().x] = total", "a.squares[pn::block_index().x] += total")],
            SgdStep),
        ["a gradient that two blocks add to"] = new(
            "mixed_sum", "mixed_sum_weight_gradients", "race between blocks", "ld.global",
            [new("mixed_sum.cu", "    if (a.terms[t].weight_index == index) return;", "    if (a.terms[t].weight_index < 0) return;")],
            MixedSumBackward),
        ["a partial sum in its neighbour's place"] = new(
            "optimisers", "sgd_sum_squares", "race between blocks", "st.global",
            [new("optimisers.cu", "a.squares[pn::block_index().x] = total", "a.squares[pn::block_index().x / 2] = total")],
            SgdStep),
        ["a result that another block writes"] = new(
            "optimisers", "adam_step", "race between blocks", "ld.global",
            [new("optimisers.cu", "pn::load<W>(a.first_moment + i)", "pn::load<W>(a.first_moment + (i + pn::kChunk) % a.count)")],
            AdamStep),
        ["a missing fence before a block is counted"] = new(
            Fused, FusedForward, "race between blocks", "ld.global",
            [new("device.h", "  __nvvm_membar_gl();\n  barrier();\n  if", "  barrier();\n  if")],
            DepthwisePointwiseForward),
        ["a missing fence behind the count of blocks"] = new(
            Fused, FusedForward, "race between blocks", "ld.global",
            [new("device.h", "  barrier();\n  __nvvm_membar_gl();\n", "  barrier();\n")],
            DepthwisePointwiseForward),
        ["an access of 16 bytes off its boundary"] = new(
            "optimisers", "adam_step", "misaligned", "ld.global",
            [new("flat.h", "f(Width<4>(), begin + i)", "f(Width<4>(), begin + i + 1)")],
            AdamStep),
    };

    public static TheoryData<string> Names() => [.. Bugs.Keys];

    [EmulatedCudaTheory]
    [MemberData(nameof(Names))]
    public void Is_found_and_named(string name)
    {
        var bug = Bugs[name];
        using (var backend = new CudaBackend(DeviceKind.CudaEmulated))
        {
            using var memory = new Memory(backend);
            bug.Run(backend, memory);
        }
        var ptx = PlantedKernels.Compile(bug.Operator, bug.Edits);
        try
        {
            using var backend = new CudaBackend(DeviceKind.CudaEmulated);
            backend.Replace(bug.Kernel, ptx);
            using var memory = new Memory(backend);
            Assert.Throws<CudaException>(() => bug.Run(backend, memory));
            var fault = CudaEmulator.LastFault!;
            var place = Place().Match(fault);
            Assert.True(place.Success, fault);
            Assert.Equal(bug.Fault, place.Groups["fault"].Value);
            Assert.Equal(bug.Kernel, place.Groups["kernel"].Value);
            var line = Encoding.ASCII.GetString(ptx).Split('\n')[int.Parse(place.Groups["line"].Value) - 1];
            Assert.True(line.Contains(bug.Instruction, StringComparison.Ordinal), $"{fault}: that line is '{line.Trim()}'");
        }
        finally
        {
            CudaEmulator.Reset();
        }
    }

    [EmulatedCudaFact]
    public void An_uncoalesced_access_shows_in_the_efficiency()
    {
        const string file = "flat.h", before = "int i = 4 * thread; i < kChunk; i += 4 * kFlatThreads";
        const string neighboursForAThread = "int i = 16 * thread; i < 16 * thread + 16; i += 4";
        Assert.InRange(Count([]).GlobalEfficiency, 0.99, 1.01);
        Assert.InRange(Count([new(file, before, neighboursForAThread)]).GlobalEfficiency, 0, 0.51);

        EmulatedCounters Count(IReadOnlyList<PlantedKernels.Edit> edits)
        {
            using var backend = new CudaBackend(DeviceKind.CudaEmulated);
            backend.Replace("adam_step", PlantedKernels.Compile("optimisers", edits));
            using var memory = new Memory(backend);
            return CudaEmulator.Count(() => AdamStep(backend, memory))["adam_step"];
        }
    }

    [EmulatedCudaFact]
    public void A_bank_conflict_shows_in_the_counters()
    {
        const string tile = "float weight[pn::kTile][pn::kTile";
        Assert.InRange(Count([]).ConflictShare, 0, 0.05);
        Assert.InRange(Count([new("linear.cu", $"{tile} + 1]", $"{tile}]")]).ConflictShare, 0.5, 1);

        EmulatedCounters Count(IReadOnlyList<PlantedKernels.Edit> edits)
        {
            using var backend = new CudaBackend(DeviceKind.CudaEmulated);
            backend.Replace("linear_backward_input", PlantedKernels.Compile("linear", edits));
            using var memory = new Memory(backend);
            return CudaEmulator.Count(() => LinearBackward(backend, memory))["linear_backward_input"];
        }
    }

    [GeneratedRegex(@"^(?<fault>[^:]+): .+ \(kernel '(?<kernel>\w+)', PTX line (?<line>\d+), block \(\d+,\d+,\d+\), thread \(\d+,\d+,\d+\)\)$")]
    private static partial Regex Place();

    private static void DepthwisePointwiseForward(CudaBackend backend, Memory memory)
    {
        backend.DepthwisePointwiseForward(new()
        {
            X = memory.Floats(2 * 9 * 10 * 16),
            Depthwise = memory.Floats(3 * 3 * 16),
            Pointwise = memory.Floats(16 * 16),
            Y = memory.Floats(2 * 9 * 10 * 16),
            Statistics = memory.Floats(2 * 2 * 16),
            Variants = 1,
            Images = 2,
            Height = 9,
            Width = 10,
            InChannels = 16,
            OutChannels = 16,
            Kernel = 3,
            Stride = 1,
            Dilation = 1,
        });
        memory.Wait();
    }

    private static void BatchNormForward(CudaBackend backend, Memory memory)
    {
        backend.BatchNormForward(new()
        {
            Statistics = memory.Floats(16 * 2 * 16),
            Normalization = memory.Floats(4 * 16),
            Variants = 1,
            Images = 16,
            Pixels = 4,
            Channels = 16,
            Epsilon = 1e-5f,
        });
        memory.Wait();
    }

    private static void BatchNormBackward(CudaBackend backend, Memory memory)
    {
        backend.BatchNormBackward(new()
        {
            GradientSums = memory.Floats(8 * 2 * 16),
            Normalization = memory.Floats(4 * 16),
            Coefficients = memory.Floats(3 * 16),
            Images = 8,
            Pixels = 4,
            Channels = 16,
            Rows = 2,
            Row = 1,
            Training = 1,
        });
        memory.Wait();
    }

    private static void LinearBackward(CudaBackend backend, Memory memory)
    {
        backend.LinearBackward(new()
        {
            Weight = memory.Floats(16 * 20),
            G = memory.Floats(10 * 20),
            Dx = memory.Floats(10 * 16),
            Rows = 10,
            InChannels = 16,
            OutChannels = 20,
        });
        memory.Wait();
    }

    private static void PoolForward(CudaBackend backend, Memory memory)
    {
        backend.PoolForward(new()
        {
            X = memory.Floats(2 * 5 * 6 * 8),
            Y = new() { [Pooling.Avg3x3] = memory.Floats(2 * 5 * 6 * 8) },
            Statistics = new() { [Pooling.Avg3x3] = memory.Floats(2 * 2 * 8) },
            Variants = 1,
            Images = 2,
            Height = 5,
            Width = 6,
            Channels = 8,
            Stride = 1,
        });
        memory.Wait();
    }

    private static void SgdStep(CudaBackend backend, Memory memory)
    {
        const int count = 10_000;
        backend.SgdStep(new()
        {
            Parameters = memory.Floats(count),
            Gradients = memory.Floats(count),
            MomentumBuffer = memory.Floats(count),
            Norm = memory.Floats(2),
            Count = count,
            Rate = 0.1f,
        });
        memory.Wait();
    }

    private static void MixedSumBackward(CudaBackend backend, Memory memory)
    {
        TermArgs[] terms =
        [
            new() { Y = memory.Floats(2 * 4 * 8), Variants = 1, WeightIndex = 1 },
            new() { Y = memory.Floats(2 * 4 * 8), Variants = 1, WeightIndex = 1 },
        ];
        unsafe
        {
            fixed (TermArgs* first = terms)
                backend.MixedSumBackward(new()
                {
                    Terms = (nint)first,
                    G = memory.Floats(2 * 4 * 8),
                    WeightGradients = memory.Floats(2),
                    TermCount = terms.Length,
                    Variants = 1,
                    Images = 2,
                    Pixels = 4,
                    Channels = 8,
                    WeightStride = 2,
                });
        }
        memory.Wait();
    }

    private static void AdamStep(CudaBackend backend, Memory memory)
    {
        const int count = 8192;
        backend.AdamStep(new()
        {
            Parameters = memory.Floats(count),
            Gradients = memory.Floats(count),
            FirstMoment = memory.Floats(count),
            SecondMoment = memory.Floats(count),
            Count = count,
            Step = 1,
            Rate = 0.1f,
        });
        memory.Wait();
    }

    /// <param name="Operator">The file of kernels/cuda.</param>
    /// <param name="Kernel">The kernel that goes wrong.</param>
    /// <param name="Fault">What the emulated device calls it.</param>
    /// <param name="Instruction">What stands in the line of the PTX that is named.</param>
    /// <param name="Edits">The mistake.</param>
    /// <param name="Run">A call that runs into it.</param>
    private sealed record Bug(
        string Operator, string Kernel, string Fault, string Instruction, PlantedKernels.Edit[] Edits, Action<CudaBackend, Memory> Run);

    /// <summary>Arrays that end where their last element does, with nothing around them that an access too far would hit.</summary>
    private sealed class Memory(CudaBackend backend) : IDisposable
    {
        private readonly List<nint> _arrays = [];

        public nint Floats(int count)
        {
            _arrays.Add(backend.Allocate(count * sizeof(float)));
            return _arrays[^1];
        }

        /// <summary>Until everything issued has been done: only then is a fault known.</summary>
        public void Wait() => backend.Read(_arrays[0], new float[1]);

        public void Dispose() => _arrays.ForEach(backend.Free);
    }
}
