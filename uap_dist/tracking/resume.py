"""The run that --resume names: its newest checkpoint, which is found before the other options are parsed."""

import logging
import re
import time
from dataclasses import dataclass
from typing import TypeVar

from cattrs.errors import CattrsError

from uap_dist.data.locations import absolute
from uap_dist.errors import ResumeError
from uap_dist.job_options import from_json
from uap_dist.tracking.checkpoint import Checkpoint
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.tracking.mlflow_server import RunFacts, look_up
from uap_dist.tracking.process import command, value_of

RESUMABLE_JOBS = {"compute": "a computation", "finetune": "a fine-tuning"}
OTHER_JOBS = {"evaluate": "an evaluation", "analyze": "an analysis", "plan": "a plan"}

FRESH_S = 60.0  # age of the last round up to which the process that computed it may still be running

Options = TypeVar("Options")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """The newest checkpoint of a run, and its folder or URL."""

    checkpoint: Checkpoint
    storage: str

    def options(self, options_type: type[Options]) -> Options:
        """The job's options.

        Raises:
            ResumeError: another version of the package, with other options, wrote them.
        """
        try:
            return from_json(options_type, self.checkpoint.job.options)
        except (CattrsError, KeyError, TypeError, ValueError) as error:
            raise ResumeError(
                f"the options in {self.storage} are of another version of uap_dist ({error}); resume with that version, or start a new run"
            ) from error


def find_resumed(job: str) -> Resumed | None:
    """What --resume on the command line names, an MLflow run or its folder of checkpoints; None without that option.

    Args:
        job: job that is to resume it: compute or finetune.

    Raises:
        ResumeError: there is no checkpoint, or it is one that this job cannot resume.
        TrackingError: MLflow, which knows where the checkpoints are, does not answer.
    """
    target = value_of("--resume")
    if target is None:
        return None
    storage = _checkpoints_of(target, job) if re.fullmatch("[0-9a-f]{32}", target) else absolute(target)
    checkpoint = CheckpointStore(storage).newest()
    record = checkpoint.job
    if record.part_of is not None:
        raise ResumeError(_is_part(f"{storage} is", record.part_of, record.program))
    _check_job(f"{storage} is of", record.program, job, target)
    _warn_if_fresh(checkpoint)
    return Resumed(checkpoint, storage)


def _warn_if_fresh(checkpoint: Checkpoint) -> None:
    """Log a warning if another process may still be computing the run: only the age of its last round can tell."""
    if checkpoint.history:
        age_s = time.time() - checkpoint.history[-1].timestamp_ms / 1000
        if age_s < FRESH_S:
            logger.warning(
                "run %s finished a round %.0f s ago; if another process is still computing it, stop one of the two",
                checkpoint.job.run_id,
                age_s,
            )


def _checkpoints_of(run_id: str, job: str) -> str:
    """Folder or URL of a run's checkpoints; ResumeError if it has none, or this job cannot resume it."""
    run = look_up(run_id)
    root_id, root = _root(run_id, run)
    if not root.job:
        raise ResumeError(
            f"run {run_id} ({run.name}) was started by another program, or by an earlier version of uap_dist; it cannot be resumed"
        )
    if root.status == "FINISHED":
        raise ResumeError(f"run {run_id} is finished; there is nothing to resume")
    if root_id != run_id:
        raise ResumeError(_is_part(f"run {run_id} ({run.name}) is", root_id, root.job))
    _check_job(f"run {run_id} is", run.job, job, run_id)
    if run.checkpoints is None:
        raise ResumeError(f"run {run_id} ended before its first checkpoint; start it again without --resume")
    return run.checkpoints


def _root(run_id: str, run: RunFacts) -> tuple[str, RunFacts]:
    """The run at the top of the one given, which may be its own: parent of its parents."""
    return (run_id, run) if run.parent is None else _root(run.parent, look_up(run.parent))


def _is_part(subject: str, run_id: str, job: str) -> str:
    return f"{subject} part of run {run_id}, {RESUMABLE_JOBS.get(job, OTHER_JOBS.get(job))}; resume that: {command(job)} --resume {run_id}"


def _check_job(subject: str, found: str, job: str, target: str) -> None:
    if found in OTHER_JOBS:
        raise ResumeError(f"{subject} {OTHER_JOBS[found]}, which cannot be resumed; start it again")
    if found != job:
        raise ResumeError(
            f"{subject} {RESUMABLE_JOBS.get(found, found)}; resume it with {command(found)} --resume {target}"
        )
