"""Perturbations that attack some classes and spare others: the sum of their steps, their rates, the job."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from processes import run_job
from test_deepfool import classifier_of, linear
from test_job import JOB, data, empty_store, runs
from torch.testing import assert_close

from uap_dist.computing.options import ComputeOptions
from uap_dist.computing.plots import save_curve
from uap_dist.computing.provenance import describe_config
from uap_dist.errors import ConfigError, ResumeError
from uap_dist.evaluation.evaluate import baselines, measure_perturbations
from uap_dist.evaluation.report import save_evaluation, summary
from uap_dist.job_options import from_json, to_json
from uap_dist.method.config import ComputeConfig
from uap_dist.method.log_odds import log_odds_sum
from uap_dist.method.rates import ATTACKED, FOOLING, SPARED, TARGETED, UNTARGETED, Goal, goal_in_words
from uap_dist.perturbations.files import load_perturbations
from uap_dist.rounds.loop import compute
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint import JobRecord, check_identity
from uap_dist.workers.dataset import classify

CONFIG = ComputeConfig(round_size=10, block_size=5, radius=20.0, max_passes=6, only_classes=(0,))
CLASSES = st.sets(st.integers(0, 4), max_size=3).map(lambda found: tuple(sorted(found)))
LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@pytest.mark.parametrize("target", [None, 2])
def test_the_sum_is_that_of_the_attacked_less_the_weighted_one_of_the_spared(target):
    _, pixels, function = linear(3, 4)
    zero, labels = torch.zeros_like(pixels[0]), torch.tensor([0, 3, 1, 0, 2])
    goal = Goal(target, only=(0, 2), spare=(3,), spare_weight=0.25)  # class 1 is left out

    def total(rows, own=UNTARGETED):
        found = log_odds_sum(classifier_of(function), pixels[rows], zero, labels[rows], weigh=torch.square, goal=own)
        return found.total

    attacked = total([0, 3, 4]) if target is None else total([0, 3, 4], Goal(target))
    found = log_odds_sum(classifier_of(function), pixels, zero, labels, weigh=torch.square, goal=goal)
    assert_close(found.total, attacked - 0.25 * total([1]))
    assert found.log_odds.isnan().tolist() == [False, False, True, False, target == 2]


@given(LABELS, CLASSES, CLASSES, st.none() | st.integers(0, 4))
def test_every_image_is_attacked_spared_or_neither(pairs, only, spare, target):
    clean, perturbed = np.array(pairs).T
    goal = Goal(target, only, tuple(label for label in spare if label not in only))
    attacked, spared, pushed = goal.attacks(clean), goal.spares(clean), goal.pushes(clean)
    assert not (attacked & spared).any() and not (pushed & ~attacked).any()
    assert not goal.has_classes or bool(goal.only and goal.spare) or (attacked | spared).all()
    for label, is_attacked, is_spared in zip(clean, attacked, spared, strict=True):
        if goal.has_classes:
            assert is_attacked == (label in goal.only if goal.only else label not in goal.spare)
            assert is_spared == (label in goal.spare if goal.spare else label not in goal.only)
    rates = goal.rates(clean, perturbed)
    for kind, mask in ((ATTACKED, attacked), (SPARED, spared)):
        if goal.has_classes and mask.any():
            assert (rates[kind].num_hits, rates[kind].num_examples) == ((clean != perturbed)[mask].sum(), mask.sum())
        else:
            assert kind not in rates
    assert rates[FOOLING].num_examples == len(clean) and tuple(goal.hits(clean, perturbed)) == goal.kinds
    of_tensors = goal.hits(torch.tensor(clean), torch.tensor(perturbed))
    for kind, masks in goal.hits(clean, perturbed).items():
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(masks, of_tensors[kind], strict=True))
    aims, factors = replace(goal, spare_weight=goal.balanced(clean)).aims(torch.tensor(clean))
    assert np.array_equal(factors.numpy() != 0, pushed | spared & pushed.any())
    if spared.any():  # both kinds of images count alike
        assert factors[torch.tensor(spared)].sum().item() == pytest.approx(pushed.sum(), rel=1e-5)
    assert aims[torch.tensor(spared)].tolist() == clean[spared].tolist()


def test_attacked_classes_are_fooled_and_spared_ones_much_less(local_workers, tiny_data):
    train, val = tiny_data
    (*_, plain), (*_, found), (*_, other) = (
        list(compute(local_workers, train, val, config))
        for config in (
            replace(CONFIG, only_classes=()),
            CONFIG,
            replace(CONFIG, only_classes=(), spare_classes=(0,)),
        )
    )
    goal = CONFIG.goal
    rates, plainly = (
        found.evaluation.train_rates,
        goal.rates(train.clean.labels, plain_labels(local_workers, train, plain)),
    )
    assert list(rates) == [ATTACKED, SPARED, FOOLING]
    assert rates[ATTACKED].rate > rates[SPARED].rate + 0.5 and rates[SPARED].rate < plainly[SPARED].rate
    spared = other.evaluation.train_rates
    assert spared[ATTACKED].rate > spared[SPARED].rate + 0.5
    assert spared[SPARED].num_examples == rates[ATTACKED].num_examples


def plain_labels(workers, images, report):
    return classify(workers, images, report.perturbation.numpy()).labels


def test_the_weight_follows_from_the_training_images_unless_it_is_given(local_workers, tiny_data):
    train, val = tiny_data
    share = int((train.clean.labels == 0).sum()) / int((train.clean.labels != 0).sum())
    assert CONFIG.balanced(train.clean.labels).spare_weight == share
    given = replace(CONFIG, spare_weight=share)
    assert (
        given.balanced(train.clean.labels) is given and ComputeConfig().balanced(train.clean.labels) == ComputeConfig()
    )
    (*_, default), (*_, same), (*_, alone) = (
        list(compute(local_workers, train, val, config))
        for config in (CONFIG, given, replace(CONFIG, spare_weight=0.0))
    )
    assert torch.equal(default.perturbation, same.perturbation)
    # without the spared images it is a run with these classes alone, all the same rounds
    assert alone.evaluation.train_rates[SPARED].rate > default.evaluation.train_rates[SPARED].rate


def test_a_target_for_some_classes(local_workers, tiny_data):
    train, val = tiny_data
    config = replace(CONFIG, only_classes=(1, 2), target=0)
    *_, report = compute(local_workers, train, val, config)
    assert list(report.evaluation.val_rates)[0] == TARGETED
    expected = np.isin(train.clean.labels, (1, 2)).sum()
    assert report.evaluation.train_rates[TARGETED].num_examples == expected


def test_classes_are_found_by_number_and_name():
    names = ("red", "green", "blue", "grey")
    config = ComputeConfig(only_classes=("Blue", 0, 2), spare_classes=("grey",)).with_labels(names, 4)
    assert config.goal == Goal(None, (2, 0), (3,))
    assert replace(config, only_classes=("blue, 0",)).with_labels(names, 4) == config
    named = ComputeConfig(spare_classes=("cat, wild",)).with_labels(("dog", "cat, wild"), 2)  # as timm's names are
    assert named.spare_classes == (1,)
    assert goal_in_words(config.goal, names) == ["attacked: blue (2), red (0)", "spared: grey (3)"]
    assert goal_in_words(Goal(1, spare=(3,)), ()) == ["target 1", "attacked: all others", "spared: 3"]
    assert ComputeConfig.from_provenance(describe_config(config), "v") == replace(config, radius=10.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only_classes": ("rd",)}, "--only-classes is 'rd', which is no class of the network; nearest names: red"),
        ({"spare_classes": (4,)}, "--spare-classes is 4; the network has the labels 0 to 3"),
        ({"only_classes": ("red,gray",)}, r"--only-classes is 'gray', which is no class .* nearest names: grey \(3\)"),
        ({"only_classes": (0, 1), "spare_classes": (1,)}, r"label 1 is to be attacked .* and spared"),
        ({"spare_classes": (0, 1, 2, 3)}, "--spare-classes has all 4 classes; leave some to attack"),
        ({"only_classes": (0, 1, 2, 3)}, "--only-classes has all 4 classes; leave it out"),
        ({"only_classes": (1,), "target": 1}, "only images of class 1 are to be attacked, and that is the target"),
    ],
)
def test_a_class_list_that_leaves_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ComputeConfig(**options).with_labels(("red", "green", "blue", "grey"), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only_classes": (1,), "rule": "paper"}, "the paper's rule knows no classes to attack or spare"),
        ({"spare_weight": 1.0}, "--spare-weight belongs to --only-classes and --spare-classes"),
        (
            {"only_classes": (1,), "spare_weight": -1.0},
            "--spare-weight is -1.0; it must be finite and not negative",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ComputeConfig(**options)


def test_images_of_which_none_is_attacked_are_refused(local_workers, tiny_data):
    train, val = tiny_data
    others = train.take(np.flatnonzero(train.clean.labels != 0))
    with pytest.raises(
        ConfigError, match=f"all {others.num_examples} training images labels that are not attacked; none"
    ):
        next(compute(local_workers, others, val, CONFIG))


def test_the_job_reports_the_rates_of_both_sets(shards, tmp_path, local_workers, tiny_data):
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    words = [str(JOB), "--model", TINY, *data(shards), "--num-workers", "1", "--round-size", "10", "--block-size", "5"]
    words += ["--radius", "20", "--max-passes", "4", "--output", "out"]
    done = run_job([*words, "--only-classes", "red", "3"], tmp_path)
    assert done.returncode == 0, done.stderr
    train, val = tiny_data
    result = json.loads((tmp_path / "out/result.json").read_text())
    table = pq.read_table(tmp_path / "out/tables/held-out-examples.parquet").to_pydict()
    attacked, fooled = np.array(table["is_attacked"]), np.array(table["is_fooled"])
    assert (attacked == np.isin(table["clean_label"], (0, 3))).all() and (attacked != table["is_spared"]).all()
    assert result["val_attacked_fooling_rate"] == fooled[attacked].mean()
    assert result["val_spared_fooling_rate"] == fooled[~attacked].mean()
    assert result["goal"] == ["attacked: red (0), grey (3)", "spared: all others"]
    _, (run,) = runs(tmp_path)
    assert run.data.metrics["attacked_fooling_rate/val"] == result["val_attacked_fooling_rate"]
    assert run.data.metrics["random/spared_fooling_rate"] == result["val_spared_fooling_rate_random"]
    assert run.data.params["only_classes"] == "[0, 3]"
    share = np.isin(train.clean.labels, (0, 3)).mean()
    assert float(run.data.params["steps.spare_weight"]) == pytest.approx(share / (1 - share))
    note = run.data.tags["mlflow.note.content"]
    assert "**attacked: red (0), grey (3)**" in note and "Fooling rate of spared classes on held-out images: **" in note
    assert f"of 47 training images {round(47 * share)} are of attacked classes" in done.stdout
    # an evaluation knows the classes, too
    (one,) = load_perturbations(str(tmp_path / "out"))
    everything = [one, *baselines([one], val.shape, 0)]
    found = list(measure_perturbations(local_workers, "tiny", "val", val, everything, class_names=("r", "g", "b", "w")))
    assert found[0].rates[SPARED].rate == result["val_spared_fooling_rate"]
    assert {m.goal for m in found} == {"attacked: r (0), w (3); spared: all others", ""}
    save_evaluation(tmp_path / "evaluation", found)
    rows = pq.read_table(tmp_path / "evaluation/tables/evaluation.parquet").to_pylist()
    assert rows[0]["attacked_fooling_rate"] == result["val_attacked_fooling_rate"]
    assert "Fooling rate of spared classes: images of the classes that it was to leave alone" in summary(found)


def test_options_come_back_from_a_checkpoint_as_they_were():
    for config in (ComputeConfig(target=1, only_classes=(0, "cat"), spare_weight=0.5), ComputeConfig(target="cat")):
        options = ComputeOptions(compute=config)
        assert from_json(ComputeOptions, json.loads(json.dumps(to_json(options)))) == options


def test_curves_are_drawn_where_no_training_image_is_spared(local_workers, tiny_data, tmp_path):
    train, val = tiny_data
    attacked = train.take(np.flatnonzero(train.clean.labels == 0))
    history = []
    for report in compute(local_workers, attacked, val, replace(CONFIG, max_passes=1)):
        history.append(RoundRecord.of(report, {}, history))
    rates = report.evaluation.val_rates
    assert SPARED in rates and SPARED not in report.evaluation.train_rates
    save_curve(tmp_path / "curve.png", history, {kind: {"same ℓ2 norm": rate} for kind, rate in rates.items()})
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_run_is_not_resumed_with_other_classes():
    configs = (ComputeConfig(only_classes=(1,)), ComputeConfig(only_classes=(1, 2)))
    saved, now = (JobRecord("run", {}, json.loads(json.dumps(describe_config(config))), {}) for config in configs)
    check_identity(saved, JobRecord("run", {}, describe_config(configs[0]), {}))
    with pytest.raises(ResumeError, match=r"its result would differ: only_classes was \[1\], is \[1, 2\]"):
        check_identity(saved, now)
