"""Our DeepFool beside other libraries', the bound, saturated images, and what leaving candidates out changes: benchmarks/deepfool.md.

    pip install -e '.[bench]'
    pip install --no-deps torchattacks adv-lib      # they pin or need what others cannot live with
    python benchmarks/deepfool.py                   # about 25 minutes on one core

One thread, the same images, ten candidates, at most ten iterations, overshoot 0.02. Libraries that look at all classes are
shown a network of the ten candidates of each image, image by image; ART too. A library that is not installed is left out.
"""

import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import tyro
from comparison.attacks import BLOCK, Attack, Counting, Narrow, attacks, by_foolbox, ours
from networks import NETWORKS, Network
from torch import Tensor, nn

from uap_dist.data.decode import load_shard
from uap_dist.data.patterns import expand_patterns
from uap_dist.method.deepfool import SLOPE_RATIO, Nearest, deepfool, find_nearest
from uap_dist.method.log_odds import log_odds_sum
from uap_dist.models.accelerate import accelerate
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier
from uap_dist.workers.reproducible import set_up_torch

BATCHES = (1, 2, 6, 12, 24)  # of which the best makes the bound
ON_THE_BOUNDARY = 1e-4  # logits


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare."""

    networks: tuple[str, ...] = ("squeezenet", "lite0", "resnet20")
    """Of benchmarks/networks.py."""
    num_images: int = 24
    """That every library attacks."""
    num_art_images: int = 4
    """That ART attacks at once as its users have it attack, without help; 0 leaves this out."""
    num_choices: int = 48
    """Images whose every step is taken with and without leaving candidates out."""
    num_saturated: int = 48
    """Most and least saturated images of all shards that ours and foolbox attack; 0 leaves them out."""
    saturated_only: bool = False
    """Leave out all but saturated images and the affine classifier: nothing is timed, so other work may run beside it."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""


def main() -> None:
    """A table for each network."""
    options = tyro.cli(Options)
    warnings.simplefilter("ignore")
    report_affine()
    for name in options.networks:
        plain = load_classifier(*NETWORKS[name].locate(options.data))
        pixels = load_pixels(NETWORKS[name].train, plain, options.data, max(options.num_images, options.num_choices))
        set_up_torch(1)
        fast = accelerate(plain, pixels.shape[1:])
        labels = torch.cat([plain(x).argmax(1) for x in pixels.split(24)])
        few = slice(options.num_images)
        print(f"\n{name}:\n")
        if not options.saturated_only:
            forward, backward = time_network(fast, pixels[few])
            compare_attacks(plain, fast, pixels[few], labels[few], forward, backward)
            if options.num_art_images:
                report_art(plain, fast, pixels[: options.num_art_images], labels[: options.num_art_images])
            report_default_rule(plain, fast, pixels[few], labels[few], forward + backward)
            report_choices(fast, pixels, labels)
        if options.num_saturated:
            report_saturated(plain, fast, load_everything(NETWORKS[name], plain, options.data), options.num_saturated)


def load_pixels(pattern: str, classifier: Classifier, data: Path, count: int) -> Tensor:
    """The first images of the shards, N×3×H×W."""
    urls = expand_patterns([str(data / pattern)])
    images: list[np.ndarray] = []
    for url in urls:
        if sum(map(len, images)) < count:
            images.append(load_shard(url, classifier.geometry).images)
    return torch.tensor(np.concatenate(images)[:count], dtype=torch.float32)


def load_everything(network: Network, classifier: Classifier, data: Path) -> Tensor:
    """Training and held-out images: nothing is learnt from them here. N×3×H×W."""
    return torch.cat([load_pixels(pattern, classifier, data, sys.maxsize) for pattern in (network.train, network.val)])


def time_network(classifier: Classifier, pixels: Tensor) -> tuple[float, float]:
    """Seconds an image of a forward and of a backward alone, each at its best batch."""
    forward, backward = [], []
    for size in BATCHES:
        for x in [pixels[:size]] * 3:
            x = x.clone().requires_grad_()
            started = time.perf_counter()
            loss = classifier(x).logsumexp(1).sum()
            between = time.perf_counter()
            torch.autograd.grad(loss, x)
            forward.append((between - started) / len(x))
            backward.append((time.perf_counter() - between) / len(x))
    return min(forward), min(backward)


