"""The peer of our benchmarks: the DARTS reference's way of working in PyTorch, timed one repeat at a time.

    python3 benchmarks/peer/peer.py --space s5 --work search-step --repeats 3      (Debian's python3-torch)

The first line printed is a JSON object with the versions and settings seen and `initial_loss`, the loss of the initial
weights with batch statistics (before any step; our engine's must agree; for derived-train with 0.4 times the auxiliary
loss). Then every repeat prints {"work", "mode", "seconds", "loss", "peak_bytes"}: loss is that of the repeat's last
forward pass, before its update; peak_bytes is the process's largest resident size so far. With --lockstep a repeat runs
for each line read from standard input until it ends, so that a driver can alternate repeats of two programs.

Work: `scoring` is a forward pass without gradients; `alpha-step` a full backward pass, weight gradients included, and
Adam on α; `weight-step` the same pass, clipping and SGD; `search-step` both; `derived-train` a training step of the
derived network. All with batch statistics. `--mode tuned` uses channels_last; its other half is the caller's
environment, which must be set before the start: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
MALLOC_TOP_PAD_=268435456.

--init names a safetensors file with every weight and α, and optionally `images` [N, 3, H, W] and `labels` [N], which
then replace the random batch. Exit code 2 with one sentence where that file or an option does not fit.

Time on a quiet machine only: the threads of PyTorch spin, so that a busy machine slows a step many times over.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "fixtures"))
import safetensors_file  # noqa: E402
from supernet import SPACES, DerivedNetwork, new_supernet, parse_genotype  # noqa: E402

ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
CLIP, AUXILIARY_WEIGHT = 5.0, 0.4
# The architecture that the DARTS paper found on CIFAR-10 with second order.
DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=range(2, 6), "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), "
    "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))"
)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Times PyTorch at the work of our benchmarks.")
    parser.add_argument("--space", choices=SPACES, default="s5")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8, help="cells; for nas-bench-201 cells per stage")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", choices=["stock", "tuned"], default="stock")
    parser.add_argument("--work", choices=Peer.works(), default="search-step")
    parser.add_argument("--genotype", default=DARTS_V2, help="of derived-train; text form")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lockstep", action="store_true", help="one repeat for each line of standard input")
    parser.add_argument("--init", help="safetensors file with weights, α and optionally images and labels")
    return parser.parse_args()


def load(network, path):
    """Fills the network's parameters from the file; returns its (images, labels), or None where it has none."""
    tensors, _ = safetensors_file.read(path)
    for name, parameter in network.named_parameters():
        if name not in tensors:
            raise ValueError(f"File '{path}' has no tensor '{name}'; write it for the same space, channels and layers.")
        if tensors[name].shape != tuple(parameter.shape):
            raise ValueError(
                f"Tensor '{name}' of file '{path}' is {list(tensors[name].shape)}, expected {list(parameter.shape)}."
            )
        parameter.data = torch.tensor(tensors[name], dtype=torch.float32)
    if "images" not in tensors or "labels" not in tensors:
        return None
    return torch.tensor(tensors["images"], dtype=torch.float32), torch.tensor(tensors["labels"], dtype=torch.int64)


class Peer:
    def __init__(self, arguments):
        torch.manual_seed(0)
        self.derived = arguments.work == "derived-train"
        sizes = (arguments.channels, arguments.layers, arguments.classes)
        if self.derived:
            self.network = DerivedNetwork(parse_genotype(arguments.genotype), *sizes)
            weights = self.network.parameters()
        else:
            self.network = new_supernet(arguments.space, *sizes)
            weights = self.network.weights().values()
            alphas = self.network.alphas().values()
        batch = load(self.network, arguments.init) if arguments.init else None
        if batch is None:
            images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size)
            batch = images, torch.randint(arguments.classes, (arguments.batch,))
        self.images, self.labels = batch
        if arguments.mode == "tuned":
            self.network.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.weights = list(weights)
        self.sgd = torch.optim.SGD(self.weights, lr=0.025, momentum=0.9, weight_decay=3e-4)
        if not self.derived:
            self.adam = torch.optim.Adam(alphas, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    @staticmethod
    def works():
        return ["search-step", "alpha-step", "weight-step", "scoring", "derived-train"]

    def loss(self):
        if not self.derived:
            return functional.cross_entropy(self.network(self.images), self.labels)
        logits, auxiliary = self.network(self.images)
        return functional.cross_entropy(logits, self.labels) + AUXILIARY_WEIGHT * functional.cross_entropy(
            auxiliary, self.labels
        )

    def scoring(self):
        with torch.no_grad():
            return self.loss().item()

    def alpha_step(self):
        self.adam.zero_grad()
        loss = self.loss()
        loss.backward()
        self.adam.step()
        return loss.item()

    def weight_step(self):
        self.sgd.zero_grad()
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.sgd.step()
        return loss.item()

    derived_train = weight_step

    def search_step(self):
        self.alpha_step()
        return self.weight_step()


def report(**line):
    print(json.dumps(line), flush=True)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    try:
        peer = Peer(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run = getattr(peer, arguments.work.replace("-", "_"))
    report(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        work=arguments.work,
        mode=arguments.mode,
        allocator={name: os.environ.get(name) for name in ALLOCATOR},
        parameters=sum(p.numel() for p in peer.weights),
        batch=list(peer.images.shape),
        initial_loss=peer.scoring(),
    )
    for _ in sys.stdin if arguments.lockstep else range(arguments.repeats):
        start = time.perf_counter()
        loss = run()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report(work=arguments.work, mode=arguments.mode, seconds=seconds, loss=loss, peak_bytes=peak)


main()
