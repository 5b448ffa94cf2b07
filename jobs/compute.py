"""Compute universal adversarial perturbations of a classifier from WebDataset shards, on Ray, logged to MLflow: one, or a pool.

Without arguments: EfficientNet-Lite0 on the photographs that packages of the `demo` extra carry.
"""

import json
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from uap_dist.checkpoint import Checkpoint, CheckpointStore, JobRecord, check_identity
from uap_dist.classifiers import Classifier, load_classifier
from uap_dist.compute import POOL_RANDOM_START, ComputeConfig, State
from uap_dist.dataset import Dataset, check_disjoint, load_dataset
from uap_dist.demo import write_demo_shards
from uap_dist.errors import ConfigError, TrackingError
from uap_dist.fleet import Fleet, FleetConfig, connect
from uap_dist.locations import is_url, join
from uap_dist.member import Member, own_provenance
from uap_dist.pool_report import MEMBERS_FOLDER, POOL_FOLDER, FinishedPool, save_pool
from uap_dist.provenance import git_commit, versions
from uap_dist.report import RESULT_FILE, output_folder
from uap_dist.shards import expand_patterns
from uap_dist.terminal import RoundProgress, one_line_errors, raise_on_sigterm, set_up_logging
from uap_dist.together import compute_together
from uap_dist.tracking import CHECKPOINTS_TAG, Tracker, checkpoints_of, is_finished

console = Console(soft_wrap=True, highlight=False)
DELIVERY_TIMEOUT_S, LAST_DELIVERY_TIMEOUT_S = 1.0, 20.0  # while others compute, and when nothing else is to be done


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
    """Share of images (0..1) that may fail to decode before the job fails."""
    output: Path | None = None
    """Folder for the results. Default: outputs/<model>-<norm>-seed<seed>-<time>."""
    storage: str | None = None
    """Folder or s3://, gs:// URL under which each round is committed, in a folder named after the MLflow run; the last
    three are kept. Default: checkpoints beside the output folder."""
    resume: str | None = None
    """MLflow run, or its folder of checkpoints, to go on with after its last committed round. All other options are
    then those of that run; of those given anew, only such that do not change the result are accepted."""
    register_as: str | None = None
    """Model in MLflow's registry that the finished pool becomes a version of. Default: it is not registered."""
    experiment: str = "uap_dist"
    """MLflow experiment; the server is taken from MLFLOW_TRACKING_URI, else mlflow.db in the working directory."""
    debug: bool = False
    """Show tracebacks of errors."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.num_perturbations < 1:
            raise ConfigError(f"num perturbations is {self.num_perturbations}; it must be positive")
        if self.register_as is not None and self.num_perturbations == 1:
            raise ConfigError("only a pool is registered (--register-as); give --num-perturbations 2 or more")
        if self.register_as is not None and not re.fullmatch("[^/:'\"]+", self.register_as):
            raise ConfigError(
                f"--register-as {self.register_as!r} is no name for a model: it must not hold / : ' or \""
            )

    @property
    def name(self) -> str:
        """Of the MLflow run and, with the time, of the output folder."""
        model = "-".join(Path(self.model).parts[-2:]) if ".py:" not in self.model else Path(self.model).name
        seed = self.compute.seed
        which = f"seed{seed}" if self.num_perturbations == 1 else f"pool{self.num_perturbations}-seed{seed}"
        return f"{model.replace(':', '-')}-{self.compute.norm}-{which}"

    def of_members(self, output: Path) -> dict[str, "Options"]:
        """Those with which each member of the pool could be computed alone, by its name."""
        members = {}
        for seed in range(self.compute.seed, self.compute.seed + self.num_perturbations):
            config, folder = replace(self.compute, seed=seed), output / MEMBERS_FOLDER / f"seed-{seed}"
            members[folder.name] = replace(self, num_perturbations=1, register_as=None, compute=config, output=folder)
        return members

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


@dataclass(frozen=True)
class Resumed:
    """What --resume has found: the newest checkpoint, and where it lies."""

    checkpoint: Checkpoint
    storage: str


@dataclass(frozen=True)
class Setting:
    """What all perturbations of a job share."""

    options: Options
    output: Path
    classifier: Classifier
    fleet: Fleet
    train: Dataset
    val: Dataset
    provenance: Mapping[str, Any]

    @property
    def member_folders(self) -> dict[str, Path]:
        """Of a pool's members, by name."""
        return {name: self.output / MEMBERS_FOLDER / name for name in self.options.of_members(self.output)}


def main() -> None:
    """Parse, then run inside an MLflow run that ends as the job does."""
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        resumed = _checkpoint_to_resume()
        options, refusal = _parse(resumed)
        run_id = resumed.checkpoint.job.run_id if resumed else None
        name = "refused" if refusal else options.name
        with Tracker(experiment=options.experiment, run_name=name, run_id=run_id) as tracker:
            if refusal is not None:
                raise refusal
            run(options, tracker, resumed)


