"""What compute_all records and keeps, on a real fleet and in a real MLflow."""

import gc
import io
import weakref
from contextlib import ExitStack
from dataclasses import replace
from threading import Event

import mlflow
import pytest
import torch
from conftest import TINY
from fleets import load, make_fleet
from rich.console import Console
from test_job import data, empty_store, job_options

from uap_dist.computing import pool_run
from uap_dist.computing import run as computing_run
from uap_dist.computing.pool_run import (
    MemberPlan,
    compute_all,
    compute_members,
    finish_pool,
    open_members,
    plan_members,
)
from uap_dist.computing.provenance import Setting, describe_config, describe_setup, describe_training, job_record
from uap_dist.computing.run import TrackedRun
from uap_dist.data.locations import exists
from uap_dist.errors import ConfigError, ResumeError, TrackingError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import to_json
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import State
from uap_dist.models.loading import load_classifier
from uap_dist.rounds.loop import compute
from uap_dist.tracking.checkpoint import Checkpoint
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.workers.behind import known


@pytest.fixture(scope="module")
def fleet(local_ray):
    fleet = make_fleet(1)
    yield fleet
    fleet.close()


@pytest.fixture
def begin(fleet, shards, tmp_path, monkeypatch):
    """The arguments of `compute_all` for a job of one round, or more."""
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    train, val = load(fleet, shards)

    def begin(tracker, val=val, num_perturbations=1, **config):
        config = ComputeConfig(**({"round_size": 45, "block_size": 5, "radius": 20.0, "max_passes": 1} | config))
        patterns = {"train_shards": (data(shards)[1],), "val_shards": (data(shards)[3],)}
        options = job_options(model=TINY, compute=config, num_perturbations=num_perturbations, **patterns)
        classifier = load_classifier(TINY)
        settings = describe_setup(classifier, None, FleetConfig(num_workers=1)) | describe_config(options.config)
        settings |= {"demo": False, "num_perturbations": num_perturbations} | describe_training(train)
        setting = Setting(classifier, fleet, train, known(val), settings, Console(file=io.StringIO()), 1000.0)
        record = job_record("compute", setting, run_id=tracker.run_id, options=to_json(options))
        state = State.start(train.shape, train.clean.labels, options.config)
        output, storage = tmp_path / "out", str(tmp_path / "checkpoints")
        return setting, options, Checkpoint(record, state, ()), tracker, output, storage

    yield begin
    mlflow.end_run("FAILED")


def track():
    return Tracker(experiment="here", run_name="a run", job="compute")


@pytest.mark.parametrize("num_perturbations", [1, 2])
def test_held_out_images_are_recorded_even_if_mlflow_does_not_answer_when_they_are_there(
    begin, monkeypatch, num_perturbations
):
    log_dataset, are_rounds_over = Tracker.log_dataset, Event()

    def fail_at_first(*args):
        if not are_rounds_over.is_set():
            raise TrackingError("down")
        log_dataset(*args)

    monkeypatch.setattr(Tracker, "log_dataset", fail_at_first)
    monkeypatch.setattr(pool_run, "publish", lambda *args: are_rounds_over.set())
    with track() as tracker:
        compute_all(*begin(tracker, num_perturbations=num_perturbations))
    run = mlflow.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == ["held-out-20"]
    assert "val_digest" in run.data.params


@pytest.mark.parametrize("num_perturbations", [1, 2])
def test_a_run_whose_results_could_not_be_copied_to_its_storage_is_not_finished(begin, store, num_perturbations):
    def begin_in_store(tracker):
        *given, _ = begin(tracker, num_perturbations=num_perturbations)
        return *given, f"s3://bucket/{num_perturbations}?{store.query}&retries=1"

    with (
        pytest.raises(ConfigError, match="access is denied.*copy them with --resume '?s3://bucket"),
        track() as tracker,
    ):
        store.fault = lambda method, path: ("status", 403) if path.endswith("/results/result.json") else None
        compute_all(*begin_in_store(tracker))
    assert mlflow.get_run(tracker.run_id).info.status == "FAILED"
    store.reset()
    with Tracker(run_name="", run_id=tracker.run_id) as tracker:
        compute_all(*begin_in_store(tracker))
    assert mlflow.get_run(tracker.run_id).info.status == "FINISHED"
    assert exists(f"s3://bucket/{num_perturbations}/results/result.json?{store.query}")


