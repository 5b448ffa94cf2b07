"""Faults, really done to real jobs: the perturbation must keep its bits and MLflow its metrics. See benchmarks/chaos.md.

    python benchmarks/chaos.py                        # all rows, about half an hour on two cores
    python benchmarks/chaos.py --only driver-kills    # one row
    python benchmarks/chaos.py --table                # the table of what has been done

The jobs are `jobs/compute.py` on a Ray cluster that this script starts on the machine, with synthetic shards and a small network that
takes its time over each block, so that faults strike in the middle of one.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
import torch
import tyro
from torch import Tensor, nn

from uap_dist.provenance import git_commit

JOB = Path(__file__).parents[1] / "jobs/compute.py"
FLAGS = "UAP_DIST_CHAOS_FLAGS"  # a folder; a file in it makes one worker do what its name says, once
SECONDS_PER_BLOCK = 0.15


class Victim(nn.Module):
    """A small network on 16×16 images of four classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8 * 64, 4)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, after doing what a flag says."""
        if torch.is_grad_enabled():  # a solve
            time.sleep(SECONDS_PER_BLOCK)
            if _take_flag("exit"):
                os._exit(1)
            if _take_flag("raise"):
                raise RuntimeError("a bug in the network")
            if _take_flag("fill-memory"):
                hoard = []
                while True:
                    hoard.append(np.ones(1 << 26))  # 512 MiB
                    time.sleep(0.2)
        return self.head(torch.tanh(self.conv(pixels / 64 - 2)).flatten(1))


def _take_flag(name: str) -> bool:
    """Whether the flag was there; only one worker gets it."""
    try:
        (Path(os.environ[FLAGS]) / name).unlink()
    except (FileNotFoundError, KeyError):
        return False
    return True


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


class Trial:
    """One run under a fault: its processes, its checkpoints, its end."""

    def __init__(self, lab: "Lab", name: str, *options: str, **environment: str) -> None:
        self.lab, self.options, self.environment = lab, options, environment
        self.folder = lab.folder / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.started = time.monotonic()
        self.endings: list[str] = []
        self.errors, self.seconds = "", 0.0
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> None:
        """The job, or with --resume what is left of it."""
        arguments = options or (*self.lab.options, *self.options, "--output", str(self.folder / "out"))
        self.process = subprocess.Popen(
            [sys.executable, str(JOB), *arguments],
            cwd=self.folder,
            env=self.lab.environment | self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def resume(self, *options: str) -> None:
        """Go on from the checkpoints."""
        self.start("--resume", str(self.checkpoints), *options)

    @property
    def checkpoints(self) -> Path:
        """The run's folder of commits."""
        (folder,) = (self.folder / "checkpoints").iterdir()
        return folder

    @property
    def run_id(self) -> str:
        """Of MLflow."""
        return self.checkpoints.name

    @property
    def tags(self) -> dict[str, str]:
        """Of the MLflow run."""
        return self.lab.client.get_run(self.run_id).data.tags

    @property
    def rounds(self) -> int:
        """Committed so far."""
        with suppress(OSError, ValueError):
            return max(int(path.name.split("-")[1]) for path in self.checkpoints.glob("round-*"))
        return 0

    @property
    def num_pool_rounds(self) -> int:
        """Committed so far by all members of a pool."""
        newest: dict[Path, int] = {}
        for path in (self.folder / "checkpoints").glob("*/seed-*/round-*"):
            newest[path.parent] = max(newest.get(path.parent, 0), int(path.name.split("-")[1]))
        return sum(newest.values())

    def wait(self, is_so: Callable[[], bool]) -> bool:
        """Return when it is so; False if the job ended before."""
        assert self.process is not None
        while not is_so():
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        return True

    def wait_for_round(self, number: int) -> bool:
        """Return when so many rounds are committed; False if the job ended before."""
        return self.wait(lambda: self.rounds >= number)

    def kill(self) -> None:
        """SIGKILL to the driver."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.endings.append("driver killed")

    def finish(self, timeout: float = 300) -> str:
        """Wait for the job's end and say how MLflow has it."""
        assert self.process is not None
        _, self.errors = self.process.communicate(timeout=timeout)
        self.seconds = time.monotonic() - self.started
        if not (self.folder / "checkpoints").exists():
            raise RuntimeError(f"the job ended before its first commit: {self.errors}")
        self.endings.append(self.lab.client.get_run(self.run_id).info.status)
        return self.endings[-1]

    @property
    def ending(self) -> str:
        """How its processes ended, one after another."""
        return ", then ".join(
            f"{e} × {self.endings.count(e)}".removesuffix(" × 1") for e in dict.fromkeys(self.endings)
        )

    @property
    def result(self) -> dict[str, Any]:
        """What the run has written of its perturbation; empty if nothing."""
        path = self.folder / "out/result.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def line(self, row: str, fault: str, times: int, undisturbed: "Trial | None" = None) -> Line:
        """Compare the end with that of the undisturbed run."""
        reference = undisturbed or self.lab.undisturbed
        same = self.result.get("perturbation_sha256") == reference.result["perturbation_sha256"]
        complete = self.has_all_metrics(reference.result["num_rounds"])
        lost = round(self.seconds - reference.seconds, 1)
        return Line(row, fault, times, self.ending, same, complete, lost)

    def has_all_metrics(self, num_rounds: int, run_id: str | None = None) -> bool:
        """Every metric of every round once, in the trial's MLflow run or in another."""
        names = ("fooling_rate/round", "round/step", "iterate/norm_l2", "total/solves", "total/evaluations")
        steps = [[m.step for m in self.lab.client.get_metric_history(run_id or self.run_id, name)] for name in names]
        return all(sorted(found) == list(range(1, num_rounds + 1)) for found in steps)


