"""Places of files: local paths and s3://, gs:// URLs with their options, through pyarrow."""

from pyarrow import ArrowInvalid, fs

from uap_dist.errors import ConfigError


def is_url(location: str) -> bool:
    """Whether it names a file system, as in s3://bucket/key."""
    return "://" in location


def split_query(location: str) -> tuple[str, str]:
    """A URL and its options, as in s3://bucket/key?region=…; in a local path ? is a wildcard."""
    path, mark, query = location.partition("?") if is_url(location) else (location, "", "")
    return path, mark + query


def join(location: str, name: str) -> str:
    """The name below a folder, the folder's options kept."""
    path, query = split_query(location)
    return f"{path.rstrip('/')}/{name}{query}"


def locate(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the path there.

    Raises:
        ConfigError: no such file system, or one that cannot be reached.
    """
    if not is_url(location):
        return fs.LocalFileSystem(), location
    try:
        return fs.FileSystem.from_uri(location)
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"cannot reach {location}: {error}") from error
