"""The commands uap-compute, …: beside the package, because Ctrl-C shall be quiet in the seconds that its import takes."""

import os
import signal
from importlib import import_module


def compute() -> None:
    """jobs/compute.py."""
    _run("compute")


def evaluate() -> None:
    """jobs/evaluate.py."""
    _run("evaluate")


def finetune() -> None:
    """jobs/finetune.py."""
    _run("finetune")


def analyze() -> None:
    """jobs/analyze.py."""
    _run("analyze")


def shard() -> None:
    """jobs/shard.py."""
    _run("shard")


def _run(job: str) -> None:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    import_module(f"uap_dist.jobs.{job}").main()
