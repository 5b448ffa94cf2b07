"""Places of files: local paths and s3://, gs:// URLs with their options, through pyarrow; and what their stores' refusals mean."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pyarrow import ArrowInvalid, fs

from uap_dist.errors import ConfigError
from uap_dist.foreign_text import hide_credentials, redact

T = TypeVar("T")

logger = logging.getLogger(__name__)

# pyarrow's own defaults are 3, 1 s and 3 s for S3, of which a busy store needs more, and 15 minutes for GCS
RETRIES, CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, GCS_RETRY_S = 3, 5.0, 10.0, 30.0
TRIAL_BYTES = 1 << 20
ATTEMPTS, SECONDS_BEFORE_RETRY = 5, 0.5  # the pause doubles each time
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on this machine; what a store says has no such number
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the machine's role)"
S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
GCS_ENDPOINTS = ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
AN_ENDPOINT = "HOST:PORT of the store, without a path or credentials"


def _to_bool(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _to_scheme(text: str) -> str:
    return {"https": "https", "http": "http"}[text.lower()]


def _split_url(text: str) -> SplitResult | None:
    """Scheme, host and port; None where there is no host, or anything else."""
    try:
        url = urlsplit(text)
        has_host = bool(url.hostname) and url.port != 0
    except ValueError:
        return None
    has_more = url.path.strip("/") or url.query or url.fragment or re.search(r"[@\s]", url.netloc)
    return url if has_host and not has_more else None


def _to_endpoint(text: str) -> str:
    """HOST:PORT, or the same after http:// or https://; ValueError otherwise."""
    url = _split_url(text if is_url(text) else f"//{text}")
    if url is None or url.scheme not in ("", "http", "https"):
        raise ValueError
    return f"{url.scheme}://{url.netloc}" if url.scheme else url.netloc


S3_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "region": str,
    "endpoint_override": _to_endpoint,
    "scheme": _to_scheme,
    "anonymous": _to_bool,
    "retries": int,
    "connect_timeout": float,
    "request_timeout": float,
    "allow_bucket_creation": _to_bool,
    "force_virtual_addressing": _to_bool,
    "tls_ca_file_path": str,
}
GCS_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "endpoint_override": _to_endpoint,
    "scheme": _to_scheme,
    "anonymous": _to_bool,
    "retry_limit_seconds": float,
    "project_id": str,
}
KINDS: Mapping[Callable[[str], Any], str] = {
    _to_bool: "true or false",
    _to_scheme: "https or http",
    _to_endpoint: AN_ENDPOINT,
}

# what stands in a store's error, and what it means; in none of these cases does it help to ask again
REFUSALS = {
    r"NO_SUCH_BUCKET|Bucket '.*' not found|bucket does not exist": "there is no such bucket; look at its name and the endpoint",
    r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|ExpiredToken|InvalidToken": (
        f"the credentials are not valid there; look at {CREDENTIALS}"
    ),
    r"ACCESS_DENIED|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED": "access is denied",
    r"HTTP status (301|400)": (
        "the request is refused as it stands, as when the bucket is in another region or the credentials have expired; "
        "give its region as ?region=…"
    ),
    r"OAuth2 access token": (
        "no Google credentials; give GOOGLE_APPLICATION_CREDENTIALS, or ?anonymous=true where the bucket is public"
    ),
}
UNREACHABLE = "NETWORK_CONNECTION.*curlCode: (6|7),|CURL error .(6|7)."


def is_url(location: str) -> bool:
    """Whether it names a file system, as in s3://bucket/key."""
    return "://" in location


def split_query(location: str) -> tuple[str, str]:
    """A URL and its options, as in s3://bucket/key?region=…; in a local path ? is a wildcard."""
    path, mark, query = location.partition("?") if is_url(location) else (location, "", "")
    return path, mark + query


def absolute(location: str) -> str:
    """The same place whatever the working directory is; a URL as it is."""
    return location if is_url(location) else str(Path(location).resolve())


def join(location: str, name: str) -> str:
    """The name below a folder, the folder's options kept."""
    path, query = split_query(location)
    return f"{path.rstrip('/')}/{name}{query}"


def set_name(pattern: str) -> str:
    """What a set of shards is called in tables: `val` for val.tar, val-{0000..0009}.tar, s3://bucket/val-*.tar?region=…, val/*.tar."""
    path = PurePosixPath(split_query(pattern.split("::")[0])[0])
    for part in (path.name, path.parent.name):
        name = re.sub(r"([-_]?[0-9]*[{*?[].*|[-_][0-9]+(-of-[0-9]+)?)$", "", part.split(".")[0] or part)
        if name:
            return name
    return pattern


