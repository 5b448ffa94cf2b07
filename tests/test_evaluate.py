import csv
import re
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, tiny_worker
from markdown_it import MarkdownIt
from processes import run_job
from test_job import empty_store

from uap_dist.evaluation.evaluate import Measurement, baselines, measure_perturbations
from uap_dist.evaluation.report import markdown as as_table
from uap_dist.evaluation.report import summary
from uap_dist.method.norms import measure, random_perturbation
from uap_dist.method.rates import FOOLING, Rate
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import write_weights
from uap_dist.perturbations.files import Perturbation
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

SHAPE = (3, 16, 16)

JOB = Path(__file__).parents[1] / "jobs/evaluate.py"


def test_rates_are_what_a_loop_over_the_images_gives(local_workers, tiny_data):
    _, val = tiny_data
    v = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)) * 30
    network = tiny_worker().classifier
    pixels = torch.tensor(next(local_workers.map(Worker.pixels, [val.examples(0, range(20))])).astype(np.float32))
    for quantize in (False, True):
        found = list(
            measure_perturbations(
                local_workers, "tiny", "val", val, [Perturbation("v", v)], scales=(0.5, 1.0), quantize=quantize
            )
        )
        for m, scale in zip(found, (0.5, 1.0), strict=True):
            shown = (pixels + scale * v).clamp(0, 255)
            labels = network(shown.round() if quantize else shown).argmax(1).numpy()
            assert m.fooling.rate == (labels != val.clean.labels).mean()
            assert m.top1.rate == (labels == val.truths).mean()
            assert m.top1_clean.rate == (val.clean.labels == val.truths).mean()
            assert m.norm_l2 == pytest.approx(scale * measure(v, "l2")) and m.scale == scale


def test_baselines_are_as_large_as_the_perturbations_in_both_norms(local_workers, tiny_data):
    corner = Perturbation("corner", random_perturbation(SHAPE, norm="linf", radius=10.0, seed=5))
    twin = Perturbation("twin", 1.005 * random_perturbation(SHAPE, norm="linf", radius=10.0, seed=6))
    sparse = Perturbation("sparse", torch.zeros(SHAPE).index_fill(1, torch.arange(4), 8.0))
    zero, *noise = baselines([corner, twin, sparse], SHAPE, seed=0)
    assert not zero.v.any()
    assert [n.name for n in noise] == [
        "random, ℓ∞ norm of corner",  # signs, which are as long too; they serve for the twin
        "random, ℓ∞ norm of sparse",
        "random, ℓ2 norm of sparse",
    ]
    assert set(noise[0].v.flatten().tolist()) == {-10.0, 10.0} and set(noise[1].v.flatten().tolist()) == {-8.0, 8.0}
    assert measure(noise[2].v, "l2") == pytest.approx(measure(sparse.v, "l2"))
    # at another size it is as large as what is shown there
    _, small, _ = baselines([Perturbation("sparse", sparse.v)], (3, 8, 8), seed=0)
    assert measure(small.v, "linf") == measure(sparse.resized((3, 8, 8)), "linf")
    (nothing,) = measure_perturbations(local_workers, "tiny", "val", tiny_data[1], [zero])
    assert nothing.fooling.num_hits == 0 and nothing.is_baseline and nothing.top1 == nothing.top1_clean


def test_perturbations_share_noise_by_their_norms_at_the_size_of_the_images():
    small, large = torch.zeros(3, 8, 8), torch.zeros(SHAPE)
    small[:, 2:4], large[:, 4:8] = 8.0, 4.0  # of one ℓ2 norm until they are resized
    found = baselines([Perturbation("large", large), Perturbation("small", small)], SHAPE, seed=0)
    assert "random, ℓ2 norm of small" in [each.name for each in found]


