"""The wheel, as it is built from the checkout and as it runs where there is none."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

import uap_dist

ROOT = Path(__file__).parents[1]
JOBS = ("analyze", "compute", "evaluate", "finetune", "shard")


def run(*words, cwd, **environment):
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves its build folder beside the sources."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "uap_dist", source / "uap_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "uap_dist_commands.py"):
        shutil.copy(ROOT / name, source)
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        "dist",
        ".",
        cwd=source,
    )
    (path,) = (source / "dist").iterdir()
    return path


def test_the_wheel_holds_package_and_jobs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        about = f"uap_dist-{uap_dist.__version__}.dist-info"
        metadata = Parser().parsestr(file.read(f"{about}/METADATA").decode())
        assert file.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "uap_dist").rglob("*.py")}
    others = {"uap_dist/py.typed", "uap_dist/models/wordnet_ids.txt", "uap_dist_commands.py"}
    assert names == package | others
    assert metadata["Version"] == uap_dist.__version__
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert set(metadata.get_all("Provides-Extra")) == {"demo", "bench", "docs", "hub", "test", "timm"}


def test_its_commands_start_and_it_claims_no_commit_of_a_checkout_around_it(wheel, tmp_path):
    run("git", "init", "--quiet", cwd=tmp_path)
    run("git", "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--allow-empty", "-m", "m", cwd=tmp_path)
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", "site", wheel, cwd=tmp_path)
    code = (
        "from importlib.metadata import distribution; from uap_dist.versions import describe_code; import uap_dist;"
        "points = distribution('uap-dist').entry_points;"
        "print(uap_dist.__file__, *sorted(point.name for point in points if callable(point.load())));"
        "print(describe_code()['git_commit'], describe_code()['version.uap_dist'])"
    )
    commands, described = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert commands.split() == [str(tmp_path / "site/uap_dist/__init__.py"), *(f"uap-{job}" for job in JOBS)]
    assert described.split() == ["unknown", uap_dist.__version__]


@pytest.mark.parametrize("job", JOBS)
def test_each_job_runs_as_a_module_too(job):
    """Where a wheel is sent along with a submitted job, its commands are not on the path."""
    assert f"{job}.py [-h]" in run(sys.executable, "-m", f"uap_dist.jobs.{job}", "--help", cwd=ROOT)


def test_of_a_checkout_ray_uploads_the_code_and_networks_beside_it(tmp_path):
    for name in (
        "uap_dist/workers/worker.py",
        "jobs/compute.py",
        "network.py",
        "weights.safetensors",
        "imagenet/train-0000.tar",
        "tests/tiny.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    shutil.copy(ROOT / ".rayignore", tmp_path)
    package = tmp_path.with_suffix(".zip")
    create_package(str(tmp_path), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert set(zipfile.ZipFile(package).namelist()) == {"uap_dist/workers/worker.py", "jobs/compute.py", "network.py"}
