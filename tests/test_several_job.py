"""jobs/compute.py --models as a user starts it, killed and resumed, and what jobs/evaluate.py makes of its result on other networks."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from fleets import load
from processes import JobProcess, committed, environment, run_job
from test_job import JOB, data, empty_store, runs

from uap_dist.analysis.sample_size import Recipe
from uap_dist.computing.options import ComputeOptions
from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.job_options import DataOptions
from uap_dist.method.config import ComputeConfig
from uap_dist.models.loading import load_classifier
from uap_dist.perturbations.files import load_perturbations
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

EVALUATE = Path(JOB).with_name("evaluate.py")
BOTH = (TINY, TINY.replace("Tiny", "Other"))
CIFAR = ("resnet20", "resnet32")


def given(shared, names):
    folder = shared / "models"
    return tuple(f"{folder / 'cifar_resnet.py'}:{name}={folder / name}.safetensors" for name in names)


@pytest.fixture(scope="module")
def of_two(shared, tmp_path_factory):
    """Of two networks for CIFAR-10: a job that was killed and resumed."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "mlflow.db").write_bytes(empty_store())
    images = shared / "data/cifar10"
    words = [str(JOB), "--models", *given(shared, CIFAR), "--train-shards", str(images / "train-0000.tar")]
    words += ["--val-shards", str(images / "test-0000.tar"), "--num-train-images", "100", "--num-val-images", "300"]
    words += ["--max-evaluations", "2000", "--num-workers", "1", "--output", "out", "--commit-every-s", "0"]
    process = JobProcess(words, folder, environment())
    while committed(folder) < 10:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    _, (run,) = runs(folder)
    done = run_job([str(JOB), "--resume", run.info.run_id], folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_bits_are_those_of_one_process(of_two, shared):
    folder, _ = of_two
    workers = LocalWorkers(Worker(load_classifier(given(shared, CIFAR)), cache_bytes=1 << 30, num_threads=1))
    train = load_dataset(workers, [str(shared / "data/cifar10/train-0000.tar")], num_images=100)
    *_, last = compute(workers, train, train.thin(1), ComputeConfig(max_evaluations=2000))
    (v,) = load_perturbations([str(folder / "out")])
    assert torch.equal(v.v, last.perturbation)
    assert v.provenance["num_evaluations"] == last.num_evaluations == 200 + 4 * last.num_solves


def test_files_and_mlflow_have_the_rates_of_each_network_of_the_worst_and_of_all_at_once(of_two):
    folder, out = of_two
    result = json.loads((folder / "out/result.json").read_text())
    table = pq.read_table(folder / "out/tables/held-out-examples.parquet").to_pydict()
    fooled = {
        name: np.array(table[f"{name}.clean_label"]) != np.array(table[f"{name}.perturbed_label"]) for name in CIFAR
    }
    each = {name: result[f"val_{name}.fooling_rate"] for name in CIFAR}
    assert each == {name: mask.mean() for name, mask in fooled.items()}
    assert result["val_worst.fooling_rate"] == min(each.values()) == each[result["worst_network"]] > 0.5
    assert result["val_fooling_rate"] == np.logical_and(*fooled.values()).mean() == np.mean(table["is_fooled"])
    assert result["val_worst.fooling_rate_random"] < 0.5
    assert result["provenance"]["networks"] == list(CIFAR)
    _, (run,) = runs(folder)
    assert run.info.run_name == "resnet20+resnet32-linf-seed0"
    for name in (*CIFAR, "worst"):
        assert run.data.metrics[f"{name}.fooling_rate/val"] == result[f"val_{name}.fooling_rate"]
    assert run.data.metrics["fooling_rate/val"] == result["val_fooling_rate"]
    assert len(run.data.params["weights_digest.resnet20"]) == 64 and run.data.params["model"] == "resnet20 + resnet32"
    note = run.data.tags["mlflow.note.content"]
    assert "Fooling rate of the worst network on held-out images" in note and "**resnet20 + resnet32**" in note
    assert "one perturbation for resnet20, resnet32; images are taken as they lie in the shards, for all of them" in out
    assert "clean top-1 of training images by resnet32: " in out
    assert (folder / "out/pictures/1-fooling-rate.png").exists()


def test_an_evaluation_on_other_networks_says_which_it_was_computed_for(of_two, shared, tmp_path):
    folder, _ = of_two
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    words = [
        str(EVALUATE),
        "--perturbations",
        f"joint={folder / 'out'}",
        "--models",
        *given(shared, (*CIFAR, "resnet44")),
    ]
    words += ["--shards", f"v={shared}/data/cifar10/test-0000.tar", "--num-images", "300", "--num-workers", "1"]
    done = run_job([*words, "--output", "out"], tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out/result.json").read_text())
    rows = pq.read_table(tmp_path / "out/tables/evaluation.parquet").to_pylist()
    rates = {row["classifier"]: row["fooling_rate"] for row in rows if row["perturbation"] == "joint"}
    assert {name: rates[name] for name in CIFAR} == {name: result[f"val_{name}.fooling_rate"] for name in CIFAR}
    assert rates["resnet44"] > 0.3
    own = {row["classifier"]: row["is_own"] for row in rows if row["perturbation"] == "joint"}
    assert own == {"resnet20": True, "resnet32": True, "resnet44": False}
    assert not any(row["is_own"] for row in rows if row["is_baseline"])


def test_a_pool_of_several_networks(shards, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    words = [
        str(JOB),
        "--models",
        *BOTH,
        *data(shards),
        "--num-workers",
        "1",
        "--round-size",
        "10",
        "--block-size",
        "5",
    ]
    words += ["--radius", "20", "--max-passes", "3", "--output", "out", "--target", "red", "--num-perturbations", "2"]
    done = run_job([*words, "--members-at-once", "2"], tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["mean_val_worst.targeted_success_rate"] <= result["mean_val_Tiny.targeted_success_rate"]
    tables = [
        pq.read_table(tmp_path / f"out/members/seed-{seed}/tables/held-out-examples.parquet").to_pydict()
        for seed in (0, 1)
    ]
    labels = [np.array([table[f"{name}.perturbed_label"] for name in ("Tiny", "Other")]) for table in tables]
    clean = np.array([tables[0][f"{name}.clean_label"] for name in ("Tiny", "Other")])
    counts = (clean != 0).all(0)
    covered = np.logical_or(*((each == 0).all(0) for each in labels))[counts]
    assert covered.mean() == result["val_coverage_targeted_success"]
    assert "Tiny: 14 of 47 training images take no part" in done.stdout


@pytest.mark.parametrize("num_workers", [1, 2])
def test_same_bits_for_any_number_of_workers(local_ray, shards, num_workers):
    config = ComputeConfig(round_size=20, block_size=5, max_passes=3, radius=20.0)
    workers = LocalWorkers(Worker(load_classifier(BOTH), cache_bytes=1 << 30, num_threads=1))
    *_, expected = compute(workers, *load(workers, shards), config)
    fleet = Fleet(BOTH, None, FleetConfig(num_workers=num_workers))
    fleet.wait()
    *_, final = compute(fleet, *load(fleet, shards), config)
    fleet.close()
    assert torch.equal(final.perturbation, expected.perturbation)
    assert final.evaluation.val_rates == expected.evaluation.val_rates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": BOTH[:1]}, f"^--models has one network, {BOTH[0]}; give it as --model, or give several$"),
        (
            {"models": BOTH, "weights": "w.pth"},
            "^--weights belongs to --model; with --models give each network its own, ",
        ),
        (
            {"models": BOTH, "model": "timm/resnet50"},
            "^give --model timm/resnet50 as one of --models, or leave out --m",
        ),
        ({"models": (BOTH[0], BOTH[0])}, "twice with the same weights"),
        ({"models": (BOTH[0], f"{BOTH[1]}=")}, "no weights file after the last ="),
        (
            {"models": BOTH, "data": DataOptions(num_train_images=50), "compute": ComputeConfig(max_evaluations=100)},
            "do not pay for more than the clean labels of 50 training images by 2 networks",
        ),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        ComputeOptions(**options)


def test_how_many_images_it_takes_is_not_asked_of_several_networks(of_two):
    (v,) = load_perturbations([str(of_two[0] / "out")])
    with pytest.raises(
        PerturbationError, match="was computed for several networks, .*; leave images out of --analyses"
    ):
        Recipe.of(v)
