"""Labelled images as people have them: an ImageFolder tree, or the tars of ILSVRC 2012."""

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uap_dist.errors import ShardError
from uap_dist.shards import IMAGE_EXTENSIONS


@dataclass(frozen=True)
class SourceImage:
    """An image as a range of bytes in a file (size None: the whole file), its key and class index."""

    key: str
    extension: str
    label: int
    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The encoded image."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


def list_folder(root: Path) -> tuple[list[SourceImage], list[str]]:
    """Images of root/CLASS/…/NAME.jpg, and the class names in sorted order, as torchvision's ImageFolder numbers them.

    Raises:
        ShardError: no class folder, or no image.
    """
    if not root.is_dir():
        raise ShardError(f"no folder {root}")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    images = [
        SourceImage(_key(path.relative_to(root).with_suffix("")), _extension(path.name), label, path)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if _extension(path.name) in IMAGE_EXTENSIONS
    ]
    if not images:
        raise ShardError(f"{root} holds no CLASS/NAME.jpg (extensions {', '.join(IMAGE_EXTENSIONS)})")
    return images, classes


def list_ilsvrc_train(path: Path) -> tuple[list[SourceImage], list[str]]:
    """Images of ILSVRC2012_img_train.tar, a tar of one tar a class; classes are its sorted WordNet ids, as networks number them.

    Raises:
        ShardError: it is no tar of tars.
    """
    inner = [member for member in _members(path) if member.name.endswith(".tar")]
    classes = sorted(Path(member.name).stem for member in inner)
    images: list[SourceImage] = []
    for member in inner:
        label = classes.index(Path(member.name).stem)
        images += [_in_tar(image, label, path) for image in _members(path, member.offset_data)]
    if not images:
        raise ShardError(f"{path} holds no tars of images; expected ILSVRC2012_img_train.tar")
    return images, classes


def list_ilsvrc_val(path: Path, labels: Path) -> tuple[list[SourceImage], list[str]]:
    """Images of ILSVRC2012_img_val.tar with the labels of a text file.

    Args:
        path: the tar.
        labels: one line an image, `NAME LABEL`, or `LABEL` alone in the order of the sorted names; LABEL is a WordNet id
            (numbered among those of the file, sorted: all 1,000 give the networks' numbers) or a class index from 0. The
            devkit's ground truth counts from 1 in an order of its own and is refused.

    Raises:
        ShardError: tar and labels do not fit.
    """
    members = sorted(_members(path), key=lambda member: member.name)
    try:
        lines = [line.split() for line in labels.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ShardError(f"cannot read {labels}: {error.strerror}") from error
    odd = next((line for line in lines if len(line) != len(lines[0]) or len(line) > 2), None)
    if odd is not None:
        raise ShardError(f"{labels}: line {' '.join(odd)!r} is not `NAME LABEL`, nor `LABEL` as all the others")
    if len(lines) != len(members) or not members:
        raise ShardError(f"{labels} has {len(lines)} labels for the {len(members)} images of {path}")
    by_name = {Path(line[0]).name: line[1] for line in lines} if len(lines[0]) == 2 else None
    names = [Path(member.name).name for member in members]
    try:
        chosen = [by_name[name] for name in names] if by_name is not None else [line[0] for line in lines]
    except KeyError as error:
        raise ShardError(f"{labels} has no label for {error.args[0]}") from error
    if all(label.isdigit() for label in chosen):
        indices = [int(label) for label in chosen]
        if min(indices) == 1 and max(indices) == 1000:
            raise ShardError(
                f"{labels} counts classes from 1, as the devkit does in an order of its own; give WordNet ids instead"
            )
        found = [str(i) for i in range(max(indices) + 1)]
    else:
        found = sorted(set(chosen))
        indices = [found.index(label) for label in chosen]
    return [_in_tar(m, label, path) for m, label in zip(members, indices, strict=True)], found


def shuffled_samples(images: Sequence[SourceImage], seed: int) -> Iterator[dict[str, Any]]:
    """The images as WebDataset samples in an order that depends on the seed only.

    Raises:
        ShardError: two images with one key.
    """
    twice = [key for key, count in Counter(image.key for image in images).items() if count > 1]
    if twice:
        raise ShardError(f"{len(twice)} keys stand for two images each, the first {twice[0]}; rename these files")
    for i in np.random.default_rng(seed).permutation(len(images)):
        image = images[i]
        yield {"__key__": image.key, image.extension: image.read(), "cls": image.label}


def _members(path: Path, offset: int = 0) -> list[tarfile.TarInfo]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                return [member for member in tar if member.isfile()]
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"cannot read {path} as a tar: {error}") from error


def _in_tar(member: tarfile.TarInfo, label: int, path: Path) -> SourceImage:
    name = Path(member.name)  # the offsets of a tar inside a tar count from the outer one's start
    return SourceImage(_key(Path(name.stem)), _extension(name.name), label, path, member.offset_data, member.size)


def _key(path: Path) -> str:
    """A sample's key: WebDataset takes what follows the first dot for the extension."""
    return "_".join(path.parts).replace(".", "_")


def _extension(name: str) -> str:
    return Path(name).suffix.lstrip(".").lower()
