"""mlflow.db when several jobs start at once, and when an earlier one was killed while creating it."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from uap_dist.errors import TrackingError
from uap_dist.tracking.sqlite_store import prepare_store, sqlite_path

START = """
from uap_dist.tracking.mlflow_run import Tracker
print("imported", flush=True)
input()
with Tracker(run_name="run", experiment="sweep") as tracker:
    tracker.log_params({"seed": 1})
"""


def open_store(uri):
    mlflow.MlflowClient(uri).search_experiments()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "mlflow.db"
    prepare_store(path, open_store)
    return path


def start_trackers(folder, count, **extra):
    """Processes that have imported everything, and start a run each at their next line of input."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | extra
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = [subprocess.Popen([sys.executable, "-c", START], cwd=folder, env=env, **pipes) for _ in range(count)]
    for process in found:
        assert process.stdout.readline() == "imported\n", process.stderr.read()
    return found


def tell(process):
    process.stdin.write("\n")
    process.stdin.flush()


def runs_by_experiment(uri):
    client = mlflow.MlflowClient(uri)
    return {
        each.name: [run.info.status for run in client.search_runs([each.experiment_id])]
        for each in client.search_experiments()
    }


def harm(path, *statements):
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_jobs_that_start_at_once_wait_for_the_one_that_creates_the_file_even_if_it_is_killed(tmp_path):
    killed, *others = start_trackers(tmp_path, 3)
    tell(killed)
    draft = tmp_path / "mlflow.db.unfinished"
    while not (draft.exists() and draft.stat().st_size > 80_000):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.005)
    for process in others:
        tell(process)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    for process in others:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert runs_by_experiment(uri) == {"Default": [], "sweep": ["FINISHED"] * 2} and not draft.exists()
    experiment = mlflow.MlflowClient(uri).get_experiment_by_name("sweep")
    assert Path(experiment.artifact_location.removeprefix("file://")) == tmp_path / "mlruns"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.uap_dist"])["state"])
    assert view["columnOrder"][0] == "metrics.`fooling_rate/val`"


@pytest.mark.parametrize("num_runs", [0, 2])
def test_an_incomplete_file_is_named_with_what_to_do_and_left_alone(whole, tmp_path, num_runs):
    with_runs = shutil.copy(whole, tmp_path / "with-runs.db")
    for _ in range(num_runs):
        mlflow.MlflowClient(f"sqlite:///{with_runs}").create_run("0")
    path = shutil.copy(with_runs, tmp_path / "mlflow.db")
    harm(path, "UPDATE alembic_version SET version_num = '451aebb31d03'", "DROP TABLE webhook_events")
    advice = (
        "no runs, so delete it and start again" if num_runs == 0 else "2 runs: make a backup, then try `mlflow db upg"
    )
    with pytest.raises(
        TrackingError, match=f"the tables in {path} are incomplete, or.*already exists.*it holds {advice}"
    ):
        prepare_store(path, open_store)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (num_runs,)


def test_an_empty_file_is_no_store_yet(tmp_path):
    path = tmp_path / "mlflow.db"
    path.touch()
    prepare_store(path, open_store)
    assert runs_by_experiment(f"sqlite:///{path}") == {"Default": []}


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_text("no database " * 200)
    with pytest.raises(TrackingError, match=r"cannot open .*mlflow.db: .*file is not a database; move it away"):
        prepare_store(path, open_store)
    assert path.read_text() == "no database " * 200


def test_a_file_of_a_newer_mlflow_is_recognised(whole, tmp_path):
    path = shutil.copy(whole, tmp_path / "mlflow.db")
    harm(path, "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(TrackingError, match=re.escape(str(path))) as error:
        prepare_store(path, open_store)
    assert "\n" not in str(error.value) and "another version of MLflow" in str(error.value)


def test_a_folder_that_cannot_be_written_to_is_one_line():
    with pytest.raises(
        TrackingError, match="cannot lock /proc/mlflow.db.lock: .*set MLFLOW_TRACKING_URI to a file in a "
    ):
        prepare_store(Path("/proc/mlflow.db"), open_store)


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////data/mlflow.db", Path("/data/mlflow.db")),
        ("sqlite:///runs/mlflow.db", Path.cwd() / "runs/mlflow.db"),
        ("sqlite:////data/mlflow.db?timeout=60", Path("/data/mlflow.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("postgresql://host/mlflow", None),
        ("http://127.0.0.1:5000", None),
    ],
)
def test_the_file_that_a_uri_names(uri, path):
    assert sqlite_path(uri) == path


def test_a_uri_that_names_no_file_is_one_line():
    with pytest.raises(
        TrackingError, match="^MLFLOW_TRACKING_URI is sqlite:mlflow.db; give sqlite:///PATH or the URL of a server$"
    ):
        sqlite_path("sqlite:mlflow.db")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("disk is full", "cannot open .*mlflow.db: .*disk is full; free some space on its disk"),
        ("disk I/O error", "the tables in .*mlflow.db are incomplete.* .disk I/O error.; it holds no runs"),
    ],
)
def test_a_file_that_cannot_be_created_is_one_line_and_leaves_none(tmp_path, failure, message):
    def fail(uri):
        raise OSError(failure)

    with pytest.raises(TrackingError, match=message):
        prepare_store(tmp_path / "mlflow.db", fail)
    assert not (tmp_path / "mlflow.db").exists()
