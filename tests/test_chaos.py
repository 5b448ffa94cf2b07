"""Rows of benchmarks/chaos.py with short jobs: faults really done to jobs on a cluster, one of each kind."""

import json
import sys
from pathlib import Path

import pytest
from conftest import SHARED

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import chaos
from faults.lab import SMALL, open_lab
from faults.runs import Trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
NEITHER_SHORT_NOR_SMALL = {"real-networks", "worker-counts", "worker-fills-memory", "node-added"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with open_lab(tmp_path_factory.mktemp("chaos"), SHARED, SMALL) as lab:
        yield lab


def test_nothing_listens_beyond_loopback(lab):
    found = {ip.removeprefix("::ffff:") for ip in lab.cluster.listens_at()}
    assert found and found <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("name", sorted(set(chaos.ROWS) - NEITHER_SHORT_NOR_SMALL))
def test_a_fault_changes_no_bit_and_loses_no_metric(lab, name):
    lines = lab.do(name, chaos.ROWS[name])
    assert lines and all(line.is_good for line in lines), lines


def test_rows_that_fail_are_told_from_good_ones_and_the_others_go_on(lab, tmp_path, monkeypatch):
    def raises(lab):
        trial = Trial(lab, "raises")
        trial.start()
        trial.finish("FAILED")
        yield trial.line("none", 0)

    def differs(lab):
        trial = Trial(lab, "differs", "--seed", "5")
        trial.start()
        trial.finish()
        yield trial.line("another seed", 1)

    monkeypatch.setattr(chaos, "ROWS", {row.__name__: row for row in (raises, differs)})
    output = tmp_path / "chaos.jsonl"
    assert not chaos.do(lab, "raises", output) and output.read_text() == ""
    assert not chaos.do(lab, "differs", output)
    (line,) = map(json.loads, output.read_text().splitlines())
    assert line["row"] == "differs" and line["metrics_complete"] and not line["same_bits"]
    assert not lab.cluster.workers() and len(lab.cluster.raylets()) == 2