class Lab:
    """A Ray cluster, shards, a tracking store, and the undisturbed run."""

    def __init__(self, folder: Path, data: Path) -> None:
        from ray.cluster_utils import Cluster

        self.folder, self.data = folder, data
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("flags", "shards"):
            (folder / name).mkdir(parents=True)
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        os.environ |= {
            FLAGS: str(folder / "flags"),
            "MLFLOW_TRACKING_URI": self.uri,
            "RAY_memory_monitor_refresh_ms": "100",
            "RAY_memory_usage_threshold": "0.6",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        write_shards(folder / "shards")
        health = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 3,
        }
        head = {"num_cpus": 0, "include_dashboard": True, "_system_config": health}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.environment = dict(os.environ) | {"RAY_ADDRESS": self.cluster.address}
        self.nodes = [self.cluster.add_node(num_cpus=5)]
        shards = folder / "shards"
        self.options = (
            *("--model", f"{Path(__file__).resolve()}:Victim"),
            *("--train-shards", f"{shards}/train-*.tar", "--val-shards", f"{shards}/val-*.tar"),
            *("--num-workers", "2", "--round-size", "20", "--block-size", "5", "--radius", "20"),
            *("--max-passes", "20", "--evaluate-every", "5"),
        )
        self.undisturbed = Trial(self, "undisturbed")
        self.undisturbed.start()
        assert self.undisturbed.finish() == "FINISHED", self.undisturbed.errors
        self.num_rounds = self.undisturbed.result["num_rounds"]

    @property
    def client(self):  # noqa: ANN201  # MLflow is imported when its address is known
        """Of MLflow's store, not of a server that may be away."""
        import mlflow

        return mlflow.MlflowClient(self.uri)

    def flag(self, name: str) -> None:
        """Have one worker do it."""
        (self.folder / "flags" / name).touch()

    def workers(self) -> list[psutil.Process]:
        """Actors' processes of this lab's cluster, that are in a block."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith(("ray::UapWorker", "ray::worker-")):
                    found.append(process)
        return found

    def close(self) -> None:
        """Stop the cluster."""
        self.cluster.shutdown()


def worker_counts(lab: Lab) -> list[Line]:
    """No fault: 1, 2, 3 and 5 workers."""
    lines = []
    for count in (1, 2, 3, 5):
        trial = Trial(lab, f"workers-{count}", "--num-workers", str(count))
        trial.start()
        trial.finish()
        lines.append(trial.line("worker-counts", f"none, {count} workers", 0))
    return lines


def real_networks(lab: Lab) -> list[Line]:
    """No fault: 1, 2, 3 and 5 workers on real networks and images."""
    from networks import NETWORKS  # here, because workers import this file for its network

    lines = []
    for name, evaluations in (("squeezenet", 1_500), ("resnet20", 3_000)):
        network = NETWORKS[name]
        model, weights = network.locate(lab.data)
        options = (
            *("--model", model, "--weights", str(weights)),
            *("--train-shards", f"{lab.data / network.train}", "--num-train-images", str(network.num_train_images)),
            *("--val-shards", f"{lab.data / network.val}", "--num-val-images", "500"),
            *("--max-evaluations", str(evaluations), "--evaluate-every", "1000", "--placement-timeout-s", "300"),
        )
        trials = []
        for count in (1, 2, 3, 5):
            trials.append(Trial(lab, f"{name}-{count}"))
            trials[-1].start(*options, "--num-workers", str(count), "--output", str(trials[-1].folder / "out"))
            trials[-1].finish(timeout=1200)
        digest = trials[0].result["perturbation_sha256"]
        for count, trial in zip((1, 2, 3, 5), trials, strict=True):
            fault = f"none, {name}, {evaluations:,} evaluations, {count} workers: {digest[:12]}…"
            lines.append(trial.line("real-networks", fault, 0, trials[0]))
    return lines


def worker_kills(lab: Lab) -> list[Line]:
    """SIGKILL to workers in the middle of blocks."""
    trial, times = Trial(lab, "worker-kills"), 0
    trial.start()
    for number in range(3, lab.num_rounds - 5, 8):
        if trial.wait_for_round(number):
            time.sleep(SECONDS_PER_BLOCK / 2)
            lab.workers()[0].kill()
            times += 1
    trial.finish()
    return [trial.line("worker-kills", "SIGKILL of a worker in mid-block", times)]


def worker_flags(lab: Lab) -> list[Line]:
    """A worker that exits, and one that fills its memory until Ray kills it."""
    lines = []
    for flag, fault in (("exit", "a worker exits in mid-block"), ("fill-memory", "a worker fills its memory")):
        trial = Trial(lab, flag)
        trial.start()
        trial.wait_for_round(5)
        lab.flag(flag)
        trial.finish()
        lost = int(trial.tags["num_workers_lost"])  # Ray's memory monitor may take another one before the right one
        assert lost >= 1
        lines.append(trial.line("worker-flags", f"{fault} ({lost} lost)", 1))
    return lines


def worker_raises(lab: Lab) -> list[Line]:
    """A bug is no lost worker: the run fails, and goes on once the bug is gone."""
    trial = Trial(lab, "raise")
    trial.start()
    trial.wait_for_round(5)
    lab.flag("raise")
    assert trial.finish() == "FAILED" and "a bug in the network" in trial.errors, trial.errors
    trial.resume()
    trial.finish()
    return [trial.line("worker-raises", "a worker raises an error; resumed", 1)]


def worker_hangs(lab: Lab) -> list[Line]:
    """SIGSTOP to a worker: overtaken by another, and taken for lost after its deadline."""
    trial = Trial(lab, "hang", "--task-timeout-s", "6")
    trial.start()
    trial.wait_for_round(5)
    victim = lab.workers()[0]
    victim.suspend()
    trial.finish()
    with suppress(psutil.NoSuchProcess):
        victim.kill()
    return [trial.line("worker-hangs", "SIGSTOP of a worker", 1)]


def node_kills(lab: Lab) -> list[Line]:
    """SIGKILL of a raylet and all on its node, with two and three nodes."""
    lines = []
    for num_nodes in (2, 3):
        node = lab.cluster.add_node(num_cpus=2)
        others = [lab.cluster.add_node(num_cpus=2) for _ in range(num_nodes - 2)]
        trial = Trial(lab, f"nodes-{num_nodes}", "--num-workers", str(5 + len(others)))
        trial.start()
        trial.wait_for_round(5)
        lab.cluster.remove_node(node, allow_graceful=False)
        trial.finish()
        for other in others:
            lab.cluster.remove_node(other, allow_graceful=False)
        lines.append(trial.line("node-kills", f"SIGKILL of a raylet, {num_nodes} worker nodes", 1))
    return lines


def node_added(lab: Lab) -> list[Line]:
    """A node joins during the run, and is put to use."""
    options = [word for word in lab.options if word not in ("--num-workers", "2")]
    trial = Trial(lab, "node-added")
    trial.start(*options, "--output", str(trial.folder / "out"))
    trial.wait_for_round(3)
    node = lab.cluster.add_node(num_cpus=2)
    trial.finish()
    lab.cluster.remove_node(node, allow_graceful=False)
    return [trial.line("node-added", f"a node joins: 5 workers before, {trial.tags['num_workers_at_end']} after", 1)]


def driver_kills(lab: Lab) -> list[Line]:
    """SIGKILL to the driver at random points, until the run has got to its end in spite of at least 20 of them."""
    rng, trial, times = random.Random(0), Trial(lab, "driver-kills"), 0
    trial.start()
    trial.wait_for_round(1)
    while True:
        if times < 22:
            target = trial.rounds + rng.choice((1, 1, 2, 3))
            if target < lab.num_rounds and trial.wait_for_round(target):
                time.sleep(rng.uniform(0, 0.6))
                trial.kill()
                times += 1
                trial.resume("--num-workers", rng.choice("123"))
                continue
        trial.finish()
        return [
            trial.line("driver-kills", "SIGKILL of the driver at a random point, resumed with 1 to 3 workers", times)
        ]


def pools(lab: Lab) -> list[Line]:
    """Faults to a pool; each member must have the bits that its seed has alone."""
    alone = [Trial(lab, f"pool-alone-{seed}", "--seed", str(seed), "--random-start", "0.5") for seed in range(3)]
    for trial in alone:
        trial.start()
        assert trial.finish() == "FINISHED", trial.errors

    def line(trial: Trial, fault: str, times: int) -> Line:
        members = list(trial.result["members"].values())
        pairs = list(zip(members, alone, strict=True))
        same = all(m["perturbation_sha256"] == other.result["perturbation_sha256"] for m, other in pairs)
        complete = all(trial.has_all_metrics(other.result["num_rounds"], m["mlflow_run_id"]) for m, other in pairs)
        lost = round(trial.seconds - sum(other.seconds for other in alone), 1)
        return Line("pools", f"a pool of 3: {fault}", times, trial.ending, same, complete, lost)

    rng, trial, times = random.Random(1), Trial(lab, "pool-kills", "--num-perturbations", "3"), 0
    trial.start()
    for target in (10, 45, 80, 115, 150):  # of 180 rounds of all members
        if not trial.wait(lambda target=target: trial.num_pool_rounds >= target):
            break
        time.sleep(rng.uniform(0, 0.6))
        trial.kill()
        times += 1
        trial.resume("--num-workers", rng.choice("123"))
    trial.finish()
    lines = [line(trial, "SIGKILL of the driver at a random point, resumed", times)]

    server = _Server(lab)
    server.start()
    trial = Trial(lab, "pool-outage", "--num-perturbations", "3", MLFLOW_TRACKING_URI=server.uri)
    trial.start()
    trial.wait(lambda: trial.num_pool_rounds >= 20)
    server.stop()
    trial.finish()
    assert "--resume" in trial.errors and (trial.folder / "out/pool/pool.safetensors").exists(), trial.errors
    server.start()
    trial.resume()
    trial.finish()
    server.stop()
    return [*lines, line(trial, "MLflow server killed, back after the end; resumed", 1)]


def job_stop(lab: Lab) -> list[Line]:
    """`ray job stop`, then resume."""
    from ray.job_submission import JobSubmissionClient

    trial = Trial(lab, "job-stop")
    jobs = JobSubmissionClient(f"http://{lab.cluster.head_node.webui_url or lab.cluster.webui_url}")
    words = (sys.executable, str(JOB), *lab.options, "--output", str(trial.folder / "out"))
    job = jobs.submit_job(entrypoint=" ".join(f"'{word}'" for word in words))
    while trial.rounds < 8:
        time.sleep(0.05)
    started = time.monotonic()
    jobs.stop_job(job)
    while (status := lab.client.get_run(trial.run_id).info.status) == "RUNNING":
        time.sleep(0.02)
    trial.endings.append(f"{status} after {time.monotonic() - started:.1f} s")
    while jobs.get_job_status(job).value not in ("STOPPED", "FAILED", "SUCCEEDED"):
        time.sleep(0.1)
    trial.resume()
    trial.finish()
    return [trial.line("job-stop", "`ray job stop`, resumed", 1)]


def storage_fails(lab: Lab) -> list[Line]:
    """The folder of checkpoints cannot be written to for a while (a file stands in its place)."""
    trial = Trial(lab, "storage-fails")
    trial.start()
    trial.wait_for_round(5)
    folder = trial.checkpoints
    folder.rename(folder.with_suffix(".away"))
    folder.touch()
    time.sleep(3)
    folder.unlink()
    folder.with_suffix(".away").rename(folder)
    trial.wait_for_round(20)
    trial.kill()
    trial.resume()
    trial.finish()
    return [trial.line("storage-fails", "storage refuses writes for 3 s; then the driver is killed, resumed", 1)]


def checkpoint_cut(lab: Lab) -> list[Line]:
    """The newest checkpoint is cut in half: the one before is taken."""
    trial = Trial(lab, "checkpoint-cut")
    trial.start()
    trial.wait_for_round(10)
    trial.kill()
    newest = max(trial.checkpoints.glob("round-*"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    trial.resume()
    trial.finish()
    return [trial.line("checkpoint-cut", "newest checkpoint cut in half, resumed", 1)]


class _Server:
    """A real `mlflow server` on the lab's store."""

    def __init__(self, lab: Lab) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self._lab = f"http://127.0.0.1:{self.port}", lab

    def start(self) -> None:
        words = ("server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        words += ("--backend-store-uri", self._lab.uri, "--artifacts-destination", str(self._lab.folder / "artifacts"))
        environment = dict(os.environ) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while True:
            with suppress(OSError), urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.1)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def tracking_outage(lab: Lab) -> list[Line]:
    """The MLflow server is killed, and started again during the run; or only after it."""
    server = _Server(lab)
    server.start()
    trial = Trial(lab, "outage", "--max-passes", "20", MLFLOW_TRACKING_URI=server.uri)
    trial.start()
    trial.wait_for_round(5)
    server.stop()
    before, started = trial.rounds, time.monotonic()
    trial.wait_for_round(before + 15)
    pace = (trial.rounds - before) / (time.monotonic() - started)
    server.start()
    trial.finish()
    lines = [trial.line("tracking-outage", f"MLflow server killed for a while; {pace:.1f} rounds/s meanwhile", 1)]

    trial = Trial(lab, "outage-at-end", MLFLOW_TRACKING_URI=server.uri)
    trial.start()
    trial.wait_for_round(5)
    server.stop()
    trial.finish()
    how = re.search(r"--resume (\S+)", trial.errors)
    assert how is not None and (trial.folder / "out/result.json").exists(), trial.errors
    server.start()
    trial.start("--resume", how[1])
    trial.finish()
    server.stop()
    return [
        *lines,
        trial.line("tracking-outage", "MLflow server killed, back after the end; resumed as the error says", 1),
    ]


