namespace PerturbNas.Backends.Cuda;

/// <summary>Opens a CUDA device, and says in one sentence what stands in the way and what to do about it.</summary>
internal static class CudaDevice
{
    private const string DriverLibrary = "libcuda.so.1";

    // The CUDA versions are published with the driver that brought them.
    private static readonly (int Version, int Driver)[] Drivers = [(11040, 470), (11050, 495), (11060, 510), (11070, 515), (11080, 520), (12000, 525)];

    /// <summary>Where the build puts the emulated driver.</summary>
    public static string EmulatedLibrary => Path.Combine(AppContext.BaseDirectory, "cuda-emulator", DriverLibrary);

    /// <summary>Whether a driver is worth asking: it has a device file, on Linux and in its subsystem for Windows. Costs a look at the file system.</summary>
    public static bool MayExist => File.Exists("/dev/nvidiactl") || File.Exists("/dev/dxg");

    /// <summary>What this build lacks to use the device, and how to get it; null: nothing.</summary>
    public static string? WhyNotBuilt(DeviceKind kind)
    {
        var remedy = $"start it as './perturbnas VERB --device {Devices.NameOf(kind)}', which";
        if (!PtxModules.Exist)
            return "This program was built without its CUDA kernels, because no clang (16 or newer) or nvcc (11.8 to 12) was there or none was asked " +
                $"for; {remedy} builds them and brings clang-19 where apt-get can.";
        return kind == DeviceKind.CudaEmulated && !File.Exists(EmulatedLibrary)
            ? $"This program was built without the emulated CUDA driver ('{EmulatedLibrary}' is missing); {remedy} builds it."
            : null;
    }

    /// <exception cref="UserException">The device cannot be used.</exception>
    public static (CudaContext Context, PtxModules Ptx) Open(DeviceKind kind)
    {
        if (WhyNotBuilt(kind) is { } reason)
            throw new UserException(reason);
        CudaContext context;
        try
        {
            context = CudaContext.Open(kind == DeviceKind.CudaEmulated ? EmulatedLibrary : DriverLibrary);
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
