"""Importing a user's code: a file by its path, together with the modules beside it, or a module by its name."""

import importlib
import importlib.util
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import first_line

OWN = "uap_dist_network_"  # prefix of the module names given to users' files

# folders of users' files that this module has added to sys.path, and the names of modules imported from them
_beside: dict[str, set[str]] = {}


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Within this context, modules in a folder can be imported; installed ones of the same name take precedence.

    They stay importable afterwards, until a file in another folder is loaded, which may have modules of the same names.
    """
    place = str(folder.resolve())
    for other in _beside.keys() - {place}:
        sys.path[:] = [path for path in sys.path if path != other]
        for name in _beside.pop(other):
            sys.modules.pop(name, None)
    if place not in _beside and place in map(os.path.abspath, sys.path):
        yield
        return
    if place not in _beside:
        sys.path.append(place)
    known, before = _beside.setdefault(place, set()), set(sys.modules)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        new = {name for name in sys.modules.keys() - before if not name.startswith(OWN)}
        roots = {name for name in new if "." not in name and _lies_in(sys.modules[name], place)}
        known |= {name for name in new if name.partition(".")[0] in roots}


def _lies_in(module: ModuleType, folder: str) -> bool:
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]
    return os.path.dirname(places[0]) == folder


def import_file(path: Path) -> ModuleType:
    """Import a user's file as a module.

    Raises:
        ClassifierError: there is no such file, or importing it fails.
    """
    if not path.is_file():
        raise ClassifierError(f"no file {path} on {platform.node()}; expected path/to/file.py:factory")
    # a name that no other module has; it must be in sys.modules because dataclasses look up their module there
    name = f"{OWN}{sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # user code may raise anything
        del sys.modules[name]
        raise ClassifierError(f"{path} cannot be imported: {with_line(error)}{_how_to_import(error, path)}") from error
    return module


def import_module(name: str) -> ModuleType:
    """Import a module from sys.path.

    Raises:
        ClassifierError: importing it fails.
    """
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ClassifierError(
            f"cannot import {name!r}: {with_line(error)}; expected package.module:factory, in a folder on PYTHONPATH"
        ) from error


def with_line(error: BaseException) -> str:
    """Message of an error in a user's code, with file and line."""
    if isinstance(error, SystemExit):
        return "it ends the process, as a script does; put everything but the network under if __name__ == '__main__'"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    where = (
        f" (line {frames[-1].lineno} of {frames[-1].filename})"
        if not isinstance(error, ImportError | SyntaxError)
        else ""
    )
    return first_line(error) + where


def _how_to_import(error: BaseException, path: Path) -> str:
    """Advice on how to make the missing module importable."""
    if not isinstance(error, ImportError):
        return ""
    if "relative import" in str(error):
        return (
            f"; a file alone has no package: give package.module:factory, with PYTHONPATH={path.resolve().parents[1]}"
        )
    folder, wanted = path.resolve().parent, (error.name or "").partition(".")[0]
    if wanted and ((folder / f"{wanted}.py").is_file() or (folder / wanted).is_dir()):
        return f"; another module named {wanted} takes precedence over the one beside the file: rename it, or set PYTHONPATH={folder}"
    return "; install it, or set PYTHONPATH to the folder that holds it, on every node"
