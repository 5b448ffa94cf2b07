"""A job that is interrupted, at any moment, or whose disk is full, ends in one line, never with a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import can_hide_folders

from uap_dist.errors import ConfigError, OutputError
from uap_dist.tracking.outputs import output_folder, resumable, writes_files

ROOT = Path(__file__).parents[1]

SLOW_END = """
import atexit, time
atexit.register(lambda: (print("closing", flush=True), time.sleep(60)))  # as Ray does
from uap_dist.tracking.console import one_line_errors
from uap_dist.tracking.process import raise_on_sigterm
with one_line_errors(debug=False):
    raise_on_sigterm()
    print("ready", flush=True)
    time.sleep({seconds})
"""

TRANSACTION = """
import sqlite3, time
from uap_dist.tracking.console import one_line_errors
from uap_dist.tracking.mlflow_server import tracking_errors
from uap_dist.tracking.process import raise_on_sigterm
with one_line_errors(debug=False):
    raise_on_sigterm()
    try:
        with tracking_errors("sqlite:///file.db"), tracking_errors("sqlite:///file.db"):
            connection = sqlite3.connect("file.db")
            connection.execute("create table runs (status)")
            connection.execute("begin immediate")
            print("ready", flush=True)
            time.sleep(1)
            connection.commit()
        print("not reached")
    finally:
        other = sqlite3.connect("file.db", timeout=0)
        other.execute("insert into runs values ('KILLED')")
        print("marked", flush=True)
"""

FULL_DISK = """
from pathlib import Path
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.errors import ConfigError
from uap_dist.tracking.outputs import output_folder
for ask in (lambda: output_folder(Path("full/out")), lambda: CheckpointStore("full/runs").prepare()):
    try:
        ask()
    except ConfigError as error:
        print(error)
"""


NO_UTF8 = """
from uap_dist.errors import ConfigError
from uap_dist.jobs.common import command_line, console
with command_line():
    console.print("\\u2113\\u221e norm")
    raise ConfigError("\\xb110")
"""


def start(*command, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], **pipes, **options)


@pytest.mark.parametrize("kinds", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_interrupt_ends_the_process_at_once(kinds):
    process = start("-c", SLOW_END.format(seconds=60))
    for line, kind in zip(("ready\n", "closing\n"), kinds, strict=True):
        assert process.stdout.readline() == line, process.stderr.read()
        process.send_signal(kind)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == "stopping; interrupt again to stop at once\ninterrupted\n"


def test_an_interrupt_lets_a_call_of_mlflow_end_so_that_no_lock_is_left(tmp_path):
    process = start("-c", TRANSACTION, cwd=tmp_path)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "marked\n"), err
    assert err == "stopping; interrupt again to stop at once\ninterrupted\n"


def test_an_interrupt_after_all_is_done_is_quiet():
    process = start("-c", SLOW_END.format(seconds=0))
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "closing\n"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == ""


@pytest.mark.parametrize(
    "command",
    [
        (str(ROOT / "jobs/compute.py"),),
        (str(ROOT / "jobs/shard.py"),),
        ("-c", "import uap_dist_commands as c; c.shard()"),
    ],
)
def test_an_interrupt_while_a_job_imports_is_quiet(command, tmp_path):
    process = start(*command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""


def test_what_a_terminal_cannot_show_is_replaced():
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start("-c", NO_UTF8, env=os.environ | {"PYTHONPATH": str(ROOT)} | locale)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (1, "?? norm\n", "error: ?10\n")


@pytest.mark.skipif(not can_hide_folders(), reason="needs a mount of its own")
def test_a_full_disk_is_known_at_the_start(tmp_path):
    (tmp_path / "full").mkdir()
    fill = 'mount -t tmpfs -o size=64k none full && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", fill, "sh", sys.executable, "-c", FULL_DISK]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    output, storage = done.stdout.splitlines()
    assert output == f"cannot write to --output {tmp_path}/full/out: No space left on device", done.stderr
    assert storage.startswith("cannot write checkpoints to full/runs: ") and "No space left on device" in storage


def test_results_that_do_not_fit_on_the_disk_say_how_to_continue(tmp_path):
    @writes_files
    def save(folder):
        (folder / "result.json").write_text("x" * 100_000)

    (tmp_path / "result.json").symlink_to("/dev/full")
    advice = "everything computed is committed: mend that, then run .* --resume s3://bucket/run$"
    with (
        pytest.raises(OutputError, match=f"cannot write results to {tmp_path}: no space is left on its disk; {advice}"),
        resumable("s3://bucket/run"),
    ):
        save(tmp_path)


def test_a_folder_that_holds_a_plan_takes_the_run_that_was_planned(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    assert output_folder(tmp_path, besides=("plan.json",)) == tmp_path
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty; give another --output"):
        output_folder(tmp_path, besides=("plan.json",))
