"""Reading tar files strictly: truncation and damage, which `tarfile` silently takes for the end of a tar, are errors here."""

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from posixpath import dirname, join, normpath
from typing import Any, Self

from uap_dist.errors import ShardError

READ_SIZE = 1 << 20
NUM_BYTES_SHOWN = 24
OPENERS: Mapping[bytes, Callable[[Any], Any]] = {  # by the first bytes, because extensions of downloads are unreliable
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9]1AY&SY": bz2.open,
    rb"\xfd7zXZ\0|\x5d\0\0\x80": lzma.open,
}
NAMES: Mapping[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}


Place = tuple[int, int]


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        name: within the tar.
        data: its content, for a link that of its target; empty if that is not known.
        link_to: target of a link whose content is not known; empty otherwise.
        place: offset and size of the content in the file; None in a compressed tar, and for a sparse member.
    """

    name: str
    data: bytes
    link_to: str = ""
    place: Place | None = None


class EndOfFile(EOFError):
    """The file ends where a header or a block of zeros may follow."""


class StrictHeader(tarfile.TarInfo):
    """A member's header that raises on truncation or damage; after the first member, `tarfile` takes either for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See `tarfile.TarInfo.frombuf`; raises EndOfFile if the file ends here, ReadError if this is not a header."""
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data") if any(buf) else EndOfFile
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(str(error)) from error
            raise  # a block of zeros, the end of a tar


def read_tar(stream: Any, head: bytes, name: str, read_at: Callable[[int, int], bytes]) -> Iterator[Member]:
    """Files and links of a tar in their order; it may be compressed (gzip, bzip2, xz), and be several that were joined.

    Args:
        stream: a binary file at its start, of which only `read` is used, up to its end.
        head: its first block.
        name: of the file, for error messages.
        read_at: reads from an offset of the file so many bytes: links to members before them are followed in a tar that is not
            compressed.

    Raises:
        ShardError: it is truncated, damaged or not a tar, or what follows its end mark is no tar.
    """
    opener = _opener(head)
    places: dict[str, Place] = {}
    with tar_errors(head, name):
        if not head:
            raise EOFError
        for tar, member in _members(opener(stream) if opener else stream):
            if member.islnk() or member.issym():
                place = None if opener else places.get(link_target(member))
                if place is None:
                    yield Member(member.name, b"", member.linkname)
                    continue
                places[normpath(member.name)] = place
                yield Member(member.name, read_at(*place), place=place)
            elif (file := tar.extractfile(member)) is not None:
                place = None if opener or member.issparse() else (member.offset_data, member.size)
                if place is not None:
                    places[normpath(member.name)] = place
                yield Member(member.name, file.read(), place=place)


def _members(stream: Any) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Members of tars that may follow each other; EOFError where the last has no end mark, which is two blocks of zeros."""
    try:
        tar = tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictHeader, ignore_zeros=True, **NAMES)  # noqa: SIM115
    except EndOfFile:  # an end mark alone
        return
    end = 0
    with tar:
        try:
            for member in iter(tar.next, None):
                tar.members = []  # type: ignore[attr-defined]  # would otherwise collect all headers in memory
                end = tar.offset
                yield tar, member
        except EndOfFile:
            if tar.offset - end < 2 * tarfile.BLOCKSIZE:
                raise
        except tarfile.ReadError as error:
            if tar.offset - end < tarfile.BLOCKSIZE:
                raise
            raise tarfile.ReadError(f"what follows its end mark is no tar ({error})") from error


def link_target(link: tarfile.TarInfo) -> str:
    """Name of the member that a link leads to: from the top of the tar for a hard link, from its own folder for a symbolic one."""
    return normpath(link.linkname if link.islnk() else join(dirname(link.name), link.linkname))


def is_compressed(head: bytes) -> bool:
    """Whether a file with these first bytes is compressed in a format that `read_tar` supports."""
    return _opener(head) is not None


def check_end(read: Callable[[int], bytes]) -> None:
    """Check what follows the first block of zeros after the last member: at least one more block of zeros, and nothing else.

    Raises:
        EOFError: the file ends before that.
        ReadError: other data follow.
    """
    size = 0
    while data := read(READ_SIZE):
        size += len(data)
        if any(data):
            raise tarfile.ReadError("data follow the end mark of the tar; join tars with tar --concatenate")
    if size < tarfile.BLOCKSIZE:
        raise EOFError


@contextmanager
def tar_errors(head: bytes, name: str) -> Iterator[None]:
    """Turn errors of reading a tar with `StrictHeader` into a ShardError that names it; `head` is its first block."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ShardError(f"{name} {_fault(head, error)}") from error


def _opener(head: bytes) -> Callable[[Any], Any] | None:
    return next((opener for magic, opener in OPENERS.items() if re.match(magic, head)), None)


def _fault(head: bytes, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if not head:
        return "is empty"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return f"is no tar but a page of a web server, as one that asks for a login: it begins with {head[:NUM_BYTES_SHOWN]!r}"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the tar itself; fetch that with git lfs pull"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip file; pack its files into a tar"
    if not _is_header(head) and not is_compressed(head):
        return f"is not a tar, nor one compressed with gzip, bzip2 or xz: it begins with {head[:NUM_BYTES_SHOWN]!r}"
    if isinstance(error, EOFError) or str(error) == "unexpected end of data":
        return "is cut short: it does not end as a tar does; fetch or make it again"
    return f"is damaged: {error}"


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return len(block) == tarfile.BLOCKSIZE and not any(block)
    return True
