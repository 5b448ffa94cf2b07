"""Compute universal adversarial perturbations of a classifier from WebDataset shards, on Ray, logged to MLflow: one, or a pool.

Without arguments: EfficientNet-Lite0 on the photographs that packages of the `demo` extra carry.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is quiet while the imports below take their seconds
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import json
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from uap_dist.computing.pool_report import POOL_FOLDER, FinishedPool, save_pool
from uap_dist.computing.pool_run import (
    MemberPlan,
    Setting,
    compute_members,
    deliver_members,
    deliver_pool,
    describe_data,
    describe_job,
    describe_settings,
    member_folder,
    open_members,
)
from uap_dist.computing.report import FinishedRun
from uap_dist.computing.rounds import check_budget
from uap_dist.computing.run import Member
from uap_dist.data.demo import write_demo_shards
from uap_dist.data.locations import absolute, join
from uap_dist.data.patterns import expand_apart
from uap_dist.errors import ConfigError, TrackingError
from uap_dist.fleet.config import FleetConfig, need_of
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import Need, check_shared, connect
from uap_dist.method.config import POOL_RANDOM_START, ComputeConfig
from uap_dist.method.state import State
from uap_dist.models.loading import load_usable_classifier
from uap_dist.planning.comparison import PLAN_FILE, Spent, read_plan
from uap_dist.planning.estimate import make_plan
from uap_dist.planning.job import PlannedJob
from uap_dist.tracking.checkpoint import Checkpoint, CheckpointStore, check_identity
from uap_dist.tracking.console import one_line_errors, set_up_logging
from uap_dist.tracking.mlflow_run import Tracker, register
from uap_dist.tracking.mlflow_server import CHECKPOINTS_TAG
from uap_dist.tracking.outputs import output_folder, publish, resumable, writes_files
from uap_dist.tracking.process import command, raise_on_sigterm, refuse_credentials
from uap_dist.tracking.resume import Resumed, find_resumed
from uap_dist.versions import describe_code, seconds_since_start
from uap_dist.workers.accuracy import check_accuracy
from uap_dist.workers.dataset import check_disjoint, check_limits, load_dataset

JOB_COSTS = (
    "model",
    "weights",
    "train_shards",
    "val_shards",
    "num_train_images",
    "num_val_images",
    "num_perturbations",
)
FLEET_COSTS = ("num_workers", "gpus_per_worker", "threads_per_worker", "cache_gib", "disk_cache_gib")

console = Console(soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compute a universal adversarial perturbation, or a pool of them.

    Pixels are RGB values 0..255 at the classifier's input size; every norm, radius and step is in these units.
    """

    model: str = "efficientnet_lite0"
    """torchvision/NAME, timm/NAME, efficientnet_lite0|1|2, or your own path/to/file.py:factory or package.module:factory."""
    weights: str | None = None
    """File with its weights (.safetensors, or a .pth of tensors). Default: the published ones."""
    train_shards: tuple[str, ...] = ()
    """WebDataset tars to compute from: paths or s3://, gs:// URLs; {0000..0009}, * in file names and `::` work.
    Default: photographs of the packages of the demo extra."""
    val_shards: tuple[str, ...] = ()
    """Held-out tars that the fooling rate is reported on; none of them may be among the training ones."""
    num_train_images: int | None = None
    """Images to compute from, the first of the shards. Default: all."""
    num_val_images: int | None = None
    """Held-out images, the first of the shards. Default: all."""
    num_perturbations: int = 1
    """Perturbations to compute, with seeds from --seed on; several make a pool, and share the workers and what they decoded."""
    max_bad_fraction: float = 0.01
    """Share of images (0..1) that may fail to decode, and of held-out ones that may be training images too, before the job fails;
    both are left out."""
    output: Path | None = None
    """Folder for the results. Default: outputs/<model>-<norm>-seed<seed>-<time>."""
    storage: str | None = None
    """Folder or s3://, gs:// URL under which each round is committed, in a folder named after the MLflow run; the last
    three are kept. At a URL `results` there becomes a copy of the output folder. Default: checkpoints beside that."""
    resume: str | None = None
    """MLflow run, or its folder of checkpoints, to go on with after its last committed round. All other options are
    then those of that run; of those given anew, only such that do not change the result are accepted."""
    register_as: str | None = None
    """Model in MLflow's registry that the finished pool becomes a version of. Default: it is not registered."""
    plan: bool = False
    """Compute nothing: try a few blocks on one worker (on CPUs, on as many as share its machine), and say what the
    run takes in network evaluations, time, worker-hours, data and memory, by size of the fleet; plan.json has it all."""
    price_per_gpu_hour: float | None = None
    """With --plan: what an hour of one GPU costs, in any currency."""
    planned: str | None = None
    """plan.json of this run: MLflow and the last lines then hold what was planned against what it took."""
    experiment: str = "uap_dist"
    """MLflow experiment; the server is taken from MLFLOW_TRACKING_URI, else mlflow.db in the working directory."""
    debug: bool = False
    """Show tracebacks of errors."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        check_limits(self.max_bad_fraction, self.num_train_images, self.num_val_images)
        if self.num_train_images is not None:
            check_budget(self.num_train_images, self.compute)
        if self.num_perturbations < 1:
            raise ConfigError(f"num perturbations is {self.num_perturbations}; it must be positive")
        if self.register_as is not None and self.num_perturbations == 1:
            raise ConfigError("only a pool is registered (--register-as); give --num-perturbations 2 or more")
        if self.register_as is not None and not re.fullmatch("[^/:'\"]+", self.register_as):
            raise ConfigError(
                f"--register-as {self.register_as!r} is no name for a model: it must not hold / : ' or \""
            )

        if self.plan and self.resume is not None:
            raise ConfigError("--plan plans a run from its beginning; leave out --resume")
        if self.plan and self.fleet.verify_determinism:
            raise ConfigError("--plan does not count what --verify-determinism solves twice; leave it out")
        if self.plan and self.planned is not None:
            raise ConfigError("--plan makes what --planned takes; give one of them")
        if self.price_per_gpu_hour is not None and not self.plan:
            raise ConfigError("--price-per-gpu-hour belongs to --plan")
        if self.price_per_gpu_hour is not None and not self.price_per_gpu_hour > 0:
            raise ConfigError(f"price per gpu hour is {self.price_per_gpu_hour}; it must be positive")

    @property
    def name(self) -> str:
        """Of the MLflow run and, with the time, of the output folder."""
        model = "-".join(Path(self.model).parts[-2:]) if ".py:" not in self.model else Path(self.model).name
        seed = self.compute.seed
        which = f"seed{seed}" if self.num_perturbations == 1 else f"pool{self.num_perturbations}-seed{seed}"
        return f"{model.replace(':', '-')}-{self.compute.norm}-{which}{'-plan' * self.plan}"

    def costly(self) -> dict[str, Any]:
        """What time and money depend on: a plan that differs in it is of another run."""
        values = self.to_json()
        fleet = {name: values["fleet"][name] for name in FLEET_COSTS}
        return {name: values[name] for name in JOB_COSTS} | values["compute"] | fleet

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Options":
        """What `to_json` gave."""
        return cls(
            **dict(values)
            | {
                "train_shards": tuple(values["train_shards"]),
                "val_shards": tuple(values["val_shards"]),
                "output": Path(values["output"]),
                "compute": ComputeConfig(**values["compute"]),
                "fleet": FleetConfig(**values["fleet"]),
            }
        )


def main() -> None:
    """Parse, then run inside an MLflow run that ends as the job does."""
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        refuse_credentials(sys.argv[1:])
        resumed = find_resumed("compute")
        options, refusal = _parse(resumed)
        run_id = resumed.checkpoint.job.run_id if resumed else None
        name = "refused" if refusal else options.name
        job = "plan" if options.plan else "compute"
        with Tracker(job=job, experiment=options.experiment, run_name=name, run_id=run_id) as tracker:
            if refusal is not None:
                raise refusal
            if options.plan:
                plan(options, tracker)
            else:
                run(options, tracker, resumed)


def plan(options: Options, tracker: Tracker) -> None:
    """Try a little of the job, and say what all of it costs."""
    output = output_folder(options.output, options.name)
    classifier = load_usable_classifier(options.model, options.weights)
    tracker.log_params(describe_settings(classifier, options.weights, options.compute, options.fleet))
    train_urls, val_urls = _shards(options, output)
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    if not options.train_shards:
        _check_demo(train_urls, need_of(options.fleet))
    job = PlannedJob(
        model=options.model,
        weights=options.weights,
        train_urls=train_urls,
        val_urls=val_urls,
        num_train_images=options.num_train_images,
        num_val_images=options.num_val_images,
        max_bad_fraction=options.max_bad_fraction,
        num_perturbations=options.num_perturbations,
        config=options.compute,
        fleet=options.fleet,
        storage=options.storage or str(output.parent / "checkpoints"),
        price_per_gpu_hour=options.price_per_gpu_hour,
        options=options.costly(),
    )
    made = make_plan(job, classifier, tracker, console)
    _save_plan(output, made.result() | {"code": describe_code()})
    tracker.complete(tags={}, metrics=made.metrics(), step=0, markdown=made.summary(), folder=output)
    console.print(f"\n{made.summary()}\n\nFiles: {output}\nMLflow: {tracker.how_to_open()}", markup=False)


@writes_files
def _save_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    (folder / PLAN_FILE).write_text(json.dumps(plan, indent=2) + "\n")


def run(options: Options, tracker: Tracker, resumed: Resumed | None) -> None:
    """The whole job: connect, load, compute, save, say so. Its workers end with its process."""
    output = output_folder(options.output, options.name, may_hold_files=resumed is not None)
    below = options.storage or str(output.parent / "checkpoints")
    storage = resumed.storage if resumed else join(absolute(below), tracker.run_id)
    planned = {}
    if options.planned is not None and resumed is None:
        planned = read_plan(Path(options.planned), options.costly())
        tracker.log_metrics(planned)
    setting = _set_up(options, output, storage, tracker, resumed)
    checkpoint = _start(setting, replace(options, output=output), tracker, resumed)
    with ExitStack() as stack:
        stack.enter_context(resumable(storage))
        store = stack.enter_context(CheckpointStore(storage))
        if options.num_perturbations == 1:
            member = Member(options.compute, checkpoint, store=store, folder=output, tracker=tracker)
            members, pool = {"": member}, None
            compute_members(setting, members)
        else:
            store.start(checkpoint)  # says what the pool is; the members' own say how far they are
            tracker.set_tag(CHECKPOINTS_TAG, storage)
            plans = _plan_members(options, output)
            members = open_members(setting, plans, storage, checkpoint.job, tracker, stack)
            compute_members(setting, members)
            pool = FinishedPool.of({name: plan.folder for name, plan in plans.items()}, tracker.run_id)
            save_pool(output, pool)
        publish(output, storage)
        try:
            deliver_members(setting, members)
            if pool is not None:
                deliver_pool(tracker, setting, pool, output)
                if options.register_as is not None:
                    console.print(f"registered as {register(tracker, POOL_FOLDER, options.register_as)}")
        except TrackingError as error:
            raise TrackingError(
                f"{error}; all is computed and lies in {output}; when the server answers again: "
                f"{command()} --resume {storage}"
            ) from error
    finished = pool or members[""].finished
    assert finished is not None
    results = [finished.result()] if isinstance(finished, FinishedRun) else list(finished.results.values())
    # what its earlier processes took, a resumed run does not know
    spent = Spent.of(results, setting.fleet.num_workers, None if resumed else seconds_since_start())
    summary = f"{finished.summary()}\n\n{spent.beside(planned)}".rstrip()
    try:
        tracker.log_metrics(spent.metrics())
        tracker.describe(summary)
    except TrackingError as error:  # all else is delivered, and the run is finished
        console.print(f"what the run took is not in MLflow: {error}", markup=False)
    console.print(f"\n{summary}\n\nFiles: {output}\nMLflow: {tracker.how_to_open()}", markup=False)


def _set_up(options: Options, output: Path, storage: str, tracker: Tracker, resumed: Resumed | None) -> Setting:
    """Network, fleet and data; the run says what they are."""
    classifier = load_usable_classifier(options.model, options.weights)
    settings = describe_settings(classifier, options.weights, options.compute, options.fleet)
    settings |= {"demo": not options.train_shards, "num_perturbations": options.num_perturbations}
    if resumed is None:
        tracker.log_params(settings)
    train_urls, val_urls = _shards(options, output)
    CheckpointStore(storage).prepare()  # that it can be written to is known before any work
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    fleet = Fleet(
        options.model, options.weights, options.fleet, tracker.run_id, weights_digest=classifier.weights_digest
    )
    console.print(f"MLflow run {tracker.run_id}; waiting for {fleet.describe_request()}")
    fleet.wait()
    if not options.train_shards:
        _check_demo(train_urls, fleet.need)
    console.print(f"decoding {len(train_urls)} training and {len(val_urls)} held-out shards")
    load = {"max_bad_fraction": options.max_bad_fraction}
    train = load_dataset(fleet, train_urls, num_images=options.num_train_images, **load)
    val = load_dataset(fleet, val_urls, num_images=options.num_val_images, **load)
    val = check_disjoint(train, val, max_shared_fraction=options.max_bad_fraction)
    for what, dataset in (("training", train), ("held-out", val)):
        console.print(f"clean top-1 of {what} images: {check_accuracy(fleet, dataset, options.model) or 'no labels'}")
    ball = f"{options.compute.norm} {options.compute.ball_radius:g}"
    console.print(f"{options.model}, {ball}, {train.num_examples} training and {val.num_examples} held-out images")
    return Setting(classifier, fleet, train, val, settings | describe_data(train, val), console)


def _start(setting: Setting, options: Options, tracker: Tracker, resumed: Resumed | None) -> Checkpoint:
    """What the run goes on from."""
    job = describe_job(setting, options.compute, tracker.run_id, options.to_json())
    if resumed is not None:
        check_identity(resumed.checkpoint.job, job)
        if job.options["storage"] != resumed.checkpoint.job.options["storage"]:
            raise ConfigError(f"a resumed run is committed where it was, in {resumed.storage}; leave out --storage")
        return resumed.checkpoint
    tracker.log_params(describe_data(setting.train, setting.val))
    tracker.log_dataset(setting.train, "training")
    tracker.log_dataset(setting.val, "held-out")
    return Checkpoint(job, State.start(setting.train.shape, setting.train.num_examples, options.compute), ())


def _plan_members(options: Options, output: Path) -> dict[str, MemberPlan]:
    """The members of a pool by name, each with the options with which it could be computed alone."""
    plans = {}
    for seed in range(options.compute.seed, options.compute.seed + options.num_perturbations):
        config, folder = replace(options.compute, seed=seed), member_folder(output, seed)
        alone = replace(options, num_perturbations=1, register_as=None, compute=config, output=folder)
        plans[folder.name] = MemberPlan(config, folder, alone.name, alone.to_json())
    return plans


def _parse(resumed: Resumed | None) -> tuple[Options, ConfigError | None]:
    """Options; those that cannot be are reported inside an MLflow run, as whoever watches scheduled jobs expects."""
    try:
        default = Options() if resumed is None else resumed.options(Options.from_json)
        options = tyro.cli(Options, default=default, config=(tyro.conf.OmitArgPrefixes,))
        if options.num_perturbations > 1 and options.compute.random_start is None:
            options = replace(options, compute=replace(options.compute, random_start=POOL_RANDOM_START))
        return options, None
    except ConfigError as error:
        words = sys.argv
        experiment = words[words.index("--experiment") + 1] if "--experiment" in words[:-1] else Options.experiment
        return Options(experiment=experiment), error


def _shards(options: Options, output: Path) -> tuple[list[str], list[str]]:
    if not options.train_shards and not options.val_shards:
        train, val, num_train, num_val = write_demo_shards(output.parent / "demo-shards")
        console.print(
            f"no shards given: crops of {num_train} training and {num_val} held-out photographs, a demonstration only"
        )
        return train, val
    if not options.train_shards or not options.val_shards:
        raise ConfigError("give both --train-shards and --val-shards, or neither for the demonstration")
    return expand_apart(options.train_shards, options.val_shards)


def _check_demo(urls: list[str], need: Need) -> None:
    """Refuse the demonstration where its shards, which the driver has written, are not seen by the nodes."""
    check_shared(
        Path(urls[0]).parent,
        need,
        "the demonstration's shards are written beside --output: give one in a folder that every node sees, or shards of your own "
        "(--train-shards, --val-shards)",
    )


if __name__ == "__main__":
    main()
