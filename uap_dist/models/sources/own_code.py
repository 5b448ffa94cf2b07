"""Networks that a factory in a user's code makes: in a file, together with the modules beside it, or in a module by its name."""

import ast
import difflib
import importlib
import importlib.util
import inspect
import math
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from torch import nn

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import first_line, nearest
from uap_dist.models.classifier import Classifier
from uap_dist.models.weights import fill_from
from uap_dist.models.weights_file import open_weights

OWN = "uap_dist_network_"  # prefix of the module names given to users' files

FACTORY = re.compile(r"(.+?):([^\W\d]\w*)(?:\?(.*))?", re.DOTALL)
CONSTANTS = {"true": True, "false": False, "none": None}  # as shells and configuration files write them

# folders of users' files that this module has added to sys.path, and the names of modules imported from them
_beside: dict[str, set[str]] = {}


def is_factory(model: str) -> bool:
    """Whether the name of a network is that of a factory in a user's code, as path/to/file.py:factory or package.module:factory."""
    return ":" in model and not model.startswith(("timm/", "torchvision/"))


def load_own(name: str, weights: str | None) -> Classifier:
    """The network of a factory as `path/to/file.py:factory?depth=18` or `package.module:factory`, see `load_classifier`.

    Raises:
        ClassifierError: there is no such factory, it does not take these arguments, it fails, or what it returns cannot be used.
    """
    found = FACTORY.fullmatch(name)
    if found is None:
        raise ClassifierError(f"{name!r} names no factory; expected path/to/file.py:factory or package.module:factory")
    location, attribute, query = found.groups()
    is_file = location.endswith(".py")
    with importable(Path(location).parent) if is_file else nullcontext():
        module = import_file(Path(location)) if is_file else import_module(location)
        factory = getattr(module, attribute, None)
        if not callable(factory):
            own = [n for n, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__]
            kind = f", only a value of type {type(factory).__name__}" if hasattr(module, attribute) else ""
            raise ClassifierError(
                f"{location} has no factory {attribute!r}{kind}; nearest names: {nearest(attribute, own, own)}"
            )
        network = _call(factory, _parse(name, query or ""), f"{location}:{attribute}")
    if not isinstance(network, nn.Module):
        raise ClassifierError(f"{name} returns {type(network).__name__}, not a torch.nn.Module")
    if any(nn.parameter.is_lazy(p) for p in (*network.parameters(), *network.buffers())):
        raise ClassifierError(f"{name} has lazy layers without weights; run it once on an image in the factory")
    if weights is not None:
        fill_from(network, open_weights(weights))
    size = getattr(network, "input_size", None)
    if not (size is None or (isinstance(size, int) and size > 0)):
        raise ClassifierError(f"{name} has input_size {size!r}; it must be the side of its input in pixels, as 224")
    return Classifier(
        network,
        name=name,
        geometry=Geometry(math.floor(size / 0.875), size) if size else Geometry(),
        class_names=getattr(network, "class_names", None),
    )


def _parse(name: str, query: str) -> dict[str, Any]:
    """Keyword arguments from KEY=VALUE&…, percent-encoded; a VALUE that is a constant of Python is one, any other is a string."""
    arguments: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in arguments:
            raise ClassifierError(f"{name}: {part!r} is no argument, or given twice; give them as ?depth=18&width=2")
        arguments[key] = _constant(unquote(value))
    return arguments


def _constant(text: str) -> Any:
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _call(factory: Callable[..., Any], arguments: dict[str, Any], name: str) -> Any:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some built-in callables have none
        signature = None
    if signature is not None:
        _check_arguments(signature, arguments, name)
    try:
        return factory(**arguments)
    except (Exception, SystemExit) as error:  # user code may raise anything
        called = " ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ClassifierError(
            f"{name} fails {f'with {called}' if called else 'without arguments'}: {with_line(error)}"
        ) from error


def _check_arguments(signature: inspect.Signature, arguments: dict[str, Any], name: str) -> None:
    try:
        signature.bind(**arguments)
    except TypeError as error:
        known = [
            key
            for key, each in signature.parameters.items()
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        ]
        wrong = [key for key in arguments if key not in known]
        near = difflib.get_close_matches(wrong[0], known, n=1, cutoff=0.4) if wrong else []
        hint = f" (nearest: {near[0]})" if near else ""
        takes = f"{', '.join(known)}, given as {name}?{(near or known)[0]}=…" if known else "no arguments"
        raise ClassifierError(f"{name}: {error}{hint}; it takes {takes}") from error


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
