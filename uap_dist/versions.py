"""Where a result comes from: versions, Git commit, machine."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

__version__ = "0.1.0"  # the only place: pyproject.toml reads it
DECISIVE_VERSIONS = ("python", "uap_dist", "torch", "torchvision", "pillow")  # the bits of a result may depend on them
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "ray", "mlflow", "webdataset", "pyarrow", "timm")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the installed libraries, by name."""
    found = {"python": platform.python_version(), "uap_dist": __version__}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Commit of the checkout that the package runs from, with "+changes" if files differ from it.

    It is "unknown" if there is no checkout, as for an installed wheel; `versions` then identifies the code.
    """
    try:
        _git("ls-files", "--error-unmatch", __file__)  # the checkout may be another project's
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+changes" if changes else "")


def _git(*words: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


def describe_code() -> dict[str, str]:
    """Commit and versions, under the names that MLflow parameters and provenance use."""
    return {"git_commit": git_commit(), **{f"version.{name}": value for name, value in versions().items()}}


def machine() -> str:
    """The kind of this machine, on which the bits of a result may depend: device and CPU instruction set."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, {torch.backends.cpu.get_cpu_capability()}"


def seconds_since_start() -> float:
    """Age of this process, imports included."""
    return time.time() - psutil.Process().create_time()
