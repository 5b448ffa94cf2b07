"""The classes of a network by their names, and the class that the label of a sample means."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from unicodedata import normalize

import numpy as np
import torchvision.models

from uap_dist.errors import ConfigError
from uap_dist.foreign_text import to_text

UNKNOWN_CLASS = -1
MAX_SHOWN = 40  # characters of a label in messages


def imagenet_names() -> Sequence[str]:
    """Names of the 1,000 classes of ILSVRC 2012 in the order in which networks number them."""
    names: Sequence[str] = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    return names


def label_name(label: int, class_names: Sequence[str]) -> str:
    """Name of a class, or its index if names are unknown."""
    return class_names[label] if class_names else str(label)


def name_with_label(label: int, class_names: Sequence[str]) -> str:
    """Such as "goldfish (1)", or the index alone if names are unknown."""
    return f"{class_names[label]} ({label})" if class_names else str(label)


class ClassIndex:
    """Indices of a network's classes by name."""

    def __init__(self, class_names: Sequence[str]) -> None:
        """Index the names of a network's classes, as many as they are, in the order of its logits.

        The classes of ILSVRC 2012 are also known by WordNet id, as n01440764; networks number them in the order of the ids.
        """
        self._exact = _unique([normalize("NFC", name) for name in class_names])
        self._alike = _unique([_plain(name) for name in class_names])
        if list(class_names) == list(imagenet_names()):
            self._exact |= _unique(files(__package__).joinpath("wordnet_ids.txt").read_text(encoding="utf-8").split())

    def __bool__(self) -> bool:
        """Whether any class has a name."""
        return bool(self._exact)

    def find(self, name: str) -> int | None:
        """Index of the class of this name, or of one that differs in case, spaces and underscores only; None if there is not one."""
        return self._exact.get(normalize("NFC", name), self._alike.get(_plain(name)))


def find_class(label: Mapping[str, bytes], classes: ClassIndex, label_key: str | None = None) -> tuple[int, str]:
    """The class that a sample's label means.

    Args:
        label: content of the sample's files `cls` and `json`, if it has them.
        classes: of the network.
        label_key: key of the label in `json`; None takes `cls`.

    Returns:
        The class index and "", or UNKNOWN_CLASS and why a label means no class; "" again where there is no label.
    """
    if label_key is None:
        source, given = "cls", to_text(label["cls"], "replace") if "cls" in label else None
    else:
        source = f"json, {label_key}"
        try:
            content = json.loads(label.get("json", b"{}"))
        except ValueError:
            return UNKNOWN_CLASS, "its .json is not JSON"
        if not isinstance(content, dict):
            return UNKNOWN_CLASS, "its .json holds no keys"
        if content and label_key not in content:
            return UNKNOWN_CLASS, f"its .json has no {label_key!r}, but {', '.join(map(str, content))}"
        value = content.get(label_key)
        given = value if value is None or isinstance(value, str) else json.dumps(value)
    if given is None:
        return UNKNOWN_CLASS, ""
    text = given.strip()
    if not text:
        return UNKNOWN_CLASS, f"its label ({source}) is empty"
    if re.fullmatch(r"-1|\+?[0-9]{1,18}", text):
        return int(text), ""
    index = classes.find(text)
    if index is not None:
        return index, ""
    shown = text[:MAX_SHOWN] + "…" * (len(text) > MAX_SHOWN)
    lack = "the network has no class of this name" if classes else "the network does not name its classes (class_names)"
    return UNKNOWN_CLASS, f"its label ({source}) is {shown!r}, neither a class index nor the name of a class; {lack}"


def find_classes(
    labels: Sequence[Mapping[str, bytes]], class_names: Sequence[str], label_key: str | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices of N samples (int64, see `find_class`), and for each why a label means no class, or ""."""
    classes = ClassIndex(class_names)
    found = [find_class(label, classes, label_key) for label in labels]
    return np.array([index for index, _ in found], np.int64), tuple(reason for _, reason in found)


def find_label(given: int | str, class_names: Sequence[str], num_classes: int, *, option: str) -> int:
    """The label that a number or a name means.

    Args:
        given: label or name of a class.
        class_names: of the network's labels; empty if unknown.
        num_classes: how many labels the network has.
        option: that it was given for, for messages.

    Raises:
        ConfigError: it is no class of the network.
    """
    if isinstance(given, int):
        if not 0 <= given < num_classes:
            raise ConfigError(f"{option} is {given}; the network has the labels 0 to {num_classes - 1}")
        return given
    if not class_names:
        raise ConfigError(
            f"{option} is {given!r}, but the classes have no names (class_names of the network, or classes.txt beside the shards); "
            f"give a label from 0 to {num_classes - 1}"
        )
    index = ClassIndex(class_names).find(given)
    if index is not None:
        return index
    plain = [_plain(name) for name in class_names]
    alike = [label for label, name in enumerate(plain) if name == _plain(given)]
    if alike:
        raise ConfigError(
            f"{option} is {given!r}, the name of several classes; give one of the labels {', '.join(map(str, alike))}"
        )
    holding = [name for name in plain if _plain(given) in name]
    near = dict.fromkeys([*holding, *difflib.get_close_matches(_plain(given), plain, n=3, cutoff=0.4)])
    shown = [f"{class_names[plain.index(name)]} ({plain.index(name)})" for name in list(near)[:3]]
    some = "; ".join(f"{name} ({label})" for label, name in enumerate(class_names[:3])) + "; …" * (len(class_names) > 3)
    raise ConfigError(
        f"{option} is {given!r}, which is no class of the network; "
        + (f"nearest names: {'; '.join(shown)}" if shown else f"its classes are {some}")
    )


def find_labels(
    given: Sequence[int | str], class_names: Sequence[str], num_classes: int, *, option: str
) -> tuple[int, ...]:
    """The labels that numbers and names mean, each once; a text with commas that is no name is a list of them.

    Args and errors as for `find_label`.
    """
    index = ClassIndex(class_names)
    parts: list[int | str] = []
    for each in given:
        is_list = isinstance(each, str) and "," in each and index.find(each) is None
        parts += [part.strip() for part in str(each).split(",")] if is_list else [each]
    numbers = (int(part) if isinstance(part, str) and part.isdecimal() else part for part in parts)
    found = [find_label(part, class_names, num_classes, option=option) for part in numbers]
    return tuple(dict.fromkeys(found))


def _unique(names: Sequence[str]) -> dict[str, int]:
    """Index of each name that occurs once."""
    counts = Counter(names)
    return {name: index for index, name in enumerate(names) if counts[name] == 1}


def _plain(name: str) -> str:
    return " ".join(normalize("NFC", name).replace("_", " ").casefold().split())
