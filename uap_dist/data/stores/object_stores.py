"""File systems of s3:// and gs:// URLs, from their options and the environment, through pyarrow."""

import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pyarrow import ArrowInvalid, fs

from uap_dist.errors import ConfigError
from uap_dist.foreign_text import redact

Options = tuple[tuple[str, Any], ...]  # names and values

# pyarrow's own defaults are 3 retries, 1 s and 3 s for S3, too little for a busy store, and 15 minutes for GCS
RETRIES, CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, GCS_RETRY_S = 3, 5.0, 10.0, 30.0
S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
GCS_ENDPOINTS = ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
VARIABLES = ("AWS_", "GOOGLE_", "STORAGE_", "CLOUD_")  # beginnings of those that file systems read when they are made
AN_ENDPOINT = "HOST:PORT of the store, without a path or credentials"


def _to_bool(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _to_scheme(text: str) -> str:
    return {"https": "https", "http": "http"}[text.lower()]


def _split_endpoint(text: str) -> SplitResult | None:
    """Scheme, host and port of a URL; None if it has no host, or a path, query or credentials."""
    try:
        url = urlsplit(text)
        has_host = bool(url.hostname) and url.port != 0
    except ValueError:
        return None
    has_more = url.path.strip("/") or url.query or url.fragment or re.search(r"[@\s]", url.netloc)
    return url if has_host and not has_more else None


def _to_endpoint(text: str) -> str:
    """HOST:PORT, alone or after http:// or https://; ValueError otherwise."""
    url = _split_endpoint(text if "://" in text else f"//{text}")
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


def open_store(url: str) -> tuple[fs.FileSystem, str] | None:
    """The file system that a URL names, and the path there; None if pyarrow has none for this scheme.

    Options follow the path, as in s3://bucket/key?region=eu-west-1&retries=5.

    * s3: `region` (default: the bucket's own), `endpoint_override` (HOST:PORT; default: that of AWS_ENDPOINT_URL_S3 or
      AWS_ENDPOINT_URL, which are URLs, else AWS), `scheme` (https or http), `anonymous` (true for a public bucket), `retries` (of
      a single request, 3), `connect_timeout` (5 s), `request_timeout` (seconds without a byte, 10), `allow_bucket_creation`,
      `force_virtual_addressing`, `tls_ca_file_path`.
    * gs: `anonymous`, `retry_limit_seconds` (of a single request, 30), `endpoint_override` (default: that of
      STORAGE_EMULATOR_HOST, else Google), `scheme`, `project_id`.

    Credentials are not options, because URLs are stored in runs and checkpoints. The stores' libraries find them in the usual
    places.

    Raises:
        ConfigError: an unknown option, or a value that it cannot have.
        OSError: the file system cannot be reached.
    """
    scheme, _, rest = url.partition("://")
    path, _, query = rest.partition("?")
    environment = tuple(sorted(each for each in os.environ.items() if each[0].startswith(VARIABLES)))
    if scheme.lower() == "s3":
        options = _parse_options(url, query, S3_OPTIONS)
        return _s3(path.partition("/")[0], tuple(options.items()), environment), path.rstrip("/")
    if scheme.lower() in ("gs", "gcs"):
        return _gcs(tuple(_parse_options(url, query, GCS_OPTIONS).items()), environment), path.rstrip("/")
    if scheme.lower() == "hf":
        return None
    try:
        return fs.FileSystem.from_uri(url)
    except ArrowInvalid:
        return None


def name_endpoint(url: str) -> str:
    """The endpoint that requests for this URL go to, for messages."""
    options = dict(parse_qsl(url.partition("?")[2]))
    variables = GCS_ENDPOINTS if url.startswith("g") else S3_ENDPOINTS
    named = (os.environ.get(name) for name in variables)
    return redact(options.get("endpoint_override") or next(filter(None, named), "the store's endpoint"))


def _parse_options(url: str, query: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    options = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise ConfigError(f"{redact(url)}: unknown option {name!r}; the options are {', '.join(known)}")
        try:
            options[name] = known[name](text)
        except (ValueError, KeyError) as error:
            kind = KINDS.get(known[name], "a number")
            raise ConfigError(f"{redact(url)}: option {name} is {text!r}; it must be {kind}") from error
    scheme, separator, host = options.get("endpoint_override", "").partition("://")
    if separator:  # a URL, as the environment variables have it, where pyarrow takes host and scheme apart
        if options.get("scheme") not in (None, scheme):
            raise ConfigError(
                f"{redact(url)}: endpoint_override begins with {scheme}, but scheme is {options['scheme']}; give one of them"
            )
        options |= {"endpoint_override": host, "scheme": scheme}
    return options


@cache
def _region(bucket: str) -> str:
    region: str = fs.resolve_s3_region(bucket)
    return region


# because it takes 8 ms to make one, and its connections are used again; `environment` is part of the key: pyarrow reads those variables
@cache
def _s3(bucket: str, given: Options, environment: Options) -> fs.S3FileSystem:
    options = dict(given)
    options = _endpoint_of_environment(options, *S3_ENDPOINTS) | options
    if "region" not in options and "endpoint_override" not in options and bucket:
        options["region"] = _region(bucket)
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=options.pop("retries", RETRIES))
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "request_timeout": REQUEST_TIMEOUT_S}
    return fs.S3FileSystem(**timeouts | options, retry_strategy=retries)


@cache  # see `_s3`
def _gcs(given: Options, environment: Options) -> fs.GcsFileSystem:
    options = dict(given)
    emulator = _endpoint_of_environment(options, *GCS_ENDPOINTS)
    options = emulator | ({"anonymous": True} if emulator else {}) | options  # emulators have no accounts
    limit = timedelta(seconds=options.pop("retry_limit_seconds", GCS_RETRY_S))
    return fs.GcsFileSystem(**options, retry_time_limit=limit)


def _endpoint_of_environment(options: Mapping[str, Any], *variables: str) -> dict[str, str]:
    """The endpoint named by the first of these variables that is set, as pyarrow's options; none if the URL's options name one."""
    found = next((name for name in variables if os.environ.get(name, "").strip()), None)
    if found is None or "endpoint_override" in options:
        return {}
    text = os.environ[found].strip()
    url = _split_endpoint(text)
    if url is None or url.scheme not in ("http", "https"):
        raise ConfigError(f"{found} is {redact(text)!r}; it must be {AN_ENDPOINT}, with http:// or https:// before it")
    return {"endpoint_override": url.netloc, "scheme": url.scheme}
