"""Locations of files, local paths or URLs: naming, reading and writing them, and explaining what their stores refuse."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import TypeVar

from pyarrow import ArrowException, fs

from uap_dist.data.stores.fsspec_stores import Refused, open_fsspec
from uap_dist.data.stores.object_stores import name_endpoint, open_store
from uap_dist.errors import ConfigError
from uap_dist.foreign_text import hide_credentials, redact

T = TypeVar("T")

logger = logging.getLogger(__name__)

TRIAL_BYTES = 1 << 20
ATTEMPTS, SECONDS_BEFORE_RETRY = 5, 0.5  # the pause doubles after each attempt
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on this machine; errors of a store have no such number
# what pyarrow raises for a store: some answers of Google's and Azure's are no OSError
STORE_ERRORS = (OSError, ArrowException)
CREDENTIALS = {  # where each store's belong
    "s3": "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the machine's role)",
    "gs": "as GOOGLE_APPLICATION_CREDENTIALS (or those of gcloud, or the machine's service account)",
    "abfs": "as AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET (or those of `az login`), on every node",
    "hf": "as HF_TOKEN, or log in with `hf auth login`, on every node",
    "https": "in ~/.netrc, on every node",
}
SAME_STORE = {"gcs": "gs", "abfss": "abfs", "http": "https"}
DENIED, INVALID, LACKING = "access is denied", "the credentials are not valid there", "no credentials are found"

# patterns in the error of a store that refuses a request, and what they mean; trying again does not help
REFUSALS = {
    r"NO_SUCH_BUCKET|Bucket '.*' not found|bucket does not exist": "there is no such bucket; look at its name and the endpoint",
    r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|ExpiredToken|InvalidToken": INVALID,
    r"ACCESS_DENIED|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED": DENIED,
    r"HTTP status (301|400)": (
        "the request is refused as it stands, as when the bucket is in another region or the credentials have expired; "
        "give its region as ?region=…"
    ),
    r"INVALID_ARGUMENT": "the request is refused as it stands; look at the name of the bucket",
    r"OAuth2 access token|DefaultAzureCredential": LACKING,
}
# of Google's errors, what matters: the kind, and the server's own words unless they are a web page
GOOGLE_STATUS = r"google::cloud::Status\((\w+): (?:.*last message of )?([^<\n]*?)(?: error_info=|<|\n|$)"
UNREACHABLE = "NETWORK_CONNECTION.*curlCode: (6|7),|CURL error .(6|7)."


def is_url(location: str) -> bool:
    """Whether a location is a URL, as s3://bucket/key, rather than a local path."""
    return "://" in location


def split_query(location: str) -> tuple[str, str]:
    """A URL without its options, and "?" with the options; a local path, in which ? is a wildcard, has none."""
    path, mark, query = location.partition("?") if is_url(location) else (location, "", "")
    return path, mark + query


def absolute(location: str) -> str:
    """A local path made independent of the working directory; a URL as it is.

    Raises:
        ConfigError: it begins with ~, which shells expand only where a word begins; a folder of that name is not what is meant.
    """
    if location.startswith("~"):
        raise ConfigError(f"{location}: ~ is not expanded here; give the whole path")
    return location if is_url(location) else str(Path(location).resolve())


def join(location: str, name: str) -> str:
    """The location of a name in a folder, with the folder's options."""
    path, query = split_query(location)
    return f"{path.rstrip('/')}/{name}{query}"


def set_name(pattern: str) -> str:
    """Name of a set of shards: `val` for val.tar, val-{0000..0009}.tar, s3://bucket/val-*.tar?region=… and val/*.tar."""
    path = PurePosixPath(split_query(pattern.split("::")[0])[0])
    for part in (path.name, path.parent.name):
        name = re.sub(r"([-_]?[0-9]*[{*?[].*|[-_][0-9]+(-of-[0-9]+)?)$", "", part.split(".")[0] or part)
        if name:
            return name
    return pattern


