using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using PerturbNas.Training;
using Xunit;

namespace PerturbNas.Tests.Data;

public sealed class SafeTensorsTests
{
    [Fact]
    public void What_was_written_is_read()
    {
        using var folder = new TemporaryFolder();
        Example().Write(folder["a.safetensors"]);
        var file = SafeTensorsFile.Read(folder["a.safetensors"]);
        Assert.Equal(["cells.0.edges.1<-0.\"ä\"", "empty", "flags", "scalar", "steps", "weights"], file.Tensors.Select(tensor => tensor.Name));
        Assert.Equal([1f, -0f, float.NaN, float.MaxValue, float.Epsilon, 0.1f], file.Float32("weights", 2, 3).ToArray());
        Assert.Equal([Math.PI], file.Float64("scalar").ToArray());
        Assert.Equal([long.MinValue, -1, long.MaxValue], file.Int64("steps", 3).ToArray());
        Assert.Equal([1, 0, 255], file.UInt8("flags", 3, 1).ToArray());
        Assert.Equal(0, file.Float32("empty", 0, 4).Length);
        Assert.Equal([2.5f], file.Float32("cells.0.edges.1<-0.\"ä\"", 1).ToArray());
        Assert.Equal("s5 \"quoted\"\n", file.Metadata["space"]);
        Assert.Equal("perturbnas-1", file.Metadata["format"]);
        Assert.True(file.Contains("flags"));
        Assert.False(file.Contains("flag"));
        Assert.Equal([folder["a.safetensors"]], Directory.GetFileSystemEntries(folder.Path));
    }

    [Fact]
    public void The_bytes_follow_the_format()
    {
        using var folder = new TemporaryFolder();
        var file = new SafeTensorsFile();
        file.Add("b", [1, 2], (float[])[1, 2]);
        file.Add("a", [1], (byte[])[7]);
        file.Add("c", [], (long[])[3]);
        file.Write(folder["a.safetensors"]);

        byte[] data = [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x3f, 0, 0, 0, 0x40, 7];
        var header = """{"__metadata__":{"format":"perturbnas-1","sha256":"SHA"},"c":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]},"a":{"dtype":"U8","shape":[1],"data_offsets":[16,17]}}"""
            .Replace("SHA", Convert.ToHexStringLower(SHA256.HashData([.. """["format","perturbnas-1"]"""u8, .. data])));
        header = header.PadRight((header.Length + 7) / 8 * 8);
        Assert.Equal(FileBytes(header, data), File.ReadAllBytes(folder["a.safetensors"]));
    }

    [Fact]
    public void Changed_metadata_is_damage()
    {
        using var folder = new TemporaryFolder();
        var file = new SafeTensorsFile();
        file.Metadata["step"] = "12";
        file.Write(folder["a"]);
        var text = File.ReadAllText(folder["a"], System.Text.Encoding.Latin1);
        File.WriteAllText(folder["a"], text.Replace("\"12\"", "\"13\""), System.Text.Encoding.Latin1);
        Assert.Contains("SHA-256", Assert.Throws<UserException>(() => SafeTensorsFile.Read(folder["a"])).Message);
    }

    [Fact]
    public void The_bytes_do_not_depend_on_the_order_of_adding_or_on_a_round_trip()
    {
        using var folder = new TemporaryFolder();
        Example().Write(folder["a"]);
        Example(backwards: true).Write(folder["b"]);
        SafeTensorsFile.Read(folder["a"]).Write(folder["c"]);
        Assert.Equal(File.ReadAllBytes(folder["a"]), File.ReadAllBytes(folder["b"]));
        Assert.Equal(File.ReadAllBytes(folder["a"]), File.ReadAllBytes(folder["c"]));
    }

