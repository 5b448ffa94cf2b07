"""A job on nodes that come and go, as spot nodes do: from none to four and back, the bits of one worker. See benchmarks/cluster.md.

    python benchmarks/spot.py

Ray's autoscaler starts nodes of one CPU and one pretended GPU on demand, as processes of this machine; they are killed (SIGKILL)
with their workers. Network and images are those of benchmarks/chaos.py: a block takes 0.15 s.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from faults.runs import JOB, VICTIM
from faults.shards import write_shards

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from clusters import RayCluster, ray_cluster

SPOT = {"resources": {"CPU": 1, "GPU": 1}, "min_workers": 0, "max_workers": 4}
IDLE_S = 6.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kill nodes at random."""

    folder: Path = Path("outputs/spot")
    """For shards and results."""
    num_kills: int = 6
    """Of single nodes; in a second run all nodes die at once, twice."""
    seconds_between_kills: float = 8.0
    """Mean; exponentially distributed."""
    seed: int = 0
    """Of the times and victims."""


@dataclass
class Watch:
    """A job on the cluster, and what was seen of it."""

    cluster: RayCluster
    process: subprocess.Popen[str]
    started: float
    first_worker_s: float = 0.0
    most_workers: int = 0
    num_kills: int = 0

    def look(self) -> int:
        """Workers that are there."""
        num_workers = len(self.cluster.workers())
        if num_workers and not self.first_worker_s:
            self.first_worker_s = time.monotonic() - self.started
        self.most_workers = max(self.most_workers, num_workers)
        return num_workers

    def wait(self, seconds: float, num_workers: int = 0) -> bool:
        """So long, and until so many workers are there; False when the job has ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and (time.monotonic() < deadline or self.look() < num_workers):
            time.sleep(0.1)
        return self.process.poll() is None

    def kill(self, num_nodes: int) -> None:
        """SIGKILL to so many nodes but the head."""
        for _ in range(min(num_nodes, len(self.cluster.raylets()) - 1)):
            self.cluster.kill_node()
            self.num_kills += 1


def main() -> None:
    """One row for each run."""
    options = tyro.cli(Options)
    shutil.rmtree(options.folder, ignore_errors=True)
    shards = options.folder.absolute() / "shards"
    shards.mkdir(parents=True)
    write_shards(shards)
    rng = random.Random(options.seed)
    print(
        "| run | nodes killed | first worker after, s | workers at most | workers lost | run took, s | no node left after, s | same bits |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    digests: list[str] = []
    for name in ("one worker of its own", "0 to 4 nodes", "nodes die at random", "all nodes die at once, twice"):
        folder = options.folder.absolute() / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        if not digests:
            watch = Watch(None, start(shards, folder, dict(os.environ), "--num-workers", "1"), time.monotonic())  # type: ignore[arg-type]
            watch.process.wait()
            idle_s = float("nan")
        else:
            with ray_cluster(folder, node_types={"spot": SPOT}, idle_s=IDLE_S) as cluster:
                words = ("--num-workers", "1:4", "--gpus-per-worker", "1")
                watch = Watch(cluster, start(shards, folder, cluster.env, *words), time.monotonic())
                watch.wait(0, num_workers=1)
                if "random" in name:
                    for _ in range(options.num_kills):
                        if watch.wait(rng.expovariate(1 / options.seconds_between_kills), num_workers=2):
                            watch.kill(1)
                elif "all" in name:
                    for _ in range(2):
                        if watch.wait(5, num_workers=3):
                            watch.kill(4)
                while watch.process.poll() is None:
                    watch.look()
                    time.sleep(0.1)
                ended = time.monotonic()
                while len(cluster.raylets()) > 1 and time.monotonic() < ended + 60:
                    time.sleep(0.1)
                idle_s = time.monotonic() - ended
        assert watch.process.returncode == 0, (folder / "job.log").read_text()
        result = json.loads((folder / "out/result.json").read_text())
        digests.append(result["perturbation_sha256"])
        lost = result["provenance"]["num_workers_lost"]
        print(
            f"| {name} | {watch.num_kills} | {watch.first_worker_s:.0f} | {watch.most_workers or 1} | {lost} "
            f"| {result['seconds'] if 'seconds' in result else time.monotonic() - watch.started:.0f} | {idle_s:.0f} "
            f"| {'yes' if digests[-1] == digests[0] else 'NO'} |",
            flush=True,
        )


def start(shards: Path, folder: Path, env: dict[str, str], *words: str) -> subprocess.Popen[str]:
    """jobs/compute.py, its lines in a file."""
    return subprocess.Popen(
        [
            *(sys.executable, str(JOB), "--model", VICTIM, "--output", str(folder / "out")),
            *("--train-shards", f"{shards}/train-*.tar", "--val-shards", f"{shards}/val-*.tar"),
            *(
                "--round-size",
                "20",
                "--block-size",
                "5",
                "--radius",
                "20",
                "--max-passes",
                "40",
                "--evaluate-every",
                "20",
            ),
            *words,
        ],
        cwd=folder,
        env=env,
        stdout=(folder / "job.log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":
    main()