def locate(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the path there; `open_store` lists the options of URLs.

    Raises:
        ConfigError: a URL with credentials or an unknown option, or a file system that does not exist or cannot be reached.
    """
    if not is_url(location):
        return fs.LocalFileSystem(), os.path.abspath(location)  # pyarrow takes a relative path with a colon for a URL
    if hide_credentials(location) != location:
        raise ConfigError(
            f"{redact(location)} holds credentials, which runs and checkpoints would keep; give them {_where_credentials_belong(location)}"
        )
    try:
        return open_store(location) or open_fsspec(location)
    except STORE_ERRORS as error:
        raise ConfigError(f"cannot reach {explain(location, error)}") from error


def _store_of(location: str) -> str:
    """The scheme of a URL, one for each kind of store."""
    scheme = location.partition("://")[0].lower()
    return SAME_STORE.get(scheme, scheme)


def _where_credentials_belong(location: str) -> str:
    store = _store_of(location)
    found = CREDENTIALS.get(store, "as the library of this store finds them in the environment, on every node")
    return f"{found}, or ?anonymous=true where the bucket is public" if store in ("s3", "gs") else found


def read_file(location: str) -> bytes:
    """A whole file; reading one in a store is retried, see `persist`.

    Raises:
        OSError: it cannot be read; the message is one line, see `explain`.
        ConfigError: see `locate`.
    """

    def read() -> bytes:
        filesystem, path = locate(location)
        with filesystem.open_input_stream(path, compression=None) as stream:
            data: bytes = stream.read()
        return data

    return persist(location, read, "file")[0]


def persist(location: str, read: Callable[[], T], what: str) -> tuple[T, int]:
    """Read from a store in at most five attempts, with pauses that double; returns the result and the number of retries.

    These attempts come on top of pyarrow's retries of single requests. What a store refuses and what fails on this machine is
    not tried again.

    Args:
        location: that is read.
        read: reads it; on failure it raises one of STORE_ERRORS, or ConfigError caused by one.
        what: kind of thing that is read, for warnings.

    Raises:
        OSError: the message is one line, see `explain`; one of `NO_ROOM` keeps its number.
        ConfigError: see `locate`.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return read(), attempt - 1
        except (*STORE_ERRORS, ConfigError) as raised:
            # `locate` may have to ask a store for a bucket's region
            error = raised.__cause__ if isinstance(raised, ConfigError) else raised
            if not isinstance(error, STORE_ERRORS):
                raise
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise error from None
            if not is_url(location) or is_refusal(error):
                raise OSError(explain(location, error)) from error
            if attempt == ATTEMPTS:
                raise OSError(f"{explain(location, error)}; {attempt} attempts failed") from error
            logger.warning("%s %s; attempt %d of %d follows", what, explain(location, error), attempt + 1, ATTEMPTS)
            time.sleep(SECONDS_BEFORE_RETRY * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def exists(location: str) -> bool:
    """Whether there is a file at a location.

    Raises:
        OSError: the store does not answer; the message is one line, see `explain`.
        ConfigError: see `locate`.
    """
    filesystem, path = locate(location)
    try:
        return bool(filesystem.get_file_info(path).type == fs.FileType.File)
    except STORE_ERRORS as error:
        raise OSError(explain(location, error)) from error


def write_file(location: str, data: bytes) -> None:
    """Write a file atomically: nobody ever sees half of it. Its folder must exist.

    Raises:
        OSError: it cannot be written; the message is one line, see `explain`.
        ConfigError: see `locate`.
    """
    filesystem, path = locate(location)
    try:
        _write(filesystem, path, data)
    except STORE_ERRORS as error:
        raise OSError(explain(location, error)) from error


def make_own_folder(folder: Path) -> None:
    """Create a local folder and its missing parents, accessible to their owner alone because others may use the machine.

    Raises:
        OSError: it cannot be created.
    """
    for path in reversed((folder, *folder.parents)):
        if not path.is_dir():
            path.mkdir(0o700, exist_ok=True)


def copy_folder(folder: Path, location: str, last: str) -> None:
    """Copy every file of a local folder, the one named `last` at the end, so that its presence means the copy is complete.

    Raises:
        OSError: it cannot be written; the message is one line, see `explain`.
        ConfigError: see `locate`.
    """
    filesystem, place = locate(location)
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path == folder / last)
    try:
        for parent in sorted({file.parent for file in files}):
            filesystem.create_dir(f"{place}/{parent.relative_to(folder).as_posix()}".removesuffix("/."), recursive=True)
        for file in files:
            _write(filesystem, f"{place}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    except STORE_ERRORS as error:
        raise OSError(explain(location, error)) from error


def try_to_write(folder: Path) -> None:
    """Write and remove a temporary file in a local folder, or in its nearest parent that exists; only real bytes find a full disk.

    Raises:
        OSError: it cannot be written.
    """
    while not folder.exists():
        folder = folder.parent
    with TemporaryFile(dir=folder) as file:
        file.write(bytes(TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _write(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    """Object stores show a file only once it is complete; a disk needs a rename for that."""
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    target = f"{path}.unfinished" if is_local else path
    with filesystem.open_output_stream(target) as out:
        out.write(data)
    if is_local:
        filesystem.move(target, path)


def is_refusal(error: Exception) -> bool:
    """Whether a store refuses a request, so that trying again is useless."""
    return isinstance(error, FileNotFoundError | Refused) or any(re.search(pattern, str(error)) for pattern in REFUSALS)


def explain(location: str, error: Exception) -> str:
    """One line with the location, what a store's error there means and, if known, what to do."""
    text = str(error)
    meaning = next((meaning for pattern, meaning in REFUSALS.items() if re.search(pattern, text)), None)
    if meaning == DENIED and _store_of(location) == "s3" and "AWS_ACCESS_KEY_ID" not in os.environ:
        meaning += ", and no AWS_ACCESS_KEY_ID is set"
    if meaning is not None and meaning.startswith((DENIED, LACKING, INVALID)):
        meaning += f"; give credentials that may do this {_where_credentials_belong(location)}"
    if isinstance(error, Refused):
        meaning = text
    if isinstance(error, FileNotFoundError):
        meaning = "there is no such file or folder"
    if meaning is None and re.search(UNREACHABLE, text):
        variable = "STORAGE_EMULATOR_HOST" if _store_of(location) == "gs" else "AWS_ENDPOINT_URL"
        meaning = (
            f"{name_endpoint(location)} does not answer; look at ?endpoint_override=… (or {variable}) and the network"
        )
    if meaning is None and (found := re.search(GOOGLE_STATUS, text)):
        meaning = f"the store answers {found[1]}" + (f" ({found[2]})" if found[2] else "")
    return f"{location}: {meaning or (text.splitlines() or [type(error).__name__])[0]}"