def run(options: Options, tracker: Tracker, resumed: Resumed | None) -> None:
    """The whole job: connect, load, compute, save, say so. Its workers end with its process."""
    setting = _set_up(options, tracker, resumed)
    storage, checkpoint = _start(setting, tracker, resumed)
    with ExitStack() as stack:
        store = stack.enter_context(CheckpointStore(storage))
        if options.num_perturbations == 1:
            member = Member(options.compute, checkpoint, store=store, folder=setting.output, tracker=tracker)
            members, pool = {"": member}, None
            _compute(setting, members)
        else:
            store.start(checkpoint)  # says what the pool is; the members' own say how far they are
            tracker.set_tag(CHECKPOINTS_TAG, storage)
            members = _start_members(setting, storage, checkpoint.job, tracker, stack)
            _compute(setting, members)
            pool = FinishedPool.of(setting.member_folders, tracker.run_id)
            save_pool(setting.output, pool)
        try:
            _deliver(setting, members, pool, tracker)
        except TrackingError as error:
            raise TrackingError(
                f"{error}; all is computed and lies in {setting.output}; when the server answers again: "
                f"python jobs/compute.py --resume {storage}"
            ) from error
    finished = pool or members[""].finished
    assert finished is not None
    console.print(f"\n{finished.summary()}\n\nFiles: {setting.output}\nMLflow: {tracker.how_to_open()}", markup=False)


def _set_up(options: Options, tracker: Tracker, resumed: Resumed | None) -> Setting:
    """Folder, network, fleet and data; the run says what they are."""
    output = output_folder(options.output, options.name, may_hold_files=resumed is not None)
    classifier = load_classifier(options.model, options.weights)
    settings = _describe_settings(options, classifier)
    if resumed is None:
        tracker.log_params(settings)
    train_urls, val_urls = _shards(options, output)
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    fleet = Fleet(options.model, options.weights, options.fleet)
    console.print(f"MLflow run {tracker.run_id}; waiting for {fleet.num_workers} workers")
    fleet.wait()
    console.print(f"decoding {len(train_urls)} training and {len(val_urls)} held-out shards")
    load = {"max_bad_fraction": options.max_bad_fraction}
    train = load_dataset(fleet, train_urls, num_images=options.num_train_images, **load)
    val = load_dataset(fleet, val_urls, num_images=options.num_val_images, **load)
    check_disjoint(train, val)
    ball = f"{options.compute.norm} {options.compute.ball_radius:g}"
    console.print(f"{options.model}, {ball}, {train.num_examples} training and {val.num_examples} held-out images")
    return Setting(options, output, classifier, fleet, train, val, settings | _describe_data(train, val))


def _start(setting: Setting, tracker: Tracker, resumed: Resumed | None) -> tuple[str, Checkpoint]:
    """Where the run is committed, and what it goes on from."""
    job = _describe_job(setting, tracker.run_id)
    if resumed is not None:
        check_identity(resumed.checkpoint.job, job)
        if job.options["storage"] != resumed.checkpoint.job.options["storage"]:
            raise ConfigError(f"a resumed run is committed where it was, in {resumed.storage}; leave out --storage")
        return resumed.storage, resumed.checkpoint
    tracker.log_params(_describe_data(setting.train, setting.val))
    tracker.log_dataset(setting.train, "training")
    tracker.log_dataset(setting.val, "held-out")
    storage = join(setting.options.storage or str(setting.output.parent / "checkpoints"), tracker.run_id)
    return storage, Checkpoint(job, State.start(setting.train, setting.options.compute), ())


def _start_members(
    setting: Setting, storage: str, job: JobRecord, tracker: Tracker, stack: ExitStack
) -> dict[str, Member]:
    """Those members of a pool that are not finished, each in an MLflow run below the pool's."""
    members = {}
    for name, options in setting.options.of_members(setting.output).items():
        folder = setting.member_folders[name]
        store = stack.enter_context(CheckpointStore(join(storage, name)))
        found = store.find_newest()
        if found is not None and (folder / RESULT_FILE).exists() and is_finished(found.job.run_id):
            console.print(f"{name} is finished")
            continue
        run_id = found.job.run_id if found else None
        own = Tracker(experiment=options.experiment, run_name=options.name, run_id=run_id, parent=tracker)
        stack.enter_context(own)
        identity = dict(job.identity) | own_provenance(options.compute)
        own_job = replace(job, run_id=own.run_id, options=options.to_json(), identity=identity)
        if found is None:
            own.log_params(dict(setting.provenance) | own_provenance(options.compute))
            found = Checkpoint(own_job, State.start(setting.train, options.compute), ())
        else:
            check_identity(found.job, own_job)
        members[name] = Member(options.compute, found, store=store, folder=folder, tracker=own)
    return members


