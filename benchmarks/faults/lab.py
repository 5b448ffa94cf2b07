"""Where faults are done: a Ray cluster on loopback, shards, a tracking store and an undisturbed run."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from urllib.request import urlopen

import psutil
from mlflow import MlflowClient

from faults.runs import JOB, ROOT, VICTIM, Line, Trial
from faults.shards import shard_options, write_shards
from faults.victim import FLAGS, PAUSE
from uap_dist.versions import git_commit

sys.path.append(str(ROOT / "tests"))
from clusters import RayCluster, ray_cluster

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
            *("--max-passes", str(size.max_passes), "--evaluate-every", "5", "--commit-every-s", "0"),
        )
        self.undisturbed = Trial(self, "undisturbed")
        self.undisturbed.start()
        self.undisturbed.finish()
        self.num_rounds = self.undisturbed.result["num_rounds"]

    @cached_property
    def alone(self) -> list[Trial]:
        """A run of its own for each member of a pool."""
        return self.run_alone()

    def run_alone(self, *options: str) -> list[Trial]:
        """A run of its own for each member of a pool, with these options."""
        trials = []
        for seed in range(self.size.num_perturbations):
            name = "-".join((f"alone-{seed}", *(option.strip("-") for option in options)))
            trials.append(Trial(self, name, "--seed", str(seed), "--random-start", "0.5", *options))
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

    def do(self, name: str, row: Callable[["Lab"], Iterator[Line]]) -> list[Line]:
        """A row, after which no process or fault of it is left."""
        self.deadline = time.monotonic() + LIMITS_S.get(name, DEFAULT_LIMIT_S)
        done = {"row": name, "date": datetime.now(UTC).date().isoformat(), "commit": git_commit()}
        try:
            return [replace(line, **done) for line in row(self)]
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
