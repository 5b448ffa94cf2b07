import subprocess
import sys
from pathlib import Path

import uap_dist


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_needs_neither_ray_nor_mlflow():
    assert not {"ray", "mlflow", "moto"} & loaded_by("import uap_dist")


def test_the_core_imports_of_ours_only_what_lies_below_it():
    for module in (
        "norms",
        "deepfool",
        "update",
        "schedule",
        "fooling",
        "classifiers",
        "errors",
        "augment",
        "weights",
        "accelerate",
        "spectrum",
    ):
        source = (Path(uap_dist.__file__).parent / f"{module}.py").read_text()
        imported = [
            line.split()[1] for line in source.splitlines() if line.startswith(("from uap_dist", "import uap_dist"))
        ]
        below = {
            "errors",
            "norms",
            "weights",
            "classifiers",
            *(["locations", "foreign_text"] if module == "weights" else []),
        }
        below |= {"check", "own_code"} if module == "classifiers" else set()
        assert {name.removeprefix("uap_dist.") for name in imported} <= below, module


def test_public_names_are_what_the_package_lists():
    assert sorted(uap_dist.__all__) == uap_dist.__all__
    for name in uap_dist.__all__:
        assert getattr(uap_dist, name).__doc__, name
