"""Our `deepfool` beside foolbox's L2DeepFoolAttack: success, median norm and seconds on the first 24 sample images.

python benchmarks/deepfool.py --data ../shared
"""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import foolbox
import torch
import tyro
from networks import NETWORKS

from uap_dist.classifiers import load_classifier
from uap_dist.deepfool import deepfool
from uap_dist.shards import load_shard

NUM_IMAGES = 24


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare on these networks."""

    networks: tuple[str, ...] = ("squeezenet", "lite0")
    """Of benchmarks/networks.py."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""


def main() -> None:
    """One line for each network."""
    options = tyro.cli(Options)
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)
    for name in options.networks:
        classifier = load_classifier(*NETWORKS[name].locate(options.data))
        shard = load_shard(str(options.data / "data/imagenet-sample/train-0000.tar"), classifier.geometry)
        pixels = torch.tensor(shard.images[:NUM_IMAGES], dtype=torch.float32)
        labels = classifier(pixels).argmax(1)

        started = time.perf_counter()
        ours = deepfool(classifier, pixels, torch.zeros_like(pixels[0]), labels)
        between = time.perf_counter()
        attack = foolbox.attacks.L2DeepFoolAttack(steps=10, candidates=10, overshoot=0.02)
        _, (theirs,), success = attack(
            foolbox.PyTorchModel(classifier, bounds=(0, 255)), pixels, labels, epsilons=[None]
        )
        ended = time.perf_counter()

        assert ours.is_solved is not None
        norms = [x.flatten(1).norm(dim=1).median().item() for x in (ours.steps, theirs - pixels)]
        print(
            f"{name}: success {ours.is_solved.float().mean():.3f} (foolbox {success.float().mean():.3f}), median norm {norms[0]:.3f} "
            f"({norms[1]:.3f}, ratio {norms[0] / norms[1]:.4f}), {ours.num_evaluations / NUM_IMAGES:.1f} evaluations an image, "
            f"foolbox takes {(ended - between) / (between - started):.1f} times as long"
        )


if __name__ == "__main__":
    main()
