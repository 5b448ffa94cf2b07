"""Names in tables: those that users give, otherwise as much of a location as distinguishes it from the others."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from uap_dist.data.locations import is_url, set_name, split_query
from uap_dist.errors import ConfigError
from uap_dist.models.sources.timm_networks import LITE_NAMES

PUBLISHED = "published"  # names the weights if no file is given
# LIBRARY/NAME, or path/to/file.py:factory?KEY=VALUE&…
MODEL = re.compile(r"(torchvision|timm)/[^=]+|.+:[^\W\d]\w*(\?\w+=[^=&]*(&\w+=[^=&]*)*)?", re.DOTALL)
NO_NAME = re.compile(r"[/\\:]")  # characters of paths, URLs and factories
FORM = (
    "give [NAME=]MODEL[=WEIGHTS], with MODEL as torchvision/resnet50, timm/resnet50, "
    f"{LITE_NAMES[0]} or path/to/file.py:factory"
)

Parts = tuple[str, ...]  # of a location; names are made of the last ones


@dataclass(frozen=True)
class ModelChoice:
    """A network given as [NAME=]MODEL[=WEIGHTS].

    Attributes:
        name: empty if none is given.
        model: see `load_classifier`.
        weights: file; None for the published weights.
    """

    name: str
    model: str
    weights: str | None

    @classmethod
    def parse(cls, text: str) -> "ModelChoice":
        """Parse an option. The text before the first = is MODEL if it has the form of one, otherwise NAME; MODEL may contain =.

        Raises:
            ConfigError: there is no MODEL, or NAME or WEIGHTS is empty.
        """
        pieces = text.split("=")
        if len(pieces) == 1:
            return cls("", text, None)  # loading it will tell whether there is such a network
        has_name = not _is_model(pieces[0]) and not NO_NAME.search(pieces[0])
        for end in range(1 + has_name, len(pieces) + 1):
            model, weights = "=".join(pieces[has_name:end]), "=".join(pieces[end:])
            if _is_model(model):
                name = pieces[0].strip() if has_name else ""
                if has_name and not name:
                    raise ConfigError(f"--models {text}: no name before =; {FORM}")
                if end < len(pieces) and not weights:  # or an unset shell variable would mean the published weights
                    raise ConfigError(f"--models {text}: no weights file after the last =; {FORM}")
                return cls(name, model, weights or None)
        raise ConfigError(f"--models {text}: there is no network in it; {FORM}")


def name_models(choices: Sequence[ModelChoice]) -> list[str]:
    """A unique name for each network: the given one, otherwise the text after the last / or : in MODEL.

    If several networks share that text, it is preceded by more of their paths. A network that is given with several weights gets ", "
    and the name of the weights file appended, with as many folders as it takes to be unique, or "published".

    Raises:
        ConfigError: a network is given twice with the same weights, or a name is given twice.
    """
    keys = [(choice.model, None if choice.weights is None else canonical(choice.weights)) for choice in choices]
    for model, weights in keys:
        if keys.count((model, weights)) > 1:
            raise ConfigError(f"--models has {model} twice with the same weights ({weights or PUBLISHED})")
    models = list(dict.fromkeys(choice.model for choice in choices if not choice.name))
    short = dict(zip(models, tell_apart([_model_parts(model) for model in models]), strict=True))
    names = [choice.name or short[choice.model] for choice in choices]
    for model in models:
        rows = [i for i, choice in enumerate(choices) if choice.model == model and not choice.name]
        if len(rows) > 1:
            for i, file in zip(rows, name_places([choices[i].weights for i in rows]), strict=True):
                names[i] = f"{short[model]}, {file}"
    refuse_twins("models", names)
    return names


def name_places(locations: Sequence[str | None]) -> list[str]:
    """Unique names of weights files: their stems, preceded by as many folders as it takes; None stands for the published weights."""
    full = [(PUBLISHED,) if place is None else parts_of(split_query(place)[0]) for place in locations]
    stems = [(*parts[:-1], re.sub(r"\.(safetensors|pth|pth\.tar|pt|bin)(?=#|$)", "", parts[-1])) for parts in full]
    return tell_apart(_unless_alike(stems, full))


def name_sets(given: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """A unique name for each set of images, fit for file names: the given one, otherwise `set_name`, as val for val-0000.tar.

    If several sets share that name, it is preceded by more of their paths, joined by -, or is the whole name of their first shard.

    Raises:
        ConfigError: a name is given twice.
    """
    full = [parts_of(split_query(pattern.split("::")[0])[0]) for pattern in patterns]
    words = [(*parts[:-1], set_name(pattern)) for parts, pattern in zip(full, patterns, strict=True)]
    return name_rest("sets of images", given, _unless_alike(words, full), separator="-")


def name_rest(
    what: str, given: Sequence[str], parts: Sequence[Parts], *, taken: Collection[str] = (), separator: str = "/"
) -> list[str]:
    """The given names, with unique names made of locations for those that are empty.

    Args:
        what: is named, for error messages.
        given: names; empty if not given.
        parts: of each location.
        taken: names of other things in the same tables.
        separator: between parts in a name.

    Raises:
        ConfigError: a name is given twice.
    """
    rest = [own for name, own in zip(given, parts, strict=True) if not name]
    found = iter(tell_apart(rest, taken=[*taken, *filter(None, given)], separator=separator))
    names = [name or next(found) for name in given]
    refuse_twins(what, names, taken)
    return names


def tell_apart(parts: Sequence[Parts], *, taken: Collection[str] = (), separator: str = "/") -> list[str]:
    """Names made of the last part of each location, or of as many of the last parts as it takes to be unique, also in MLflow."""
    counts, known = [1] * len(parts), set(map(plain_key, taken))
    while True:
        names = [separator.join(own[-count:]) for own, count in zip(parts, counts, strict=True)]
        keys = list(map(plain_key, names))
        uses = Counter(keys)
        short = [i for i, key in enumerate(keys) if (uses[key] > 1 or key in known) and counts[i] < len(parts[i])]
        if not short:
            return names
        for i in short:
            counts[i] += 1


def parts_of(location: str, separators: str = r"[/\\]") -> Parts:
    """The components of a path or URL, without empty ones, "." and ".."."""
    return tuple(part for part in re.split(separators, location) if part not in ("", ".", "..")) or (location,)


def canonical(location: str) -> str:
    """The location in a form that is the same however it is written."""
    return location.rstrip("/") if is_url(location) else str(Path(location).resolve())


def refuse_twins(what: str, names: Sequence[str], taken: Collection[str] = ()) -> None:
    """Raise ConfigError if a name occurs twice or is taken, or if another is the same in MLflow (see `plain_key`)."""
    known = {plain_key(name): name for name in taken}
    for name in names:
        key = plain_key(name)
        if key in known:
            alike = f"{known[key]!r} and {name!r}, which are one name in MLflow" if known[key] != name else repr(name)
            raise ConfigError(f"two {what} are named {alike}; give them other names, as NAME=…")
        known[key] = name


def plain_key(name: str) -> str:
    """The name with _ in place of characters that MLflow does not allow in keys."""
    return re.sub(r"[^\w.\- /]", "_", name)


def _model_parts(model: str) -> Parts:
    """Components of a model's path; the last one has the arguments of a factory, as build(depth=18, width=2)."""
    path, _, arguments = model.partition("?")
    *folders, last = parts_of(path, r"[/\\:]")
    return (*folders, f"{last}({arguments.replace('&', ', ')})" if arguments else last)


def _is_model(text: str) -> bool:
    return text in LITE_NAMES or MODEL.fullmatch(text) is not None


def _unless_alike(short: Sequence[Parts], full: Sequence[Parts]) -> list[Parts]:
    uses = Counter(short)
    return [own if uses[own] == 1 else long for own, long in zip(short, full, strict=True)]
