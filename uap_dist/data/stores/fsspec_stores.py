"""File systems that pyarrow does not have, through fsspec: hf://, https:// and others; their errors say what is wrong and what to do."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import fsspec
from aiohttp import ClientTimeout
from pyarrow import PythonFile, fs

from uap_dist.errors import ConfigError
from uap_dist.foreign_text import first_line

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 10.0  # seconds until a server answers, and without a byte
SEVERAL_TRIES = (408, 425, 429)  # of the HTTP states below 500, those that may pass


class Refused(OSError):
    """A server refuses; its message says why and what to do, and trying again does not help."""


def open_fsspec(url: str) -> tuple[fs.PyFileSystem, str]:
    """The file system that a URL names, and the path there.

    Raises:
        ConfigError: no file system has this scheme, or its package is not installed.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        # trust_env: proxies of the environment, credentials of ~/.netrc
        web = fsspec.filesystem(scheme, client_kwargs={"trust_env": True, "timeout": timeout})
        return fs.PyFileSystem(ReadOnlyStore(web, explain_web)), url
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except ImportError as error:
        package = (
            "huggingface_hub: pip install 'uap-dist[hub]'" if scheme == "hf" else f"a package: {first_line(error)}"
        )
        raise ConfigError(f"{scheme}:// needs {package}, on every node") from error
    except ValueError as error:
        raise ConfigError(
            f"cannot reach {url}: no file system has the scheme {scheme}://, or it lacks settings ({first_line(error)})"
        ) from error
    return fs.PyFileSystem(
        ReadOnlyStore(filesystem, partial(explain_hub, url) if scheme == "hf" else explain_web)
    ), path


class ReadOnlyStore(fs.FSSpecHandler):
    """What pyarrow needs of a file system of fsspec to find and read files; what fails is an OSError that says why.

    fsspec calls files missing that a server refuses to show or cannot show.
    """

    def __init__(self, filesystem: Any, explain: Callable[[Exception], OSError | None]) -> None:
        """Wrap a file system; `explain` gives the error to raise for one of the library's, None for a file that does not exist."""
        super().__init__(filesystem)
        self._explain = explain

    def get_file_info(self, paths: Sequence[str]) -> list[fs.FileInfo]:
        """See `FSSpecHandler.get_file_info`."""
        found = []
        for path in paths:
            info = fs.FileInfo(path, fs.FileType.NotFound)
            with suppress(FileNotFoundError), self._explained(path):
                info = self._create_file_info(path, self.fs.info(path))
            found.append(info)
        return found

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """What is in a folder, see `FSSpecHandler.get_file_info_selector`; folders below it are not looked into."""
        with self._explained(selector.base_dir):
            return [self._create_file_info(each["name"], each) for each in self.fs.ls(selector.base_dir, detail=True)]

    def open_input_stream(self, path: str) -> PythonFile:
        """A copy of the file, open for reading."""
        file = TemporaryFile()  # noqa: SIM115  # closed by who reads
        self.copy(path, file)
        return PythonFile(file, mode="r")

    open_input_file = open_input_stream

    def create_dir(self, path: str, recursive: bool) -> None:
        """Refuse: results and checkpoints need a store that shows a file only when it is complete."""
        raise Refused("nothing is written there; give a folder, s3:// or gs://")

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        """Refuse, see `create_dir`."""
        self.create_dir(path, False)

    def copy(self, path: str, file: BinaryIO) -> None:
        """Copy a file into one that is open for writing, and go back to the start of that."""
        with self._explained(path):
            self.fs.get_file(path, file)
        file.seek(0)

    def read_spans(self, path: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of a file by offset and size."""
        found = []
        for offset, size in spans:
            with self._explained(path):
                data = self.fs.cat_file(path, start=offset, end=offset + size)
            # a web server that knows no ranges sends the whole file
            found.append(data if len(data) <= size else data[offset : offset + size])
        return found

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many libraries
            raise self._explain(error) or FileNotFoundError(path) from error


def explain_web(error: Exception) -> OSError | None:
    """The error to raise for one of aiohttp's or of fsspec's; None for a file that does not exist."""
    states = (getattr(each, "status", None) for each in _chain(error))
    status = next((each for each in states if isinstance(each, int)), None)
    if status in (401, 403, 407):
        return Refused(f"the server refuses (HTTP {status}); credentials belong in ~/.netrc, on every node")
    if status is not None:
        return _of_status(status)
    cause = _chain(error)[-1]
    if isinstance(cause, FileNotFoundError):
        return None
    if isinstance(cause, TimeoutError):
        return OSError(f"the server does not answer within {READ_TIMEOUT_S:g} s")
    return OSError(f"the server does not answer: {first_line(cause)}")


def explain_hub(url: str, error: Exception) -> OSError | None:
    """The error to raise for one of huggingface_hub's; None for a file that does not exist."""
    names = {type(each).__name__ for each in _chain(error)}
    status = next((r.status_code for each in _chain(error) if (r := getattr(each, "response", None)) is not None), None)
    path, has_token = url.partition("://")[2], _has_token()
    repository = "/".join(path.partition("@")[0].split("/")[: 3 if path.startswith(("datasets/", "spaces/")) else 2])
    give = "give a token as HF_TOKEN, or log in with `hf auth login`, on every node"
    if "OfflineModeIsEnabled" in names:
        return Refused("HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or give local shards")
    if "GatedRepoError" in names:
        page = f"{_endpoint()}/{repository}"
        need = (
            f"accept its terms at {page} with the account of the token"
            if has_token
            else f"accept its terms at {page} and {give}"
        )
        return Refused(f"{repository} is gated; {need}")
    if status == 401 and has_token and "RepositoryNotFoundError" not in names:
        return Refused(f"the hub does not know the token; {give}")
    if "RepositoryNotFoundError" in names or status == 401:
        need = "that the token may read it" if has_token else "or, if it is private or gated, " + give
        return Refused(f"the hub shows no {repository}; look at its name, {'and ' * has_token}{need}")
    if "RevisionNotFoundError" in names:
        return Refused(f"{repository} has no such revision; look at what follows its @")
    if names & {"HFValidationError", "HfUriError", "NotImplementedError", "ValueError"}:
        return Refused(f"it is no hf:// URL ({first_line(error)}); give hf://datasets/OWNER/NAME/FILE")
    if status is not None and status != 404:
        return _of_status(status)
    cause = _chain(error)[-1]
    if status == 404 or isinstance(cause, FileNotFoundError):
        return None
    return OSError(f"{_endpoint()} does not answer ({first_line(cause)}); look at the network and HF_ENDPOINT")


def _of_status(status: int) -> OSError | None:
    if status in (404, 410):
        return None
    passes = status >= 500 or status in SEVERAL_TRIES
    return OSError(f"HTTP status {status}") if passes else Refused(f"the server refuses (HTTP {status})")


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


@cache
def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
