"""Images a second from the bytes of shards to the classifier's 224×224 pixels: by number of threads, and by decoder.

    python benchmarks/decoding.py                      # threads; a minute
    pip install -e '.[bench]'
    python benchmarks/decoding.py --compare decoders   # a minute; benchmarks/overhead.md has the table
    python benchmarks/decoding.py --compare start      # a few minutes: what stands between decoding and a job's first round

*Threads*: whole shards as a worker decodes them (`decode_shard`), read from the page cache. *Decoders*: one thread, and whether
the pixels are Pillow's; every decoder's picture is resized and cropped by the same Pillow code, as decode.py does it. A decoder
that is not installed is left out. *Start*: all training images decoded in this process by as many threads as there are CPUs, and
how long jobs/compute.py with a network that costs nothing takes from its start to its first round on the same images.
"""

import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import mlflow
import numpy as np
import torch
import tyro
from PIL import Image
from torchvision.transforms import functional as F

from uap_dist.data.decode import Geometry, decode_shard
from uap_dist.data.fetch import fetch

ROOT = Path(__file__).resolve().parents[1]
RESIZE, CROP = 256, 224
GEOMETRY = Geometry(RESIZE, CROP)
EXIF_ORIENTATION = 274
NUM_COPIES = 16  # of 62 photographs
Decoder = Callable[[bytes], np.ndarray]  # H×W×3 uint8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure."""

    compare: Literal["threads", "decoders", "start"] = "threads"
    """What is compared."""
    repeats: int = 3
    """Of which the best counts."""
    data: Path = Path("../shared/data")
    """Folder with the shards of photographs."""
    model: str = f"{ROOT}/benchmarks/free.py:at_224"
    """Start: network of the job; another one shows its clean labels, too."""
    weights: str | None = None
    """Of that network."""
    train: str = "imagenette/train-*.tar"
    """Start: training shards in the folder."""
    val: str = "imagenette/val-*.tar"
    """Start: held-out shards, which are read behind the rounds."""


def main() -> None:
    """A line for each number of threads, each decoder or each repeat."""
    options = tyro.cli(Options)
    {"threads": compare_threads, "decoders": compare_decoders, "start": compare_start}[options.compare](options)


def compare_threads(options: Options) -> None:
    """A table for photographs as ImageNet has them, and one for small ones."""
    with TemporaryDirectory() as folder:
        many = Path(folder) / "many.tar"
        repeat(options.data / "imagenet-original/original-0000.tar", many)
        for what, paths in (
            ("photographs of ImageNet's size", [many]),
            ("photographs of 224×224", sorted(options.data.glob("imagenette/train-000[0-2].tar"))),
        ):
            print(f"{what}, {os.cpu_count()} CPUs\n\n| threads | images/s | times one thread |\n| --- | --- | --- |")
            speeds = measure_speeds(paths, options.repeats)
            for count, speed in speeds.items():
                print(f"| {count} | {speed:.0f} | {speed / speeds[1]:.2f} |")
            print(flush=True)


def repeat(path: Path, target: Path) -> None:
    """Write a shard whose samples are those of another one, under new keys, until they are as many as a shard commonly has."""
    with tarfile.open(path) as tar, tarfile.open(target, "w") as out:
        members = [(member, tar.extractfile(member).read()) for member in tar if member.isfile()]  # type: ignore[union-attr]
        for copy in range(NUM_COPIES):
            for member, data in members:
                info = tarfile.TarInfo(f"{copy}-{Path(member.name).name}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))


def measure_speeds(paths: list[Path], repeats: int) -> dict[int, float]:
    """Images a second by number of threads, from 1 to twice the CPUs, in turn because other load comes and goes."""

    def decode(num_threads: int) -> int:
        return sum(len(decode_shard(fetch(str(path)), GEOMETRY, num_threads=num_threads).keys) for path in paths)

    num_cpus, num_images = os.cpu_count() or 1, decode(1)
    counts = sorted({1, 2, num_cpus, 2 * num_cpus})
    rounds = [[timed(partial(decode, count)) for count in counts] for _ in range(repeats)]
    return {count: num_images / min(seconds) for count, seconds in zip(counts, zip(*rounds, strict=True), strict=True)}


def pillow(data: bytes) -> np.ndarray:
    """As decode.py."""
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


def compare_decoders(options: Options) -> None:
    """A line for each decoder, of the upright RGB photographs of ImageNet's size."""
    torch.set_num_threads(1)
    with tarfile.open(options.data / "imagenet-original/original-0000.tar") as tar:
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


def compare_start(options: Options) -> None:
    """A line for each repeat: decoding alone, then a job."""
    paths, num_threads = sorted(options.data.glob(options.train)), os.cpu_count() or 1
    print(f"{num_threads} CPUs\n")
    print("| training images | decoded alone, s | a job's first round begins after, s | beyond 1.2 times decoding, s |")
    print("| --- | --- | --- | --- |")
    for _ in range(options.repeats):
        started = time.perf_counter()
        num_images = sum(len(decode_shard(fetch(str(p)), GEOMETRY, num_threads=num_threads).keys) for p in paths)
        alone = time.perf_counter() - started
        first = seconds_to_first_round(options, num_images)
        print(f"| {num_images:,} | {alone:.1f} | {first:.1f} | {first - 1.2 * alone:.1f} |", flush=True)


def seconds_to_first_round(options: Options, num_images: int) -> float:
    """From the start of a job's process, by what MLflow was told and when."""
    with TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/mlflow.db"
        mlflow.MlflowClient(store).search_experiments()  # makes its tables, which would else be in the job's time
        words = [sys.executable, str(ROOT / "jobs/compute.py"), "--model", options.model, "--output", "out"]
        words += ["--weights", str(Path(options.weights).resolve())] if options.weights else []
        for name, pattern in (("--train-shards", options.train), ("--val-shards", options.val)):
            words += [name, str(options.data.resolve() / pattern)]
        words += ["--num-val-images", "100", "--max-evaluations", str(num_images + 600)]
        started = time.time()
        subprocess.run(words, cwd=folder, check=True, capture_output=True, env=os.environ | {"MLFLOW_TRACKING_URI": ""})
        client = mlflow.MlflowClient(store)
        experiment = client.get_experiment_by_name("uap_dist")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        first = client.get_metric_history(run.info.run_id, "round/seconds")[0]
        return first.timestamp / 1000 - first.value - started


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