def test_names_in_a_summary_are_text():
    names = {False: "<b>v|*w*", True: "random, ℓ2 norm of <b>v|*w*"}
    found = [
        Measurement("[c](d)", "a_b", name, is_baseline, 1.0, 1.0, 1.0, {FOOLING: Rate(1 + is_baseline, 10)}, None, None)
        for is_baseline, name in names.items()
    ]
    parser = MarkdownIt("commonmark").enable("table")
    tokens = [child for token in parser.parse(summary(found)) for child in token.children or ()]
    assert not {"html_inline", "link_open", "em_open"} & {token.type for token in tokens}
    texts = [token.content for token in tokens if token.type == "text"]
    for name in ("[c](d)", "a_b", *names.values()):
        assert any(name in text for text in texts), texts
    assert "| \\[c\\](d) | a_b |" in as_table(found) and as_table(found).count("\n") == 3


def test_a_summary_says_the_factor_of_the_best():
    found = [
        Measurement("c", "d", name, is_baseline, scale, 1.0, 1.0, {FOOLING: Rate(int(4 * scale), 10)}, None, None)
        for name, is_baseline in (("v", False), ("noise", True))
        for scale in (0.5, 2.0)
    ]
    assert "* c: **v × 2** fools 0.800" in summary(found) and "; noise × 2: 0.800" in summary(found)


def test_a_worker_that_adopts_another_does_not_decode_again(shards):
    first = tiny_worker()
    load_dataset(LocalWorkers(first), [str(shards / "val-0000.tar")])
    second = Worker(load_classifier(TINY), cache_bytes=1 << 30, num_threads=1)
    second.adopt(first)
    load_dataset(LocalWorkers(second), [str(shards / "val-0000.tar")])
    assert second.traffic.shards_read == 1


def test_the_job_writes_table_matrix_and_run(shards, tmp_path):
    v = 40 * np.random.default_rng(0).choice([-1.0, 1.0], (8, 8, 3))
    np.save(tmp_path / "noise.npy", v)
    command = [
        str(JOB),
        "--models",
        TINY,
        TINY.replace(":Tiny", ":Resized"),
        f"after tuning={TINY}=tuned.safetensors",
        "--num-workers",
        "1",
    ]
    tuned = load_classifier(TINY).network
    tuned.head.bias.data += 9 * torch.eye(4)[0]
    write_weights(tmp_path / "tuned.safetensors", tuned, {})
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    options = ["--shards", f"val={shards}/val-*.tar", "--scales", "0.5", "1", "--output", "out"]
    done = run_job([*command, *options, "--perturbations", "noise.npy:255"], tmp_path)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "out/tables/evaluation.parquet").to_pylist()
    assert len(table) == 3 * 4 * 2  # the perturbation, nothing, and noise of either norm
    assert list(dict.fromkeys(row["classifier"] for row in table)) == ["Tiny", "Resized", "after tuning"]
    # those with the same geometry were measured one after another, so images were decoded twice, not three times
    order = list(dict.fromkeys(re.findall("^(.*), val, noise × 1:", done.stdout, re.MULTILINE)))
    assert abs(order.index("Tiny") - order.index("after tuning")) == 1
    assert {row["fooling_rate_num_images"] for row in table} == {20}
    assert all(row["fooling_rate_low"] <= row["fooling_rate"] <= row["fooling_rate_high"] for row in table)
    assert {row["fooling_rate"] for row in table if row["perturbation"] == "zero"} == {0.0}
    with (tmp_path / "out/tables/evaluation.csv").open() as file:
        assert len(list(csv.reader(file))) == 25
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    pictures = {a.path for a in client.list_artifacts(run.info.run_id, "pictures")}
    digests = {run.data.params[f"weights_digest.{name}"] for name in ("Tiny", "after tuning")}
    assert run.info.status == "FINISHED" and [len(digest) for digest in digests] == [64, 64]
    assert "| noise × 0.5 | " in run.data.tags["mlflow.note.content"]
    assert pictures == {"pictures/1-transfer-val.png", "pictures/2-fooling-rate-by-norm-val.png"}
    with (tmp_path / "out/tables/transfer-val.csv").open() as file:
        transfer = {row["perturbation"]: float(row["Tiny"]) for row in csv.DictReader(file)}
    full = {
        row["perturbation"]: row["fooling_rate"] for row in table if row["classifier"] == "Tiny" and row["scale"] == 1
    }
    assert transfer == full


