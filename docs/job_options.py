"""The options of every job as Markdown, from the parsers that read the command line."""

import argparse
import importlib
import re
import sys
import warnings
from functools import cache
from types import ModuleType

import tyro

JOBS = ("compute", "evaluate", "finetune", "analyze", "shard")
DEFAULT = re.compile(r"\s*\((default: .*|required)\)$", re.DOTALL)


def _module(job: str) -> ModuleType:
    return sys.modules[importlib.import_module(f"jobs.{job}").main.__module__]


@cache
def parser(job: str) -> argparse.ArgumentParser:
    """The parser of jobs/JOB.py."""
    own = vars(_module(job))
    kind = own.get(f"{job.capitalize()}Options") or own["Options"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other way to list options
        return tyro.extras.get_parser(kind, config=(tyro.conf.OmitArgPrefixes,))


def options(job: str) -> set[str]:
    """Every option that jobs/JOB.py accepts, as --model."""
    return {name for action in parser(job)._actions for name in action.option_strings}


def markdown(job: str) -> str:
    """A section for jobs/JOB.py: a table for each group of its options."""
    lines = [f"## uap-{job} {{#{job}}}", "", _module(job).__doc__ or ""]
    for group in parser(job)._action_groups:
        actions = [action for action in group._group_actions if "--help" not in action.option_strings]
        if actions:
            title = group.description or "The job itself."
            lines += [
                "",
                f"**{_cell(title)}**",
                "",
                "| option | values | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
            lines += [_row(action) for action in actions]
    return "\n".join(lines) + "\n"


def _row(action: argparse.Action) -> str:
    text = action.help or ""
    found = DEFAULT.search(text)
    default = found[1].removeprefix("default:").strip() if found else ""
    meaning = _cell(DEFAULT.sub("", text))
    names = "<br>".join(f"`{name}`" for name in action.option_strings)
    values = f"`{_values(action.metavar)}`" if action.metavar else ""
    return f"| {names} | {values} | {'' if default in ('', 'None') else _cell(f'`{default}`')} | {meaning} |"


def _values(metavar: object) -> str:
    """Without None, which the default says, and without the bar, which ends a cell."""
    return str(metavar).removeprefix("{None}|").replace("|", " or ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
