"""All computations of a job on one fleet: one perturbation, or the members of a pool at the same time."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from uap_dist.computing.options import ComputeOptions
from uap_dist.computing.pool_report import MEMBERS_FOLDER, POOL_FOLDER, FinishedPool, save_pool
from uap_dist.computing.provenance import Setting, check_resumed, describe_held_out, describe_member
from uap_dist.computing.run import TrackedRun
from uap_dist.data.locations import join
from uap_dist.errors import ResumeError, TrackingError
from uap_dist.job_options import to_json
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport, State
from uap_dist.rounds.concurrent import compute_concurrently, keep_last_arrays, num_concurrent
from uap_dist.rounds.group import in_groups, run_together
from uap_dist.tracking.checkpoint import Checkpoint, JobRecord
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.tracking.console import RoundProgress
from uap_dist.tracking.mlflow_run import LAST_DELIVERY_TIMEOUT_S, Tracker, register
from uap_dist.tracking.mlflow_server import CHECKPOINTS_TAG, look_up
from uap_dist.tracking.outputs import RESULT_FILE, deliverable, publish, resumable
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import Workers

DELIVERY_TIMEOUT_S = 1.0  # while other members compute


@dataclass(frozen=True)
class MemberPlan:
    """A member of a pool before it is computed.

    Attributes:
        config: of its computation.
        folder: folder of its results.
        run_name: name of its MLflow run.
        options: options of a job that resumes it alone.
    """

    config: ComputeConfig
    folder: Path
    run_name: str
    options: Mapping[str, Any]


def compute_all(
    setting: Setting, options: ComputeOptions, checkpoint: Checkpoint, tracker: Tracker, output: Path, storage: str
) -> tuple[str, list[Mapping[str, Any]]]:
    """Compute, save and deliver the perturbation or the pool that the options ask for.

    Args:
        setting: network, workers and data.
        options: of the job.
        checkpoint: where the job continues.
        tracker: of its MLflow run.
        output: folder of the results.
        storage: folder or URL of its checkpoints.

    Returns:
        A summary in Markdown, and the numbers of each perturbation (see `FinishedRun.result`).

    Raises:
        OutputError: results cannot be written; all rounds are committed.
        TrackingError: everything is computed and saved, but MLflow does not accept it.
    """
    with ExitStack() as stack:
        stack.enter_context(resumable(storage))
        store = stack.enter_context(CheckpointStore(storage, setting.commit_every_s))
        plans: Mapping[str, MemberPlan] = {}
        pool = None
        if options.num_perturbations == 1:
            run = TrackedRun(options.config, checkpoint, store=store, folder=output, tracker=tracker)
            members = {"": run}
        else:
            store.start(checkpoint)  # identifies the pool; the members have checkpoints of their own
            tracker.set_tag(CHECKPOINTS_TAG, storage)
            plans = plan_members(options, output)
            members = open_members(setting, plans, storage, checkpoint.job, tracker, stack)
        record = cache(partial(record_held_out, tracker, setting, plans))  # once, but again after an error
        # the run of a single perturbation ends only when its files are published, because a finished run is not resumed
        compute_members(setting, members, record, deliver_at_once=bool(plans))
        if plans:
            pool = finish_pool(setting, plans, tracker)
            save_pool(output, pool)
        publish(output, storage)
        with deliverable(output, storage):
            record()
            deliver_members(setting, members)
            if pool is not None:
                deliver_pool(tracker, setting, pool, output)
                if options.register_as is not None:
                    setting.console.print(f"registered as {register(tracker, POOL_FOLDER, options.register_as)}")
    if pool is not None:
        return pool.summary(), list(pool.results.values())
    assert run.finished is not None
    return run.finished.summary(), [run.finished.result()]


def plan_members(options: ComputeOptions, output: Path) -> dict[str, MemberPlan]:
    """The members of a pool, by name."""
    plans = {}
    for seed in range(options.config.seed, options.config.seed + options.num_perturbations):
        folder = member_folder(output, seed)
        alone = options.alone(seed, folder)
        plans[folder.name] = MemberPlan(alone.config, folder, alone.name, to_json(alone))
    return plans


def member_folder(output: Path, seed: int) -> Path:
    """Folder of the member with that seed. Its name is the name of the member."""
    return output / MEMBERS_FOLDER / f"seed-{seed}"


def open_members(
    setting: Setting, plans: Mapping[str, MemberPlan], storage: str, job: JobRecord, tracker: Tracker, stack: ExitStack
) -> dict[str, TrackedRun]:
    """Start or resume the members of a pool that are not finished, each in a child of the pool's MLflow run.

    Args:
        setting: network, workers and data.
        plans: all members of the pool, by name.
        storage: folder or URL with a folder of checkpoints for each member.
        job: of the pool, from which those of the members are derived.
        tracker: of the pool.
        stack: closes the members' stores and MLflow runs.
    """
    members = {}
    for name, plan in plans.items():
        store = stack.enter_context(CheckpointStore(join(storage, name), setting.commit_every_s))
        found = store.find_newest()
        if (
            found is not None
            and (plan.folder / RESULT_FILE).exists()
            and look_up(found.job.run_id).status == "FINISHED"
        ):
            setting.console.print(f"{name} is finished")
            continue
        run_id = found.job.run_id if found else None
        own = stack.enter_context(Tracker(run_name=plan.run_name, run_id=run_id, parent=tracker))
        identity = dict(job.identity) | describe_member(plan.config)
        own_job = replace(job, run_id=own.run_id, options=plan.options, identity=identity, part_of=job.run_id)
        if found is None:
            own.log_params(dict(setting.provenance) | describe_member(plan.config))
            found = Checkpoint(own_job, State.start(setting.train.shape, setting.train.clean.labels, plan.config), ())
        else:
            check_resumed(found.job, own_job)
        members[name] = TrackedRun(plan.config, found, store=store, folder=plan.folder, tracker=own)
    return members


def compute_members(
    setting: Setting,
    members: dict[str, TrackedRun],
    record: Callable[[], None] = lambda: None,
    *,
    deliver_at_once: bool = True,
) -> None:
    """Compute all remaining rounds. A member that is done is saved, sent to MLflow and, with its history, removed from `members`.

    Args:
        setting: network, workers and data.
        members: by name; those that MLflow does not accept now are left.
        record: called when the held-out images are there, and again before a member is sent.
        deliver_at_once: if not, all members are left, and none is sent.
    """
    if not members:
        return
    fleet = setting.fleet
    for name, member in members.items():
        if member.state.num_rounds:
            setting.console.print(f"{name} resuming after round {member.state.num_rounds}".strip())
    # those of pools that were put together by hand may differ
    configs = {name: member.config for name, member in members.items()}
    kinds = {replace(config, seed=0, random_start=None) for config in configs.values()}
    was_tried = False
    rounds = _begin_all(setting, members)
    with RoundProgress(setting.console, {name: each.max_evaluations for name, each in configs.items()}) as progress:
        for name, report in compute_concurrently(
            rounds, limit=lambda left: max(num_concurrent(fleet.num_workers, left, each) for each in kinds)
        ):
            progress.show(report, name)
            if report.is_last:
                val = setting.held_out.result()
                provenance = describe_held_out(setting.train, val) | dict(setting.provenance) | fleet.describe()
                members[name].finish(report, fleet, val, provenance, setting.class_names)
            with suppress(TrackingError):  # the next member that is done tries again, or `deliver_members`
                if setting.held_out.done() and (report.is_last or not was_tried):
                    was_tried = True
                    record()
                if report.is_last and deliver_at_once:
                    members[name].deliver(DELIVERY_TIMEOUT_S, fleet.describe())
                    del members[name]


def _begin_all(setting: Setting, members: Mapping[str, TrackedRun]) -> dict[str, Iterator[RoundReport]]:
    """The remaining rounds of each member, by name."""

    def begin(name: str, workers: Workers) -> Iterator[RoundReport]:
        own = members[name].rounds(workers, setting.train, setting.held_out, num_uncomputed)
        return keep_last_arrays(own)

    def num_uncomputed() -> int:
        computed = [member.is_computed for member in list(members.values())]  # which others remove meanwhile
        return computed.count(False)

    configs = {name: member.config for name, member in members.items()}
    found: dict[str, Iterator[RoundReport]] = {}
    for names in in_groups(configs):
        group = {name: configs[name] for name in names}
        is_batch = group[names[0]].members_at_once > 1
        found |= run_together(setting.fleet, group, begin) if is_batch else {n: begin(n, setting.fleet) for n in names}
    return found


def record_held_out(tracker: Tracker, setting: Setting, plans: Mapping[str, MemberPlan]) -> None:
    """Log the held-out images, which are there now, unless members of a pool were measured on other ones."""
    val = setting.held_out.result()
    _check_measured(plans, val)
    tracker.log_params(describe_held_out(setting.train, val))
    tracker.log_dataset(val, "held-out")


def finish_pool(setting: Setting, plans: Mapping[str, MemberPlan], tracker: Tracker) -> FinishedPool:
    """The pool of these members, which are computed.

    Raises:
        ResumeError: an earlier process measured some of them on other held-out images.
    """
    val = setting.held_out.result()
    _check_measured(plans, val)
    folders = {name: plan.folder for name, plan in plans.items()}
    return FinishedPool.of(folders, setting.fleet, val, tracker.run_id)


def _check_measured(plans: Mapping[str, MemberPlan], val: Dataset) -> None:
    for name, plan in plans.items():
        path = plan.folder / RESULT_FILE
        if path.exists():
            measured = json.loads(path.read_text(encoding="utf-8"))["provenance"]["val_digest"]
            if measured != val.digest:
                raise ResumeError(
                    f"{name} was measured on other held-out images: val_digest was {measured}, is {val.digest}; "
                    "restore these, or start a new run"
                )


def deliver_members(setting: Setting, members: Mapping[str, TrackedRun]) -> None:
    """Complete the MLflow runs of the members that `compute_members` has left.

    Raises:
        TrackingError: the server does not answer.
    """
    for member in members.values():
        member.deliver(LAST_DELIVERY_TIMEOUT_S, setting.fleet.describe())


def deliver_pool(tracker: Tracker, setting: Setting, pool: FinishedPool, folder: Path) -> None:
    """Complete the MLflow run of the pool itself.

    Raises:
        TrackingError: the server does not answer.
    """
    tracker.complete(
        tags=setting.fleet.describe(),
        metrics=pool.metrics(),
        step=0,
        markdown=pool.summary(),
        folder=folder,
        leave_out=(MEMBERS_FOLDER,),
    )