def compare_attacks(
    plain: Classifier,
    fast: Classifier,
    pixels: Tensor,
    labels: Tensor,
    forward: float,
    backward: float,
) -> None:
    """Ours and the other libraries', each on the network as its users have it."""
    print("| | s an image | success | median norm | evaluations an image | bound, s | of the bound | ours is faster |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    reference = 0.0
    count = len(pixels)
    for name, attack in attacks():
        counting = Counting(fast if name.startswith("ours") else plain)
        started = time.perf_counter()
        found = attack(counting, pixels, labels)
        seconds = (time.perf_counter() - started) / count
        reference = reference or seconds
        with torch.no_grad():
            success = is_solved(plain(found), labels).float().mean()
        norm = (found - pixels).flatten(1).norm(dim=1).median()
        bound = (counting.num_forward * forward + counting.num_backward * backward) / count
        evaluations = (counting.num_forward + counting.num_backward) / count
        print(
            f"| {name} | {seconds:.2f} | {success:.3f} | {norm:.1f} | {evaluations:.1f} | {bound:.2f} "
            f"| {seconds / bound:.2f} | {seconds / reference:.1f} |",
            flush=True,
        )


def report_affine() -> None:
    """Images of which a share of the values is 0 or 255, attacked on ten classes with affine boundaries by ours and foolbox's."""
    rng = torch.Generator().manual_seed(0)
    normals = torch.randn(10, 768, generator=rng)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    network.load_state_dict({"1.weight": normals, "1.bias": -128 * normals.sum(1)})
    print(
        "\naffine, 200 random images:\n\n| values at 0 or 255 | solved | median norm | evaluations | foolbox: solved | norm |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for share in (0.0, 0.05, 0.2, 0.5, 0.9, 1.0):
        pixels = 255 * torch.rand(200, 3, 16, 16, generator=rng)
        edges = 255.0 * torch.randint(0, 2, pixels.shape, generator=rng)
        pixels = torch.where(torch.rand(pixels.shape, generator=rng) < share, edges, pixels)
        cells = [cell for attack in (ours, by_foolbox) for cell in summarise(network, attack, pixels)]
        print(f"| {share:.0%} | {' | '.join(cells[:-1])} |", flush=True)


def report_saturated(plain: Classifier, fast: Classifier, pixels: Tensor, count: int) -> None:
    """The images with most and with fewest values at 0 or 255, attacked by ours and foolbox's."""
    shares = ((pixels == 0) | (pixels == 255)).flatten(1).float().mean(1)
    order = shares.argsort(descending=True, stable=True)
    print("\n| images | values at 0 or 255 | | solved | median norm | evaluations an image |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, rows in (("most saturated", order[:count]), ("least saturated", order[-count:])):
        for who, attack, network in (("ours", ours, fast), ("foolbox", by_foolbox, plain)):
            cells = summarise(network, attack, pixels[rows])
            few, many = shares[rows].min(), shares[rows].max()
            print(f"| {count} {name} | {few:.1%} to {many:.1%} | {who} | {' | '.join(cells)} |", flush=True)


def summarise(network: nn.Module, attack: Attack, pixels: Tensor) -> tuple[str, str, str]:
    """Solved images (another label, nothing less), median ℓ2 norm over all, evaluations an image."""
    with torch.no_grad():
        labels = torch.cat([network(x).argmax(1) for x in pixels.split(24)])
    counting = Counting(network)
    found = torch.cat([attack(counting, x, y) for x, y in zip(pixels.split(24), labels.split(24), strict=True)])
    with torch.no_grad():
        after = torch.cat([network(x).argmax(1) for x in found.split(BLOCK)])
    norm = (found - pixels).flatten(1).norm(dim=1).median()
    evaluations = (counting.num_forward + counting.num_backward) / len(pixels)
    return f"{int((after != labels).sum())} of {len(pixels)}", f"{norm:.2f}", f"{evaluations:.1f}"


def is_solved(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether another logit is above the label's, or as high: where a step ends on the boundary, rounding decides."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).max(1).values > own - ON_THE_BOUNDARY


def report_art(plain: Classifier, fast: Classifier, pixels: Tensor, labels: Tensor) -> None:
    """ART with ten candidates of all classes, several images in one call, beside ours on the same images."""
    from art.attacks.evasion import DeepFool
    from art.estimators.classification import PyTorchClassifier

    count, shape = plain(pixels[:1]).shape[1], tuple(pixels.shape[1:])
    network = Narrow(plain, torch.arange(count))
    estimator = PyTorchClassifier(network, nn.CrossEntropyLoss(), shape, count, clip_values=(0, 1), device_type="cpu")
    attack = DeepFool(estimator, max_iter=10, epsilon=0.02, nb_grads=min(10, count), verbose=False)
    started = time.perf_counter()
    found = 255 * torch.tensor(attack.generate((pixels / 255).numpy()))
    between = time.perf_counter()
    by_us = ours(fast, pixels, labels)
    ended = time.perf_counter()
    norms = [(images - pixels).flatten(1).norm(dim=1).median() for images in (found, by_us)]
    success = is_solved(plain(found), labels).float().mean()
    print(
        f"\nART without help, {len(pixels)} images in one call: {(between - started) / len(pixels):.1f} s an image, "
        f"{(between - started) / (ended - between):.0f} times as long as ours; success {success:.2f}, "
        f"median norm {norms[0]:.1f} (ours {norms[1]:.1f}).",
        flush=True,
    )


def report_default_rule(
    plain: Classifier, fast: Classifier, pixels: Tensor, labels: Tensor, evaluations_s: float
) -> None:
    """One log-odds step an image in blocks, beside a forward and a backward alone."""
    zero, seconds = torch.zeros_like(pixels[0]), {}
    for name, network in (("accelerated", fast), ("as loaded", plain)):
        repeats = []
        for _ in range(3):
            started = time.perf_counter()
            for x, y in zip(pixels.split(BLOCK), labels.split(BLOCK), strict=True):
                log_odds_sum(network, x, zero, y, weigh=torch.ones_like)
            repeats.append((time.perf_counter() - started) / len(pixels))
        seconds[name] = min(repeats)
    print(
        f"\nOne log-odds step: {1e3 * seconds['accelerated']:.1f} ms an image, {seconds['accelerated'] / evaluations_s:.2f} of one forward "
        f"and one backward alone; {seconds['as loaded'] / seconds['accelerated']:.2f} times as fast as on the network as it was loaded."
    )


def report_choices(classifier: Classifier, pixels: Tensor, labels: Tensor) -> None:
    """How often leaving candidates out changes which boundary is the nearest, and what that does to the norms."""
    same: list[Tensor] = []
    costs = {"few": 0, "all": 0}

    def both(*arguments: object) -> Nearest:
        few, whole = find_nearest(*arguments), find_nearest(*arguments[:-1], torch.inf)  # type: ignore[arg-type]
        same.append((few.rivals == whole.rivals)[whole.rivals >= 0])
        costs["few"] += few.num_evaluations
        costs["all"] += whole.num_evaluations
        return replace(whole, slopes=few.slopes, num_evaluations=few.num_evaluations)  # on along the exact path

    blocks = [(x, y) for x, y in zip(pixels.split(BLOCK), labels.split(BLOCK), strict=True)]
    zero = torch.zeros_like(pixels[0])
    norms = [
        torch.cat([deepfool(classifier, x, zero, y, slope_ratio=r).steps.flatten(1).norm(dim=1) for x, y in blocks])
        for r in (SLOPE_RATIO, torch.inf)
    ]
    with patch.object(sys.modules[deepfool.__module__], "find_nearest", both):
        for x, y in blocks:
            deepfool(classifier, x, zero, y)
    chosen = torch.cat(same)
    print(
        f"Leaving candidates out, {len(pixels)} images: the same boundary in {int(chosen.sum())} of {len(chosen)} steps, "
        f"{costs['all'] / costs['few']:.1f} times fewer evaluations in them; median norm {norms[0].median():.3f} against "
        f"{norms[1].median():.3f} (ratio {norms[0].median() / norms[1].median():.4f}).",
        flush=True,
    )


if __name__ == "__main__":
    main()
