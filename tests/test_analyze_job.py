"""jobs/analyze.py as a user starts it, on a perturbation that jobs/compute.py has computed."""

import csv
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, compute_here, tiny_worker
from processes import run_job
from test_job import data, empty_store, runs

from uap_dist.analysis.boundaries import SUBSPACE, analyze_boundaries, gather_normals
from uap_dist.analysis.options import AnalyzeOptions
from uap_dist.analysis.phase_transition import UNIVERSAL, phase_transition
from uap_dist.analysis.run import check_images, plan_sample_sizes, read_recipe
from uap_dist.analysis.sample_size import Recipe, compute_sample_sizes, configs_by_size
from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import measure, paper_norm_l2
from uap_dist.perturbations.files import Perturbation, load_perturbations, save_perturbation
from uap_dist.perturbations.reading import PERTURBATION_FILE
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers

JOB = Path(__file__).parents[1] / "jobs/analyze.py"
SMALL = ("--num-singular", "5", "--num-draws", "2", "--scales", "0.5", "2", "--numbers", "12", "47", "--num-seeds", "2")
TABLES = ("phase-transition", "singular-values", "subspace", "number-of-images")
PICTURES = ("1-phase-transition", "2-singular-values", "3-number-of-images")


@pytest.fixture(scope="module")
def computed(shards, tmp_path_factory):
    """Folder whose `v` is a perturbation as jobs/compute.py leaves it, and the report of its last round."""
    folder = tmp_path_factory.mktemp("analyze")
    config = ComputeConfig(round_size=10, block_size=5, radius=20.0, max_evaluations=247)
    v, final = compute_here(TINY, None, *urls(shards), config)
    (folder / "v").mkdir()
    save_perturbation(folder / "v" / PERTURBATION_FILE, v.v, v.provenance)
    (folder / "mlflow.db").write_bytes(empty_store())
    return folder, final


def urls(shards):
    return [str(shards / f"train-{i:04d}.tar") for i in range(3)], [str(shards / "val-0000.tar")]


def analyze(folder, shards, *options, perturbation="v"):
    words = [str(JOB), "--model", TINY, "--perturbation", perturbation, *data(shards), *options]
    return run_job(words, folder)


@pytest.fixture(scope="module")
def analyzed(computed, shards):
    folder, final = computed
    done = analyze(folder, shards, *SMALL, "--num-workers", "2", "--output", "a")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return folder, done.stdout, final


def read(folder, table):
    return pq.read_table(folder / f"tables/{table}.parquet").to_pylist()


def test_it_agrees_with_the_computation_to_the_example(analyzed):
    folder, _, final = analyzed
    val, train = final.evaluation.val, final.evaluation.train
    own = [row for row in read(folder / "a", "phase-transition") if row["kind"] == UNIVERSAL and row["scale"] == 1]
    assert [row["norm"] for row in own] == ["l2", "linf"]
    for row in own:
        assert row["fooling"] == val.rate and row["fooling_num_images"] == 20
        assert (row["norm_l2"], row["norm_linf"]) == tuple(measure(final.perturbation, norm) for norm in ("l2", "linf"))
        assert (row["fooling_low"], row["fooling_high"]) == val.interval
    # all images and the perturbation's own seed give it again
    (again,) = [r for r in read(folder / "a", "number-of-images") if (r["num_images"], r["seed"]) == (47, 0)]
    assert again["val"] == val.rate and again["train"] == train.rate
    assert again["num_evaluations"] == final.num_evaluations


