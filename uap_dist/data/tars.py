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


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        name: within the tar.
        data: its content; empty for a link.
        link_to: target of a link; empty for a regular file.
    """

    name: str
    data: bytes
    link_to: str = ""


class StrictHeader(tarfile.TarInfo):
    """A member's header that raises on truncation or damage; after the first member, `tarfile` takes either for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See `tarfile.TarInfo.frombuf`; raises EOFError if the file ends here, ReadError if this is not a header."""
        if len(buf) < tarfile.BLOCKSIZE:
            raise EOFError
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(str(error)) from error
            raise  # a block of zeros, the end of a tar


def read_tar(stream: Any, head: bytes, name: str) -> Iterator[Member]:
    """Files and links of a tar in their order; it may be compressed (gzip, bzip2, xz). The stream is read to its end.

    Args:
        stream: a binary file at its start, of which only `read` is used.
        head: its first block.
        name: of the file, for error messages.

    Raises:
        ShardError: it is truncated, damaged or not a tar, or data follow its end mark.
    """
    opener = _opener(head)
    with (
        tar_errors(head, name),
        tarfile.open(
            fileobj=opener(stream) if opener else stream,
            mode="r|",
            tarinfo=StrictHeader,
            **NAMES,
        ) as tar,
    ):
        for member in iter(tar.next, None):
            tar.members = []  # type: ignore[attr-defined]  # would otherwise collect all headers in memory
            if member.islnk() or member.issym():
                yield Member(member.name, b"", member.linkname)
            elif (file := tar.extractfile(member)) is not None:
                yield Member(member.name, file.read())
        assert tar.fileobj is not None
        check_end(tar.fileobj.read)


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
            raise tarfile.ReadError(
                "data follow the end mark of the tar; where tars were joined with cat, give them one by one, or join them with "
                "tar --concatenate"
            )
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
