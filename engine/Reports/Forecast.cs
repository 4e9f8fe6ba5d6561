using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Backends.Planning;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Reports;

/// <summary>Peak memory of a run, in bytes, by what takes it.</summary>
/// <param name="Tapes">Activations and their gradients: the arena, as large as the largest tape.</param>
/// <param name="Parameters">Weights, architecture parameters, their gradients and the state of the optimisers.</param>
/// <param name="Data">The images and the batches made of them.</param>
/// <param name="Checkpoint">The copies that are made to write a checkpoint.</param>
/// <param name="Program">The program itself.</param>
public sealed record MemoryForecast(long Tapes, long Parameters, long Data, long Checkpoint, long Program)
{
    public long Total => Tapes + Parameters + Data + Checkpoint + Program;

    /// <summary>What lies in the memory of a device that has its own.</summary>
    public long OnDevice => Tapes + Parameters;
}

/// <summary>A piece of a run: "alpha step", "search", ...</summary>
public sealed record PhaseForecast(string Name, Workload Work);

/// <summary>
/// What a search or a selection will take, known before it starts: the engine's own code runs on a backend that computes nothing and
/// counts. Memory, and the work of every step, are exact; of a selection's work it is estimated how it falls as edges are decided
/// (linearly), each decided edge keeping the candidate that costs most.
/// </summary>
public sealed class Forecast
{
    /// <summary>
    /// Share of the machine's limits that time estimates assume for a whole step, kernels and what is between them: an assumption, `profile`
    /// shows what is reached.
    /// </summary>
    public const double Efficiency = 0.4;

    // Resident memory of everything else, measured: runtime, compiled code and the kernels' scratch memory; and per operator of the largest
    // tape the bookkeeping of the three tapes that a search has.
    private const long ProgramBytes = 52L << 20, OperatorBytes = 18 << 10;

    private readonly int _batch;

    private Forecast(int batch, MemoryForecast memory, IReadOnlyList<PhaseForecast> phases) => (_batch, Memory, Phases) = (batch, memory, phases);

    public MemoryForecast Memory { get; }

    /// <summary>The pieces, small ones first; the last one is all of it.</summary>
    public IReadOnlyList<PhaseForecast> Phases { get; }

    /// <summary>One line for whoever starts the run.</summary>
    public string Summary
    {
        get
        {
            var available = MachineMemory.Available() is { } bytes ? $" of {Size(bytes + Environment.WorkingSet)} available" : "";
            return $"forecast: {Size(Memory.Total)} of memory{available}; " +
                string.Join(", ", Phases.Select(phase => $"{phase.Name} {Amount(phase.Work.Total.Flops, "FLOP")}"));
        }
    }

    /// <summary>A search from its beginning to its end.</summary>
    /// <exception cref="UserException">The data cannot be found.</exception>
    public static Forecast OfSearch(SearchConfiguration configuration)
    {
        using var plan = new Plan(configuration, configuration.Batch, configuration.TrainLimit, configuration.ValidLimit);
        var undecided = new EdgeStates();
        var phases = new List<PhaseForecast>();
        var weightStep = plan.Step(alpha: false, plan.BatchOf(plan.Train), undecided);
        var epoch = plan.Epoch(plan.Train, weightStep, images => plan.Step(alpha: false, images, undecided));
        if (configuration.UpdatesAlpha)
        {
            var alphaStep = plan.Step(alpha: true, plan.BatchOf(plan.Validation), undecided);
            phases.Add(new PhaseForecast("alpha step", alphaStep));
            phases.Add(new PhaseForecast("weight step", weightStep));
            phases.Add(new PhaseForecast("search step", alphaStep + weightStep));
            // An epoch ends with the training half; alpha goes around its own half as often as that takes.
            var rounds = (double)plan.Steps(plan.Train) / plan.Steps(plan.Validation);
            epoch += rounds * plan.Epoch(plan.Validation, alphaStep, images => plan.Step(alpha: true, images, undecided));
        }
        else
        {
            phases.Add(new PhaseForecast("search step", weightStep));
        }
        phases.Add(new PhaseForecast("search", configuration.Epochs * epoch + plan.ScoreAll(undecided, [Mask.None])));
        return plan.Finish(phases);
    }

