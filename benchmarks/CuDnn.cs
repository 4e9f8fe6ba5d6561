using System.Runtime.InteropServices;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Benchmarks;

/// <summary>Extents of float32 images [Images][Height][Width][Channels].</summary>
internal readonly record struct ImageShape(int Images, int Height, int Width, int Channels)
{
    public int Pixels => Images * Height * Width;

    public int Count => Pixels * Channels;
}

/// <summary>A convolution without bias; the filters are [Out.Channels][Size][Size][In.Channels / Groups].</summary>
internal readonly record struct ConvolutionShape(ImageShape In, ImageShape Out, int Size, int Stride, int Dilation, int Groups)
{
    public int Padding => Dilation * (Size / 2);
}

/// <summary>A pool of 3x3 pixels, padding 1, whose average leaves padding out.</summary>
internal readonly record struct PoolShape(ImageShape In, ImageShape Out, int Stride, bool Maximum);

/// <summary>A network's layers on images that lie on the device.</summary>
internal interface ILayers : IDisposable
{
    void Relu(ImageShape shape, nint x, nint y);

    void ReluBackward(ImageShape shape, nint y, nint dy, nint x, nint dx);

    /// <summary>y = convolution of x + beta * y.</summary>
    void Convolve(ConvolutionShape shape, nint x, nint weights, float beta, nint y);

    void ConvolveBackwardData(ConvolutionShape shape, nint weights, nint dy, nint dx);

    void ConvolveBackwardWeights(ConvolutionShape shape, nint x, nint dy, nint dWeights);

    void Pool(PoolShape shape, nint x, nint y);

    void PoolBackward(PoolShape shape, nint y, nint dy, nint x, nint dx);

    /// <summary>Normalises with the statistics of the batch, which are kept: y = scale * inverse * (x - mean) + shift, all [Channels].</summary>
    /// <param name="inverse">1 / sqrt(biased variance + <see cref="CuDnn.Epsilon"/>).</param>
    void BatchNorm(ImageShape shape, nint x, nint y, nint scale, nint shift, nint mean, nint inverse);

    void BatchNormBackward(ImageShape shape, nint x, nint dy, nint dx, nint scale, nint dScale, nint dShift, nint mean, nint inverse);
}

/// <summary>
/// cuDNN 8 or 9: the functions in use, as its headers declare them. A convolution takes the fastest algorithm, which is searched for when
/// its shape comes for the first time.
/// </summary>
internal sealed unsafe partial class CuDnn : ILayers
{
    public const double Epsilon = 1e-5;

    // Enumerators of the headers: data type, format of tensors and filters, convolution that does not mirror its filter, and so on.
    private const int Float = 0, Nhwc = 1, CrossCorrelation = 1, DefaultMath = 0, FmaMath = 3, Rectify = 1, PropagateNan = 1;
    private const int MaxPool = 0, AveragePoolWithoutPadding = 2, SpatialPersistent = 2;
    private const int NotSupportedBefore9 = 9, NotSupported = 3000, EndOfNotSupported = 4000;

    // More than there are algorithms, each with and without tensor cores.
    private const int MostAlgorithms = 32;

    private const float One = 1, Zero = 0;

    private readonly CudaBackend _backend;
    private readonly List<CudaLibraryHandle> _handles = [];
    private readonly CudaLibraryHandle _handle, _relu;
    private readonly Dictionary<ImageShape, CudaLibraryHandle> _tensors = [];
    private readonly Dictionary<PoolShape, CudaLibraryHandle> _pools = [];
    private readonly Dictionary<(string Function, ConvolutionShape Shape), Plan> _plans = [];
    private nint _workspace;
    private nuint _workspaceBytes;

