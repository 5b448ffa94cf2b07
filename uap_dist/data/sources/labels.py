"""Labels of images as a file or a column gives them: class indices, or names, which are numbered here."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from uap_dist.errors import ShardError
from uap_dist.foreign_text import to_text

INDEX = re.compile(r"\+?[0-9]{1,6}")
NUMBER = re.compile(r"[-+]?([0-9]+[.,]?[0-9]*|[.,][0-9]+)")
UNKNOWN = "-1"

logger = logging.getLogger(__name__)


def read_label_file(path: Path) -> tuple[list[list[str]], list[str]]:
    """The words of each line that is not blank, all `NAME LABEL` or all `LABEL`, and file and number of each, for messages.

    Raises:
        ShardError: the file cannot be read, has no lines, or others than these.
    """
    try:
        text = to_text(path.read_bytes())
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ShardError(f"{path} is not in UTF-8: {error.reason}; save it as UTF-8") from error
    if "\0" in text:
        raise ShardError(f"{path} is not in UTF-8, it holds null characters; save it as UTF-8")
    numbered = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not numbered:
        raise ShardError(f"{path} has no labels")
    lines, places = [words for _, words in numbered], [f"{path}: line {number}" for number, _ in numbered]
    for words, place in zip(lines, places, strict=True):
        line = " ".join(words)
        if len(words) != len(lines[0]) or len(words) > 2:
            raise ShardError(f"{place}: {line!r} is not `NAME LABEL`, nor `LABEL` as all the others")
        if re.search("[,;]$", words[0]) or re.search("[,;]", words[-1]):
            raise ShardError(f"{place}: {line!r} has no place for commas; separate name and label with a space")
    return lines, places


def number_labels(labels: Sequence[str | None], places: Sequence[str]) -> tuple[list[int | None], list[str]]:
    """The class index of each label, and the names of the classes.

    Labels are indices from 0, or names, as WordNet ids, which are numbered in sorted order. None and "-1" stand for no class.

    Args:
        labels: N of them.
        places: where the N labels stand, for messages.

    Raises:
        ShardError: some are indices and some are names, or one is a number but no index.
    """
    first: dict[str, str] = {}  # place of each label
    for label, place in zip(labels, places, strict=True):
        if label is not None and label != UNKNOWN:
            first.setdefault(label, place)
    indices = [label for label in first if INDEX.fullmatch(label)]
    names = [label for label in first if not INDEX.fullmatch(label)]
    odd = next((name for name in names if NUMBER.fullmatch(name)), None)
    if odd is not None:
        raise ShardError(
            f"{first[odd]}: the label is {odd!r}; class indices are whole numbers from 0 to 999999, or -1 where the class is not known"
        )
    if indices and names:
        raise ShardError(
            f"{first[names[0]]}: the label is {names[0]!r}, but {indices[0]!r} in {first[indices[0]]}; labels are class indices, or "
            "names as WordNet ids, not both"
        )
    numbers = {name: number for number, name in enumerate(sorted(names))} or {label: int(label) for label in indices}
    if indices and min(numbers.values()) == 1:
        logger.warning(
            "the smallest label is 1; networks count classes from 0: if these labels count from 1, take 1 off each"
        )
    classes = sorted(names) or [str(number) for number in range(1 + max(numbers.values(), default=-1))]
    return [None if label is None else numbers.get(label) for label in labels], classes
