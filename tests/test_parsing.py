"""Command lines that cannot be parsed end in one line."""

import sys

import pytest

from uap_dist.analysis.options import AnalyzeOptions
from uap_dist.computing.options import ComputeOptions
from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions, ResumableRecordOptions
from uap_dist.jobs.parsing import parse

GIVEN = ("compute.py", "--model", "m", "--train-shards", "a.tar", "--val-shards", "b.tar")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--radius", "10px"), "--radius is '10px'; it must be a number"),
        (("--max-evaluations", "1e4"), "--max-evaluations is '1e4'; it must be a whole number"),
        (("--seed", "1.5"), "--seed is '1.5'; it must be a whole number"),
        (("--norm", "L2"), "--norm is 'L2'; it must be one of l2, linf"),
        (("--augment", "no"), "--augment is 'no'; it must be one of flip, flip-shift, none"),
        (("--trget", "3"), "unknown options or values: --trget, 3; perhaps --target is meant"),
        (("--debug=maybe",), "unknown options or values: maybe"),
        (("--resume",), "--resume has no value"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(monkeypatch, capsys, words, line):
    monkeypatch.setattr(sys, "argv", [*GIVEN, *words])
    with pytest.raises(SystemExit) as end:
        parse(ComputeOptions)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"error: {line} (--help lists all options)\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only-classes",), "--only-classes has no value; if one of the shell's variables is meant, it is empty"),
        (("--spare_classes", "--seed", "1"), "--spare-classes has no value"),
        (("--train_shards=c.tar",), "--train-shards is given twice; give it once, with all of its values"),
    ],
)
def test_lists_without_a_value_or_given_twice_are_refused(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", [*GIVEN, *words])
    with pytest.raises(ConfigError, match=message):
        parse(ComputeOptions)


def test_no_word_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compute.py"])
    assert parse(ComputeOptions).is_demo


def test_help_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compute.py", "--help"])
    with pytest.raises(SystemExit) as end:
        parse(ComputeOptions)
    said = capsys.readouterr()
    assert end.value.code == 0 and "--radius" in said.out and not said.err


@pytest.mark.parametrize("storage", ["https://host/x", "http://host/x", "ftp://host/x"])
def test_storage_that_cannot_be_written_to_is_refused_at_once(storage):
    with pytest.raises(ConfigError, match="--storage is a URL that cannot be written to; give a folder, s3://"):
        ResumableRecordOptions(storage=storage)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value):
    with pytest.raises(ConfigError, match="--gpus-per-worker is (nan|inf); it must be 0"):
        FleetConfig(gpus_per_worker=value)
    with pytest.raises(ConfigError, match="--commit-every-s is (nan|inf); it must not be negative, and must be finite"):
        ResumableRecordOptions(commit_every_s=value)


@pytest.mark.parametrize(
    ("numbers", "message"), [((0,), "has 0; it must be positive$"), ((5, 9), "has 9; .*at most 8")]
)
def test_numbers_of_images_that_cannot_be(numbers, message):
    data = DataOptions(train_shards=("a.tar",), val_shards=("b.tar",), num_train_images=8 if 9 in numbers else None)
    with pytest.raises(ConfigError, match=f"--numbers {message}"):
        AnalyzeOptions(model="m", perturbation="v", data=data, numbers=numbers)
