"""Names in tables: those that users give, else as much of where a thing lies as tells it from the others."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from uap_dist.data.locations import is_url, set_name, split_query
from uap_dist.errors import ConfigError
from uap_dist.models.loading import LITE_NAMES

PUBLISHED = "published"  # name of the weights where no file is given
MODEL = re.compile(r"(torchvision|timm)/[^=]+|.+:[^\W\d]\w*", re.DOTALL)  # of a library, or path/to/file.py:factory
NO_NAME = re.compile(r"[/\\:]")  # what belongs to a path, a URL or a factory

Parts = tuple[str, ...]  # of a location, the last one first to be shown


@dataclass(frozen=True)
class ModelChoice:
    """A network as an option names it: [NAME=]MODEL[=WEIGHTS]; no name where none is given, no weights for the published ones."""

    name: str
    model: str
    weights: str | None

    @classmethod
    def parse(cls, text: str) -> "ModelChoice":
        """What precedes the first = is MODEL if it has the form of one, else NAME; after MODEL, = and all that follows is WEIGHTS.

        Raises:
            ConfigError: no MODEL in it, or nothing where NAME or WEIGHTS should be.
        """
        pieces = text.split("=")
        if len(pieces) == 1:
            return cls("", text, None)  # whoever loads it knows whether there is such a network
        has_name = not _is_model(pieces[0]) and not NO_NAME.search(pieces[0])
        for end in range(1 + has_name, len(pieces) + 1):
            model, weights = "=".join(pieces[has_name:end]), "=".join(pieces[end:])
            if _is_model(model):
                name = pieces[0].strip() if has_name else ""
                if has_name and not name:
                    raise ConfigError(f"--models {text}: no name before =; {FORM}")
                if end < len(pieces) and not weights:  # an unset variable of the shell would give the published ones
                    raise ConfigError(f"--models {text}: no weights file after the last =; {FORM}")
                return cls(name, model, weights or None)
        raise ConfigError(f"--models {text}: there is no network in it; {FORM}")


FORM = (
    "give [NAME=]MODEL[=WEIGHTS], with MODEL as torchvision/resnet50, timm/resnet50, "
    f"{LITE_NAMES[0]} or path/to/file.py:factory"
)


def name_models(choices: Sequence[ModelChoice]) -> list[str]:
    """A name for each network: that given, else what follows the last / or : of MODEL.

    Networks that are alike in this get more of their path before it. One that is there with several weights is followed by
    ", " and the name of the weights file, with as many of its folders as it takes, or "published".

    Raises:
        ConfigError: a network that is there twice with the same weights, or a name that stands for two.
    """
    keys = [(choice.model, None if choice.weights is None else canonical(choice.weights)) for choice in choices]
    for model, weights in keys:
        if keys.count((model, weights)) > 1:
            raise ConfigError(f"--models has {model} twice with the same weights ({weights or PUBLISHED})")
    models = list(dict.fromkeys(choice.model for choice in choices if not choice.name))
    short = dict(zip(models, tell_apart([parts_of(model, r"[/\\:]") for model in models]), strict=True))
    names = [choice.name or short[choice.model] for choice in choices]
    for model in models:
        rows = [i for i, choice in enumerate(choices) if choice.model == model and not choice.name]
        if len(rows) > 1:
            for i, file in zip(rows, name_places([choices[i].weights for i in rows]), strict=True):
                names[i] = f"{short[model]}, {file}"
    refuse_twins("models", names)
    return names


def name_places(locations: Sequence[str | None]) -> list[str]:
    """The names of files without their extensions, with as many folders before as tell them apart; None is the published weights."""
    full = [(PUBLISHED,) if place is None else parts_of(split_query(place)[0]) for place in locations]
    stems = [(*parts[:-1], re.sub(r"\.(safetensors|pth|pt|bin)$", "", parts[-1])) for parts in full]
    return tell_apart(_unless_alike(stems, full))


def name_sets(given: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """A name for each set of images, which files are named after: that given, else the shards' first word, as val of val-0000.tar.

    Sets that are alike in this get more of their path before it, with - between, or their shards' whole name.

    Raises:
        ConfigError: a name that stands for two.
    """
    full = [parts_of(split_query(pattern.split("::")[0])[0]) for pattern in patterns]
    words = [(*parts[:-1], set_name(pattern)) for parts, pattern in zip(full, patterns, strict=True)]
    return name_rest("sets of images", given, _unless_alike(words, full), separator="-")


def name_rest(
    what: str, given: Sequence[str], parts: Sequence[Parts], *, taken: Collection[str] = (), separator: str = "/"
) -> list[str]:
    """The names given, where there are such (not empty), and for the others what tells them apart from all.

    Args:
        what: they name, for the complaint.
        given: names, or nothing.
        parts: of the location of each.
        taken: names of other things in the same tables.
        separator: between parts.

    Raises:
        ConfigError: a name that stands for two.
    """
    rest = [own for name, own in zip(given, parts, strict=True) if not name]
    found = iter(tell_apart(rest, taken=[*taken, *filter(None, given)], separator=separator))
    names = [name or next(found) for name in given]
    refuse_twins(what, names, taken)
    return names


def tell_apart(parts: Sequence[Parts], *, taken: Collection[str] = (), separator: str = "/") -> list[str]:
    """For each the last of its parts, and where several are alike, or the name is taken, as many of those before as it takes."""
    counts = [1] * len(parts)
    while True:
        names = [separator.join(own[-count:]) for own, count in zip(parts, counts, strict=True)]
        uses = Counter(names)
        short = [i for i, name in enumerate(names) if (uses[name] > 1 or name in taken) and counts[i] < len(parts[i])]
        if not short:
            return names
        for i in short:
            counts[i] += 1


def parts_of(location: str, separators: str = r"[/\\]") -> Parts:
    """Of a path or URL, without what names nothing."""
    return tuple(part for part in re.split(separators, location) if part not in ("", ".", "..")) or (location,)


def canonical(location: str) -> str:
    """The same for all ways to write one place."""
    return location.rstrip("/") if is_url(location) else str(Path(location).resolve())


def refuse_twins(what: str, names: Sequence[str], taken: Collection[str] = ()) -> None:
    """Raise ConfigError where a name stands for two."""
    for name, count in Counter(names).items():
        if count > 1 or name in taken:
            raise ConfigError(f"two {what} are named {name!r}; give them other names, as NAME=…")


def plain_key(name: str) -> str:
    """The name with _ for what MLflow takes in no key."""
    return re.sub(r"[^\w.\- /]", "_", name)


def _is_model(text: str) -> bool:
    return text in LITE_NAMES or MODEL.fullmatch(text) is not None


def _unless_alike(short: Sequence[Parts], full: Sequence[Parts]) -> list[Parts]:
    uses = Counter(short)
    return [own if uses[own] == 1 else long for own, long in zip(short, full, strict=True)]