    private CuDnn(string soname, CudaBackend backend)
    {
        _backend = backend;
        _handle = New(Create, Destroy, "cudnnCreate");
        Check(SetStream(_handle, backend.Stream), "cudnnSetStream");
        _relu = New(CreateActivation, DestroyActivation, "cudnnCreateActivationDescriptor");
        Check(SetActivation(_relu, Rectify, PropagateNan, 0), "cudnnSetActivationDescriptor");
        var version = (int)GetVersion();
        // 8907 for 8.9.7, 90600 for 9.6.0.
        var parts = version < 10000 ? (version / 1000, version / 100 % 10, version % 100) : (version / 10000, version / 100 % 100, version % 100);
        Description = $"cuDNN {parts.Item1}.{parts.Item2}.{parts.Item3} ({soname})";
    }

    /// <summary>Opens the library for work in a backend's stream and precision; null: it is not installed.</summary>
    /// <exception cref="CudaLibraryException">It is installed, but cannot be used.</exception>
    public static CuDnn? Open(CudaBackend backend) => CudaLibrary.Load(CudaLibrary.Dnn) is { } soname ? new(soname, backend) : null;

    /// <summary>Name, version and file.</summary>
    public string Description { get; }

    public void Relu(ImageShape shape, nint x, nint y)
    {
        var tensor = Tensor(shape);
        Check(ActivationForward(_handle, _relu, One, tensor, x, Zero, tensor, y), "cudnnActivationForward");
    }

    public void ReluBackward(ImageShape shape, nint y, nint dy, nint x, nint dx)
    {
        var tensor = Tensor(shape);
        Check(ActivationBackward(_handle, _relu, One, tensor, y, tensor, dy, tensor, x, Zero, tensor, dx), "cudnnActivationBackward");
    }

    public void Convolve(ConvolutionShape shape, nint x, nint weights, float beta, nint y)
    {
        var plan = PlanOf("cudnnConvolutionForward", shape, static (handle, p, results) =>
            (FindForward(handle, p.Input, p.Filter, p.Convolution, p.Output, results.Length, out var count, results), count));
        Check(ConvolutionForward(_handle, One, plan.Input, x, plan.Filter, weights, plan.Convolution, plan.Algorithm, _workspace, plan.WorkspaceBytes,
            in beta, plan.Output, y), "cudnnConvolutionForward");
    }

    public void ConvolveBackwardData(ConvolutionShape shape, nint weights, nint dy, nint dx)
    {
        var plan = PlanOf("cudnnConvolutionBackwardData", shape, static (handle, p, results) =>
            (FindBackwardData(handle, p.Filter, p.Output, p.Convolution, p.Input, results.Length, out var count, results), count));
        Check(ConvolutionBackwardData(_handle, One, plan.Filter, weights, plan.Output, dy, plan.Convolution, plan.Algorithm, _workspace,
            plan.WorkspaceBytes, Zero, plan.Input, dx), "cudnnConvolutionBackwardData");
    }

    public void ConvolveBackwardWeights(ConvolutionShape shape, nint x, nint dy, nint dWeights)
    {
        var plan = PlanOf("cudnnConvolutionBackwardFilter", shape, static (handle, p, results) =>
            (FindBackwardFilter(handle, p.Input, p.Output, p.Convolution, p.Filter, results.Length, out var count, results), count));
        Check(ConvolutionBackwardFilter(_handle, One, plan.Input, x, plan.Output, dy, plan.Convolution, plan.Algorithm, _workspace, plan.WorkspaceBytes,
            Zero, plan.Filter, dWeights), "cudnnConvolutionBackwardFilter");
    }

    public void Pool(PoolShape shape, nint x, nint y) =>
        Check(PoolingForward(_handle, Pool(shape), One, Tensor(shape.In), x, Zero, Tensor(shape.Out), y), "cudnnPoolingForward");

    public void PoolBackward(PoolShape shape, nint y, nint dy, nint x, nint dx)
    {
        var (input, output) = (Tensor(shape.In), Tensor(shape.Out));
        Check(PoolingBackward(_handle, Pool(shape), One, output, y, output, dy, input, x, Zero, input, dx), "cudnnPoolingBackward");
    }

    public void BatchNorm(ImageShape shape, nint x, nint y, nint scale, nint shift, nint mean, nint inverse)
    {
        var tensor = Tensor(shape);
        Check(BatchNormForward(_handle, SpatialPersistent, One, Zero, tensor, x, tensor, y, PerChannel(shape), scale, shift, 1, 0, 0, Epsilon, mean,
            inverse), "cudnnBatchNormalizationForwardTraining");
    }

