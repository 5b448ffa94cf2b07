"""jobs/compute.py as a user starts it: a process, a local Ray, MLflow in a file."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from functools import cache
from hashlib import sha256
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY, random_samples, tiny_worker
from processes import JobProcess, committed, environment, run_job
from safetensors import safe_open
from tiny import Tiny

from uap_dist.computing.options import ComputeOptions
from uap_dist.data.patterns import expand_patterns
from uap_dist.data.write import write_shards
from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions, ResumableRecordOptions
from uap_dist.method.config import ComputeConfig
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers

JOB = Path(__file__).parents[1] / "jobs/compute.py"


@cache
def empty_store() -> bytes:
    """A new mlflow.db: making its tables takes MLflow several seconds, which one job of these tests spends for all."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


def start(folder, *options, has_store=True, **extra):
    """The job; without a store as at a user's first start: an interpreter that imports everything, and tables to be made."""
    words = [str(JOB), *(() if "--model" in options else ("--model", TINY)), "--num-workers", "1", *options]
    if has_store:
        (folder / "mlflow.db").write_bytes(empty_store())
        return JobProcess(words, folder, environment(**extra))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment(**extra), text=True, **pipes)


def finish(process, timeout=150):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def data(shards):
    return ("--train-shards", str(shards / "train-{0000..0002}.tar"), "--val-shards", str(shards / "val-*.tar"))


def runs(folder):
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client, client.search_runs([e.experiment_id for e in client.search_experiments()])


def job_options(**options):
    """Options of jobs/compute.py from their flat names on the command line."""
    groups = {"data": DataOptions, "record": ResumableRecordOptions}
    for group, kind in groups.items():
        names = [field.name for field in fields(kind) if field.name in options]
        options[group] = kind(**{name: options.pop(name) for name in names})
    return ComputeOptions(**options)


def write_plan(path, job):
    """A plan of a job on one worker that takes a minute."""
    spans = [{"expected": amount, "low": amount - 10, "high": amount + 10} for amount in (60, 330)]
    fleet = {"num_workers": 1, "seconds": spans[0], "worker_hours": spans[0]}
    path.write_text(json.dumps({"job": job, "fleets": [fleet], "num_evaluations": spans[1], "num_solves": 140}))


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    config = ComputeConfig(round_size=10, block_size=5, radius=20.0, max_passes=3)
    patterns = {"train_shards": (data(shards)[1],), "val_shards": (data(shards)[3],)}
    job = job_options(model=TINY, compute=config, fleet=FleetConfig(num_workers=1), **patterns)
    write_plan(folder / "plan.json", job.costs())
    options = ("--round-size", "10", "--block-size", "5", "--radius", "20", "--max-passes", "3", "--output", "out")
    options += ("--planned", "plan.json")
    code, out, err = finish(start(folder, *data(shards), *options, has_store=False))
    assert code == 0, err
    return folder, out


def test_the_result_is_what_the_file_holds(finished):
    folder, _ = finished
    result = json.loads((folder / "out/result.json").read_text())
    with safe_open(folder / "out" / result["perturbation"], "numpy") as file:
        v = file.get_tensor("perturbation")
        provenance = json.loads(file.metadata()["provenance"])
    assert v.dtype == np.float32 and v.shape == (3, 16, 16)
    assert sha256(v.tobytes()).hexdigest() == result["perturbation_sha256"]
    assert np.abs(v).max() == result["norm_linf"] == 20
    assert result["num_val_images"] == 20 and result["num_evaluations"] == 47 + 2 * result["num_solves"] == 47 + 2 * 141
    assert provenance["seed"] == 0 and len(provenance["train_digest"]) == len(provenance["weights_digest"]) == 64


def test_the_table_gives_the_fooling_rate(finished):
    folder, _ = finished
    table = pq.read_table(folder / "out/tables/held-out-examples.parquet").to_pydict()
    fooled = [a != b for a, b in zip(table["clean_label"], table["perturbed_label"], strict=True)]
    assert fooled == table["is_fooled"]
    assert sum(fooled) / 20 == json.loads((folder / "out/result.json").read_text())["val_fooling_rate"]
    assert set(table["clean_name"]) <= {"red", "green", "blue", "grey"}


def test_the_mlflow_run_holds_all_of_it(finished):
    folder, _ = finished
    result = json.loads((folder / "out/result.json").read_text())
    client, (run,) = runs(folder)
    assert run.info.status == "FINISHED" and run.info.run_id == result["mlflow_run_id"]
    history = client.get_metric_history(run.info.run_id, "fooling_rate/round")
    assert [m.step for m in history] == list(range(1, result["num_rounds"] + 1))
    assert run.data.metrics["fooling_rate/val"] == result["val_fooling_rate"]
    assert run.info.run_name == "tiny.py-Tiny-linf-seed0"
    assert run.data.params["period"] == "none" and run.data.params["steps.period"] == "32"
    assert result["provenance"]["steps.first_size"] == float(run.data.params["steps.first_size"]) == 0.8 * 20
    assert run.data.params["rule"] == "log-odds" and "fooling rate" in run.data.tags["mlflow.note.content"].lower()
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"training-47", "held-out-20"}
    names = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(folder / "mlruns")
    assert names == {p.name for p in (folder / "out").iterdir()}