def test_a_pool_is_not_mixed_of_members_that_were_measured_on_different_images(begin, fleet, shards):
    with track() as tracker:
        compute_all(*begin(tracker, num_perturbations=2))
    _, val = load(fleet, shards)
    with track() as tracker, pytest.raises(ResumeError, match="seed-0 was measured on other held-out images: val_dig"):
        compute_all(*begin(tracker, val.thin(5), num_perturbations=2))


def test_members_of_a_pool_that_was_put_together_by_hand_have_their_own_configs(begin, fleet):
    """Whose members are computed two at once or alone, and for so many passes."""
    with track() as tracker, ExitStack() as stack:
        setting, options, checkpoint, _, output, storage = begin(tracker)
        configs = {
            f"seed-{seed}": replace(
                options.config, round_size=5, seed=seed, members_at_once=at_once, max_passes=passes, period=period
            )
            for seed, at_once, passes, period in ((0, 2, 1, None), (1, 2, 2, 8), (2, 1, 1, 8), (3, 2, 2, 8))
        }
        configs["seed-4"] = ComputeConfig(
            rule="paper", max_evaluations=200, radius=20.0, round_size=5, block_size=5, seed=4
        )
        plans = {name: MemberPlan(config, output / name, name, {}) for name, config in configs.items()}
        members = open_members(setting, plans, storage, checkpoint.job, tracker, stack)
        compute_members(setting, members)
        pool = finish_pool(setting, plans, tracker).pool
    for member, v in zip(pool.members, pool.perturbations, strict=True):
        config = configs[member["name"]]
        assert ComputeConfig.from_provenance(dict(pool.shared) | dict(member), "") == config
        *_, alone = compute(fleet, setting.train, setting.held_out, config)
        assert torch.equal(v, alone.perturbation)


def test_a_member_that_mlflow_has_is_kept_no_longer(begin):
    with track() as tracker, ExitStack() as stack:
        setting, options, checkpoint, _, output, storage = begin(tracker, num_perturbations=2, round_size=5)
        plans = plan_members(options, output)
        members = open_members(setting, plans, storage, checkpoint.job, tracker, stack)
        runs = [weakref.ref(member) for member in members.values()]
        compute_members(setting, members)
        gc.collect()
        assert [run() for run in runs] == [None, None]
        assert not any(type(each) is Checkpoint and each.history for each in gc.get_objects())


def test_a_run_that_is_resumed_before_its_last_round_logs_no_more_rounds_than_others(
    begin, local_workers, tmp_path, monkeypatch
):
    monkeypatch.setattr(computing_run, "MAX_LOGGED", 2)
    with track() as tracker, CheckpointStore(str(tmp_path / "one")) as store:
        setting, options, checkpoint, *_ = begin(tracker, round_size=5, max_passes=2, evaluate_every=2)

        def rounds(checkpoint):
            run = TrackedRun(options.config, checkpoint, store=store, folder=tmp_path, tracker=tracker)
            for report in run.rounds(local_workers, setting.train, setting.held_out, lambda: 1):
                yield report, list(run._history)

        *_, (before_last, history), (last, _) = rounds(checkpoint)
        tracker.wait_for_delivery(10)
    with track() as tracker, CheckpointStore(str(tmp_path / "two")) as store:
        resumed = Checkpoint(replace(checkpoint.job, run_id=tracker.run_id), before_last.state, history)
        assert [report.is_last for report, _ in rounds(resumed)] == [True]
        tracker.wait_for_delivery(10)
        found = mlflow.MlflowClient().get_metric_history(tracker.run_id, "total/evaluations")
    assert [metric.step for metric in found] == [1, last.num_rounds // 2, last.round_number + 1]
