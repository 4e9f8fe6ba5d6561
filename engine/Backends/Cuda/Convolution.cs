namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void ConvolutionForward(in ConvolutionArgs a) => throw NotSupported("convolution_forward");

    public override void ConvolutionBackward(in ConvolutionArgs a) => throw NotSupported("convolution_backward");
}
