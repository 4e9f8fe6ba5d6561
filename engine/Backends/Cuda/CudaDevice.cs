namespace PerturbNas.Backends.Cuda;

/// <summary>Opens a CUDA device, and says in one sentence what stands in the way and what to do about it.</summary>
internal static class CudaDevice
{
    private const string DriverLibrary = "libcuda.so.1";

    // The CUDA versions are published with the driver that brought them.
    private static readonly (int Version, int Driver)[] Drivers = [(11040, 470), (11050, 495), (11060, 510), (11070, 515), (11080, 520), (12000, 525)];

    /// <summary>Where the build puts the emulated driver.</summary>
    public static string EmulatedLibrary => Path.Combine(AppContext.BaseDirectory, "cuda-emulator", DriverLibrary);

    /// <summary>Whether there is a driver library to try at all; costs no more than looking for a file.</summary>
    public static bool MayExist(DeviceKind kind) => kind == DeviceKind.CudaEmulated ? File.Exists(EmulatedLibrary) : File.Exists("/dev/nvidiactl");

    /// <exception cref="UserException">The device cannot be used.</exception>
    public static (CudaContext Context, PtxModules Ptx) Open(DeviceKind kind)
    {
        var name = Devices.NameOf(kind);
        if (!PtxModules.Exist)
            throw new UserException("This program was built without its CUDA kernels, because no clang (16 or newer) or nvcc (12 or newer) was there or " +
                $"none was asked for; start it as './perturbnas VERB --device {name}', which builds them, and brings clang-19 where apt-get can.");
        CudaContext context;
        try
        {
            context = CudaContext.Open(kind == DeviceKind.CudaEmulated ? EmulatedLibrary : DriverLibrary);
        }
        catch (DllNotFoundException) when (kind == DeviceKind.CudaEmulated)
        {
            throw new UserException($"The emulated CUDA driver was not built: '{EmulatedLibrary}' is missing; start the program as " +
                $"'./perturbnas VERB --device {name}', which builds it.");
        }
        catch (DllNotFoundException)
        {
            throw new UserException($"There is no NVIDIA driver on this machine ({DriverLibrary} cannot be loaded); install the driver, or use --device cpu.");
        }
        catch (CudaException e) when (e.Status == DriverStatus.NoDevice)
        {
            throw new UserException($"The NVIDIA driver finds no device ({e.Name}); check the device with nvidia-smi, or use --device cpu.");
        }
        catch (CudaException e) when (e.Status == DriverStatus.DriverMismatch)
        {
            throw new UserException($"The NVIDIA driver's library and its kernel module are of different versions ({e.Name}); restart the machine, or use --device cpu.");
        }
        catch (CudaException e)
        {
            throw new UserException($"The CUDA device cannot be used: {e.Message}; check it with nvidia-smi, or use --device cpu.", e);
        }
        var device = context.Properties;
        if (device.ComputeCapability < PtxModules.LeastComputeCapability)
            throw new UserException($"{device.Name} has compute capability {Dotted(device.ComputeCapability)} and the kernels need " +
                $"{Dotted(PtxModules.LeastComputeCapability)}; use another device, or --device cpu.");
        var ptx = PtxModules.For(device.ComputeCapability);
        if (device.DriverVersion < ptx.DriverVersion)
            throw new UserException($"The NVIDIA driver knows CUDA {Version(device.DriverVersion)} and the kernels need {Version(ptx.DriverVersion)}; " +
                $"update the driver{Driver(ptx.DriverVersion)}, or use --device cpu.");
        return (context, ptx);
    }

    private static string Dotted(int tenfold) => $"{tenfold / 10}.{tenfold % 10}";

    private static string Version(int version) => $"{version / 1000}.{version % 1000 / 10}";

    private static string Driver(int version) =>
        Drivers.FirstOrDefault(driver => driver.Version >= version) is { Driver: > 0 } known ? $" to {known.Driver} or newer" : "";
}
