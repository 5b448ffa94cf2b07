"""A pool in a training loop that knows nothing of this package: torch's DataLoader, and a transform of timm's or torchvision's.

The pool is one that `uap-compute --num-perturbations` has written, or is computed here in some minutes. The demonstration's
photographs have no labels, so the network's own clean labels stand in for them: this shows where the pool goes, it defends nothing.

python examples/adversarial_training.py --help
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
import webdataset as wds
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from uap_dist import (
    AddUniversalPerturbation,
    Classifier,
    ComputeConfig,
    LocalWorkers,
    PerturbationPool,
    Worker,
    compute,
    load_classifier,
    load_dataset,
)
from uap_dist.data.demo import write_demo_shards

Transform = Callable[[Any], Tensor]


class Photographs(Dataset):
    """Images of shards with the labels that a network gives them."""

    def __init__(self, shards: list[str], num_images: int | None, transform: Transform, network: nn.Module) -> None:
        samples = wds.WebDataset(shards, shardshuffle=False).decode("pil")
        self.images = [sample["png"] for sample in samples][:num_images]
        self.transform = transform
        with torch.no_grad():
            self.labels = [int(network(transform(image)[None]).argmax()) for image in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def timm_transform(network: nn.Module, pool: PerturbationPool, probability: float) -> Transform:
    """Timm's own, with the pool between ToTensor (0..1) and Normalize."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    transform.transforms.insert(-1, AddUniversalPerturbation(pool, probability, float_range=1.0))
    return transform


def torchvision_transform(network: nn.Module, pool: PerturbationPool, probability: float) -> Transform:
    """The same by hand: the pool takes uint8 pixels here."""
    config = timm.data.resolve_model_data_config(network)
    size = config["input_size"][1]
    return v2.Compose(
        [
            v2.Resize(int(size / config["crop_pct"]), InterpolationMode(config["interpolation"])),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            AddUniversalPerturbation(pool, probability),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )


def make_pool(
    classifier: Classifier, train_shards: list[str], held_out_shards: list[str], num_images: int | None
) -> PerturbationPool:
    """Two perturbations from different seeds and starts, after a short run each."""
    workers = LocalWorkers(Worker(classifier, cache_bytes=4 << 30, num_threads=2))
    train = load_dataset(workers, train_shards, num_images=num_images)
    held_out = load_dataset(workers, held_out_shards, num_images=num_images)
    found = []
    for seed in (0, 1):
        config = ComputeConfig(max_evaluations=5 * train.num_examples, random_start=0.5, seed=seed)
        *_, last = compute(workers, train, held_out, config)
        found.append(last.perturbation)
    shared = {
        "model": classifier.name,
        "weights_digest": classifier.weights_digest,
        "norm": config.norm,
        "radius": config.ball_radius,
    }
    return PerturbationPool(torch.stack(found), shared, [{"name": f"seed-{seed}"} for seed in (0, 1)])


def train_epoch(network: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> float:
    """An ordinary epoch; the mean loss."""
    losses = []
    for images, labels in loader:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def main(
    folder: Path = Path("outputs/example"),
    pool: str | None = None,
    library: Literal["timm", "torchvision"] = "timm",
    num_images: int | None = None,
    epochs: int = 1,
) -> None:
    """Fine-tune EfficientNet-Lite0 on images of which half get a random member of a pool.

    Args:
        folder: for shards and the pool.
        pool: folder of a pool, s3://, gs:// or runs:/RUN/pool. Default: one is computed.
        library: whose transforms prepare the images.
        num_images: of the demonstration's crops; all of them where it is None.
        epochs: passes over the images.
    """
    train_shards, held_out_shards, *_ = write_demo_shards(folder / "shards")
    classifier = load_classifier("efficientnet_lite0")
    if pool is None:
        make_pool(classifier, train_shards, held_out_shards, num_images).save(folder / "pool")
    perturbations = PerturbationPool.load(pool or folder / "pool")

    network = load_classifier("efficientnet_lite0").network.requires_grad_(True)  # timm's module
    prepare = timm_transform if library == "timm" else torchvision_transform
    dataset = Photographs(train_shards, num_images, prepare(network, perturbations, 0.0), network)
    dataset.transform = prepare(network, perturbations, 0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    for epoch in range(epochs):
        loss = train_epoch(network, DataLoader(dataset, batch_size=8, shuffle=True), optimizer)
        print(f"epoch {epoch}: loss {loss:.3f} on {len(dataset)} images, half of them perturbed")
    torch.save(network.state_dict(), folder / "network.pth")


if __name__ == "__main__":
    tyro.cli(main)
