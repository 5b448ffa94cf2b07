"""Jobs as separate processes, forked from a server that has imported everything already, which saves five seconds each."""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from runpy import run_path

import uap_dist

SETTINGS = ("MLFLOW_", "RAY_")  # prefixes of environment variables that no test may depend on
FIRST = "uap_dist.fleet.ray_cluster"  # imported first: it sets variables that Ray reads when it is imported
ROOT = Path(uap_dist.__file__).parent
MODULES = [
    ".".join(("uap_dist", *path.relative_to(ROOT).with_suffix("").parts)) for path in sorted(ROOT.rglob("[!_]*.py"))
]


def environment(**extra: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)} | extra


def committed(folder: Path) -> int:
    """Rounds that jobs in a folder have committed so far, at most."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoints/**/round-*")), default=0)


class JobProcess:
    """The process of a script, with the interface of subprocess.Popen."""

    def __init__(self, words: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self.stdout, self.stderr = (tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2))  # noqa: SIM115
        arguments = (list(words), str(folder), dict(env), self.stdout.name, self.stderr.name)
        self._process = _server().Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the job", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_job(
    words: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, timeout: float = 200
) -> subprocess.CompletedProcess:
    """Run a script with its options, as subprocess.run does."""
    process = JobProcess(words, folder, environment() if env is None else env)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([FIRST, *MODULES])
    before = dict(os.environ)
    for name in set(before) - set(environment()):
        del os.environ[name]
    try:
        forkserver.ensure_running()
    finally:
        os.environ.update(before)
    return context


def _run(words: list[str], folder: str, env: dict[str, str], *outputs: str) -> None:
    set_by_imports = {k: v for k, v in os.environ.items() if k.startswith(SETTINGS)}
    os.environ.clear()
    os.environ.update(set_by_imports | env)
    os.chdir(folder)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
    try:
        run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips these
