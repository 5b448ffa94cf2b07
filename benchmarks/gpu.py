"""Log-odds steps a second on one device, by network, batch and precision, beside the device's matmul peak.

    python benchmarks/gpu.py                                                    # a GPU
    python benchmarks/gpu.py --networks squeezenet1_0 --batches 1 2 --side 64   # a toy, on the CPU

Random weights: speed only. A step is one forward and one backward of `log_odds_sum` on the accelerated network. The share of the
peak counts 2 · MACs for a forward and as many for the backward (to the pixels, not to weights). Precision float32 has TF32 off, as workers
have it; tf32 has it on; bfloat16 is torch.autocast.
"""

import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import torchvision
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from uap_dist.data.decode import Geometry
from uap_dist.method.log_odds import log_odds_sum
from uap_dist.models.accelerate import accelerate
from uap_dist.models.classifier import Classifier

PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure."""

    networks: tuple[str, ...] = ("squeezenet1_0", "resnet50", "vit_b_16", "vgg16")
    """Of torchvision."""
    batches: tuple[int, ...] = (6, 32, 128, 512)
    """Images of a block."""
    precisions: tuple[str, ...] = PRECISIONS
    """Of float32, tf32, bfloat16."""
    side: int = 224
    """Of the images."""
    min_seconds: float = 1.0
    """Each measurement takes at least."""


def main() -> None:
    """A line for each network, batch and precision."""
    options = tyro.cli(Options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, {datetime.now(UTC).date().isoformat()}\n")
    peaks = {precision: matmul_peak(device, precision, options) for precision in options.precisions}
    print(
        ", ".join(f"{precision} {peak / 1e12:.2f} TFLOP/s" for precision, peak in peaks.items()) + " (square matmuls)\n"
    )
    print(
        "| network | batch | precision | images/s | of the matmul peak | memory, MB |\n| --- | --- | --- | --- | --- | --- |"
    )
    for network in options.networks:
        classifier = make_classifier(network, device)
        flops = count_flops(classifier, options.side)
        fast = accelerate(classifier, (3, options.side, options.side))
        for batch in options.batches:
            for precision in options.precisions:
                try:
                    speed, memory = measure(fast, batch, precision, device, options)
                except torch.OutOfMemoryError:
                    print(f"| {network} | {batch} | {precision} | out of memory | | |", flush=True)
                    continue
                share = speed * flops / peaks[precision]
                print(f"| {network} | {batch} | {precision} | {speed:.1f} | {share:.0%} | {memory:.0f} |", flush=True)


def make_classifier(network: str, device: torch.device) -> Classifier:
    """With random weights."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 224} if network.startswith("vit") else {}
    made = torchvision.models.get_model(network, weights=None, **options)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Classifier(made, name=network, geometry=Geometry(), mean=mean, std=std).to(device)


def count_flops(classifier: nn.Module, side: int) -> float:
    """Of a forward and a backward to the pixels, an image."""
    x = torch.zeros(1, 3, side, side, device=next(classifier.buffers()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(x)
    return 2.0 * counter.get_total_flops()


def matmul_peak(device: torch.device, precision: str, options: Options) -> float:
    """FLOP/s of the best of some square matrix products."""
    best = 0.0
    for size in (1024, 4096, 8192) if device.type == "cuda" else (512, 1024):
        a = torch.randn(size, size, device=device)
        with in_precision(precision, device):
            seconds = seconds_of(lambda a=a: a @ a, device, options.min_seconds / 3)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
    return best


def measure(
    classifier: Classifier, batch: int, precision: str, device: torch.device, options: Options
) -> tuple[float, float]:
    """Images a second, and the peak of memory in MB (0 on the CPU)."""
    shape = (3, options.side, options.side)
    pixels = 255 * torch.rand(batch, *shape, device=device)
    labels = torch.arange(batch, device=device) % 1000
    zero = torch.zeros(shape, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with in_precision(precision, device):
        step = lambda: log_odds_sum(classifier, pixels, zero, labels, weigh=torch.ones_like)  # noqa: E731
        seconds = seconds_of(step, device, options.min_seconds)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
    return batch / seconds, memory


def in_precision(precision: str, device: torch.device) -> Any:
    """What holds while it is entered."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def seconds_of(function: Callable[[], object], device: torch.device, min_seconds: float) -> float:
    """Of one call, after one that warms up."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    function()
    synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() < started + min_seconds:
        function()
        count += 1
        synchronize()
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    main()
