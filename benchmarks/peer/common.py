"""What the peers of our benchmarks share: options, settings, weights, and answering a driver line by line."""

import json
import os
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "fixtures"))
import safetensors_file  # noqa: E402
from supernet import SPACES, DerivedNetwork, new_supernet, parse_genotype  # noqa: E402, F401

ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def add_common(parser):
    parser.add_argument("--space", choices=SPACES, default="s5")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8, help="cells; for nas-bench-201 cells per stage")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", choices=["stock", "tuned"], default="stock")
    parser.add_argument("--lockstep", action="store_true", help="one repeat for each line of standard input")
    parser.add_argument("--init", help="safetensors file with weights, α and what the work needs")


def start(build, arguments):
    """Builds the peer; a file or an option that does not fit is one sentence and exit code 2."""
    torch.set_num_threads(arguments.threads)
    try:
        return build(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def fill(network, path):
    """Fills the network's parameters from the file; returns the file's other tensors by name."""
    tensors, _ = safetensors_file.read(path)
    for name, parameter in network.named_parameters():
        if name not in tensors:
            raise ValueError(f"File '{path}' has no tensor '{name}'; write it for the same space, channels and layers.")
        tensor = tensors.pop(name)
        if tensor.shape != tuple(parameter.shape):
            raise ValueError(f"Tensor '{name}' of file '{path}' is {list(tensor.shape)}, expected {list(parameter.shape)}.")
        parameter.data = torch.tensor(tensor, dtype=torch.float32)
    return {name: torch.tensor(tensor) for name, tensor in tensors.items()}


def settings(arguments):
    """Versions and settings as this process has seen them."""
    allocator = {name: os.environ.get(name) for name in ALLOCATOR}
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "mode": arguments.mode, "allocator": allocator}


def requests():
    """The driver's lines: JSON, or empty for one more repeat of the same."""
    for line in sys.stdin:
        yield json.loads(line) if line.strip() else None


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(**line):
    print(json.dumps(line), flush=True)