    public void BatchNormBackward(ImageShape shape, nint x, nint dy, nint dx, nint scale, nint dScale, nint dShift, nint mean, nint inverse)
    {
        var tensor = Tensor(shape);
        Check(BatchNormBackward(_handle, SpatialPersistent, One, Zero, One, Zero, tensor, x, tensor, dy, tensor, dx, PerChannel(shape), scale,
            dScale, dShift, Epsilon, mean, inverse), "cudnnBatchNormalizationBackward");
    }

    public void Dispose()
    {
        _backend.Free(_workspace);
        for (var i = _handles.Count - 1; i >= 0; i--)
            _handles[i].Dispose();
    }

    /// <summary>Descriptors of a convolution and the fastest algorithm that multiplies as asked, with room for what it needs.</summary>
    private Plan PlanOf(string function, ConvolutionShape shape, Func<CudaLibraryHandle, Plan, AlgorithmPerformance[], (int Status, int Count)> find)
    {
        if (_plans.TryGetValue((function, shape), out var plan))
            return plan;
        var convolution = New(CreateConvolution, DestroyConvolution, "cudnnCreateConvolutionDescriptor");
        Check(SetConvolution(convolution, shape.Padding, shape.Padding, shape.Stride, shape.Stride, shape.Dilation, shape.Dilation, CrossCorrelation, Float),
            "cudnnSetConvolution2dDescriptor");
        Check(SetGroupCount(convolution, shape.Groups), "cudnnSetConvolutionGroupCount");
        // By default float32 factors may be rounded to TF32.
        Check(SetMathType(convolution, _backend.Tf32 ? DefaultMath : FmaMath), "cudnnSetConvolutionMathType");
        var filter = New(CreateFilter, DestroyFilter, "cudnnCreateFilterDescriptor");
        Check(SetFilter(filter, Float, Nhwc, shape.Out.Channels, shape.In.Channels / shape.Groups, shape.Size, shape.Size), "cudnnSetFilter4dDescriptor");
        plan = new(convolution, filter, Tensor(shape.In), Tensor(shape.Out), 0, 0);

        var results = new AlgorithmPerformance[MostAlgorithms];
        var (status, count) = find(_handle, plan, results);
        Check(status, $"the search for an algorithm of {function}");
        // The fastest comes first; the list also has what the convolution's own math type does not allow.
        var found = Array.FindIndex(results, 0, count, result => result.Status == 0 && (_backend.Tf32 || result.MathType == FmaMath));
        if (found < 0)
            throw new CudaLibraryException($"the search for an algorithm of {function}", NotSupported, "there is none for this shape and precision", notSupported: true);
        var best = results[found];
        Check(SetMathType(convolution, best.MathType), "cudnnSetConvolutionMathType");
        if (best.Memory > _workspaceBytes)
        {
            _backend.Free(_workspace);
            (_workspace, _workspaceBytes) = (_backend.Allocate((long)best.Memory), best.Memory);
        }
        return _plans[(function, shape)] = plan with { Algorithm = best.Number, WorkspaceBytes = best.Memory };
    }

    private CudaLibraryHandle Tensor(ImageShape shape)
    {
        if (!_tensors.TryGetValue(shape, out var tensor))
        {
            _tensors[shape] = tensor = New(CreateTensor, DestroyTensor, "cudnnCreateTensorDescriptor");
            Check(SetTensor(tensor, Nhwc, Float, shape.Images, shape.Channels, shape.Height, shape.Width), "cudnnSetTensor4dDescriptor");
        }
        return tensor;
    }

    private CudaLibraryHandle PerChannel(ImageShape shape) => Tensor(new(1, 1, 1, shape.Channels));

    private CudaLibraryHandle Pool(PoolShape shape)
    {
        if (!_pools.TryGetValue(shape, out var pool))
        {
            _pools[shape] = pool = New(CreatePooling, DestroyPooling, "cudnnCreatePoolingDescriptor");
            Check(SetPooling(pool, shape.Maximum ? MaxPool : AveragePoolWithoutPadding, PropagateNan, 3, 3, 1, 1, shape.Stride, shape.Stride),
                "cudnnSetPooling2dDescriptor");
        }
        return pool;
    }