def shards_harmed(lab: Lab) -> list[Line]:
    """A shard cut short before the run; deleted or replaced during it, where images are read again; an image that is none."""
    lines = []
    shard = lab.folder / "shards/train-0001.tar"
    whole, other = shard.read_bytes(), (lab.folder / "shards/train-0000.tar").read_bytes()

    trial = Trial(lab, "shard-cut")
    shard.write_bytes(whole[: len(whole) // 2])
    trial.start()
    assert trial.process is not None
    _, errors = trial.process.communicate(timeout=120)
    assert "cut short" in errors and errors.count("\n") == 1, errors
    trial.endings.append("FAILED")
    shard.write_bytes(whole)
    trial.start()
    trial.finish()
    lines.append(trial.line("shards-harmed", "a shard cut in half; made whole, started again", 1))

    for name, fault, message in (("deleted", None, "cannot open"), ("replaced", other, "changed during the run")):
        trial = Trial(lab, f"shard-{name}", "--cache-gib", "1e-6")
        trial.start()
        trial.wait_for_round(8)
        away = shard.with_suffix(".away")
        shard.rename(away)
        if fault is not None:
            shard.write_bytes(fault)
        assert trial.finish() == "FAILED" and message in trial.errors, trial.errors
        away.replace(shard)
        trial.resume()
        trial.finish()
        lines.append(trial.line("shards-harmed", f"a shard {name} during the run; put back, resumed", 1))

    broken = lab.folder / "broken"
    broken.mkdir(exist_ok=True)
    for path in (lab.folder / "shards").glob("train-*.tar"):
        shutil.copy(path, broken / path.name)
    write_shards(broken, broken_image=True)
    trial = Trial(lab, "image", "--train-shards", f"{broken}/train-*.tar", "--max-bad-fraction", "0.05")
    trial.start()
    trial.finish()
    lines.append(trial.line("shards-harmed", "an image that is none, beside the others", 1))
    return lines


ROWS: dict[str, Callable[[Lab], list[Line]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        worker_counts,
        real_networks,
        worker_kills,
        worker_flags,
        worker_raises,
        worker_hangs,
        node_kills,
        node_added,
        driver_kills,
        pools,
        job_stop,
        storage_fails,
        checkpoint_cut,
        tracking_outage,
        shards_harmed,
    )
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Do faults to jobs, or print the table of what was done."""

    only: tuple[str, ...] = tuple(ROWS)
    """Rows to do."""
    table: bool = False
    """Print the table, and do nothing."""
    folder: Path = Path("outputs/chaos")
    """Where the jobs run; emptied first."""
    data: Path = Path("../shared")
    """Folder of the real images and networks, for row real-networks."""
    output: Path = Path(__file__).with_name("chaos.jsonl")
    """Results; those of a row that is done again are replaced."""


def main() -> None:
    """Do what was asked for, then print the table."""
    options = tyro.cli(Options)
    if not options.table:
        lab = Lab(options.folder.resolve(), options.data.resolve())
        try:
            for name in options.only:
                lines = ROWS[name](lab)
                kept = [line for line in _read(options.output) if line.row != name]
                done = {"date": datetime.now(UTC).date().isoformat(), "commit": git_commit()}
                lines = [replace(line, **done) for line in lines]
                text = [json.dumps(asdict(line), ensure_ascii=False) for line in [*kept, *lines]]
                options.output.write_text("\n".join(text) + "\n")
                print("\n".join(text[-len(lines) :]), flush=True)
        finally:
            lab.close()
    print(
        "| fault | times | run ended | same bits | metrics complete | seconds lost |\n| --- | --- | --- | --- | --- | --- |"
    )
    for line in sorted(_read(options.output), key=lambda line: list(ROWS).index(line.row)):
        answers = ("yes" if answer else "**no**" for answer in (line.same_bits, line.metrics_complete))
        print(f"| {line.fault} | {line.times} | {line.ended} | {' | '.join(answers)} | {line.seconds_lost} |")


def _read(path: Path) -> list[Line]:
    return [Line(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def write_shards(folder: Path, *, broken_image: bool = False) -> None:
    """47 training and 20 held-out images of coloured noise, the broken one beside them."""
    import io

    from PIL import Image

    from uap_dist.shards import write_shards

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
        write_shards(samples, folder, prefix=prefix, shard_size=20)


if __name__ == "__main__":
    main()