def test_numbers_of_the_result_are_those_of_the_tables(analyzed):
    folder, *_ = analyzed
    result = json.loads((folder / "a/result.json").read_text())
    phase, subspace = read(folder / "a", "phase-transition"), read(folder / "a", "subspace")
    for norm in ("l2", "linf"):
        for kind, rate in result["phase_transition"][norm]["fooling_rates_at_own_norm"].items():
            rows = [r["fooling"] for r in phase if (r["norm"], r["kind"], r["scale"]) == (norm, kind, 1)]
            assert np.mean(rows) == pytest.approx(rate)
    assert {row["scale"] for row in phase} == {0.5, 1, 2}
    for kind, rate in result["boundaries"]["fooling_rates"].items():
        assert np.mean([row["fooling"] for row in subspace if row["kind"] == kind]) == pytest.approx(rate)
    assert sum(row["kind"] == SUBSPACE for row in subspace) == 2
    values = read(folder / "a", "singular-values")
    num_normals = result["boundaries"]["num_normals"]
    assert len(values) == num_normals == 47 - result["boundaries"]["num_left_out"]
    energy = np.cumsum([row["normals"] ** 2 for row in values])
    assert energy[-1] == pytest.approx(num_normals, rel=1e-6)
    assert result["boundaries"]["dimension_90"] == int((energy < 0.9 * num_normals).sum()) + 1
    for each in result["number_of_images"]:
        rows = [r["val"] for r in read(folder / "a", "number-of-images") if r["num_images"] == each["num_images"]]
        assert len(rows) == 2 and np.mean(rows) == pytest.approx(each["val_fooling_rate"])
    for table in TABLES:
        with (folder / f"a/tables/{table}.csv").open() as file:
            assert len(list(csv.reader(file))) == 1 + len(read(folder / "a", table))


def test_the_report_stands_alone(analyzed):
    folder, *_ = analyzed
    html = (folder / "a/report.html").read_text()
    assert html.count('src="data:image/png;base64,') == len(PICTURES)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|https?://|@import|url\(""", html)
    assert html.count("<table>") == 5 and "<h2>Where this comes from</h2>" in html
    markdown = (folder / "a/report.md").read_text()
    for picture in re.findall(r"\]\((pictures/.*?)\)", markdown):
        assert (folder / "a" / picture).stat().st_size > 10_000
    result = json.loads((folder / "a/result.json").read_text())
    assert f"{result['boundaries']['num_normals']} unit normals" in markdown
    for digest in ("weights_digest", "train_digest", "val_digest", "perturbation_sha256"):
        assert f"| {digest} | {result['provenance'][digest]} |" in markdown
    assert "another network" not in markdown and "nan" not in markdown


def test_the_mlflow_run_holds_all_of_it(analyzed):
    folder, out, final = analyzed
    client, found = runs(folder)
    (run,) = [run for run in found if run.info.run_name == "analysis"]
    result = json.loads((folder / "a/result.json").read_text())
    assert run.info.status == "FINISHED" and run.info.run_id == result["mlflow_run_id"] and run.info.run_id in out
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert names == {"pictures", "tables", "report.md", "report.html", "result.json"}
    metrics = run.data.metrics
    assert metrics["boundaries/dimension_90"] == result["boundaries"]["dimension_90"]
    assert metrics["phase/l2/at_own_norm/universal_perturbation"] == final.evaluation.val.rate
    assert "images/12" in metrics and "Number of images" in run.data.tags["mlflow.note.content"]
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"training-47", "held-out-20"}


def test_one_worker_in_this_process_finds_the_same(analyzed, shards):
    """The job's tables to the bit: neither the number of workers nor Ray decides anything."""
    folder, *_ = analyzed
    workers = LocalWorkers(tiny_worker())
    train, val = (load_dataset(workers, some) for some in urls(shards))
    (v,) = load_perturbations([str(folder / "v")])
    memory, draws = 2 << 30, {"num_draws": 2, "seed": 0}
    normals = gather_normals(workers, train, 5, memory)
    length = paper_norm_l2(v.v.shape)
    found = analyze_boundaries(workers, val, v.v, normals, norm_l2=length, memory_bytes=memory, **draws)
    values = read(folder / "a", "singular-values")
    assert [row["normals"] for row in values] == list(found.spectrum.values)
    assert [row["random"] for row in values] == list(found.random.values)
    phase = list(phase_transition(workers, train, val, v.v, normals.total, scales=[0.5, 1.0, 2.0], **draws))
    for table, points in (("subspace", found.points), ("phase-transition", phase)):
        rows = [
            (r["kind"], r["draw"], r["norm"], r["scale"], r["norm_l2"], r["fooling"]) for r in read(folder / "a", table)
        ]
        assert rows == [(p.kind, p.draw, p.norm, p.scale, p.norm_l2, p.fooling.rate) for p in points]
    plan = configs_by_size(train, Recipe.of(v), (12, 47), 2)
    numbers = sorted((p.num_images, p.seed, p.val.rate) for p in compute_sample_sizes(workers, train, val, plan))
    assert [(r["num_images"], r["seed"], r["val"]) for r in read(folder / "a", "number-of-images")] == numbers


