"""The command line as options of a job; what cannot be parsed ends in one line."""

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from itertools import pairwise
from typing import NoReturn, TypeVar

import tyro

from uap_dist.errors import ConfigError
from uap_dist.foreign_text import printable, redact
from uap_dist.job_options import list_options, option

# what tyro would add says nothing: groups in front of names, {None}| in front of values, --no-debug beside --debug
PARSER = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
KINDS = {"INT": "a whole number", "FLOAT": "a number"}

Parsed = TypeVar("Parsed")


def parse(options_type: type[Parsed], default: Parsed | None = None) -> Parsed:
    """The options on the command line; SystemExit with code 2, after a line that says why, if they cannot be parsed.

    Args:
        options_type: dataclass of the options.
        default: options where the command line gives none.

    Raises:
        ConfigError: one that takes several values is given twice, of which the parser would take the last, as it should of others,
            or without a value; or what the options themselves raise.
    """
    _check_lists(sys.argv[1:], list_options(options_type))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(options_type, default=tyro.MISSING_NONPROP if default is None else default, config=PARSER)
    except SystemExit as end:
        if end.code:
            _refuse(said.getvalue())
        raise


def _check_lists(words: Sequence[str], lists: set[str]) -> None:
    # options may be given with _ for -
    words = [
        option(word[2:].partition("=")[0]) + word[2:].partition("=")[1] if word.startswith("--") else word
        for word in words
    ]
    given = [word.rstrip("=") for word in words if word.startswith("--")]
    names = sorted(map(option, lists))
    for name in names:
        if given.count(name) > 1:
            raise ConfigError(f"{name} is given twice; give it once, with all of its values")
    for word, following in pairwise([*words, "--"]):
        if word in names and following.startswith("--"):
            raise ConfigError(f"{word} has no value; if one of the shell's variables is meant, it is empty")
    if given.count("--model") > 1:
        raise ConfigError("--model is given twice" + "; several networks are --models A B" * ("--models" in names))


def _refuse(box: str) -> NoReturn:
    """Print what the parser says in a box of several lines, as one line."""
    rows = "\n".join(row.strip("│╭╮╰╯ ") for row in box.splitlines())
    # a title, the complaint, and what may have been meant, between lines of ─ or, where stdout has not UTF-8, of -
    _, complaint, *others = re.split(r"(?:\n|^)(?:[─-]{3,}|─ .* ─+)(?:\n|$)", rows)
    text = " ".join(complaint.partition("\n\n")[0].split())
    missing = re.fullmatch(r"Missing value for argument '(--\S+)'.*", text)
    wrong_type = re.search(r"Error parsing (--\S+): no type matching (\w+) could be instantiated from \['(.*)'\]", text)
    no_number = re.search(r"Error parsing (--\S+): (?:invalid literal for (int)|could not .* (float)).*: '(.*)'", text)
    wrong_choice = re.search(r"invalid choice '(.*)' for argument '(--\S+)'\. Expected one of \((.*)\)", text)
    if missing:
        text = f"{missing[1]} has no value"
    elif wrong_type:
        text = f"{wrong_type[1]} is {wrong_type[3]!r}; it must be {KINDS.get(wrong_type[2], wrong_type[2])}"
    elif no_number:
        text = f"{no_number[1]} is {no_number[4]!r}; it must be {KINDS['INT' if no_number[2] else 'FLOAT']}"
    elif wrong_choice:
        choices = sorted({*re.findall(r"'([^']*)'", wrong_choice[3])} - {"None"})
        text = f"{wrong_choice[2]} is {wrong_choice[1]!r}; it must be one of {', '.join(choices)}"
    near = re.findall(r"^ *(--[\w-]+)", "\n".join(other for other in others if "meant" in other), re.MULTILINE)
    hint = f"; perhaps {' or '.join(dict.fromkeys(near))} is meant" if near else ""
    text = text.replace("Unrecognized options:", "unknown options or values:")
    print(f"error: {printable(redact(text.rstrip('.')))}{hint} (--help lists all options)", file=sys.stderr)
    raise SystemExit(2)
