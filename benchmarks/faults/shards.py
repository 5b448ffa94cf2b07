"""Small shards of coloured noise, and the options that give them to a job."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from uap_dist.data import write


def shard_options(folder: Path) -> tuple[str, ...]:
    """What gives a job the shards that `write_shards` has written."""
    return "--train-shards", f"{folder}/train-*.tar", "--val-shards", f"{folder}/val-*.tar"


def write_shards(folder: Path, *, broken_image: bool = False) -> None:
    """47 training and 20 held-out images of coloured noise, the broken one beside them."""
    folder.mkdir(exist_ok=True)
    for prefix, count, seed in (("train", 47, 1), ("val", 20, 2)):
        rng, samples = np.random.default_rng(seed), []
        for i in range(count):
            colour = rng.integers(0, 256, size=3)
            pixels = np.clip(colour + rng.normal(0, 40, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            samples.append({"__key__": f"{prefix}-{i:03d}", "png": file.getvalue(), "cls": int(colour.argmax())})
        if broken_image and prefix == "train":
            samples.append({"__key__": "broken", "png": b"no image", "cls": 0})
        write.write_shards(samples, folder, prefix=prefix, shard_size=20)