def options_from(**changed):
    data = {"train_shards": ("t",), "val_shards": ("h",)}
    data |= {name: changed.pop(name) for name in ("num_val_images", "max_bad_fraction") if name in changed}
    return AnalyzeOptions(**{"model": "m", "perturbation": "v"} | changed, data=DataOptions(**data))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scales": (1.0, 0.0)}, "a scale is 0.0; scales must be positive"),
        ({"scales": (float("nan"),)}, "a scale is nan; scales must be positive"),
        ({"num_draws": 0}, "--num-draws is 0; it must be positive"),
        ({"norm_l2": float("inf")}, "--norm-l2 is inf; it must be positive"),
        ({"memory_gib": -1.0}, "--memory-gib is -1.0; it must be positive"),
        ({"seed": -1}, "seed is -1; it must not be negative"),
        ({"analyses": ()}, "no analyses given"),
        ({"num_val_images": 0}, "--num-val-images is 0; it must be positive"),
        ({"max_bad_fraction": -0.1}, "--max-bad-fraction is -0.1; it must lie in [0, 1]"),
    ],
)
def test_options_that_cannot_be_are_named(changed, message):
    options_from()
    with pytest.raises(ConfigError, match=re.escape(message)):
        options_from(**changed)


@pytest.mark.parametrize(
    ("changed", "size", "message"),
    [
        ({"num_singular": 48}, 16, "48 singular vectors (--num-singular) asked for, but there are 47 normals"),
        ({"num_normals": 50}, 16, "50 normals (--num-normals) asked for, but there are 47 training images"),
        (
            {"numbers": (100,)},
            16,
            "a perturbation of 100 training images (--numbers) cannot be compared: its rounds would have another size",
        ),
        ({}, 8, "v has shape 3×8×8, but images of m have 3×16×16; give a perturbation of that size"),
    ],
)
def test_what_the_data_do_not_allow_is_refused(tiny_data, changed, size, message):
    options = options_from(**{"num_singular": 5} | changed)
    v, recipe = Perturbation("v", torch.ones(3, size, size)), Recipe(ComputeConfig(), num_evaluations=100)
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_sample_sizes(options, v, recipe, tiny_data[0])


@pytest.mark.parametrize(
    ("changed", "shape", "num_train", "message"),
    [
        ({}, (3, 8, 8), None, "v has shape 3×16×16, but images of m have 3×8×8; give a perturbation of that size"),
        ({"num_normals": 50}, None, 40, "50 normals (--num-normals) asked for, but there are 40 training images"),
        ({"num_singular": 48, "num_normals": 47}, None, None, "48 singular vectors (--num-singular) asked for, but"),
        ({"num_singular": 48}, None, 47, "48 singular vectors (--num-singular) asked for, but there are 47 normals"),
    ],
)
def test_what_options_and_network_do_not_allow_is_refused_before_the_data(changed, shape, num_train, message):
    options, v = options_from(**{"num_singular": 5} | changed), Perturbation("v", torch.ones(3, 16, 16))
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_images(options, v, shape, num_train)


def test_verifying_others_that_one_worker_would_compute_alone_is_refused():
    said = {"num_evaluations": 300, "num_train_images": 47}
    alone, batched = (
        Perturbation("v", torch.ones(3, 16, 16), asdict(ComputeConfig(members_at_once=number)) | said)
        for number in (1, 4)
    )
    verified = {"fleet": FleetConfig(num_workers=2, verify_determinism=True)}
    assert read_recipe(options_from(**verified), alone) == Recipe(ComputeConfig(), 253)
    assert read_recipe(options_from(), batched) == Recipe(ComputeConfig(members_at_once=4), 253)
    with pytest.raises(ConfigError, match="^--verify-determinism .* only the analysis `images` computes; leave it out"):
        options_from(**verified, analyses=("phase",))
    with pytest.raises(
        ConfigError, match="^--verify-determinism .* v was computed with --members-at-once 4, .*; leave it out"
    ):
        read_recipe(options_from(**verified), batched)


def test_an_analysis_that_cannot_be_is_one_line(shards, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    np.save(tmp_path / "small.npy", np.ones((3, 8, 8)))
    done = analyze(tmp_path, shards, "--output", "out", perturbation="small.npy:255")
    message = "error: small does not say how it was computed, so others cannot be computed likewise"
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    _, (run,) = runs(tmp_path)
    assert run.info.status == "FAILED" and run.data.tags["reason"] in done.stderr
