"""What --resume refuses, each in one line that says what it is and what to do, leaving nothing behind."""

import sys
import time
from dataclasses import replace

import mlflow
import pytest
from test_checkpoint import JOB, checkpoint

from uap_dist.errors import ResumeError, TrackingError
from uap_dist.finetuning.options import FinetuneOptions
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.mlflow_server import CHECKPOINTS_TAG
from uap_dist.tracking.resume import find_resumed


@pytest.fixture(scope="module")
def runs_uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('resume') / 'mlflow.db'}"


@pytest.fixture
def resume(runs_uri, monkeypatch):
    """Parse --resume TARGET as a job does."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", runs_uri)
    mlflow.set_tracking_uri(runs_uri)

    def parse(target, job="compute"):
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", "--resume", str(target)])
        return find_resumed(job)

    return parse


def track(status="FAILED", **options):
    """The tracker of a run that ended with this status."""
    tracker = Tracker(experiment="resume", run_name="a run", **options)
    tracker._end(status)
    return tracker


def commit(folder, **facts):
    with CheckpointStore(str(folder)) as store:
        store.start(replace(checkpoint(1), job=replace(JOB, **facts)))
    return folder


@pytest.mark.parametrize(
    ("job", "noun"), [("evaluate", "an evaluation"), ("analyze", "an analysis"), ("plan", "a plan")]
)
def test_runs_of_jobs_that_cannot_be_resumed(resume, job, noun):
    run = track(job=job).run_id
    with pytest.raises(ResumeError, match=f"^run {run} is {noun}, which cannot be resumed; start it again$"):
        resume(run)
    run = track("FINISHED", job=job).run_id
    with pytest.raises(ResumeError, match=f"^run {run} is finished; there is nothing to resume$"):
        resume(run)


@pytest.mark.parametrize(("given_to", "belongs_to"), [("compute", "finetune"), ("finetune", "compute")])
def test_another_job_is_named(resume, tmp_path, given_to, belongs_to):
    run, folder = track(job=belongs_to).run_id, commit(tmp_path, program=belongs_to)
    for target in (run, folder):
        with pytest.raises(ResumeError, match=f"; resume it with python jobs/{belongs_to}.py --resume {target}$"):
            resume(target, given_to)
    assert resume(folder, belongs_to).storage == str(folder)


def test_a_child_run_names_the_run_to_resume(resume, tmp_path):
    whole = Tracker(job="finetune", experiment="resume", run_name="fine-tuning")
    pool = track(parent=whole)
    member, folder = track(parent=pool), commit(tmp_path, program="finetune", part_of=whole.run_id)
    for target in (pool.run_id, member.run_id, folder):
        advice = f"is part of run {whole.run_id}, a fine-tuning; resume that: python jobs/finetune.py --resume {whole.run_id}$"
        with pytest.raises(ResumeError, match=advice):
            resume(target)
    whole._end("FAILED")


def test_a_run_of_another_program(resume):
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("others"), run_name="grand-hen-1").info.run_id
    with pytest.raises(
        ResumeError, match=rf"^run {run} \(grand-hen-1\) was started by another program, or by an earlier version"
    ):
        resume(run)


def test_a_run_that_ended_too_early_and_one_that_is_not_there(resume):
    run = track(job="compute").run_id
    with pytest.raises(ResumeError, match=f"run {run} ended before its first checkpoint; start it again without"):
        resume(run)
    with pytest.raises(ResumeError, match=f"no run {'0' * 32} at sqlite:///"):
        resume("0" * 32)


def test_a_run_whose_checkpoints_are_gone(resume, tmp_path):
    tracker = Tracker(job="compute", experiment="resume", run_name="a run")
    tracker.set_tag(CHECKPOINTS_TAG, str(tmp_path / "gone"))
    tracker._end("FAILED")
    with pytest.raises(ResumeError, match=f"no checkpoint in {tmp_path / 'gone'}"):
        resume(tracker.run_id)


def test_a_file_and_a_folder_of_other_things(resume, tmp_path):
    (tmp_path / "result.json").touch()
    with pytest.raises(ResumeError, match=f"no checkpoint in {tmp_path}; give an MLflow run, or the folder"):
        resume(tmp_path)
    with pytest.raises(ResumeError, match=f"{tmp_path}/result.json"):
        resume(tmp_path / "result.json")


def test_looking_for_a_run_creates_no_database(resume, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(TrackingError, match=f"^{tmp_path / 'mlflow.db'}, where MLflow keeps runs, does not exist"):
        resume("0" * 32)
    assert not list(tmp_path.iterdir())


def test_a_run_that_may_still_be_computed_elsewhere_gives_a_warning(resume, tmp_path, caplog):
    resume(commit(tmp_path / "old"))
    assert not caplog.text
    fresh = RoundRecord(1, time.time_ns() // 1_000_000, {})
    with CheckpointStore(str(tmp_path / "fresh")) as store:
        store.start(replace(checkpoint(1), history=[fresh]))
    resume(tmp_path / "fresh")
    assert (
        f"run {JOB.run_id} finished a round 0 s ago; if another process is still computing it, stop one" in caplog.text
    )


def test_options_of_another_version(resume, tmp_path):
    found = resume(commit(tmp_path))
    with pytest.raises(
        ResumeError, match=f"options in {tmp_path} are of another version of uap_dist .*resume with that"
    ):
        found.options(FinetuneOptions)


def test_a_run_that_was_deleted_or_is_in_another_database(resume, tmp_path):
    run = track(job="compute").run_id
    mlflow.MlflowClient().delete_run(run)
    with pytest.raises(ResumeError, match=f"run {run} was deleted"):
        Tracker(job="compute", experiment="resume", run_name="a run", run_id=run)
    with pytest.raises(ResumeError, match=f"no run {JOB.run_id} at sqlite:///"):
        Tracker(job="compute", experiment="resume", run_name="a run", run_id=JOB.run_id)
