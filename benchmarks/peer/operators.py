"""The peer of our kernels: PyTorch's own operators for the work that a kernel of ours does in one pass.

    python3 benchmarks/peer/operators.py --mode tuned --threads 2      (Debian's python3-torch; driven line by line)

Every line read is a JSON object with `operator`, `pass`, `batch`, `side`, `channels` and what the operator needs; for each, one line
{"seconds", "loss", "peak_bytes"} is printed: seconds of a call, on average over as many calls as last 10 ms. Operators:

  depthwise_pointwise  ReLU, depthwise convolution (kernel, stride, dilation), pointwise convolution, batch norm
  pointwise            concatenation of `parts` inputs, ReLU, 1x1 convolution to `out` channels (stride), batch norm
  convolution          [ReLU,] dense 3x3 convolution to `out` channels, batch norm
  max_pool_3x3, avg_pool_3x3   the pool, batch norm
  mixed_sum            the weighted sum of `terms` activations

Batch norm takes the statistics of the batch and has no parameters. Our kernels leave normalising to whoever reads the result: mixed_sum
does here less, and everything before it more, than ours. Passes: forward; backward (of all inputs and weights), backward by data,
backward by weights: by autograd, from the gradient of the result.
"""

import argparse
import time

import torch
from torch import nn

from common import add_common, peak_bytes, report, requests, settings, start

LEAST_SECONDS = 0.01


class Normalised(nn.Module):
    """Some layers, then batch norm."""

    def __init__(self, channels, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, *inputs):
        return self.norm(self.layers(torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]))


class MixedSum(nn.Module):
    def __init__(self, terms):
        super().__init__()
        self.weights = nn.Parameter(torch.rand(terms))

    def forward(self, *terms):
        return sum(weight * term for weight, term in zip(self.weights, terms))


def build(case):
    """The module of a case and the shapes of its inputs."""
    name, c = case["operator"], case["channels"]
    shape = [case["batch"], c, case["side"], case["side"]]
    stride = case.get("stride", 1)
    if name == "depthwise_pointwise":
        kernel, dilation = case["kernel"], case["dilation"]
        padding = dilation * (kernel // 2)
        depthwise = nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False)
        return Normalised(c, nn.ReLU(), depthwise, nn.Conv2d(c, c, 1, bias=False)), [shape]
    if name == "pointwise":
        parts, out = case["parts"], case["out"]
        return Normalised(out, nn.ReLU(), nn.Conv2d(parts * c, out, 1, stride, bias=False)), [shape] * parts
    if name == "convolution":
        convolution = nn.Conv2d(c, case["out"], 3, padding=1, bias=False)
        return Normalised(case["out"], *([nn.ReLU()] if case["relu"] else []), convolution), [shape]
    if name == "max_pool_3x3":
        return Normalised(c, nn.MaxPool2d(3, stride, padding=1)), [shape]
    if name == "avg_pool_3x3":
        return Normalised(c, nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)), [shape]
    if name == "mixed_sum":
        return MixedSum(case["terms"]), [shape] * case["terms"]
    raise ValueError(f"Unknown operator '{name}'.")


class Operators:
    def __init__(self, arguments):
        self.tuned = arguments.mode == "tuned"
        self.request = None

    def prepare(self, request):
        torch.manual_seed(0)
        self.request = request
        which = request["pass"]
        module, shapes = build(request)
        # What no ReLU comes before is the image, which wants no gradient.
        wants_inputs = which in ("backward", "backward by data") and request.get("relu", True)
        inputs = [torch.randn(shape, requires_grad=wants_inputs) for shape in shapes]
        if self.tuned:
            module.to(memory_format=torch.channels_last)
            inputs = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad) for x in inputs]
        weights = list(module.parameters()) if which in ("backward", "backward by weights") else []
        for parameter in module.parameters():
            parameter.requires_grad_(which != "forward" and len(weights) > 0)
        if which == "forward":
            self.call = lambda: module(*inputs)
        else:
            y = module(*inputs)
            g = torch.randn_like(y)
            wanted = [x for x in inputs if x.requires_grad] + weights
            self.call = lambda: torch.autograd.grad(y, wanted, g, retain_graph=True)
        self.call()
        self.calls = max(1, int(LEAST_SECONDS / self.timed(1)))

    def timed(self, calls):
        begin = time.perf_counter()
        for _ in range(calls):
            self.call()
        return time.perf_counter() - begin

    def answer(self, request):
        if request != self.request:
            self.prepare(request)
        return self.timed(self.calls) / self.calls


def main():
    parser = argparse.ArgumentParser(description="Times PyTorch's operators at the work of our kernels.")
    add_common(parser)
    arguments = parser.parse_args()
    operators = start(Operators, arguments)
    report(**settings(arguments))
    for request in requests():
        report(seconds=operators.answer(request), loss=0, peak_bytes=peak_bytes())


main()
