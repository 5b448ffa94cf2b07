"""The samples of a shard: a picture each, and what may say what it shows, found by the names of the tar's files as WebDataset does."""

import re
from collections.abc import Collection, Iterator
from itertools import groupby, product
from operator import itemgetter
from pathlib import PurePosixPath

from webdataset.tariterators import base_plus_ext

from uap_dist.data.fetch import ShardFile
from uap_dist.data.tars import Member, is_compressed, read_tar
from uap_dist.errors import ShardError

IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "tif",
    "tiff",
    "avif",
)  # the first is taken where a sample has several
IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "AVIF",
    "GIF",
)  # Pillow's names; it gives others, as EPS, to programs
LABEL_EXTENSIONS = ("cls", "json")
# names that are reserved by WebDataset, and folders of attributes that pax and macOS add
RESERVED = re.compile(r"__[^/]*__($|/)|(.*/)?(__MACOSX|PaxHeaders?(\.\d+)?)/")


class Samples:
    """Samples of a shard in the order of their pictures; iterating yields the key and the picture of each.

    A sample's files need not follow each other, except that of several pictures the first group is the one that counts.

    Attributes:
        labels: files with an extension of `LABEL_EXTENSIONS`, by the key of their picture and extension: for a.png they are a.cls or
            a.png.cls; for a.image.png, if that is the only picture of a, also a.image.cls.
        unused: see `DecodedShard`.
        bad: samples without a picture, as "key: reason".

    All are complete after iteration.
    """

    def __init__(self, file: ShardFile) -> None:
        self._file, self._shard = file, f"shard {file.url}"
        self._extensions: dict[str, set[str]] = {}
        self._pictures: dict[str, list[str]] = {}
        self._label_files: dict[str, dict[str, bytes]] = {}
        self.labels: dict[str, dict[str, bytes]] = {}
        self.unused: list[str] = []
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, Member]]:
        for base, group in groupby(self._named_files(), key=itemgetter(0)):
            pictures: dict[str, Member] = {}
            seen = self._extensions.setdefault(base, set())
            for _, extension, member in group:
                if extension in seen:
                    raise ShardError(
                        f"{self._shard} holds {base}.{extension} twice; where tars are joined, their names must differ"
                    )
                seen.add(extension)
                kind = extension.rpartition(".")[2]
                if kind in IMAGE_EXTENSIONS:
                    pictures[extension] = member
                elif kind in LABEL_EXTENSIONS:
                    self._label_files.setdefault(base, {})[extension] = member.data
            for extension in self._choose(base, pictures):
                yield _key(base, extension), pictures[extension]
        self._match_labels()
        for base, extensions in self._extensions.items():
            if not self._pictures.get(base):
                listed = ", ".join(sorted(extensions))
                self.bad.append(f"{base}: no image with extension {', '.join(IMAGE_EXTENSIONS)}, only {listed}")

    def _choose(self, base: str, pictures: Collection[str]) -> list[str]:
        """Those of the pictures (by extension) of one base that are samples.

        WebDataset takes everything after the first dot of a name for its extension. If that is no image's, as in a.1.png and
        a.2.png, each file is a sample, unless the names may be those of several pictures of one sample, as in a.image.png and
        a.mask.png.
        """
        before = self._pictures.setdefault(base, [])
        plain = [extension for extension in IMAGE_EXTENSIONS if extension in pictures]
        if plain or any("." not in extension for extension in before):
            chosen = plain[:1] if not before else []
        else:
            chosen = list(pictures)
            words = [each for each in (*before, *chosen) if not re.search(r"\d", each.rpartition(".")[0])]
            if words and len(before) + len(chosen) > 1:
                first, second, *_ = (f"{base}.{each}" for each in (*before, *chosen))
                raise ShardError(
                    f"{self._shard}: {first} and {second} may be two pictures of one sample, {base}, because what follows the first "
                    f"dot of a name is its extension; leave out other dots, or name the picture that counts {base}.png or {base}.jpg"
                )
        before += chosen
        self.unused += [f"{base}.{extension}" for extension in pictures if extension not in chosen]
        return chosen

    def _match_labels(self) -> None:
        for base, files in self._label_files.items():
            pictures, used = self._pictures.get(base, []), set()
            for extension, kind in product(pictures, LABEL_EXTENSIONS):
                own = extension[: extension.rfind(".") + 1] + kind
                names = (own, f"{extension}.{kind}", *[kind] * (len(pictures) == 1))
                name = next((name for name in names if name in files), None)
                if name is not None:
                    self.labels.setdefault(_key(base, extension), {})[kind] = files[name]
                    used.add(name)
            stray = [name for name in files if name not in used and name.rpartition(".")[2] == "cls"]
            self.unused += [f"{base}.{name}" for name in stray if pictures]

    def _named_files(self) -> Iterator[tuple[str, str, Member]]:
        """Base (up to the first dot of the name) and extension of each file that belongs to a sample, and the file."""
        for member in read_tar(self._file, self._file.head, self._shard, self._file.read_at):
            path = PurePosixPath(member.name)
            is_hidden = any(part[0] == "." and part != ".." for part in path.parts) or RESERVED.match(member.name)
            base, extension = (None, None) if is_hidden else base_plus_ext(member.name)
            if base is None or extension is None:
                if is_picture(member.name) or not (is_hidden or path.suffix):
                    self.unused.append(member.name)
            elif not member.link_to:
                yield base, extension.lower(), member
            elif is_picture(member.name) or extension.lower() in LABEL_EXTENSIONS:
                self._refuse_link(member)

    def _refuse_link(self, member: Member) -> None:
        why = (
            "links in a compressed tar are not followed; decompress it"
            if is_compressed(self._file.head)
            else "which is no file before it in this tar; pack the files themselves"
        )
        raise ShardError(
            f"{self._shard}: {member.name} is a link to {member.link_to}, {why}, or pack with tar --dereference --hard-dereference"
        )


def is_picture(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _key(base: str, extension: str) -> str:
    """Key of the sample of a picture: a for a.png, a.1 for a.1.png."""
    return f"{base}.{extension}".rpartition(".")[0]
