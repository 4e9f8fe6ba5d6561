namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void SgdStep(in SgdArgs a) => throw NotSupported("sgd_step");

    public override void AdamStep(in AdamArgs a) => throw NotSupported("adam_step");
}
