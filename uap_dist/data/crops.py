"""Random crops of undecoded pictures, as networks for photographs are trained on."""

import io

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from uap_dist.data.decode import to_rgb
from uap_dist.data.fetch import fetch
from uap_dist.data.samples import IMAGE_FORMATS, Samples

AREA = (0.08, 1.0)  # share of the picture
RATIO = (3 / 4, 4 / 3)  # width to height
NUM_TRIALS = 10

Box = tuple[int, int, int, int]  # top, left, height, width


def read_pictures(url: str) -> tuple[dict[str, bytes], str]:
    """The bytes of each picture of a shard by the key of its sample, and SHA-256 (hex) of the shard's file.

    Raises:
        ShardError: see `fetch` and `Samples`.
    """
    file = fetch(url)
    pictures = {key: member.data for key, member in Samples(file)}
    return pictures, file.digest()


def random_resized_crop(data: bytes, seed: int, *, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """A random part of a picture, resized, and mirrored with probability 1/2: 3×H×W uint8, RGB.

    Args:
        data: a picture in any format that shards may hold.
        seed: of the draws.
        size: H and W.
        interpolation: "bilinear", "bicubic" and so on, antialiased.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.
    """
    rng = np.random.default_rng(seed)
    image = to_rgb(Image.open(io.BytesIO(data), formats=IMAGE_FORMATS))
    box = random_box(image.width, image.height, rng)
    image = F.resized_crop(image, *box, list(size), InterpolationMode(interpolation))
    view = np.asarray(image).transpose(2, 0, 1)
    return np.ascontiguousarray(view[..., ::-1] if rng.random() < 0.5 else view)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A box within width×height: its share of the area uniform in AREA, its ratio log-uniform in RATIO.

    After NUM_TRIALS boxes that do not fit it is the largest one in the centre whose ratio is in RATIO.
    """
    for _ in range(NUM_TRIALS):
        area = width * height * rng.uniform(*AREA)
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        across, down = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < across <= width and 0 < down <= height:
            top, left = rng.integers(height - down + 1), rng.integers(width - across + 1)
            return int(top), int(left), down, across
    across, down = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - down) // 2, (width - across) // 2, down, across