def _compute(setting: Setting, members: Mapping[str, Member]) -> None:
    """All rounds that are left; each perturbation is saved, and its run completed, as soon as it is done."""
    config, fleet = setting.options.compute, setting.fleet
    for name, member in members.items():
        if member.state.num_rounds:
            console.print(f"{name} resuming after round {member.state.num_rounds}".strip())

    def at_once() -> int:  # one more than keep all workers busy
        return 1 + ceil(fleet.num_workers * config.block_size / config.round_size)

    rounds = {name: member.rounds(fleet, setting.train, setting.val) for name, member in members.items()}
    with RoundProgress(console, config.max_evaluations, len(members)) as progress:
        for name, report in compute_together(rounds, at_once=at_once):
            progress.show(report, name)
            if report.is_last:
                provenance = dict(setting.provenance) | fleet.describe()
                members[name].finish(report, fleet, setting.val, provenance, setting.classifier.class_names)
                with suppress(TrackingError):  # tried again when all is computed
                    members[name].deliver(DELIVERY_TIMEOUT_S, fleet.describe())


def _deliver(setting: Setting, members: Mapping[str, Member], pool: FinishedPool | None, tracker: Tracker) -> None:
    """Complete the MLflow runs that are not yet complete: members' that the server did not take before, the pool's."""
    for member in members.values():
        if not member.is_delivered:
            member.deliver(LAST_DELIVERY_TIMEOUT_S, setting.fleet.describe())
    if pool is not None:
        tracker.complete(
            tags=setting.fleet.describe(),
            metrics=pool.metrics(),
            step=0,
            markdown=pool.summary(),
            folder=setting.output,
            leave_out=(MEMBERS_FOLDER,),
        )
        if setting.options.register_as is not None:
            console.print(f"registered as {tracker.register(POOL_FOLDER, setting.options.register_as)}")


def _checkpoint_to_resume() -> Resumed | None:
    """The newest checkpoint of the run that --resume names; its options are needed before the others are parsed."""
    for number, word in enumerate(sys.argv[1:], start=1):
        option, _, value = word.partition("=")
        if option == "--resume":
            target = value or "".join(sys.argv[number + 1 : number + 2])
            if re.fullmatch("[0-9a-f]{32}", target):
                storage = checkpoints_of(target)
            else:
                storage = target if is_url(target) else str(Path(target).resolve())
            return Resumed(CheckpointStore(storage).newest(), storage)
    return None


def _parse(resumed: Resumed | None) -> tuple[Options, ConfigError | None]:
    """Options; those that cannot be are reported inside an MLflow run, as whoever watches scheduled jobs expects."""
    try:
        default = Options() if resumed is None else Options.from_json(resumed.checkpoint.job.options)
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
    train, val = expand_patterns(options.train_shards), expand_patterns(options.val_shards)
    both = set(train) & set(val)
    if both:
        raise ConfigError(f"shard {min(both)} is among both the training and the held-out ones")
    return train, val


def _describe_settings(options: Options, classifier: Classifier) -> dict[str, Any]:
    return {
        "model": options.model,
        "weights": options.weights or "published",
        "weights_digest": classifier.weights_digest,
        "demo": not options.train_shards,
        "num_perturbations": options.num_perturbations,
        **asdict(options.compute),
        "radius": options.compute.ball_radius,
        **{f"solver.{key}": value for key, value in asdict(options.compute.solver).items()},
        **{f"fleet.{key}": value for key, value in asdict(options.fleet).items()},
        "git_commit": git_commit(),
        **{f"version.{key}": value for key, value in versions().items()},
    }


def _describe_job(setting: Setting, run_id: str) -> JobRecord:
    """What a resumed run is held against. The clean labels stand for the network's code, which no digest of weights covers."""
    options, provenance = setting.options, setting.provenance
    decisive = ("weights_digest", "train_digest", "val_digest", "fleet.threads_per_worker", "num_perturbations")
    config = {key: provenance[key] for key in provenance if key in asdict(options.compute) or key.startswith("solver.")}
    environment = {key: provenance[f"version.{key}"] for key in ("torch", "torchvision", "uap_dist")}
    return JobRecord(
        run_id=run_id,
        options=replace(options, output=setting.output).to_json(),
        identity={key: provenance[key] for key in decisive}
        | config
        | {"clean labels": sha256(setting.train.clean.labels.tobytes()).hexdigest()},
        environment=environment | {"git_commit": provenance["git_commit"], "machines": sorted(setting.fleet.machines)},
    )


def _describe_data(train: Dataset, val: Dataset) -> dict[str, Any]:
    return {
        "train_digest": train.digest,
        "val_digest": val.digest,
        "train_shards": len(train.shards),
        "val_shards": len(val.shards),
        "num_bad_images": len(train.bad) + len(val.bad),
    }


if __name__ == "__main__":
    main()