    // As other programs write them: no metadata or their own, no padding, tensors of the header in any order.
    [Theory]
    [InlineData("""{"y":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},"x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}""")]
    [InlineData("""{"__metadata__":{"format":"pt","sha256":"not ours"},"x":{"shape":[1],"data_offsets":[0,8],"dtype":"F64"},"y":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}   """)]
    public void Reads_files_of_other_programs(string header)
    {
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["a"], FileBytes(header, [0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0, 0, 0, 0x40]));
        var file = SafeTensorsFile.Read(folder["a"]);
        Assert.Equal([1.0], file.Float64("x", 1).ToArray());
        Assert.Equal([2f], file.Float32("y", 1).ToArray());
    }

    [Theory]
    [InlineData("[]", "header is not a JSON object")]
    [InlineData("{\"x\":", "header is not valid JSON")]
    [InlineData("""{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}""", "header is not valid JSON")]
    [InlineData("""{"__metadata__":7}""", "__metadata__ is not a JSON object")]
    [InlineData("""{"__metadata__":{"a":7}}""", "'a' in its __metadata__ is not a string")]
    [InlineData("""{"x":7}""", "entry of tensor 'x'")]
    [InlineData("""{"x":{"dtype":"F32","shape":[2]}}""", "entry of tensor 'x'")]
    [InlineData("""{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}""", "entry of tensor 'x'")]
    [InlineData("""{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}""", "entry of tensor 'x'")]
    [InlineData("""{"x":{"dtype":"F32","shape":[1.5],"data_offsets":[0,8]}}""", "entry of tensor 'x'")]
    [InlineData("""{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}""", "entry of tensor 'x'")]
    [InlineData("""{"x":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}""", "Tensor 'x' of", "has type BF16", "F32, F64, I64, I32, U8", "convert")]
    [InlineData("""{"x":{"dtype":"0","shape":[2],"data_offsets":[0,8]}}""", "has type 0")]
    [InlineData("""{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}""", "tensor 'x' of type F32 and shape [3] does not fill its 8 bytes")]
    [InlineData("""{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}""", "does not fill its 8 bytes")]
    [InlineData("""{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}""", "tensor 'x' begins at byte 4 of the data instead of 0")]
    [InlineData("""{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}""", "tensor 'y' begins at byte 4 of the data instead of 8")]
    [InlineData("""{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}""", "truncated: tensor 'x' ends at byte 12 of the data, which has 8")]
    [InlineData("""{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}""", "has 4 bytes after the last tensor")]
    [InlineData("""{"__metadata__":{"format":"perturbnas-2"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}""", "format 'perturbnas-2'", "reads 'perturbnas-1'")]
    public void Refuses_a_wrong_header(string header, params string[] parts)
    {
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["a"], FileBytes(header, new byte[8]));
        Says(() => SafeTensorsFile.Read(folder["a"]), [folder["a"], .. parts]);
    }

    [Theory]
    [InlineData(ulong.MaxValue)]
    [InlineData(1UL << 40)]
    [InlineData(100_000_001UL)]
    [InlineData(11UL)]
    public void Refuses_an_impossible_header_length(ulong length)
    {
        using var folder = new TemporaryFolder();
        var bytes = FileBytes("{}        ", []);
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, length);
        File.WriteAllBytes(folder["a"], bytes);
        Says(() => SafeTensorsFile.Read(folder["a"]), folder["a"], $"header should have {length} bytes, but the file has 18");
    }

    // No prefix of a file is taken for a file, and no flipped bit of the data goes unseen.
    [Fact]
    public void Refuses_every_truncation_and_every_changed_data_byte()
    {
        using var folder = new TemporaryFolder();
        Example().Write(folder["a"]);
        var bytes = File.ReadAllBytes(folder["a"]);
        for (var length = 0; length < bytes.Length; length++)
        {
            File.WriteAllBytes(folder["b"], bytes[..length]);
            Says(() => SafeTensorsFile.Read(folder["b"]), folder["b"], "damaged");
        }
        var header = (int)BinaryPrimitives.ReadInt64LittleEndian(bytes);
        for (var at = 8 + header; at < bytes.Length; at++)
        {
            bytes[at] ^= 16;
            File.WriteAllBytes(folder["b"], bytes);
            bytes[at] ^= 16;
            Says(() => SafeTensorsFile.Read(folder["b"]), folder["b"], "SHA-256", "earlier checkpoint");
        }
    }

    [Fact]
    public void Says_which_tensor_is_missing_or_of_another_kind()
    {
        using var folder = new TemporaryFolder();
        Example().Write(folder["a"]);
        var file = SafeTensorsFile.Read(folder["a"]);
        Says(() => file.Float32("bias", 3), folder["a"], "no tensor 'bias'", "this network");
        Says(() => file.Float32("weights", 3, 2), folder["a"], "'weights'", "F32 [2, 3]", "F32 [3, 2] is needed");
        Says(() => file.Float64("weights", 2, 3), folder["a"], "'weights'", "F32 [2, 3]", "F64 [2, 3] is needed");
        Says(() => SafeTensorsFile.Read(folder["nothing"]), folder["nothing"], "does not exist");
        Says(() => SafeTensorsFile.Read(folder["no/thing"]), folder["no/thing"], "does not exist");
        Says(() => SafeTensorsFile.Read(folder.Path), folder.Path, "cannot be read");
    }

    [Fact]
    public void Refuses_to_add_what_does_not_fit()
    {
        var file = Example();
        Assert.Throws<ArgumentException>(() => file.Add("flags", [1], (float[])[1]));
        Assert.Throws<ArgumentException>(() => file.Add("other", [2], (float[])[1]));
        Assert.Throws<ArgumentException>(() => file.Add("other", [-1, -1], (float[])[1]));
        Assert.Throws<ArgumentException>(() => file.Add("__metadata__", [1], (float[])[1]));
    }

    // /dev/full takes no byte, as a full disk: the temporary file is made a link to it.
    [Fact]
    public void A_full_disk_leaves_the_earlier_file_as_it_was()
    {
        using var folder = new TemporaryFolder();
        Example().Write(folder["a"]);
        var before = File.ReadAllBytes(folder["a"]);
        File.CreateSymbolicLink(folder["a.tmp"], "/dev/full");
        var file = Example();
        file.Add("more", [100_000], new float[100_000]);
        Says(() => file.Write(folder["a"]), folder["a"], "cannot be written", "No space left on device", "unchanged");
        Assert.Equal(before, File.ReadAllBytes(folder["a"]));
        Assert.Equal([folder["a"]], Directory.GetFileSystemEntries(folder.Path));
        file.Write(folder["a"]);
        Assert.True(SafeTensorsFile.Read(folder["a"]).Contains("more"));
    }

    [Fact]
    public void A_path_that_cannot_be_written_is_named()
    {
        using var folder = new TemporaryFolder();
        Says(() => Example().Write(folder["no/folder"]), folder["no/folder"], "cannot be written", "folder exists");
        Directory.CreateDirectory(folder["taken"]);
        Says(() => Example().Write(folder["taken"]), folder["taken"], "cannot be written");
        Assert.Equal([folder["taken"]], Directory.GetFileSystemEntries(folder.Path));
    }

    [Fact]
    public void Replaces_a_half_written_temporary_file()
    {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["a.tmp"], new string('x', 100_000));
        Example().Write(folder["a"]);
        Assert.Equal([Math.PI], SafeTensorsFile.Read(folder["a"]).Float64("scalar").ToArray());
        Assert.False(File.Exists(folder["a.tmp"]));
    }

    private static SafeTensorsFile Example(bool backwards = false)
    {
        var file = new SafeTensorsFile();
        Action[] steps =
        [
            () => file.Add("weights", [2, 3], (float[])[1, -0f, float.NaN, float.MaxValue, float.Epsilon, 0.1f]),
            () => file.Add("scalar", [], (double[])[Math.PI]),
            () => file.Add("steps", [3], (long[])[long.MinValue, -1, long.MaxValue]),
            () => file.Add("flags", [3, 1], (byte[])[1, 0, 255]),
            () => file.Add("empty", [0, 4], (float[])[]),
            () => file.Add("cells.0.edges.1<-0.\"ä\"", [1], (float[])[2.5f]),
            () => file.Metadata["space"] = "s5 \"quoted\"\n",
            () => file.Metadata["epoch"] = "3",
        ];
        foreach (var step in backwards ? steps.AsEnumerable().Reverse() : steps)
            step();
        return file;
    }

    private static byte[] FileBytes(string header, ReadOnlySpan<byte> data)
    {
        var text = Encoding.UTF8.GetBytes(header);
        var length = (long)text.Length;
        return [.. MemoryMarshal.AsBytes(new ReadOnlySpan<long>(in length)), .. text, .. data];
    }

    private static void Says(Action action, params string[] parts)
    {
        var message = Assert.Throws<UserException>(action).Message;
        Assert.All(parts, part => Assert.Contains(part, message));
        Assert.EndsWith(".", message);
    }
}