    private delegate int Constructor(out nint handle);

    private CudaLibraryHandle New(Constructor create, Func<nint, int> destroy, string call)
    {
        Check(create(out var value), call);
        var handle = new CudaLibraryHandle(value, destroy);
        _handles.Add(handle);
        return handle;
    }

    private static void Check(int status, string call)
    {
        if (status != 0)
            throw new CudaLibraryException(call, status, Marshal.PtrToStringUTF8(GetErrorString(status)) ?? "",
                status is NotSupportedBefore9 or (>= NotSupported and < EndOfNotSupported));
    }

    private sealed record Plan(CudaLibraryHandle Convolution, CudaLibraryHandle Filter, CudaLibraryHandle Input, CudaLibraryHandle Output, int Algorithm,
        nuint WorkspaceBytes);

    /// <summary>cudnnConvolutionFwdAlgoPerf_t, and the same of the two backward passes; three reserved integers end it.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 48)]
    internal struct AlgorithmPerformance
    {
        public int Number, Status;
        public float Milliseconds;
        public nuint Memory;
        public int Determinism, MathType;
    }

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnGetVersion")]
    private static partial nuint GetVersion();

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnGetErrorString")]
    private static partial nint GetErrorString(int status);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnCreate")]
    private static partial int Create(out nint handle);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnDestroy")]
    private static partial int Destroy(nint handle);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnSetStream")]
    private static partial int SetStream(CudaLibraryHandle handle, nint stream);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnCreateTensorDescriptor")]
    private static partial int CreateTensor(out nint tensor);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnDestroyTensorDescriptor")]
    private static partial int DestroyTensor(nint tensor);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnSetTensor4dDescriptor")]
    private static partial int SetTensor(CudaLibraryHandle tensor, int format, int type, int images, int channels, int height, int width);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnCreateFilterDescriptor")]
    private static partial int CreateFilter(out nint filter);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnDestroyFilterDescriptor")]
    private static partial int DestroyFilter(nint filter);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnSetFilter4dDescriptor")]
    private static partial int SetFilter(CudaLibraryHandle filter, int type, int format, int outChannels, int inChannels, int height, int width);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnCreateConvolutionDescriptor")]
    private static partial int CreateConvolution(out nint convolution);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnDestroyConvolutionDescriptor")]
    private static partial int DestroyConvolution(nint convolution);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnSetConvolution2dDescriptor")]
    private static partial int SetConvolution(CudaLibraryHandle convolution, int paddingH, int paddingW, int strideH, int strideW, int dilationH,
        int dilationW, int mode, int type);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnSetConvolutionGroupCount")]
    private static partial int SetGroupCount(CudaLibraryHandle convolution, int groups);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnSetConvolutionMathType")]
    private static partial int SetMathType(CudaLibraryHandle convolution, int mathType);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnFindConvolutionForwardAlgorithm")]
    private static partial int FindForward(CudaLibraryHandle handle, CudaLibraryHandle x, CudaLibraryHandle filter, CudaLibraryHandle convolution,
        CudaLibraryHandle y, int most, out int count, [Out] AlgorithmPerformance[] results);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnFindConvolutionBackwardDataAlgorithm")]
    private static partial int FindBackwardData(CudaLibraryHandle handle, CudaLibraryHandle filter, CudaLibraryHandle dy, CudaLibraryHandle convolution,
        CudaLibraryHandle dx, int most, out int count, [Out] AlgorithmPerformance[] results);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnFindConvolutionBackwardFilterAlgorithm")]
    private static partial int FindBackwardFilter(CudaLibraryHandle handle, CudaLibraryHandle x, CudaLibraryHandle dy, CudaLibraryHandle convolution,
        CudaLibraryHandle dFilter, int most, out int count, [Out] AlgorithmPerformance[] results);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnConvolutionForward")]
    private static partial int ConvolutionForward(CudaLibraryHandle handle, in float alpha, CudaLibraryHandle xTensor, nint x, CudaLibraryHandle filter,
        nint weights, CudaLibraryHandle convolution, int algorithm, nint workspace, nuint workspaceBytes, in float beta, CudaLibraryHandle yTensor, nint y);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnConvolutionBackwardData")]
    private static partial int ConvolutionBackwardData(CudaLibraryHandle handle, in float alpha, CudaLibraryHandle filter, nint weights,
        CudaLibraryHandle dyTensor, nint dy, CudaLibraryHandle convolution, int algorithm, nint workspace, nuint workspaceBytes, in float beta,
        CudaLibraryHandle dxTensor, nint dx);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnConvolutionBackwardFilter")]
    private static partial int ConvolutionBackwardFilter(CudaLibraryHandle handle, in float alpha, CudaLibraryHandle xTensor, nint x,
        CudaLibraryHandle dyTensor, nint dy, CudaLibraryHandle convolution, int algorithm, nint workspace, nuint workspaceBytes, in float beta,
        CudaLibraryHandle filter, nint dWeights);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnCreateActivationDescriptor")]
    private static partial int CreateActivation(out nint activation);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnDestroyActivationDescriptor")]
    private static partial int DestroyActivation(nint activation);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnSetActivationDescriptor")]
    private static partial int SetActivation(CudaLibraryHandle activation, int mode, int nan, double coefficient);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnActivationForward")]
    private static partial int ActivationForward(CudaLibraryHandle handle, CudaLibraryHandle activation, in float alpha, CudaLibraryHandle xTensor, nint x,
        in float beta, CudaLibraryHandle yTensor, nint y);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnActivationBackward")]
    private static partial int ActivationBackward(CudaLibraryHandle handle, CudaLibraryHandle activation, in float alpha, CudaLibraryHandle yTensor, nint y,
        CudaLibraryHandle dyTensor, nint dy, CudaLibraryHandle xTensor, nint x, in float beta, CudaLibraryHandle dxTensor, nint dx);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnCreatePoolingDescriptor")]
    private static partial int CreatePooling(out nint pooling);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnDestroyPoolingDescriptor")]
    private static partial int DestroyPooling(nint pooling);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnSetPooling2dDescriptor")]
    private static partial int SetPooling(CudaLibraryHandle pooling, int mode, int nan, int windowH, int windowW, int paddingH, int paddingW, int strideH,
        int strideW);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnPoolingForward")]
    private static partial int PoolingForward(CudaLibraryHandle handle, CudaLibraryHandle pooling, in float alpha, CudaLibraryHandle xTensor, nint x,
        in float beta, CudaLibraryHandle yTensor, nint y);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnPoolingBackward")]
    private static partial int PoolingBackward(CudaLibraryHandle handle, CudaLibraryHandle pooling, in float alpha, CudaLibraryHandle yTensor, nint y,
        CudaLibraryHandle dyTensor, nint dy, CudaLibraryHandle xTensor, nint x, in float beta, CudaLibraryHandle dxTensor, nint dx);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnBatchNormalizationForwardTraining")]
    private static partial int BatchNormForward(CudaLibraryHandle handle, int mode, in float alpha, in float beta, CudaLibraryHandle xTensor, nint x,
        CudaLibraryHandle yTensor, nint y, CudaLibraryHandle perChannel, nint scale, nint shift, double factor, nint runningMean, nint runningVariance,
        double epsilon, nint mean, nint inverse);

    [LibraryImport(CudaLibrary.Dnn, EntryPoint = "cudnnBatchNormalizationBackward")]
    private static partial int BatchNormBackward(CudaLibraryHandle handle, int mode, in float alphaData, in float betaData, in float alphaParameters,
        in float betaParameters, CudaLibraryHandle xTensor, nint x, CudaLibraryHandle dyTensor, nint dy, CudaLibraryHandle dxTensor, nint dx,
        CudaLibraryHandle perChannel, nint scale, nint dScale, nint dShift, double epsilon, nint mean, nint inverse);
}
