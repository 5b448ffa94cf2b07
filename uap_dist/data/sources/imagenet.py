"""Sources of labelled images: an ImageFolder tree, or the tars of ILSVRC 2012."""

import io
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from posixpath import normpath
from typing import IO, Any, TypeVar
from unicodedata import normalize

import numpy as np
from PIL import Image

from uap_dist.data.samples import IMAGE_EXTENSIONS, IMAGE_FORMATS
from uap_dist.data.sources.labels import number_labels, read_label_file
from uap_dist.data.tars import NAMES, StrictHeader, check_end, is_compressed, link_target, tar_errors
from uap_dist.errors import ShardError

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceImage:
    """An encoded image in a file.

    Attributes:
        key: of its sample.
        extension: of the image format, lower case, without a dot.
        label: class index; None if it is not known.
        path: of the file.
        offset: of the image in the file, bytes.
        size: bytes; None for the whole file.
        origin: where the image comes from, for messages; empty for what path and key say.
    """

    key: str
    extension: str
    label: int | None
    path: Path
    offset: int = 0
    size: int | None = None
    origin: str = ""

    def labelled(self, label: int | None) -> "SourceImage":
        """The same image with this label."""
        return replace(self, label=label)

    @property
    def place(self) -> str:
        """File and key, for messages."""
        if self.origin:
            return self.origin
        return str(self.path) if self.size is None else f"{self.path}: {self.key}"

    def read(self) -> bytes:
        """Read the encoded image.

        Raises:
            ShardError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read() if self.size is None else file.read(self.size)
        except OSError as error:
            raise ShardError(f"cannot read {self.place}: {error.strerror}") from error


def list_folder(root: Path) -> tuple[list[SourceImage], list[str]]:
    """Images of root/CLASS/…/NAME.jpg, and the class names in the sorted order in which torchvision's ImageFolder numbers them.

    Hidden files and folders, whose names begin with a dot, are ignored. Links to folders are followed, but not those that lead to a
    folder above them.

    Raises:
        ShardError: there is no class folder, or one without an image, or a folder cannot be read.
    """
    if not root.is_dir():
        raise ShardError(f"no folder {root}")
    files = sorted(path.relative_to(root) for path in _walk(root))
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(PurePath(path.name)))
    labels = {name: label for label, name in enumerate(names)}
    pictures = _keep(files, lambda path: path, root)
    images = [
        SourceImage(_key(path.with_suffix("")), _extension(path.name), labels[path.parts[0]], root / path)
        for path in pictures
        if path.parent.parts
    ]
    if not images:
        raise ShardError(f"{root} holds no CLASS/NAME.jpg (extensions {', '.join(IMAGE_EXTENSIONS)})")
    if len(images) < len(pictures):
        logger.warning("%s: left out %d images that are in no class folder", root, len(pictures) - len(images))
    _refuse_empty(root, names, images, "folder")
    return images, names


def list_ilsvrc_train(path: Path) -> tuple[list[SourceImage], list[str]]:
    """Images of ILSVRC2012_img_train.tar, a tar with one tar per class, and the sorted WordNet ids, as networks number the classes.

    Raises:
        ShardError: it is not a tar of tars, or one of them is truncated.
    """
    found: list[tuple[tarfile.TarInfo, tarfile.TarInfo]] = []
    with _open(path) as file, _tar(file, str(path)) as tar:
        inner = _keep(_files(tar, str(path), ("tar",)), _name, path, ("tar",))
        for member in inner:
            part = tar.extractfile(member)
            assert part is not None
            name = f"{path}: {member.name}"
            with _tar(part, name) as tar_of_class:
                found += [(member, image) for image in _files(tar_of_class, name)]
    classes = [Path(member.name).stem for member in inner]
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise ShardError(f"{path} holds {twice[0]}.tar more than once; each tar in it is a class")
    classes.sort()
    labels = {name: label for label, name in enumerate(classes)}
    images = [
        _in_tar(image, labels[Path(member.name).stem], path, member.offset_data)
        for member, image in _keep(found, lambda pair: _name(pair[1]), path)
    ]
    if not images:
        raise ShardError(f"{path} holds no tars of images; expected ILSVRC2012_img_train.tar")
    _refuse_empty(path, classes, images, "tar")
    return images, classes


def list_ilsvrc_val(path: Path, labels: Path) -> tuple[list[SourceImage], list[str]]:
    """Images of ILSVRC2012_img_val.tar with the labels in a text file, and the class names.

    Args:
        path: of the tar.
        labels: text file with one line per image, `NAME LABEL`, or `LABEL` alone in the order of the sorted names. LABEL is a
            WordNet id or a class index from 0, or -1 where the class is not known. WordNet ids are numbered in their sorted order
            within the file; all 1,000 together get the numbers that networks use. The devkit's ground truth, which counts from 1
            in another order, is rejected.

    Raises:
        ShardError: tar and labels do not match.
    """
    with _open(path) as file, _tar(file, str(path)) as tar:
        members = sorted(_keep(_files(tar, str(path)), _name, path), key=lambda member: member.name)
    lines, places = read_label_file(labels)
    if len(lines) != len(members) or not members:
        raise ShardError(f"{labels} has {len(lines)} labels for the {len(members)} images of {path}")
    if len(lines[0]) == 2:
        by_name = {Path(line[0]).name: row for row, line in enumerate(lines)}
        names = [normalize("NFC", Path(member.name).name) for member in members]
        absent = next((name for name in names if name not in by_name), None)
        if absent is not None:
            raise ShardError(f"{labels} has no label for {absent}")
        rows = [by_name[name] for name in names]
        lines, places = [lines[row] for row in rows], [places[row] for row in rows]
    indices, found = number_labels([line[-1] for line in lines], places)
    known = {index for index in indices if index is not None}
    if known and (min(known), max(known)) == (1, 1000):
        raise ShardError(
            f"{labels} counts classes from 1 in the order of the devkit, which networks do not use; give WordNet ids instead"
        )
    if unknown := indices.count(None):
        logger.warning("%d of %d images have no label (-1)", unknown, len(indices))
    return [_in_tar(m, label, path) for m, label in zip(members, indices, strict=True)], found


def shuffled_samples(images: Sequence[SourceImage], seed: int) -> Iterator[dict[str, Any]]:
    """The images as WebDataset samples, shuffled with the seed; files that Pillow cannot identify are left out with a warning.

    Raises:
        ShardError: two images have the same key, a file cannot be read, or none is an image.
    """
    twice = [key for key, count in Counter(image.key for image in images).items() if count > 1]
    if twice:
        raise ShardError(
            f"{len(twice)} keys belong to two or more images each, the first {twice[0]}; rename these files"
        )
    broken: list[str] = []
    for i in np.random.default_rng(seed).permutation(len(images)):
        image = images[i]
        data = image.read()
        if _is_image(data):
            label = {} if image.label is None else {"cls": image.label}
            yield {"__key__": image.key, image.extension: data, **label}
        else:
            broken.append(image.place)
    if broken:
        logger.warning("left out %d files that Pillow cannot read as images, the first %s", len(broken), min(broken))
    if len(broken) == len(images):
        raise ShardError(f"none of the {len(images)} files is an image that Pillow can read")


def _refuse_empty(source: Path, classes: Sequence[str], images: Sequence[SourceImage], kind: str) -> None:
    empty = sorted(set(range(len(classes))) - {image.label for image in images})
    if empty:
        raise ShardError(
            f"{source}: {len(empty)} of {len(classes)} class {kind}s hold no image, the first {classes[empty[0]]}; each {kind} is a "
            "numbered class, so move away those that are not classes"
        )


def _walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Files and hidden folders in a folder and those below it; `above` are devices and inodes of the folders that it lies in."""
    try:
        status = folder.stat()
        paths = [(path, path.is_dir()) for path in folder.iterdir()]
    except OSError as error:
        raise ShardError(f"cannot read the folder {folder}: {error.strerror}") from error
    place = (status.st_dev, status.st_ino)
    if place in above:
        logger.warning("left out %s, a link to a folder that it lies in", folder)
        return
    for path, is_folder in paths:
        if is_folder and not path.name.startswith("."):
            yield from _walk(path, above | {place})
        else:
            yield path


