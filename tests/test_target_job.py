"""jobs/compute.py --target and what jobs/evaluate.py makes of it, as a user starts them."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from processes import run_job
from test_job import JOB, data, empty_store, runs

from uap_dist.computing.provenance import describe_config, describe_member
from uap_dist.computing.report import FinishedRun, is_target_reached
from uap_dist.errors import ConfigError, ResumeError
from uap_dist.evaluation.evaluate import aim, measure_noise
from uap_dist.evaluation.label_graph import label_graph
from uap_dist.evaluation.options import EvaluateOptions
from uap_dist.evaluation.plots import save_label_graph
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import random_of_same_norms
from uap_dist.method.rates import UNTARGETED, Goal, Rate
from uap_dist.models.loading import load_classifier
from uap_dist.perturbations.files import Perturbation, load_perturbations
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.rounds.loop import compute
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint import JobRecord, check_identity

EVALUATE = Path(JOB).with_name("evaluate.py")
OPTIONS = ("--model", TINY, "--num-workers", "1", "--round-size", "10", "--block-size", "5", "--radius", "20")


@pytest.fixture(scope="module")
def computed(shards, tmp_path_factory):
    """A pool of two members with a target given by name, and what the job said."""
    folder = tmp_path_factory.mktemp("targeted")
    (folder / "mlflow.db").write_bytes(empty_store())
    words = [str(JOB), *data(shards), *OPTIONS, "--max-passes", "4", "--num-perturbations", "2", "--output", "out"]
    done = run_job([*words, "--target", "Red"], folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def member(folder):
    return folder / "out/members/seed-0"


def tables(folder):
    paths = sorted((folder / "out/members").glob("*/tables/held-out-examples.parquet"))
    return [pq.read_table(path).to_pydict() for path in paths]


def test_the_rates_are_those_of_the_table(computed):
    folder, _ = computed
    table = pq.read_table(member(folder) / "tables/held-out-examples.parquet").to_pydict()
    result = json.loads((member(folder) / "result.json").read_text())
    clean, perturbed = np.array(table["clean_label"]), np.array(table["perturbed_label"])
    counts = clean != 0
    assert table["gets_target"] == (counts & (perturbed == 0)).tolist()
    assert result["num_val_images_targeted_success"] == counts.sum() < result["num_val_images"] == 20
    assert result["val_targeted_success_rate"] == (perturbed[counts] == 0).mean() > 0.8
    assert result["val_fooling_rate"] == (clean != perturbed).mean()
    assert result["val_targeted_success_rate_random"] < result["val_targeted_success_rate"]
    low, high = result["val_targeted_success_rate_interval"]
    assert low < result["val_targeted_success_rate"] <= high
    assert (result["target_name"], result["is_target_reached"], result["provenance"]["target"]) == ("red", True, 0)


def test_mlflow_has_the_target_its_curve_and_its_baseline(computed):
    folder, out = computed
    client, found = runs(folder)
    assert all((run.data.params["target"], run.data.params["target_name"]) == ("0", "red") for run in found)
    (pool,) = (run for run in found if "mlflow.parentRunId" not in run.data.tags)
    result = json.loads((folder / "out/result.json").read_text())
    assert pool.data.metrics["pool/mean_val_targeted_success_rate"] == result["mean_val_targeted_success_rate"] > 0.8
    assert (
        "pool2-seed0-target-Red" in pool.info.run_name and "**target red (0)**" in pool.data.tags["mlflow.note.content"]
    )
    labels = [t["perturbed_label"] for t in tables(folder)]
    clean = np.array(tables(folder)[0]["clean_label"])
    covered = (np.array(labels) == 0).any(0)[clean != 0].mean()
    assert pool.data.metrics["pool/val_coverage_targeted_success"] == result["val_coverage_targeted_success"] == covered
    assert "At least one member gives the target to " in pool.data.tags["mlflow.note.content"]
    child = next(run for run in found if run is not pool and run.data.params["seed"] == "0")
    metrics, own = child.data.metrics, json.loads((member(folder) / "result.json").read_text())
    assert metrics["targeted_success_rate/val"] == own["val_targeted_success_rate"]
    assert metrics["random/targeted_success_rate"] == own["val_targeted_success_rate_random"]
    assert {"interval/val_targeted_success_low", "num_images/train_targeted_success"} <= set(metrics)
    history = client.get_metric_history(child.info.run_id, "targeted_success_rate/running")
    assert len(history) == own["num_rounds"]
    note = child.data.tags["mlflow.note.content"]
    assert "**target red (0)**" in note and note.index("Targeted success rate") < note.index("Fooling rate")
    assert "14 of 47 training images take no part: the network gives them the target's label already" in out
    assert "seed-0: after " in out and "targeted success rate training " in out and "; fooling rate training " in out


def test_the_label_graph_marks_the_target(computed, tmp_path):
    folder, _ = computed
    graph = nx.read_graphml(member(folder) / "tables/label-graph.graphml")
    assert [node for node, mark in graph.nodes(data="is_target") if mark] == ["0"]
    assert {target for _, target in graph.edges} == {"0"} and (member(folder) / "pictures/5-label-graph.png").exists()
    missed = label_graph(np.array([1, 2]), np.array([2, 2]), "abcd", target=3)  # no image gets it
    assert missed.nodes[3] == {"name": "d", "num_images": 0, "is_target": True}
    save_label_graph(tmp_path / "graph.png", missed)


def test_an_evaluation_knows_the_target_and_takes_one_for_others(computed, shards, tmp_path):
    folder, _ = computed
    np.save(tmp_path / "other.npy", 20 * np.sign(np.random.default_rng(0).normal(size=(3, 16, 16))))
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    words = [
        str(EVALUATE),
        "--models",
        TINY,
        "--shards",
        f"v={shards}/val-*.tar",
        "--num-workers",
        "1",
        "--output",
        "out",
    ]
    words += ["--pools", str(folder / "out/pool"), "--perturbations", "other.npy:255", "--target", "2"]
    done = run_job(words, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["perturbation"]: row for row in pq.read_table(tmp_path / "out/tables/evaluation.parquet").to_pylist()}
    own = json.loads((member(folder) / "result.json").read_text())
    assert rows["seed-0"]["targeted_success_rate"] == own["val_targeted_success_rate"]
    assert rows["seed-0"]["targeted_success_rate_num_images"] == own["num_val_images_targeted_success"]
    targets = {name: row["goal"].removeprefix("target ") for name, row in rows.items()}
    assert targets == {
        "other": "blue (2)",
        "seed-0": "red (0)",
        "seed-1": "red (0)",
        "zero": "",
        "random, ℓ∞ norm of other": "blue (2)",
        "random, ℓ∞ norm of seed-0": "red (0)",
    }
    assert rows["zero"]["targeted_success_rate"] is None
    with (tmp_path / "out/tables/targeted-success-v.csv").open() as file:
        success = {row["perturbation"]: float(row["Tiny"]) for row in csv.DictReader(file)}
    assert success == {name: row["targeted_success_rate"] for name, row in rows.items() if name != "zero"}
    assert (tmp_path / "out/pictures/1-targeted-success-v.png").exists()
    _, (run,) = runs(tmp_path)
    said = json.loads((folder / "out/result.json").read_text())
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith("coverage")}
    assert metrics.pop("coverage/pool/Tiny/v/targeted_success") == said["val_coverage_targeted_success"]
    assert sorted(metrics) == [f"coverage_random_{norm}/pool/Tiny/v/targeted_success" for norm in ("l2", "linf")]
    assert "* Tiny, target red (0): **seed-" in run.data.tags["mlflow.note.content"]


def test_a_goal_is_given_to_perturbations_whose_files_name_none(tmp_path, caplog):
    options = EvaluateOptions(
        perturbations=("x",), models=("m",), shards=("s",), target="Blue", only_classes=("red,3",)
    )
    tiny, names = load_classifier(TINY), ("red", "green", "blue", "grey")
    goal = options.goal(tiny, names, 4)
    assert goal == Goal(2, only=(0, 3))
    own, far = Goal(1), Goal(only=(7,))
    given = [Perturbation(str(n), torch.ones(3, 16, 16), g.provenance()) for n, g in enumerate((UNTARGETED, own, far))]
    published = Perturbation("published", torch.ones(3, 16, 16))
    found = aim([published, *given], goal, "tiny", 4)
    assert [each.goal for each in found] == [goal, goal, own, UNTARGETED]
    assert "2 is not measured by its goal, which names label 7: tiny has 4 labels" in caplog.text
    assert "measured by the goal of their files, not by the one given: 1" in caplog.messages
    with pytest.raises(
        ConfigError, match="target for .*Tiny is 'Blue', but the classes have no names .* or classes.txt"
    ):
        options.goal(tiny, (), 4)


def test_the_pool_and_its_members_keep_their_target(computed):
    folder, _ = computed
    pool = PerturbationPool.load(folder / "out/pool")
    assert [p.goal.target for p in pool.to_perturbations()] == [0, 0]
    (one,) = load_perturbations(str(member(folder)))
    config = ComputeConfig.from_provenance(one.provenance, one.name)
    assert (config.target, config.random_start, config.radius) == (0, 0.5, 20)
    assert describe_member(config)["target"] == describe_config(config)["target"] == 0


def test_a_run_is_not_resumed_with_another_target():
    saved, now = (JobRecord("run", {}, describe_config(ComputeConfig(target=target)), {}) for target in (1, 2))
    with pytest.raises(ResumeError, match="its result would differ: target was 1, is 2;"):
        check_identity(saved, now)
    check_identity(saved, saved)


@pytest.mark.parametrize(("hits", "is_reached"), [(0, False), (3, False), (90, True)])
def test_a_target_is_reached_where_more_images_get_it_than_by_chance(hits, is_reached):
    assert is_target_reached(Rate(hits, 100), [Rate(1, 100), Rate(0, 100)]) == is_reached


@pytest.mark.parametrize(
    ("radius", "words"), [(0.01, "**The target was not reached:** hardly more images"), (20.0, "Targeted")]
)
def test_a_target_that_is_not_reached_is_said_plainly(local_workers, tiny_data, radius, words):
    train, val = tiny_data
    config = ComputeConfig(radius=radius, max_passes=2, target=0)
    history = []
    for report in compute(local_workers, train, val, config):
        history.append(RoundRecord.of(report, {}, history))
    noise = random_of_same_norms(report.perturbation, seed=0)
    finished = FinishedRun(
        final=report,
        history=history,
        random_rates=measure_noise(local_workers, val, noise, config.goal),
        val=val,
        provenance=asdict(config) | {"model": "tiny", "demo": False},
        class_names=(),
        mlflow_run_id="",
    )
    assert finished.result()["is_target_reached"] == (radius == 20)
    _, paragraph, *_ = finished.summary().split("\n\n")
    assert paragraph.startswith(words) and "Targeted success rate on held-out images: **" in paragraph
    assert "already do not count: 8 held-out ones, 14 training images." in paragraph


@pytest.mark.parametrize(
    ("job", "options", "message"),
    [
        (JOB, ("--target", "rd"), "target is 'rd', which is no class of the network; nearest names: red (0)"),
        (JOB, ("--target", "4", "--plan"), "target is 4; the network has the labels 0 to 3"),
        (EVALUATE, ("--target", "bleu"), f"target for {TINY} is 'bleu', which is no class of the network; nearest names: blue (2)"),
        (EVALUATE, ("--only-classes", "red", "--spare-classes", "0"),
         "label 0 is to be attacked (--only-classes) and spared (--spare-classes)"),
    ],
)  # fmt: skip
def test_a_target_that_is_no_class_is_one_line(shards, tmp_path, job, options, message):
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    words = [str(job), "--model", TINY, "--num-workers", "1", *data(shards), *options]
    if job == EVALUATE:
        np.save(tmp_path / "v.npy", np.ones((3, 16, 16)))
        words[1:3] = ["--models", TINY]
        words[5:9] = ["--shards", f"{shards}/val-*.tar", "--perturbations", "v.npy:255"]
    done = run_job(words, tmp_path)
    assert done.returncode == 1 and done.stderr == f"error: {message}\n"
    assert not list(tmp_path.glob("out*"))