def test_the_page_on_records_names_all_that_a_run_records_and_nothing_else(finished):
    folder, _ = finished
    _, (run,) = runs(folder)
    named = set(re.findall(r"`([\w/]+)`", (JOB.parents[1] / "docs/records.md").read_text()))
    metrics = {name for name in run.data.metrics if not name.startswith(("planned/", "system/"))}
    of_paper = {"round/mean_increment_norm", "round/deepfool_success"}
    others = {"targeted_success_rate/val", "num_images/val_targeted_success"}
    of_pool = {f"pool/{name}" for name in ("mean_val_fooling_rate", "largest_inner_product", "num_perturbations")}
    assert {name for name in named if "/" in name} == metrics | of_paper | of_pool | others
    table = pq.read_schema(folder / "out/tables/held-out-examples.parquet").names
    assert {*json.loads((folder / "out/result.json").read_text()), *table} <= named


def test_what_was_planned_stands_beside_what_it_took(finished):
    folder, out = finished
    _, (run,) = runs(folder)
    metrics = run.data.metrics
    assert (metrics["planned/seconds"], metrics["planned/seconds_low"], metrics["planned/solves"]) == (60, 50, 140)
    assert metrics["spent/evaluations"] == 329 and metrics["spent/solves"] == 141
    assert metrics["spent/worker_hours"] == pytest.approx(metrics["spent/seconds"] / 3600)
    took = re.search(
        r"Planned 1:00 \(0:50–1:10\) on 1 worker, took (\d+):(\d\d) on 1; planned 330 network .*, spent 329\.", out
    )
    assert 60 * int(took[1]) + int(took[2]) == pytest.approx(metrics["spent/seconds"], abs=1)
    assert took[0] in run.data.tags["mlflow.note.content"]


def test_the_log_is_plain_lines(finished):
    _, out = finished
    assert "\x1b" not in out and "\r" not in out
    assert re.search(r"after 329 network evaluations: training 0\.\d+ \[.*\] of 47, held-out 0\.\d+ \[.*\] of 20", out)
    assert (
        "a random perturbation of the same ℓ∞ and ℓ2 norm: 0." in out
        and "mlflow ui --backend-store-uri sqlite:///" in out
    )


def test_sigterm_ends_the_run_killed(shards, tmp_path):
    process = start(
        tmp_path,
        *data(shards),
        "--max-passes",
        "100000",
        "--round-size",
        "10",
        "--block-size",
        "5",
        "--commit-every-s",
        "0",
        "--output",
        "out",
    )
    while not committed(tmp_path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    stopped = time.time()
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process, timeout=30)
    assert code == 130 and err.endswith("interrupted\n") and "Traceback" not in err
    _, (run,) = runs(tmp_path)
    assert run.info.status == "KILLED" and run.info.run_name == "tiny.py-Tiny-linf-seed0"  # it can be resumed
    assert run.info.end_time / 1000 - stopped < 3
    assert list(tmp_path.glob("checkpoints/*/round-*"))


OTHER_OPTIONS = {"target": "Red", "spare_classes": ("grey",), "achromatic": True, "zoom": 0.25}


