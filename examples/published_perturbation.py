"""Perturbations that others published, measured on a network of one's own beside random ones of the same norms.

python examples/published_perturbation.py --help
"""

from pathlib import Path

import numpy as np
import tyro

from uap_dist import LocalWorkers, Worker, expand_patterns, load_classifier, load_dataset, load_perturbations, measure
from uap_dist.data.demo import write_demo_shards
from uap_dist.method.norms import random_of_same_norms
from uap_dist.workers.dataset import classify, fooling_rate


def write_stripes(path: Path) -> None:
    """A stand-in for a published file: stripes of ±10 pixels, 3×224×224 on the scale 0..1."""
    wave = np.sign(np.sin(np.arange(224) * 2 * np.pi / 8))
    np.save(path, np.broadcast_to(10 / 255 * wave, (3, 224, 224)).astype(np.float32))


def main(
    perturbation: str | None = None,
    model: str = "efficientnet_lite0",
    weights: str | None = None,
    shards: str | None = None,
    num_images: int | None = None,
    folder: Path = Path("outputs/example"),
) -> None:
    """Print the fooling rates of perturbations and of random ones.

    Args:
        perturbation: file, folder or zip with its unit: FILE.npy:255 for pixels, FILE.pth:1 for 0..1. Default: stripes are made.
        model: as `load_classifier` takes it: torchvision/NAME, timm/NAME, or my_network.py:factory.
        weights: file with its weights.
        shards: WebDataset tars, as 'val-*.tar'. Default: the demonstration's held-out crops.
        num_images: the first so many.
        folder: for what is made here.
    """
    if perturbation is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_stripes(folder / "stripes.npy")
        perturbation = f"{folder / 'stripes.npy'}:1"
    urls = expand_patterns([shards]) if shards else write_demo_shards(folder / "shards")[1]
    workers = LocalWorkers(Worker(load_classifier(model, weights), cache_bytes=4 << 30, num_threads=2))
    images = load_dataset(workers, urls, num_images=num_images)
    for published in load_perturbations([perturbation]):
        v = published.resized(images.shape)
        random = random_of_same_norms(v, seed=0)
        for name, shown in {
            published.name: v,
            "random, same ℓ∞ norm": random["linf"],
            "random, same ℓ2 norm": random["l2"],
        }.items():
            rate = fooling_rate(images, classify(workers, images, shown.numpy()))
            print(f"{name}: fooled {rate}; ℓ∞ {measure(shown, 'linf'):.1f}, ℓ2 {measure(shown, 'l2'):.0f} pixels")


if __name__ == "__main__":
    tyro.cli(main)