    /// <summary>A selection from its beginning to its end.</summary>
    /// <exception cref="UserException">The data cannot be found.</exception>
    public static Forecast OfSelection(SearchConfiguration search, SelectionConfiguration selection)
    {
        using var plan = new Plan(search, selection.Batch, selection.TrainLimit, selection.ValidLimit);
        var undecided = new EdgeStates();
        var decided = plan.Dearest();
        if (selection.By == "magnitude")
            return plan.Finish([new("selection", plan.ScoreAll(decided, [Mask.None]))]);

        var phases = new List<PhaseForecast>();
        var whole = plan.ScoreAll(decided, [Mask.None]);
        foreach (var type in Enum.GetValues<CellType>())
        {
            for (var node = 0; node < CellTopology.Nodes; node++)
            {
                // The edges of a node cost about the same, and what is left to compute falls with every round.
                var edge = CellTopology.FirstEdge(node);
                var masks = plan.Candidates(type, edge);
                var last = decided.Copy();
                last[type, edge] = EdgeStates.Undecided;
                var first = plan.ScoreAll(undecided, masks);
                whole += 0.5 * CellTopology.EdgeCount(node) * (first + plan.ScoreAll(last, masks));
                for (var left = CellTopology.EdgeCount(node); left > 2; left--)
                {
                    Mask[] edges = [.. Enumerable.Range(edge, left).Select(e => new Mask(type, e, Mask.WholeEdge))];
                    whole += plan.ScoreAll(decided, edges);
                }
                if (node == 0)
                    phases.Add(new PhaseForecast($"scoring of a {CellTopology.NameOf(type)} edge", first));
            }
        }
        const int operationRounds = PerturbationSelector.OperationRounds;
        const int tunedRounds = PerturbationSelector.Rounds - 1;
        var steps = (double)selection.TuneEpochs * plan.Steps(plan.Train);
        var (before, after) = (Step(undecided), Step(decided));
        phases.Add(new PhaseForecast("tuning step at first", before));
        // After round r of the operation rounds, r + 1 of them are decided; in the topology rounds all are.
        const double decidedRounds = (operationRounds + 1) / 2.0 + tunedRounds - operationRounds;
        whole += steps * (tunedRounds - decidedRounds) * before + steps * decidedRounds * after;
        phases.Add(new PhaseForecast("selection", whole));
        return plan.Finish(phases);

        Workload Step(EdgeStates states)
        {
            var weights = plan.Step(alpha: false, plan.BatchOf(plan.Train), states);
            return search.UpdatesAlpha ? plan.Step(alpha: true, plan.BatchOf(plan.Validation), states) + weights : weights;
        }
    }

    /// <summary>Refuses what this machine, or the backend's device, has no memory for.</summary>
    /// <exception cref="UserException">The forecast is above what is available.</exception>
    public void RequireMemory(Backend backend)
    {
        foreach (var (needed, available, where) in Needs(backend))
            Require(needed, available, where);
    }

    /// <summary>Whether this machine, or the backend's device, has the memory.</summary>
    public bool Fits(Backend backend) => Needs(backend).All(need => !(need.Bytes > need.Available));

    // What has to fit where; available null: not known.
    private IEnumerable<(long Bytes, long? Available, string Where)> Needs(Backend backend)
    {
        var machine = MachineMemory.Available() + Environment.WorkingSet;
        return backend.DeviceMemoryBytes is { } device
            ? [(Memory.OnDevice, device, $" on the device ({backend.Name})"), (Memory.Total - Memory.OnDevice, machine, "")]
            : [(Memory.Total, machine, "")];
    }

    internal void RequireMemory(long? available) => Require(Memory.Total, available, "");

    private void Require(long needed, long? available, string where)
    {
        if (needed > available)
            throw new UserException($"This needs about {Size(needed)} of memory{where}, but {Size(available.Value)} are available; " +
                $"take a smaller --batch (it is {_batch}) or fewer --channels, or make memory free.");
    }

    /// <summary>Memory: "1.23 GiB" or "45 MiB".</summary>
    public static string Size(long bytes) => bytes >= 1L << 30 ? $"{bytes / (double)(1L << 30):0.00} GiB" : $"{bytes / (double)(1L << 20):0} MiB";

    /// <summary>An amount with three digits and a decimal prefix: "42.1 GFLOP", "1.52 TB".</summary>
    public static string Amount(long amount, string unit)
    {
        var (scale, prefix) = amount switch { >= (long)1e15 => (1e15, "P"), >= (long)1e12 => (1e12, "T"), >= (long)1e9 => (1e9, "G"), _ => (1e6, "M") };
        var value = amount / scale;
        return $"{value.ToString(value >= 100 ? "0" : value >= 10 ? "0.0" : "0.00")} {prefix}{unit}";
    }

    /// <summary>A supernet and its optimisers on a backend that only counts.</summary>
    private sealed class Plan : IDisposable
    {
        private readonly MeteredBackend _backend = new();
        private readonly Supernet _network;
        private readonly Sgd _sgd;
        private readonly AlphaAdam _adam;
        private readonly Arena _arena;
        private readonly int _batch;
        private readonly long _parameterBytes, _dataBytes;
        private long _operators;

