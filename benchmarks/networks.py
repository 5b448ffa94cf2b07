"""The networks and data of the benchmarks, as they lie in one folder (../shared; its README says where they come from)."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network with its shards, relative to the data's folder; `tune_shards` of the training ones serve to compute from when tuning."""

    model: str
    weights: str | None
    train: str
    val: str
    num_train_images: int
    num_val_images: int
    tune_shards: int

    def locate(self, data: Path) -> tuple[str, str | None]:
        """Model and weights as `load_classifier` takes them."""
        model = str(data / self.model) if self.model.split(":")[0].endswith(".py") else self.model
        return model, None if self.weights is None else str(data / self.weights)


_IMAGENET = {
    "train": "data/imagenet-sample/train-*.tar",
    "val": "data/imagenet-sample/heldout-*.tar",
    "num_train_images": 500,
    "num_val_images": 500,
    "tune_shards": 4,
}

_CIFAR = {
    "train": "data/cifar10/train-*.tar",
    "val": "data/cifar10/test-*.tar",
    "num_train_images": 1000,
    "num_val_images": 2000,
    "tune_shards": 1,
}

NETWORKS = {
    "squeezenet": Network(model="torchvision/squeezenet1_0", weights="models/squeezenet1_0.safetensors", **_IMAGENET),
    **{f"lite{n}": Network(model=f"efficientnet_lite{n}", weights=None, **_IMAGENET) for n in range(3)},
    **{
        f"resnet{n}": Network(
            model=f"models/cifar_resnet.py:resnet{n}", weights=f"models/resnet{n}.safetensors", **_CIFAR
        )
        for n in (20, 32, 44, 56)
    },
}
