"""Faults, really done to real jobs: the perturbation must keep its bits and MLflow its metrics. See benchmarks/chaos.md.

    python benchmarks/chaos.py                        # all rows, about three quarters of an hour on two cores
    python benchmarks/chaos.py --only driver-kills    # one row
    python benchmarks/chaos.py --small                # all rows with short jobs, as `make test-slow` does them
    python benchmarks/chaos.py --table                # the table of what has been done

The jobs are `jobs/compute.py` on a Ray cluster on loopback that this script starts, with synthetic shards and the network of
benchmarks/victim.py. Rows that fail, or take longer than they may, are named at the end; the exit code is then 1.
"""

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import numpy as np
import psutil
import tyro
from mlflow import MlflowClient
from networks import NETWORKS
from PIL import Image
from victim import BUG, FLAGS, PAUSE, SECONDS_PER_BLOCK

from uap_dist.data import write
from uap_dist.versions import git_commit

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from clusters import RayCluster, ray_cluster

JOB = ROOT / "jobs/compute.py"
VICTIM = f"{ROOT / 'benchmarks/victim.py'}:Victim"
EXIT_CODES = {
    "FINISHED": 0,
    "FAILED": 1,
    "RUNNING": 1,
}  # of a job, by how it leaves its MLflow run; RUNNING without MLflow
HEALTH = {  # a lost node is noticed in a second or two instead of a quarter of a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
DEFAULT_LIMIT_S = 400.0  # of a row
LIMITS_S = {"real-networks": 2400.0, "driver-kills": 1200.0, "pool-kills": 900.0, "pool-outage": 900.0}
NUM_CPUS = 5  # of the node that is always there
MEMORY_TO_FILL = 0.45  # of the machine's, when Ray ends the worker that fills it; less, and other work ends workers too


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long the jobs are, and how often faults that repeat are done."""

    max_passes: int = 20
    worker_counts: tuple[int, ...] = (1, 2, 3, 5)
    num_driver_kills: int = 22
    num_nodes: tuple[int, ...] = (2, 3)
    num_perturbations: int = 3
    num_pool_kills: int = 5
    storage_away_s: float = 3.0


FULL = Size()
SMALL = Size(
    max_passes=5,
    worker_counts=(1, 3),
    num_driver_kills=2,
    num_nodes=(2,),
    num_perturbations=2,
    num_pool_kills=1,
    storage_away_s=1.0,
)


@dataclass
class Line:
    """A row of the table."""

    row: str
    fault: str
    times: int
    ended: str
    same_bits: bool
    metrics_complete: bool
    seconds_lost: float
    date: str = ""
    commit: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the fault did no harm."""
        return self.ended.endswith("FINISHED") and self.same_bits and self.metrics_complete


class Trial:
    """One run under a fault: a first process, and those that resume it."""

    def __init__(self, lab: "Lab", name: str, *options: str, **environment: str) -> None:
        self.lab, self.name = lab, name
        self.options, self.environment = (*lab.options, *options), lab.cluster.env | environment
        self.folder = lab.folder / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.started = time.monotonic()
        self.endings: list[str] = []
        self.seconds = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        lab.trials.append(self)

    @property
    def command(self) -> tuple[str, ...]:
        """What starts the job."""
        return sys.executable, str(JOB), *self.options, "--experiment", self.name, "--output", str(self.folder / "out")

    def start(self) -> None:
        """The job, from its beginning."""
        self._start(self.command)

    def resume(self, *options: str) -> None:
        """Go on from the checkpoints."""
        self._start((sys.executable, str(JOB), "--resume", str(self.checkpoints), *options))

    def _start(self, command: tuple[str, ...]) -> None:
        with (self.folder / "errors").open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    @property
    def run(self) -> Any:
        """The newest MLflow run, a pool's own."""
        experiment = self.lab.client.get_experiment_by_name(self.name)
        assert experiment is not None, f"{self.name} has no MLflow run: {self.errors}"
        runs = self.lab.client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
        return [run for run in runs if "mlflow.parentRunId" not in run.data.tags][0]

    @property
    def checkpoints(self) -> Path:
        """The run's folder of commits."""
        return self.folder / "checkpoints" / self.run.info.run_id

    @property
    def errors(self) -> str:
        """What the newest process wrote to stderr."""
        return (self.folder / "errors").read_text()

    @property
    def rounds(self) -> int:
        """Committed so far, by all members of a pool."""
        newest: dict[Path, int] = {}
        for pattern in ("*/round-*", "*/seed-*/round-*"):
            for path in (self.folder / "checkpoints").glob(pattern):
                newest[path.parent] = max(newest.get(path.parent, 0), int(path.name.split("-")[1]))
        return sum(newest.values())

    def reach(self, number: int) -> None:
        """Return when so many rounds are committed."""
        assert self.process is not None
        self.lab.wait(lambda: self.rounds >= number or self.process.poll() is not None)
        assert self.rounds >= number, f"{self.name} ended before round {number}: {self.errors}"

    def kill(self) -> None:
        """SIGKILL to the driver."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.endings.append("driver killed")

    def finish(self, expected: str = "FINISHED") -> None:
        """Wait for the job's end, which must leave this status in MLflow."""
        assert self.process is not None
        self.lab.wait(lambda: self.process.poll() is not None)
        self.seconds = time.monotonic() - self.started
        self.endings.append(self.run.info.status)
        found = (self.endings[-1], self.process.returncode)
        assert found == (expected, EXIT_CODES[expected]), f"{self.name} ended {found}: {self.errors}"
        assert "Traceback" not in self.errors, self.errors

    @property
    def ending(self) -> str:
        """How its processes ended, one after another."""
        return ", then ".join(
            f"{e} × {self.endings.count(e)}".removesuffix(" × 1") for e in dict.fromkeys(self.endings)
        )

    @property
    def result(self) -> dict[str, Any]:
        """What the finished run has written of its perturbation, or pool."""
        return json.loads((self.folder / "out/result.json").read_text())

    def line(self, fault: str, times: int, undisturbed: "Trial | None" = None) -> Line:
        """Compare the end with that of the undisturbed run."""
        reference = undisturbed or self.lab.undisturbed
        same = self.result["perturbation_sha256"] == reference.result["perturbation_sha256"]
        complete = self.lab.has_all_metrics(self.result["mlflow_run_id"], reference.result["num_rounds"])
        return Line("", fault, times, self.ending, same, complete, round(self.seconds - reference.seconds, 1))

    def pool_line(self, fault: str, times: int) -> Line:
        """Compare each member with the run that its seed has alone."""
        pairs = list(zip(self.result["members"].values(), self.lab.alone, strict=True))
        same = all(m["perturbation_sha256"] == other.result["perturbation_sha256"] for m, other in pairs)
        complete = all(self.lab.has_all_metrics(m["mlflow_run_id"], other.result["num_rounds"]) for m, other in pairs)
        lost = round(self.seconds - sum(other.seconds for _, other in pairs), 1)
        return Line("", f"a pool of {len(pairs)}: {fault}", times, self.ending, same, complete, lost)


class Server:
    """A real `mlflow server` on the lab's store."""

    def __init__(self, lab: "Lab") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self._lab = f"http://127.0.0.1:{self.port}", lab
        lab.servers.append(self)
        self.start()

    def start(self) -> None:
        """Return when it answers."""
        words = ("server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        words += ("--backend-store-uri", self._lab.uri, "--artifacts-destination", str(self._lab.folder / "artifacts"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._lab.wait(self._answers)

    def _answers(self) -> bool:
        with suppress(OSError), urlopen(f"{self.uri}/health", timeout=2):
            return True
        return False

    def stop(self) -> None:
        """SIGKILL to all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Lab:
    """A Ray cluster, shards, a tracking store, and the undisturbed run."""

    def __init__(self, cluster: RayCluster, folder: Path, data: Path, size: Size) -> None:
        self.cluster, self.folder, self.data, self.size = cluster, folder, data, size
        self.uri = cluster.env["MLFLOW_TRACKING_URI"]
        self.client = MlflowClient(self.uri)  # of MLflow's store, not of a server that may be away
        self.client.search_experiments()  # makes its tables, which no job's time shall hold
        self.trials: list[Trial] = []
        self.servers: list[Server] = []
        self.deadline = time.monotonic() + DEFAULT_LIMIT_S
        write_shards(folder / "shards")
        self.options = (
            *("--model", VICTIM, *shard_options(folder / "shards")),
            *("--num-workers", "2", "--round-size", "20", "--block-size", "5", "--radius", "20"),
            *("--max-passes", str(size.max_passes), "--evaluate-every", "5"),
        )
        self.undisturbed = Trial(self, "undisturbed")
        self.undisturbed.start()
        self.undisturbed.finish()
        self.num_rounds = self.undisturbed.result["num_rounds"]

    @cached_property
    def alone(self) -> list[Trial]:
        """A run of its own for each member of a pool."""
        trials = []
        for seed in range(self.size.num_perturbations):
            trials.append(Trial(self, f"alone-{seed}", "--seed", str(seed), "--random-start", "0.5"))
            trials[-1].start()
            trials[-1].finish()
        return trials

    def wait(self, is_so: Callable[[], bool]) -> None:
        """Return when it is so; the row must end in time."""
        while not is_so():
            if time.monotonic() > self.deadline:
                raise TimeoutError("the row took longer than it may")
            time.sleep(0.01)

    def has_all_metrics(self, run_id: str, num_rounds: int) -> bool:
        """Every metric of every round once."""
        names = ("fooling_rate/round", "round/step", "iterate/norm_l2", "total/solves", "total/evaluations")
        steps = [[metric.step for metric in self.client.get_metric_history(run_id, name)] for name in names]
        return all(sorted(found) == list(range(1, num_rounds + 1)) for found in steps)

    def flag(self, name: str) -> None:
        """Have one worker do it."""
        (self.folder / "flags" / name).touch()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No block is computed meanwhile, so that a short job does not end before what is done to it."""
        self.flag(PAUSE)
        try:
            yield
        finally:
            (self.folder / "flags" / PAUSE).unlink()

    def worker(self) -> psutil.Process:
        """An actor's process."""
        self.wait(lambda: bool(self.cluster.workers()))
        return self.cluster.workers()[0]

    def do(self, name: str) -> list[Line]:
        """A row, after which no process or fault of it is left."""
        self.deadline = time.monotonic() + LIMITS_S.get(name, DEFAULT_LIMIT_S)
        done = {"row": name, "date": datetime.now(UTC).date().isoformat(), "commit": git_commit()}
        try:
            return [replace(line, **done) for line in ROWS[name](self)]
        finally:
            self._tidy()

    def _tidy(self) -> None:
        for trial in self.trials:
            if trial.process is not None and trial.process.poll() is None:
                trial.kill()
        for server in self.servers:
            server.stop()
        for process in self.cluster.find(lambda p: str(JOB) in p.cmdline()) + self.cluster.workers():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for flag in (self.folder / "flags").iterdir():
            flag.unlink()
        self.remove_nodes()
        if len(self.cluster.raylets()) < 2:  # a row that failed may have left no node
            self.cluster.add_node(num_cpus=NUM_CPUS)

    def remove_nodes(self) -> None:
        """All but the head and the first."""
        while len(self.cluster.raylets()) > 2:
            self.cluster.kill_node(-1)
            time.sleep(0.1)


@contextmanager
def open_lab(folder: Path, data: Path, size: Size) -> Iterator[Lab]:
    """A lab in a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "flags").mkdir(parents=True)
    threshold = min(0.95, psutil.virtual_memory().percent / 100 + MEMORY_TO_FILL)
    env = {
        FLAGS: str(folder / "flags"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "RAY_memory_monitor_refresh_ms": "100",
        "RAY_memory_usage_threshold": str(threshold),
    }
    with ray_cluster(folder, takes_jobs=True, env=env, settings=HEALTH) as cluster:
        cluster.add_node(num_cpus=NUM_CPUS)
        yield Lab(cluster, folder, data, size)


Row = Callable[[Lab], Iterator[Line]]
ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    """A fault that can be done alone, by name."""
    ROWS[function.__name__.replace("_", "-")] = function
    return function


@row
def worker_counts(lab: Lab) -> Iterator[Line]:
    """No fault, but other numbers of workers."""
    for count in lab.size.worker_counts:
        trial = Trial(lab, f"workers-{count}", "--num-workers", str(count))
        trial.start()
        trial.finish()
        yield trial.line(f"none, {count} workers", 0)


@row
def real_networks(lab: Lab) -> Iterator[Line]:
    """No fault, but other numbers of workers, on real networks and images."""
    for name, evaluations in (("squeezenet", 1_500), ("resnet20", 3_000)):
        network, trials = NETWORKS[name], []
        model, weights = network.locate(lab.data)
        for count in lab.size.worker_counts:
            trial = Trial(lab, f"{name}-{count}")
            trial.options = (
                *("--model", model, "--weights", str(weights), "--num-workers", str(count)),
                *("--train-shards", f"{lab.data / network.train}", "--num-train-images", str(network.num_train_images)),
                *("--val-shards", f"{lab.data / network.val}", "--num-val-images", "500"),
                *("--max-evaluations", str(evaluations), "--evaluate-every", "1000"),
            )
            trial.start()
            trial.finish()
            trials.append(trial)
            digest = trial.result["perturbation_sha256"]
            fault = f"none, {name}, {evaluations:,} evaluations, {count} workers: {digest[:12]}…"
            yield trial.line(fault, 0, trials[0])


@row
def worker_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL to workers in the middle of blocks."""
    trial, targets = Trial(lab, "worker-kills"), range(3, lab.num_rounds - 5, 8)
    trial.start()
    for number in targets:
        trial.reach(number)
        time.sleep(SECONDS_PER_BLOCK / 2)
        lab.worker().kill()
    trial.finish()
    yield trial.line("SIGKILL of a worker in mid-block", len(targets))


@row
def worker_exits(lab: Lab) -> Iterator[Line]:
    """A worker exits."""
    yield _lose_worker(lab, "exit", "a worker exits in mid-block")


@row
def worker_fills_memory(lab: Lab) -> Iterator[Line]:
    """A worker fills its memory until Ray ends it."""
    yield _lose_worker(lab, "fill-memory", "a worker fills its memory")


def _lose_worker(lab: Lab, flag: str, fault: str) -> Line:
    trial = Trial(lab, flag)
    trial.start()
    trial.reach(lab.num_rounds // 12)
    lab.flag(flag)
    trial.finish()
    lost = trial.result["provenance"]["num_workers_lost"]  # Ray's memory monitor may end another before the right one
    assert lost >= 1, "no worker was lost"
    return trial.line(f"{fault} ({lost} lost)", 1)


@row
def worker_raises(lab: Lab) -> Iterator[Line]:
    """A bug is no lost worker: the run fails, and goes on once the bug is gone."""
    trial = Trial(lab, "raise")
    trial.start()
    trial.reach(lab.num_rounds // 12)
    lab.flag("raise")
    trial.finish("FAILED")
    assert BUG in trial.errors, trial.errors
    trial.resume()
    trial.finish()
    yield trial.line("a worker raises an error; resumed", 1)


@row
def worker_hangs(lab: Lab) -> Iterator[Line]:
    """SIGSTOP to a worker: overtaken by another, and taken for lost after its deadline."""
    trial = Trial(lab, "hang", "--task-timeout-s", "6")
    trial.start()
    trial.reach(lab.num_rounds // 12)
    lab.worker().suspend()
    trial.finish()
    yield trial.line("SIGSTOP of a worker", 1)


@row
def node_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL of a raylet and all on its node, with two and three nodes."""
    for num_nodes in lab.size.num_nodes:
        for _ in range(num_nodes - 1):
            lab.cluster.add_node(num_cpus=2)
        trial = Trial(lab, f"nodes-{num_nodes}", "--num-workers", str(5 + num_nodes - 1))
        trial.start()
        trial.reach(lab.num_rounds // 12)
        lab.cluster.kill_node(2)
        trial.finish()
        yield trial.line(f"SIGKILL of a raylet, {num_nodes} worker nodes", 1)
        lab.remove_nodes()


@row
def node_added(lab: Lab) -> Iterator[Line]:
    """A node joins during the run, and is put to use."""
    trial = Trial(lab, "node-added")
    trial.options = tuple(word for word in lab.options if word not in ("--num-workers", "2"))
    trial.start()
    trial.reach(1)
    with lab.paused():
        lab.cluster.add_node(num_cpus=2)
    trial.finish()
    at_end = trial.run.data.tags["num_workers_at_end"]
    yield trial.line(f"a node joins: 5 workers before, {at_end} after", 1)


@row
def driver_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL to the driver at random points."""
    rng, trial, times = random.Random(0), Trial(lab, "driver-kills"), 0
    trial.start()
    while times < lab.size.num_driver_kills and trial.rounds < lab.num_rounds - 6:
        trial.reach(trial.rounds + rng.choice((1, 1, 2, 3)))
        time.sleep(rng.uniform(0, 0.3))
        trial.kill()
        times += 1
        trial.resume("--num-workers", rng.choice("123"))
    trial.finish()
    yield trial.line("SIGKILL of the driver at a random point, resumed with 1 to 3 workers", times)


@row
def pool_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL to the driver of a pool; each member must have the bits that its seed has alone."""
    rounds = lab.num_rounds * len(lab.alone)
    rng, trial, times = random.Random(1), _start_pool(lab, "pool-kills"), lab.size.num_pool_kills
    for number in range(times):
        trial.reach(round(rounds * (number + 0.3) / (times + 0.3)))
        time.sleep(rng.uniform(0, 0.6))
        trial.kill()
        trial.resume("--num-workers", rng.choice("123"))
    trial.finish()
    yield trial.pool_line("SIGKILL of the driver at a random point, resumed", times)


@row
def pool_outage(lab: Lab) -> Iterator[Line]:
    """The MLflow server of a pool is killed, and back after the pool has ended."""
    assert lab.alone
    server = Server(lab)
    trial = _start_pool(lab, "pool-outage", MLFLOW_TRACKING_URI=server.uri)
    trial.reach(lab.num_rounds // 3)
    server.stop()
    trial.finish("RUNNING")
    assert (trial.folder / "out/pool/pool.safetensors").exists(), trial.errors
    server.start()
    trial.resume()
    trial.finish()
    yield trial.pool_line("MLflow server killed, back after the end; resumed", 1)


def _start_pool(lab: Lab, name: str, **environment: str) -> Trial:
    trial = Trial(lab, name, "--num-perturbations", str(lab.size.num_perturbations), **environment)
    trial.start()
    return trial


@row
def job_stop(lab: Lab) -> Iterator[Line]:
    """`ray job submit`, `ray job stop`, then resume."""

    def ray_job(*words: str) -> None:
        command = [Path(sys.executable).with_name("ray"), "job", words[0], "--address", lab.cluster.dashboard]
        done = subprocess.run([*command, *words[1:]], env=lab.cluster.env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr

    trial, job = Trial(lab, "job-stop"), "job-stop"
    ray_job("submit", "--no-wait", "--submission-id", job, "--", *trial.command)
    lab.wait(lambda: trial.rounds >= lab.num_rounds // 7)
    with lab.paused():
        ray_job("stop", job)
    assert lab.cluster.job_status(job) == "STOPPED"
    trial.endings.append(trial.run.info.status)
    assert trial.endings == ["KILLED"], trial.endings
    trial.resume()
    trial.finish()
    yield trial.line("`ray job stop`, resumed", 1)


@row
def storage_fails(lab: Lab) -> Iterator[Line]:
    """The folder of checkpoints cannot be written to for a while (a file stands in its place)."""
    trial, seconds = Trial(lab, "storage-fails"), lab.size.storage_away_s
    trial.start()
    trial.reach(lab.num_rounds // 12)
    folder = trial.checkpoints
    away = folder.with_suffix(".away")
    folder.rename(away)
    folder.touch()
    time.sleep(seconds)
    folder.unlink()
    away.rename(folder)
    trial.reach(lab.num_rounds // 2)
    trial.kill()
    trial.resume()
    trial.finish()
    yield trial.line(f"storage refuses writes for {seconds:g} s; then the driver is killed, resumed", 1)


@row
def checkpoint_cut(lab: Lab) -> Iterator[Line]:
    """The newest checkpoint is cut in half: the one before is taken."""
    trial = Trial(lab, "checkpoint-cut")
    trial.start()
    trial.reach(lab.num_rounds // 6)
    trial.kill()
    newest = max(trial.checkpoints.glob("round-*"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    trial.resume()
    trial.finish()
    yield trial.line("newest checkpoint cut in half, resumed", 1)


@row
def tracking_outage(lab: Lab) -> Iterator[Line]:
    """The MLflow server is killed, and started again during the run."""
    server = Server(lab)
    trial = Trial(lab, "outage", MLFLOW_TRACKING_URI=server.uri)
    trial.start()
    trial.reach(lab.num_rounds // 12)
    server.stop()
    before, started = trial.rounds, time.monotonic()
    trial.reach(before + lab.num_rounds // 4)
    pace = (trial.rounds - before) / (time.monotonic() - started)
    with lab.paused():
        server.start()
    trial.finish()
    yield trial.line(f"MLflow server killed for a while; {pace:.1f} rounds/s meanwhile", 1)


@row
def tracking_outage_at_end(lab: Lab) -> Iterator[Line]:
    """The MLflow server is killed, and back only after the run has ended."""
    server = Server(lab)
    trial = Trial(lab, "outage-at-end", MLFLOW_TRACKING_URI=server.uri)
    trial.start()
    trial.reach(lab.num_rounds // 12)
    server.stop()
    trial.finish("RUNNING")
    assert (trial.folder / "out/result.json").exists(), trial.errors
    server.start()
    trial.resume()
    trial.finish()
    yield trial.line("MLflow server killed, back after the end; resumed", 1)


@row
def shard_cut(lab: Lab) -> Iterator[Line]:
    """A shard is cut short before the run."""
    trial, shard = _with_own_shards(lab, "shard-cut")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    trial.start()
    trial.finish("FAILED")
    assert shard.name in trial.errors and not trial.rounds, trial.errors
    shard.write_bytes(whole)
    trial.start()
    trial.finish()
    yield trial.line("a shard cut in half; made whole, started again", 1)


@row
def shard_deleted(lab: Lab) -> Iterator[Line]:
    """A shard is deleted during a run that reads images again."""
    yield _harm_during_run(lab, "deleted", lambda shard: shard.unlink())


@row
def shard_replaced(lab: Lab) -> Iterator[Line]:
    """A shard is replaced by another during a run that reads images again."""
    yield _harm_during_run(lab, "replaced", lambda shard: shutil.copy(shard.with_name("train-0000.tar"), shard))


def _harm_during_run(lab: Lab, name: str, harm: Callable[[Path], object]) -> Line:
    trial, shard = _with_own_shards(lab, f"shard-{name}", "--cache-gib", "1e-9", "--disk-cache-gib", "0")
    trial.start()
    trial.reach(lab.num_rounds // 7)
    whole = shard.read_bytes()
    harm(shard)
    trial.finish("FAILED")
    assert shard.name in trial.errors, trial.errors
    shard.write_bytes(whole)
    trial.resume()
    trial.finish()
    return trial.line(f"a shard {name} during the run; put back, resumed", 1)


@row
def image_broken(lab: Lab) -> Iterator[Line]:
    """An image is none."""
    trial, shard = _with_own_shards(lab, "image", "--max-bad-fraction", "0.05")
    write_shards(shard.parent, broken_image=True)
    trial.start()
    trial.finish()
    yield trial.line("an image that is none, beside the others", 1)


def _with_own_shards(lab: Lab, name: str, *options: str) -> tuple[Trial, Path]:
    """A trial with shards that may be harmed, and one of them."""
    trial = Trial(lab, name, *options)
    folder = shutil.copytree(lab.folder / "shards", trial.folder / "shards")
    trial.options += shard_options(folder)
    return trial, folder / "train-0001.tar"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Do faults to jobs, or print the table of what was done."""

    only: tuple[Literal[tuple(ROWS)], ...] = tuple(ROWS)  # type: ignore[valid-type]
    """Rows to do."""
    table: bool = False
    """Print the table, and do nothing."""
    small: bool = False
    """Short jobs and fewer faults; the table is then of these, and left in the folder."""
    folder: Path = Path("outputs/chaos")
    """Where the jobs run; emptied first."""
    data: Path = Path("../shared")
    """Folder of the real images and networks, for row real-networks."""
    output: Path = Path(__file__).with_name("chaos.jsonl")
    """Results; those of a row that is done again are replaced."""


def main() -> None:
    """Do what was asked for, print the table, and name the rows that failed."""
    options = tyro.cli(Options)
    folder = options.folder.resolve()
    output = folder / "chaos.jsonl" if options.small else options.output
    failed = []
    if not options.table:
        with open_lab(folder, options.data.resolve(), SMALL if options.small else FULL) as lab:
            failed = [name for name in options.only if not do(lab, name, output)]
    _print_table(_read(output))
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


def do(lab: Lab, name: str, output: Path) -> bool:
    """Whether a row is good; the output then has its lines instead of older ones, and none if it came to no end."""
    started, lines = time.monotonic(), []
    try:
        lines = lab.do(name)
    except Exception:  # the other rows go on
        traceback.print_exc()
    is_good = bool(lines) and all(line.is_good for line in lines)
    _write(output, [line for line in _read(output) if line.row != name] + lines)
    said = f"{name}: {'good' if is_good else 'FAILED'}, {time.monotonic() - started:.0f} s"
    print(said, file=sys.stderr, flush=True)
    return is_good


def _read(path: Path) -> list[Line]:
    return [Line(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _write(path: Path, lines: list[Line]) -> None:
    path.write_text("".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines))


def _print_table(lines: list[Line]) -> None:
    print("| fault | times | run ended | same bits | metrics complete | seconds lost |\n|" + " --- |" * 6)
    for line in sorted(lines, key=lambda line: list(ROWS).index(line.row)):
        answers = ("yes" if answer else "**no**" for answer in (line.same_bits, line.metrics_complete))
        print(f"| {line.fault} | {line.times} | {line.ended} | {' | '.join(answers)} | {line.seconds_lost} |")


def shard_options(folder: Path) -> tuple[str, ...]:
    """What gives a job the shards that `write_shards` has written."""
    return "--train-shards", f"{folder}/train-*.tar", "--val-shards", f"{folder}/val-*.tar"


def write_shards(folder: Path, *, broken_image: bool = False) -> None:
    """47 training and 20 held-out images of coloured noise, the broken one beside them."""
    folder.mkdir(exist_ok=True)
    for prefix, count, seed in (("train", 47, 1), ("val", 20, 2)):
        rng, samples = np.random.default_rng(seed), []
        for i in range(count):
            colour = rng.integers(0, 256, size=3)
            pixels = np.clip(colour + rng.normal(0, 40, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            samples.append({"__key__": f"{prefix}-{i:03d}", "png": file.getvalue(), "cls": int(colour.argmax())})
        if broken_image and prefix == "train":
            samples.append({"__key__": "broken", "png": b"no image", "cls": 0})
        write.write_shards(samples, folder, prefix=prefix, shard_size=20)


if __name__ == "__main__":
    main()