def test_what_others_made_is_measured_under_names_of_ones_choice(shards, tmp_path):
    """One network with two weights and one with other classes; two pools with the same members; a zoo and a checkpoint."""
    states = [load_classifier(TINY).network.state_dict() for _ in range(2)]
    states[1]["head.bias"] += 9 * torch.eye(4)[0]
    torch.save({"model": states[0], "model_ema": states[1]}, tmp_path / "checkpoint.pth")
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\ndef build(classes):\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(768, classes))\n"
    )
    for folder, sign in (("one", 1), ("two", -1)):
        (tmp_path / folder).mkdir()
        for seed in range(2):
            v = sign * random_perturbation(SHAPE, norm="linf", radius=20.0, seed=seed)
            torch.save(v[None] / 255, tmp_path / folder / f"seed-{seed}.pth")
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    models = ["tiny=" + TINY + "=checkpoint.pth#model", TINY + "=checkpoint.pth#model_ema", "nets.py:build?classes=2"]
    words = [str(JOB), "--models", *models, "--shards", f"mine={shards}/val-*.tar", "--output", "out"]
    words += ["--pools", "one:1", "second=two:1", "--perturbations", "own=one/seed-0.pth:1", "--num-workers", "1"]
    done = run_job(words, tmp_path)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "out/tables/evaluation.parquet").to_pylist()
    names = {key: list(dict.fromkeys(row[key] for row in table)) for key in ("classifier", "perturbation", "dataset")}
    assert names["classifier"] == ["tiny", "Tiny", "build(classes=2)"] and names["dataset"] == ["mine"]
    assert names["perturbation"][:5] == ["own", "seed-0", "seed-1", "second, seed-0", "second, seed-1"]
    rates = {(row["classifier"], row["perturbation"]): row["fooling_rate"] for row in table}
    assert rates["tiny", "own"] == rates["tiny", "seed-0"]
    covered = pq.read_table(tmp_path / "out/tables/coverage.parquet").to_pylist()
    assert [(row["pool"], row["num_members"]) for row in covered if row["classifier"] == "tiny"] == [
        *(("one", 1), ("one", 2)),
        *(("second", 1), ("second", 2)),
    ]
    assert covered[0]["covered"] == max(rates["tiny", "seed-0"], rates["tiny", "seed-1"]) <= covered[1]["covered"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.metrics["coverage/one/tiny/mine"] == covered[1]["covered"]
    assert "at least one member of **second** fools" in run.data.tags["mlflow.note.content"]
    assert len(list((tmp_path / "out/pictures").glob("3-coverage-*.png"))) == 6
    said = re.sub(r"\s+", " ", done.stdout + done.stderr)
    assert re.search(
        r"build\(classes=2\) has 2 classes, but \d+ of 20 labelled images have labels outside them, such as 2", said
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no models given (--models)"),
        (
            ("--models", TINY, TINY, "--shards", "a.tar", "--perturbations", "v.npy:255"),
            f"--models has {TINY} twice with the same weights (published)",
        ),
        (
            ("--models", TINY, "--shards", "a.tar", "--perturbations", "v.npy:255", "--scales", "1", "0.5", "1"),
            "scale 1 is not finite, or given twice (--scales)",
        ),
        (
            ("--models", TINY, "--shards", "a.tar", "--perturbations", "v.npy:255", "--num-images", "0"),
            "--num-images is 0; it must be positive",
        ),
        (
            ("--models", TINY, "--shards", "a.tar", "--perturbations", "v.npy:255", "--verify-determinism"),
            "--verify-determinism compares increments, and an evaluation computes none; leave it out",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, options, message):
    np.save(tmp_path / "v.npy", np.ones((3, 8, 8)))
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    done = run_job([str(JOB), *options], tmp_path)
    assert done.returncode == 1 and done.stderr == f"error: {message}\n"
