"""The options of every job as Markdown, from the parsers that read the command line."""

import argparse
import importlib
import re
import warnings
from functools import cache

import tyro

from uap_dist.analysis.options import AnalyzeOptions
from uap_dist.computing.options import ComputeOptions
from uap_dist.data.sources.options import ShardOptions
from uap_dist.evaluation.options import EvaluateOptions
from uap_dist.finetuning.options import FinetuneOptions
from uap_dist.jobs.parsing import PARSER

JOBS = {
    "compute": ComputeOptions,
    "evaluate": EvaluateOptions,
    "finetune": FinetuneOptions,
    "analyze": AnalyzeOptions,
    "shard": ShardOptions,
}
DEFAULT = re.compile(r"\s*\((default: .*|required)\)$", re.DOTALL)


@cache
def parser(job: str) -> argparse.ArgumentParser:
    """The parser of jobs/JOB.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other way to list options
        return tyro.extras.get_parser(JOBS[job], config=PARSER)


def options(job: str) -> set[str]:
    """Every option that jobs/JOB.py accepts, as --model."""
    return {name for action in parser(job)._actions for name in action.option_strings}


def markdown(job: str) -> str:
    """A section for jobs/JOB.py: a table for each group of its options."""
    lines = [f"## uap-{job} {{#{job}}}", "", importlib.import_module(f"uap_dist.jobs.{job}").__doc__ or ""]
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
    shown = _cell(f"`{default}`") if default not in ("", "''", "None") else ""
    return f"| {names} | {values} | {shown} | {meaning} |"


def _values(metavar: object) -> str:
    """Without the bar, which ends a cell."""
    return str(metavar).replace("|", " or ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
