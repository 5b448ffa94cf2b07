"""`ray job submit` and `ray job stop`, on a head that listens on loopback only and wants a token: the way that users are told to take."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from clusters import ray_cluster
from conftest import compute_here

from uap_dist.method.config import ComputeConfig

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from faults.victim import FLAGS, PAUSE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
VICTIM = f"{ROOT / 'benchmarks/faults/victim.py'}:Victim"
RAY = str(Path(sys.executable).with_name("ray"))
SEEDS = (4, 5)
CONFIG = ComputeConfig(max_passes=4, round_size=20, block_size=5, radius=20.0, evaluate_every=4)
OPTIONS = (
    "--commit-every-s",
    "0",
    "--max-passes",
    "4",
    "--round-size",
    "20",
    "--block-size",
    "5",
    "--radius",
    "20",
    "--evaluate-every",
    "4",
)


class Head:
    """A head with room for two workers, and an MLflow store."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.client = mlflow.MlflowClient(cluster.env["MLFLOW_TRACKING_URI"])

    def submit(self, name, *words):
        """`ray job submit` of the checkout, which returns when the job has ended; not even the commit is known there."""
        command = [RAY, "job", "submit", "--address", self.cluster.dashboard, "--working-dir", str(ROOT)]
        flags = {"env_vars": {FLAGS: str(self.folder / name)}}
        command += ["--runtime-env-json", json.dumps(flags), "--submission-id", name]
        command += ["--", "python", "jobs/compute.py", *words]
        log = (self.folder / f"{name}.log").open("w")
        return subprocess.Popen(command, cwd=self.folder, env=self.cluster.env, stdout=log, stderr=subprocess.STDOUT)

    def ask(self, *words, **env):
        command = [RAY, "job", words[0], "--address", self.cluster.dashboard, *words[1:]]
        return subprocess.run(command, env=self.cluster.env | env, capture_output=True, text=True, timeout=90)

    def runs(self, experiment):
        """MLflow runs, a pool's own first."""
        found = self.client.get_experiment_by_name(experiment)
        runs = [] if found is None else self.client.search_runs([found.experiment_id])
        return sorted(runs, key=lambda run: "mlflow.parentRunId" in run.data.tags)

    def steps(self, run):
        return [m.step for m in self.client.get_metric_history(run.info.run_id, "fooling_rate/round")]

    def wait(self, is_so, name, process):
        deadline = time.monotonic() + 150
        while not is_so():
            assert time.monotonic() < deadline and process.poll() is None, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.MlflowClient(uri).search_experiments()  # makes the tables
    with ray_cluster(folder, head_cpus=2, takes_jobs=True, env={"MLFLOW_TRACKING_URI": uri}) as cluster:
        yield Head(cluster, folder)


def rounds_of(output):
    return output.with_name(f"rounds-of-{output.name}")


def job_options(shards, output, *more):
    data = ("--train-shards", str(shards / "train-{0000..0002}.tar"), "--val-shards", str(shards / "val-0000.tar"))
    own = ("--experiment", output.name, "--output", str(output), "--storage", str(rounds_of(output)))
    return ("--model", VICTIM, "--num-workers", "1", *data, *OPTIONS, *own, *more)


def digest_of(shards, **changes):
    urls = [str(shards / f"train-{i:04d}.tar") for i in range(3)], [str(shards / "val-0000.tar")]
    v, _ = compute_here(VICTIM, None, *urls, replace(CONFIG, **changes))
    return v.provenance["perturbation_sha256"]


def test_the_head_is_closed_to_the_network_and_to_whoever_has_no_token(head):
    found = {ip.removeprefix("::ffff:") for ip in head.cluster.listens_at()}
    assert found and found <= {"127.0.0.1", "::1"}
    refused = head.ask("list", RAY_AUTH_TOKEN="f" * 64)
    assert refused.returncode != 0 and head.ask("list").returncode == 0


def test_of_two_jobs_at_once_one_is_stopped_and_taken_up_again(head, shards, tmp_path):
    def newest_rounds():
        found = {}
        for path in sorted(rounds_of(tmp_path / "pool").glob("*/seed-*/round-*")):
            found[path.parent.name] = int(path.name.split("-")[1])
        return found

    of_pool = ("--num-perturbations", "2", "--seed", str(SEEDS[0]))
    pool = head.submit("pool", *job_options(shards, tmp_path / "pool", *of_pool))
    head.wait(lambda: max(newest_rounds().values(), default=0) >= 2, "pool", pool)
    (head.folder / "pool").mkdir()
    (head.folder / "pool" / PAUSE).touch()
    one = head.submit("one", *job_options(shards, tmp_path / "one"))
    head.wait(lambda: list(rounds_of(tmp_path / "one").glob("*/round-*")), "one", one)
    parent, *_ = head.runs("pool")
    assert [run.info.status for run in (parent, *head.runs("one"))] == ["RUNNING", "RUNNING"]

    stopped = time.time()
    done = head.ask("stop", "pool")
    assert done.returncode == 0, done.stderr
    pool.wait(60)
    assert head.cluster.job_status("pool") == "STOPPED"
    assert all(run.info.status == "KILLED" for run in head.runs("pool"))
    assert head.client.get_run(parent.info.run_id).info.end_time / 1000 - stopped < 20
    committed = newest_rounds()
    for run in head.runs("pool")[1:]:
        assert head.steps(run) == list(range(1, committed[f"seed-{run.data.params['seed']}"] + 1))

    assert one.wait(150) == 0, (head.folder / "one.log").read_text()
    result = json.loads((tmp_path / "one/result.json").read_text())
    assert result["perturbation_sha256"] == digest_of(shards)
    assert result["provenance"]["git_commit"] == "unknown"  # the job ran what was sent along, not this checkout

    resumed = head.submit("resumed", "--resume", parent.info.run_id)
    assert resumed.wait(150) == 0, (head.folder / "resumed.log").read_text()
    assert [run.info.status for run in head.runs("pool")] == ["FINISHED"] * 3
    for run in head.runs("pool")[1:]:
        assert head.steps(run) == list(range(1, 3 * CONFIG.max_passes + 1))
    members = json.loads((tmp_path / "pool/result.json").read_text())["members"]
    for seed in SEEDS:
        assert members[f"seed-{seed}"]["perturbation_sha256"] == digest_of(shards, seed=seed, random_start=0.5)