def locate(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the path there.

    Options of a URL follow it, as in s3://bucket/key?region=eu-west-1&retries=5.

    * s3: `region` (default: the bucket's own), `endpoint_override` (host:port; default: that of AWS_ENDPOINT_URL_S3 or
      AWS_ENDPOINT_URL, which are URLs, else AWS), `scheme` (https or http), `anonymous` (true for a public bucket), `retries` (of
      one request, 3), `connect_timeout` (5 s), `request_timeout` (seconds without a byte, 10), `allow_bucket_creation`,
      `force_virtual_addressing`, `tls_ca_file_path`.
    * gs: `anonymous`, `retry_limit_seconds` (of one request, 30), `endpoint_override` (default: that of STORAGE_EMULATOR_HOST,
      else Google), `scheme`, `project_id`.

    Credentials are no option, because URLs are kept in runs and checkpoints; the stores' libraries find them as they always do.

    Raises:
        ConfigError: no such file system or option, or one that cannot be reached.
    """
    if not is_url(location):
        return fs.LocalFileSystem(), location
    url, query = split_query(location)
    scheme, _, path = url.partition("://")
    scheme = scheme.lower()
    if hide_credentials(location) != location:
        raise ConfigError(
            f"{redact(location)} holds credentials, which runs and checkpoints would keep; give {CREDENTIALS}, "
            "or ?anonymous=true where the bucket is public"
        )
    try:
        if scheme == "s3":
            return _s3(path.partition("/")[0], _options(location, query, S3_OPTIONS)), path.rstrip("/")
        if scheme in ("gs", "gcs"):
            return _gcs(_options(location, query, GCS_OPTIONS)), path.rstrip("/")
        return fs.FileSystem.from_uri(location)
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"cannot reach {explain(location, error)}") from error


def read_file(location: str) -> bytes:
    """A whole file; one that lies in a store is asked for again where that fails, see `persist`.

    Raises:
        OSError: it cannot be read; in one line, as `explain` says it.
        ConfigError: see `locate`.
    """

    def read() -> bytes:
        filesystem, path = locate(location)
        with filesystem.open_input_stream(path, compression=None) as stream:
            data: bytes = stream.read()
        return data

    return persist(location, read, "file")[0]


def persist(location: str, read: Callable[[], T], what: str) -> tuple[T, int]:
    """What a store gives, asked five times at most with pauses that double, and how many attempts beyond the first it took.

    These come on top of the retries of single requests. What a store refuses, and what goes wrong on this machine, is not tried again.

    Args:
        location: that is read.
        read: reads it; raises OSError, or ConfigError because of one, where that fails.
        what: lies there, for warnings.

    Raises:
        OSError: in one line, as `explain` says it; with its number where it is this machine's.
        ConfigError: see `locate`.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return read(), attempt - 1
        except (OSError, ConfigError) as raised:
            # a store may be asked for a bucket's region before it is for a file
            error = raised.__cause__ if isinstance(raised, ConfigError) else raised
            if not isinstance(error, OSError):
                raise
            if error.errno in NO_ROOM:
                raise error from None
            if not is_url(location) or is_refusal(error):
                raise OSError(explain(location, error)) from error
            if attempt == ATTEMPTS:
                raise OSError(f"{explain(location, error)}; {attempt} attempts failed") from error
            logger.warning("%s %s; attempt %d of %d follows", what, explain(location, error), attempt + 1, ATTEMPTS)
            time.sleep(SECONDS_BEFORE_RETRY * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def exists(location: str) -> bool:
    """Whether there is such a file.

    Raises:
        OSError: the store does not say; in one line, as `explain` says it.
        ConfigError: see `locate`.
    """
    filesystem, path = locate(location)
    try:
        return bool(filesystem.get_file_info(path).type == fs.FileType.File)
    except OSError as error:
        raise OSError(explain(location, error)) from error


def write_file(location: str, data: bytes) -> None:
    """A whole file, or none: nobody ever sees half of it. Its folder is there already.

    Raises:
        OSError: it cannot be written; in one line, as `explain` says it.
        ConfigError: see `locate`.
    """
    filesystem, path = locate(location)
    try:
        _write(filesystem, path, data)
    except OSError as error:
        raise OSError(explain(location, error)) from error


def make_own_folder(folder: Path) -> None:
    """A local folder and those above it, unless they are there; new ones are their owner's alone, because others may use the machine.

    Raises:
        OSError: it cannot be made.
    """
    for path in reversed((folder, *folder.parents)):
        if not path.is_dir():
            path.mkdir(0o700, exist_ok=True)


def copy_folder(folder: Path, location: str, last: str) -> None:
    """Every file of a local folder to another place, the one named `last` at the end: where it is, the rest is, and whole.

    Raises:
        OSError: it cannot be written; in one line, as `explain` says it.
        ConfigError: see `locate`.
    """
    filesystem, place = locate(location)
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path == folder / last)
    try:
        for parent in sorted({file.parent for file in files}):
            filesystem.create_dir(f"{place}/{parent.relative_to(folder).as_posix()}".removesuffix("/."), recursive=True)
        for file in files:
            _write(filesystem, f"{place}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    except OSError as error:
        raise OSError(explain(location, error)) from error


def try_to_write(folder: Path) -> None:
    """Write a file where a local folder is, or would be made, and remove it: on a full disk only real bytes tell.

    Raises:
        OSError: it cannot be done.
    """
    while not folder.exists():
        folder = folder.parent
    with TemporaryFile(dir=folder) as file:
        file.write(bytes(TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _write(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    """An object store shows a file when it is whole; on a disk that takes a rename."""
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    target = f"{path}.unfinished" if is_local else path
    with filesystem.open_output_stream(target) as out:
        out.write(data)
    if is_local:
        filesystem.move(target, path)


def is_refusal(error: Exception) -> bool:
    """Whether a store says that it will not do it, so that asking again is of no use."""
    return isinstance(error, FileNotFoundError) or any(re.search(pattern, str(error)) for pattern in REFUSALS)


def explain(location: str, error: Exception) -> str:
    """The location, what a store's error there means and, where that is known, what to do, in one line."""
    text = str(error)
    meaning = next((meaning for pattern, meaning in REFUSALS.items() if re.search(pattern, text)), None)
    if meaning == "access is denied":
        lack = "" if "AWS_ACCESS_KEY_ID" in os.environ else ", and no AWS_ACCESS_KEY_ID is set"
        meaning += (
            f"{lack}; give credentials that may do this as {CREDENTIALS}, or ?anonymous=true where the bucket is public"
        )
    if isinstance(error, FileNotFoundError):
        meaning = "there is no such file or folder"
    if re.search(UNREACHABLE, text):
        meaning = (
            f"{_endpoint(location)} does not answer; look at ?endpoint_override=… (or AWS_ENDPOINT_URL) and the network"
        )
    return f"{location}: {meaning or (text.splitlines() or [type(error).__name__])[0]}"


def _options(location: str, query: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    options = {}
    for name, text in parse_qsl(query.removeprefix("?"), keep_blank_values=True):
        if name not in known:
            raise ConfigError(f"{redact(location)}: unknown option {name!r}; there are {', '.join(known)}")
        try:
            options[name] = known[name](text)
        except (ValueError, KeyError) as error:
            kind = KINDS.get(known[name], "a number")
            raise ConfigError(f"{redact(location)}: option {name} is {text!r}; it must be {kind}") from error
    endpoint, scheme = options.get("endpoint_override", ""), options.get("scheme")
    if is_url(endpoint):  # as the variables have it
        said, _, options["endpoint_override"] = endpoint.partition("://")
        options["scheme"] = said
        if scheme not in (None, said):
            raise ConfigError(
                f"{redact(location)}: endpoint_override begins with {said}, but scheme is {scheme}; give one of them"
            )
    return options


@cache
def _region(bucket: str) -> str:
    region: str = fs.resolve_s3_region(bucket)
    return region


def _s3(bucket: str, options: dict[str, Any]) -> fs.S3FileSystem:
    options = _named_endpoint(options, *S3_ENDPOINTS) | options
    if "region" not in options and "endpoint_override" not in options and bucket:
        options["region"] = _region(bucket)
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=options.pop("retries", RETRIES))
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "request_timeout": REQUEST_TIMEOUT_S}
    return fs.S3FileSystem(**timeouts | options, retry_strategy=retries)


def _gcs(options: dict[str, Any]) -> fs.GcsFileSystem:
    emulator = _named_endpoint(options, *GCS_ENDPOINTS)
    options = emulator | ({"anonymous": True} if emulator else {}) | options  # emulators have no accounts
    limit = timedelta(seconds=options.pop("retry_limit_seconds", GCS_RETRY_S))
    return fs.GcsFileSystem(**options, retry_time_limit=limit)


def _named_endpoint(options: Mapping[str, Any], *variables: str) -> dict[str, str]:
    """The endpoint that the first of these variables names, as options of pyarrow's; none where the options name one, or nothing does."""
    found = next((name for name in variables if os.environ.get(name, "").strip()), None)
    if found is None or "endpoint_override" in options:
        return {}
    text = os.environ[found].strip()
    url = _split_url(text)
    if url is None or url.scheme not in ("http", "https"):
        raise ConfigError(f"{found} is {redact(text)!r}; it must be {AN_ENDPOINT}, with http:// or https:// before it")
    return {"endpoint_override": url.netloc, "scheme": url.scheme}


def _endpoint(location: str) -> str:
    options = dict(parse_qsl(split_query(location)[1].removeprefix("?")))
    variables = GCS_ENDPOINTS if location.startswith("g") else S3_ENDPOINTS
    named = (os.environ.get(name) for name in variables)
    return redact(options.get("endpoint_override") or next(filter(None, named), "the store's endpoint"))