def _is_image(data: bytes) -> bool:
    """Whether Pillow recognises the header."""
    try:
        Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).close()
    except Exception:  # on damaged files Pillow's parsers raise errors of many types
        return False
    return True


def _keep(
    items: Sequence[T],
    name: Callable[[T], PurePath],
    source: Path,
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
) -> list[T]:
    """The items that are not hidden and have one of these extensions; the number of others is logged."""
    hidden = [item for item in items if _is_hidden(name(item))]
    visible = [item for item in items if not _is_hidden(name(item))]
    others = [item for item in visible if _extension(name(item).name) not in extensions]
    for left_out, why in (
        (hidden, "hidden files (names or folders that begin with a dot)"),
        (others, f"files without extension {', '.join(extensions)}"),
    ):
        if left_out:
            logger.warning("%s: left out %d %s, the first %s", source, len(left_out), why, name(left_out[0]))
    return [item for item in visible if _extension(name(item).name) in extensions]


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from error
    with file:
        yield file


@contextmanager
def _tar(file: IO[bytes], name: str) -> Iterator[tarfile.TarFile]:
    head = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    if is_compressed(head):
        raise ShardError(f"{name} is compressed; decompress it first")
    with tar_errors(head, name), tarfile.open(fileobj=file, mode="r:", tarinfo=StrictHeader, **NAMES) as tar:
        yield tar


def _files(tar: tarfile.TarFile, name: str, extensions: Collection[str] = IMAGE_EXTENSIONS) -> list[tarfile.TarInfo]:
    """Files of a tar; of links, those to a file before them, as files with the content of that."""
    files: list[tarfile.TarInfo] = []
    by_name: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.islnk() or member.issym():
            target = by_name.get(link_target(member))
            if target is not None:
                member.type, member.offset_data, member.size = target.type, target.offset_data, target.size
            elif _extension(member.name) in extensions and not _is_hidden(_name(member)):
                raise ShardError(
                    f"{name}: {member.name} is a link to {member.linkname}, which is no file before it in this tar; pack the files "
                    "themselves, or pack with tar --dereference --hard-dereference"
                )
        if member.issparse():
            raise ShardError(f"{name}: {member.name} is stored without its holes; pack without tar --sparse")
        if member.isfile():
            by_name[normpath(member.name)] = member
            files.append(member)
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset + tarfile.BLOCKSIZE)
    check_end(tar.fileobj.read)
    return files


def _name(member: tarfile.TarInfo) -> PurePath:
    return PurePosixPath(member.name)


def _in_tar(member: tarfile.TarInfo, label: int | None, path: Path, offset: int = 0) -> SourceImage:
    name = Path(member.name)
    return SourceImage(
        _key(Path(name.stem)), _extension(name.name), label, path, offset + member.offset_data, member.size
    )


def _key(path: Path) -> str:
    """A sample's key; it has no dots because WebDataset takes everything after the first dot for the extension."""
    return "_".join(path.parts).replace(".", "_")


def _extension(name: str) -> str:
    return Path(name).suffix.lstrip(".").lower()
