"""Demo shards made of photographs in packages of the `demo` extra, for a first run without downloads."""

import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from uap_dist.data.write import write_shards
from uap_dist.errors import ConfigError

SOURCES = {
    "foolbox": "data/imagenet_*.jpg",
    "sklearn": "datasets/images/*.jpg",
    "skimage": "data/*.*",
}
SKIMAGE_PHOTOGRAPHS = (
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "hubble_deep_field",
    "moon",
    "motorcycle_left",
    "rocket",
)
CROPS = (  # left and top as fractions of the free space, side as a fraction of the short side
    (0.5, 0.5, 1.0),
    (0.0, 0.0, 0.75),
    (1.0, 0.0, 0.75),
    (0.0, 1.0, 0.75),
    (1.0, 1.0, 0.75),
    (0.5, 0.5, 0.75),
    (0.25, 0.5, 0.6),
    (0.75, 0.5, 0.6),
)
HELD_OUT_EVERY = 3  # every third photograph is held out with all its crops


def write_demo_shards(folder: Path) -> tuple[list[str], list[str], int, int]:
    """Write demo shards to a folder; no photograph is in both sets.

    Returns:
        Paths of the training and of the held-out shards, and the numbers of photographs in each set.

    Raises:
        ConfigError: a package of the `demo` extra is missing.
    """
    photographs = _photographs()
    train = [path for i, path in enumerate(photographs) if i % HELD_OUT_EVERY]
    held_out = photographs[::HELD_OUT_EVERY]
    folders = []
    for prefix, paths in (("train", train), ("heldout", held_out)):
        counts = write_shards(_crops(paths), folder, prefix=f"demo-{prefix}", shard_size=48)
        folders.append([str(folder / name) for name in counts])
    return folders[0], folders[1], len(train), len(held_out)


def _photographs() -> list[Path]:
    found = []
    for package, pattern in SOURCES.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"no --train-shards, and the demo's photographs need the package {package}: pip install 'uap-dist[demo]'"
            )
        paths = sorted(Path(spec.origin).parent.glob(pattern))
        found += [p for p in paths if package != "skimage" or p.stem in SKIMAGE_PHOTOGRAPHS]
    return found


def _crops(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for number, (left, top, share) in enumerate(CROPS):
        for path in paths:
            photograph = Image.open(path).convert("RGB")
            side = round(share * min(photograph.size))
            x, y = round(left * (photograph.width - side)), round(top * (photograph.height - side))
            data = io.BytesIO()
            photograph.crop((x, y, x + side, y + side)).resize((256, 256), Image.Resampling.LANCZOS).save(data, "PNG")
            yield {"__key__": f"{path.stem}-{number}", "png": data.getvalue()}