@pytest.mark.parametrize("others", [{}, OTHER_OPTIONS], ids=["default", "goal-and-transfer"])
def test_a_killed_driver_resumes_to_the_same_bits_with_every_metric_once(shards, tmp_path, others):
    options = (
        "--max-passes",
        "10",
        "--evaluate-every",
        "5",
        "--round-size",
        "10",
        "--block-size",
        "5",
        "--radius",
        "20",
        *(("--target", "Red", "--spare-classes", "grey", "--achromatic", "--zoom", "0.25") if others else ()),
    )
    process = start(tmp_path, *data(shards), *options, "--output", "out", "--commit-every-s", "0")
    while not committed(tmp_path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    _, (run,) = runs(tmp_path)
    assert run.info.status == "RUNNING" and not (tmp_path / "out/result.json").exists()

    resume = [str(JOB), "--resume", run.info.run_id]
    for more, code in ((("--step-size", "5"), 1), (("--num-workers", "2"), 0), ((), 1)):
        done = run_job([*resume, *more], tmp_path)
        assert done.returncode == code, done.stderr
        if more == ("--step-size", "5"):
            assert "cannot be resumed, because its result would differ: step_size was None, is 5.0" in done.stderr
    assert done.stderr == f"error: run {run.info.run_id} is finished; there is nothing to resume\n"

    client, (run,) = runs(tmp_path)
    assert run.info.status == "FINISHED"
    workers = LocalWorkers(tiny_worker())
    train, val = (load_dataset(workers, expand_patterns([str(shards / name)])) for name in ("train-*.tar", "val-*.tar"))
    config = ComputeConfig(max_passes=10, evaluate_every=5, round_size=10, block_size=5, radius=20.0, **others)
    config = config.with_labels(Tiny.class_names, 4)
    *_, final = compute(workers, train, val, config)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["perturbation_sha256"] == sha256(final.perturbation.numpy().tobytes()).hexdigest()
    for name in ("fooling_rate/round", "fooling_rate/running", "num_images/running", "round/step", "total/evaluations"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == list(range(1, 51))
    assert len(client.get_metric_history(run.info.run_id, "fooling_rate/val")) == 2  # of 10 passes


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("0" * 32, "no run 00000000000000000000000000000000 at sqlite:///"),
        ("nowhere", "/nowhere; give an MLflow run, or the folder"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(tmp_path, target, message):
    code, _, err = finish(start(tmp_path, "--resume", target))
    assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--radius", "0"), "radius is 0.0; it must be a positive number of pixels"),
        (("--train-shards", "absent-*.tar"), "absent-*.tar matches nothing"),
        (("--output", f"{JOB}/under-a-file"), "cannot write to --output"),
        (("--storage", f"{JOB}/under-a-file", "--num-val-images", "5"), "cannot write checkpoints to"),
        (("--model", "resnet50"), "unknown network 'resnet50'; nearest names: "),
        (("--cache-gib", "inf"), "--cache-gib is inf; it must be positive and finite"),
        (("--storage=~/runs",), "~/runs: ~ is not expanded here; give the whole path"),
        (("--model", TINY, "--model", TINY), "--model is given twice; several networks are --models A B"),
        (("--train_shards", "other-0000.tar"), "--train-shards is given twice; give it once, with all of its values"),
    ],
)
def test_bad_input_is_one_line_and_a_failed_run(shards, tmp_path, options, message):
    has_shards = options[0] == "--train-shards"
    code, _, err = finish(start(tmp_path, *data(shards)[2 * has_shards :], *options))
    assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
    _, (run,) = runs(tmp_path)
    assert run.info.status == "FAILED" and message in run.data.tags["reason"]
    assert run.info.run_name.endswith(" (failed)")
    assert {path.name for path in tmp_path.iterdir()} <= {"mlflow.db", "mlflow.db.lock"}  # no empty folders


@pytest.mark.slow
def test_held_out_images_that_are_training_images_too_are_left_out_and_recorded(shards, tmp_path):
    write_shards([*random_samples(20, seed=2), next(random_samples(1, seed=1))], tmp_path, prefix="v", shard_size=30)
    (tmp_path / "link.tar").symlink_to("v-0000.tar")
    given = (*data(shards)[:2], "--val-shards", "link.tar", "--max-evaluations", "200")
    code, out, err = finish(start(tmp_path, *given, "--max-bad-fraction", "0.05"))
    assert code == 0, err
    pair = f"{tmp_path}/link.tar: s1-000 = {(shards / 'train-0000.tar').resolve()}: s1-000"
    assert f"warning: left out 1 of 21 held-out images that are training images too: {pair}\n" in out
    _, (run,) = runs(tmp_path)
    assert run.data.params["num_shared_images"] == "1"
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"training-47", "held-out-20"}
    assert any("link.tar" in i.dataset.source for i in run.inputs.dataset_inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_images": 0}, "--num-train-images is 0; it must be positive"),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction is 1.5; it must lie in"),
        (
            {"num_train_images": 40, "compute": ComputeConfig(max_evaluations=40)},
            "do not pay for more than the clean labels of 40 training images",
        ),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_looked_at(options, message):
    with pytest.raises(ConfigError, match=message):
        job_options(**options)


def test_a_tracking_server_that_does_not_answer_fails_early(shards, tmp_path):
    started = time.monotonic()
    code, _, err = finish(start(tmp_path, *data(shards), MLFLOW_TRACKING_URI="http://127.0.0.1:9"))
    assert code == 1 and "the tracking server at http://127.0.0.1:9 (MLFLOW_TRACKING_URI) does not answer" in err
    assert err.count("\n") == 1 and time.monotonic() - started < 60


def test_an_unknown_norm_is_refused_by_the_parser(tmp_path):
    code, _, err = finish(start(tmp_path, "--norm", "l1"))
    assert code != 0 and "l1" in err and "linf" in err
