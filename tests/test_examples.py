"""The scripts of examples/, as a user starts them but on few images; and the demonstration without any options."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_job

from uap_dist import PerturbationPool, load_classifier

ROOT = Path(__file__).parents[1]
FEW = ("--num-images", "6")

pytestmark = pytest.mark.timeout(900)  # a quarter of a minute each, where nothing else runs


def run(script, folder, *words):
    done = run_job([str(ROOT / script), *words], folder, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_perturbation_is_computed_and_saved(tmp_path):
    out = run("examples/perturbation.py", tmp_path, *FEW, "--max-evaluations", "30", "--folder", "out")
    v = np.load(tmp_path / "out/perturbation.npy")
    assert v.shape == (3, 224, 224) and np.abs(v).max() == 10
    assert "of 6" in out.splitlines()[-1]


def test_a_network_is_trained_on_a_pool(tmp_path):
    out = run("examples/adversarial_training.py", tmp_path, *FEW, "--folder", "out")
    again = ("--library", "torchvision", "--pool", str(tmp_path / "out/pool"), "--folder", "again")
    assert all(
        text.startswith("epoch 0: loss ") and "on 6 images" in text
        for text in (out, run("examples/adversarial_training.py", tmp_path, *FEW, *again))
    )
    assert not (tmp_path / "again/pool").exists()
    pool = PerturbationPool.load(tmp_path / "out/pool")
    assert len(pool.members) == 2 and pool.nearest_pairs()[0][0] < 0.9
    before = load_classifier("efficientnet_lite0").network.state_dict()
    after = torch.load(tmp_path / "out/network.pth", weights_only=True)
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)


def test_a_published_perturbation_is_measured_beside_noise(tmp_path):
    lines = run("examples/published_perturbation.py", tmp_path, *FEW, "--folder", "out").splitlines()
    assert len(lines) == 3 and lines[0].startswith("stripes: fooled ") and all("of 6" in line for line in lines)
    assert all("ℓ∞ 10.0" in line for line in lines[:2])


@pytest.mark.slow
def test_the_demonstration_runs_without_options(tmp_path):
    out = run_job([str(ROOT / "jobs/compute.py")], tmp_path, timeout=800)
    assert out.returncode == 0, out.stderr
    (result,) = tmp_path.glob("outputs/*/result.json")
    found = json.loads(result.read_text())
    assert found["val_fooling_rate"] > found["val_fooling_rate_random"]
    assert "a demonstration, not a measurement" in out.stdout