        public Plan(SearchConfiguration configuration, int batch, int? trainLimit, int? validationLimit)
        {
            var source = ImageSource.Open(configuration.Data, configuration.DataDir, configuration.Seed);
            var records = source.Count(DataPart.Train);
            Train = (int)Math.Floor(configuration.TrainPortion * records);
            Validation = Math.Min(records - Train, validationLimit ?? int.MaxValue);
            Train = Math.Min(Train, trainLimit ?? int.MaxValue);
            _batch = batch;
            var image = 3L * source.Height * source.Width;
            // Pixels, label and place in the order of three loaders; the batches of trainer and evaluation.
            _dataBytes = (Train + Validation) * (image + 4 * sizeof(int)) + 2 * batch * image * sizeof(float);
            _network = new Supernet(_backend, configuration.ParseSpace(),
                new SupernetSize(configuration.Channels, configuration.Layers, source.Classes, source.Height), configuration.Seed);
            _sgd = new Sgd(_backend, _network.Parameters);
            _adam = new AlphaAdam(_backend, _network.Alphas);
            _arena = new Arena(_backend);
            _parameterBytes = _backend.AllocatedBytes;
        }

        public int Train { get; }

        public int Validation { get; }

        /// <summary>Images of a full batch.</summary>
        public int BatchOf(int images) => Math.Min(_batch, images);

        /// <summary>Batches that some images make, the last one perhaps smaller.</summary>
        public int Steps(int images) => (images + _batch - 1) / _batch;

        /// <summary>One pass over some images, given what a full batch takes and how to learn that of the rest.</summary>
        public Workload Epoch(int images, Workload fullBatch, Func<int, Workload> rest)
        {
            var batch = BatchOf(images);
            var work = images / batch * fullBatch;
            return images % batch > 0 ? work + rest(images % batch) : work;
        }

        public Workload Step(bool alpha, int images, EdgeStates states) => Count(() =>
        {
            var pass = Forward(new TapeOptions(BatchNormMode.Training, !alpha, alpha), images, states, [Mask.None]);
            pass.Backward();
            if (alpha)
                _adam.Step();
            else
                _sgd.Step(0);
        });

        /// <summary>The validation images, with some variants each.</summary>
        public Workload ScoreAll(EdgeStates states, IReadOnlyList<Mask> masks) =>
            Epoch(Validation, Score(BatchOf(Validation), states, masks), images => Score(images, states, masks));

        public Workload Score(int images, EdgeStates states, IReadOnlyList<Mask> masks) =>
            Count(() => Forward(new TapeOptions(BatchNormMode.BatchStatistics), images, states, masks));

        public IReadOnlyList<Mask> Candidates(CellType type, int edge) =>
            [.. Enumerable.Range(0, Math.Min(_network.Space.Columns(type), _network.MaxVariants)).Select(o => new Mask(type, edge, o))];

        /// <summary>Every edge decided for the column of candidates that costs most.</summary>
        public EdgeStates Dearest()
        {
            var dearest = new EdgeStates();
            foreach (var type in Enum.GetValues<CellType>())
            {
                var column = Enumerable.Range(0, _network.Space.Columns(type))
                    .MaxBy(o => Score(1, Filled(new EdgeStates(), o, Enum.GetValues<CellType>()), [Mask.None]).Total.Flops);
                Filled(dearest, column, [type]);
            }
            return dearest;

            EdgeStates Filled(EdgeStates states, int column, CellType[] types)
            {
                foreach (var type in types)
                    for (var edge = 0; edge < CellTopology.Edges; edge++)
                        states[type, edge] = Math.Min(column, _network.Space.Columns(type) - 1);
                return states;
            }
        }

        public Forecast Finish(IReadOnlyList<PhaseForecast> phases)
        {
            // A checkpoint holds weights, momentum and running statistics, once as numbers and once as the file's bytes.
            var checkpoint = 2 * (2 * _network.Parameters.WeightCount + _network.Parameters.RunningCount) * sizeof(float);
            return new Forecast(_batch, new MemoryForecast(_arena.Capacity, _parameterBytes, _dataBytes, checkpoint, ProgramBytes + _operators * OperatorBytes),
                phases);
        }

        public void Dispose()
        {
            _sgd.Dispose();
            _adam.Dispose();
            _arena.Dispose();
            _network.Dispose();
            _backend.Dispose();
        }

        private SupernetPass Forward(TapeOptions options, int images, EdgeStates states, IReadOnlyList<Mask> masks)
        {
            var pass = _network.Record(_arena, options, images, states, masks);
            _operators = Math.Max(_operators, pass.Tape.Operators.Count);
            pass.Forward([], []);
            return pass;
        }

        private Workload Count(Action work)
        {
            var counted = new Workload();
            _backend.Called = counted.Add;
            work();
            _backend.Called = null;
            return counted;
        }
    }
}
