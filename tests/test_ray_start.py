"""How a job starts a Ray or joins a cluster: who may connect, where its files are, which addresses are refused."""

import json
import os
import socket
import stat
import subprocess
import sys
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from subprocess import PIPE
from threading import Thread

import pytest
from processes import environment

from uap_dist.errors import ConfigError
from uap_dist.fleet import ray_cluster

OWN = """
import json, sys, tempfile
from uap_dist.fleet.ray_cluster import connect
connect()
import psutil, ray

@ray.remote
def temporary():
    return tempfile.gettempdir()

mine = psutil.Process().children(recursive=True)
said = {
    "session": ray._private.worker.global_worker.node.get_session_dir_path(),
    "temporary": ray.get(temporary.remote()),
    "address": ray.get_runtime_context().gcs_address,
    "listening": [c.laddr.ip for p in mine for c in p.net_connections("inet") if c.status == "LISTEN"],
    "commands": [word for p in mine for word in p.cmdline()],
}
print(json.dumps(said), flush=True)
sys.stdin.read()
"""
JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('joined')"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """What a process reports that has started a Ray, with a TMPDIR as long as those of schedulers; its folder; the process."""
    folder = tmp_path_factory.mktemp("own")
    long = folder / "local_scratch/partition_gpu/job_1234567/node_0042/user"
    (folder / "home").mkdir()
    long.mkdir(parents=True)
    env = environment(TMPDIR=str(long), HOME=str(folder / "home"))
    with subprocess.Popen(
        [sys.executable, "-c", OWN], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        said = json.loads(process.stdout.readline())
        yield said, folder, process
        process.stdin.close()


def test_a_local_ray_has_its_sockets_in_a_private_folder_of_tmp_and_images_in_tmpdir(own):
    said, folder, _ = own
    assert said["temporary"] == str(folder / "local_scratch/partition_gpu/job_1234567/node_0042/user")
    place = Path(said["session"]).parents[1]
    assert place.parent == Path("/tmp") and stat.S_IMODE(place.stat().st_mode) == 0o700


def test_a_local_ray_listens_on_loopback_and_writes_no_token_to_files(own):
    said, folder, _ = own
    assert said["listening"] and {ip.removeprefix("::ffff:") for ip in said["listening"]} <= {"127.0.0.1", "::1"}
    assert not any((folder / "home").iterdir())


def test_a_local_ray_refuses_callers_without_its_token(own):
    said, folder, _ = own
    env = environment(HOME=str(folder / "home"), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, said["address"]], env=env | token, stdout=PIPE, stderr=PIPE, text=True
        )
        for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "cd" * 32})
    ]  # at once: each tries for 20 s
    for caller in callers:
        out, err = caller.communicate(timeout=100)
        assert caller.returncode == 1 and "joined" not in out
        assert "InvalidAuthToken" in err or "Unauthenticated" in err


def test_the_folder_of_a_local_ray_is_deleted_when_the_process_ends(own):
    said, _, process = own  # the last test that uses the process
    process.stdin.close()
    process.wait(60)
    assert not Path(said["session"]).parents[1].exists()


def test_each_process_has_a_token_of_its_own():
    code = "import uap_dist.fleet.ray_cluster, os; print(os.environ['RAY_AUTH_MODE'], os.environ['RAY_AUTH_TOKEN'])"
    found = {
        subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(found) == 2 and all(text.startswith("token ") and len(text.split()[1]) == 64 for text in found)


def test_ray_tmpdir_is_used_or_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/short")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert ray_cluster._place_for_sockets() == Path("/tmp/short")
    long = "/tmp/" + "x" * 60
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(
        ConfigError,
        match=rf"^RAY_TMPDIR is {long}, 65 bytes long: .*107 bytes; set RAY_TMPDIR to a path of at most \d+ bytes",
    ):
        ray_cluster._place_for_sockets()


@pytest.fixture
def web():
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "http://127.0.0.1:8265",
            "an address to submit jobs to: unset it and use `ray job submit --address http://127.0.0.1:8265",
        ),
        ("HTTPS://user:secret@head:8265", "is HTTPS://…@head:8265, an address to submit jobs to"),
        ("ray://head:10001", r"Ray Client, ray://, is not supported"),
        ("head", "it must be HOST:PORT"),
        (":6379", "it must be HOST:PORT"),
        ("head:", "it must be HOST:PORT"),
        ("head:99999", "it must be HOST:PORT"),
        ("a b:1", "it must be HOST:PORT"),
        ("user:secret@head:6379", "is '…@head:6379'; it must be HOST:PORT"),
        ("nohost.invalid:6379", "no Ray cluster answers at nohost.invalid:6379"),
        ("[::1]:1", r"no Ray cluster answers at \[::1\]:1"),
    ],
)
def test_an_invalid_address_is_one_line_that_says_what_to_do(monkeypatch, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=message) as caught:
        ray_cluster.connect()
    said = str(caught.value)
    assert "\n" not in said and "RAY_ADDRESS" in said and "unset" in said and "secret" not in said


def test_a_server_that_is_no_ray_cluster_is_refused_at_once(monkeypatch, web):
    monkeypatch.setenv("RAY_ADDRESS", web)
    with pytest.raises(
        ConfigError,
        match=f"the server at {web} .RAY_ADDRESS. is not a Ray cluster; the port of a cluster's head is 6379",
    ):
        ray_cluster.connect()
    monkeypatch.setattr(ray_cluster, "ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConfigError, match="no Ray cluster answers at .*timed out"):
            ray_cluster.connect()


def test_an_empty_address_counts_as_unset(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", " ")
    assert not ray_cluster.can_grow() and os.environ["RAY_ADDRESS"] == " "
