"""Images a second from JPEG bytes to the classifier's 224×224 pixels, by decoder, and whether the pixels are Pillow's.

    pip install -e '.[bench]'
    python benchmarks/decoding.py        # a minute; benchmarks/overhead.md has the table

One thread, the photographs of the data as ImageNet has them (about 500×400). Every decoder's picture is resized and cropped by the same
Pillow code, as shards.py does it. A decoder that is not installed is left out.
"""

import io
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torchvision.transforms import functional as F

RESIZE, CROP = 256, 224
EXIF_ORIENTATION = 274
Decoder = Callable[[bytes], np.ndarray]  # H×W×3 uint8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure."""

    repeats: int = 3
    """Of which the best counts."""
    tar: Path = Path("../shared/data/imagenet-original/original-0000.tar")
    """Shard of JPEGs."""


def pillow(data: bytes) -> np.ndarray:
    """As shards.py."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def torchvision_io(data: bytes) -> np.ndarray:
    """Libjpeg-turbo, of torchvision."""
    from torchvision.io import ImageReadMode, decode_jpeg

    tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return tensor.permute(1, 2, 0).numpy()


def simplejpeg(data: bytes) -> np.ndarray:
    """Libjpeg-turbo, of simplejpeg."""
    import simplejpeg

    return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)


def torchcodec(data: bytes) -> np.ndarray:
    """Of torchcodec."""
    from torchcodec.decoders import decode_image

    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()


def main() -> None:
    """A line for each decoder."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    with tarfile.open(options.tar) as tar:
        files = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    opened = [Image.open(io.BytesIO(data)) for data in files]  # some decoders turn pictures as EXIF says, some do not
    files = [
        f
        for f, image in zip(files, opened, strict=True)
        if image.mode == "RGB" and image.getexif().get(EXIF_ORIENTATION, 1) == 1
    ]
    reference = [pillow(data) for data in files]
    print(f"{len(files)} photographs, {np.mean([len(data) for data in files]) / 1024:.0f} KiB each\n")
    print("| decoder | decoded, images/s | to 224×224, images/s | pictures with Pillow's pixels | largest difference |")
    print("| --- | --- | --- | --- | --- |")
    for decode in (pillow, torchvision_io, simplejpeg, torchcodec):
        try:
            pictures = [decode(data) for data in files]
        except (ImportError, RuntimeError) as error:
            print(f"| {decode.__name__} | not usable: {str(error).splitlines()[0][:60]} | | | |")
            continue
        differences = [int(np.abs(a.astype(int) - b).max()) for a, b in zip(pictures, reference, strict=True)]
        alone = min(timed(lambda d=decode: [d(data) for data in files]) for _ in range(options.repeats))  # type: ignore[misc]
        whole = min(timed(lambda d=decode: [crop(d(data)) for data in files]) for _ in range(options.repeats))  # type: ignore[misc]
        print(
            f"| {decode.__name__} | {len(files) / alone:.0f} | {len(files) / whole:.0f} "
            f"| {differences.count(0)} of {len(files)} | {max(differences)} |",
            flush=True,
        )


def crop(picture: np.ndarray) -> np.ndarray:
    """Short side to 256, then the centre."""
    image = F.center_crop(F.resize(Image.fromarray(picture), RESIZE), CROP)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
