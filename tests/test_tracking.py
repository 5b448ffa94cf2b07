"""Errors when MLflow cannot be used: they name which part of it and why, and never hide a bug of the program."""

import errno
import sqlite3
from contextlib import closing
from threading import Timer

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from processes import environment, run_job

from uap_dist.errors import ConfigError, TrackingError
from uap_dist.foreign_text import in_one_line
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.mlflow_server import tracking_errors

BROKEN_OFF = """
import os, signal, sys
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from uap_dist.tracking.console import one_line_errors
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.process import raise_on_sigterm

run_id, where, what = sys.argv[1:]
old = {name: getattr(MlflowClient, name) for name in ("get_metric_history", "set_tag", "set_terminated")}

def disturb(*names):
    def disturbed(name):
        def call(*args, **options):
            if what == "down":
                raise MlflowException("API request failed with exception timed out")
            os.kill(os.getpid(), signal.SIGTERM)
            return old[name](*args, **options)
        return call
    for name in names:
        setattr(MlflowClient, name, disturbed(name))

with one_line_errors(debug=False):
    raise_on_sigterm()
    try:
        if where == "begin":
            disturb("get_metric_history")
        with Tracker(run_name="a run", run_id=run_id):
            disturb("set_tag", *(["set_terminated"] if what == "down" else []))
            raise ValueError("disk full")
    finally:
        for name, method in old.items():  # it answers again when the process ends
            setattr(MlflowClient, name, method)
"""
SERVER, FILE = "http://127.0.0.1:9", "sqlite:////runs/mlflow.db"


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    tracker = Tracker(experiment="here", run_name="a run")
    yield tracker
    mlflow.end_run("FAILED")


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        (
            SERVER,
            requests.ConnectionError("refused"),
            f"the tracking server at {SERVER} .* does not answer .*: refused",
        ),
        (
            SERVER,
            RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "too long"}),
            "refuses the request: .*too long",
        ),
        (FILE, OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/runs/mlflow.db .*no space is left.*/a/b"),
        (FILE, MlflowException("(sqlite3.OperationalError) database or disk is full"), "no space is left on the disk"),
        (FILE, PermissionError(errno.EACCES, "Permission denied", "/a/b"), "it must not be written to .*/a/b"),
        (FILE, ModuleNotFoundError("No module named 'boto3'"), "cannot be used: No module named 'boto3'"),
    ],
)
def test_a_failure_is_named_with_its_reason(uri, error, message):
    with pytest.raises(TrackingError, match=message) as raised, tracking_errors(uri):
        raise error
    assert "\n" not in str(raised.value)
    assert "server" not in str(raised.value) or uri == SERVER


@pytest.mark.parametrize("error", [KeyError("compute"), TypeError("no"), AssertionError(), ConfigError("radius")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as raised, tracking_errors(SERVER):
        raise error
    assert raised.value is error


def test_a_bug_in_what_is_sent_is_not_blamed_on_the_server(tracker):
    tracker.log_round(RoundRecord(1, 1, None))
    with pytest.raises(AttributeError):
        tracker.wait_for_delivery(0.5)


def test_artifacts_that_cannot_be_written_are_named(tracker, tmp_path):
    (tmp_path / "mlruns").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result.json").touch()
    with pytest.raises(
        TrackingError, match=f"{tmp_path}/mlflow.db or its artifacts cannot be used: .*{tmp_path}/mlruns"
    ):
        tracker.complete(tags={}, metrics={}, step=0, markdown="", folder=tmp_path / "out")


@pytest.mark.parametrize(
    ("where", "what", "status"),
    [
        ("begin", "down", "FAILED"),
        ("begin", "interrupt", "KILLED"),
        ("end", "down", "RUNNING"),
        ("end", "interrupt", "FAILED"),
    ],
)
def test_a_run_that_is_broken_off_as_it_begins_or_ends_can_be_resumed(tracker, tmp_path, where, what, status):
    mlflow.end_run("FAILED")
    (tmp_path / "job.py").write_text(BROKEN_OFF)
    uri = {"MLFLOW_TRACKING_URI": tracker.uri}
    done = run_job([str(tmp_path / "job.py"), tracker.run_id, where, what], tmp_path, environment(**uri))
    assert done.returncode == (130 if what == "interrupt" else 1), done.stderr
    assert mlflow.get_run(tracker.run_id).info.status == status, done.stderr


def test_a_finished_run_is_marked_so_at_the_second_attempt(tracker, monkeypatch):
    set_terminated, attempts = mlflow.MlflowClient.set_terminated, []

    def fail_once(*args):
        attempts.append(args)
        if len(attempts) == 1:
            raise MlflowException("(sqlite3.OperationalError) database is locked")
        set_terminated(*args)

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", fail_once)
    tracker.finish()
    assert mlflow.get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.slow  # MLflow's patience with a locked database is 20 s
def test_a_job_waits_for_others_that_hold_the_lock_for_long(tracker, tmp_path):
    with closing(sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        Timer(25, other.rollback).start()
        tracker.set_tag("late", "but there")
    assert mlflow.get_run(tracker.run_id).data.tags["late"] == "but there"


def test_an_error_is_one_line_without_codes_of_a_terminal():
    assert in_one_line(ConfigError("do \x1b[1mthis\x1b[0m\nor that")) == "do this or that"
    assert in_one_line(OSError(errno.ENOSPC, "No space left on device", "/a/b")) == "No space left on device: /a/b"
    assert in_one_line(KeyError("compute")) == (
        "unexpected KeyError: 'compute'; run it again with --debug to see where, and report it"
    )
