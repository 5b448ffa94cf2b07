"""Ray clusters on loopback as `ray start` makes them: with an autoscaler, and of nodes that do not see the driver's files."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HEAD_ID = "f" * 51 + "00000"  # what Ray's provider of pretended nodes calls the head
HEAD_TYPE = "ray.head.default"  # and its type
STARTED = "Ray runtime started"
NO_COMMANDS = (
    *(f"{which}setup_commands" for which in ("", "head_", "worker_")),
    *("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


class RayCluster:
    """A head without room for workers, and its nodes.

    Attributes:
        env: for processes that join it.
        log: of its processes.
    """

    def __init__(self, folder: Path, *, node_types: dict | None = None, idle_s: float = 5) -> None:
        """Start the head; with node types an autoscaler starts such nodes on demand, and ends those that idle."""
        self.log = folder / "ray.log"
        port = _free_port()
        on_loopback = node_types is not None  # Ray has no nodes on 127.0.0.1 but those that its provider pretends
        base = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
        ray_env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(not on_loopback)),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._env = base | ray_env
        options = ["--head", "--port", str(port), "--num-cpus", "0", "--num-gpus", "0", "--include-dashboard", "false"]
        extra: dict[str, str] = {}
        if node_types is not None:
            config = folder / "autoscaler.json"
            config.write_text(json.dumps(_autoscaler(f"127.0.0.1:{port}", node_types, idle_s)))
            options += ["--autoscaling-config", str(config)]
            extra = {
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
            }
        self._processes = [self._start([], options, extra)]
        self._wait(lambda: STARTED in self.log.read_text())
        found = re.search(r"Local node IP.*?(\d+\.\d+\.\d+\.\d+)", self.log.read_text())
        self._address = f"{found[1]}:{port}"
        self.env = self._env | {"RAY_ADDRESS": self._address}

    def add_node(self, *, hidden: Path | None = None, python_path: Path | None = None) -> None:
        """One more node with room for a worker; a folder of this machine is empty there, or its Python finds other packages first."""
        before = self.log.read_text().count(STARTED)
        within = (
            []
            if hidden is None
            else ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs none "{hidden}" && exec "$@"', "sh"]
        )
        extra = {} if python_path is None else {"PYTHONPATH": str(python_path)}
        self._processes.append(self._start(within, ["--address", self._address, "--num-cpus", "1"], extra))
        self._wait(lambda: self.log.read_text().count(STARTED) > before)

    def raylets(self) -> list[psutil.Process]:
        """One for each node, the head's first."""
        return self._find(lambda p: p.name() == "raylet")

    def workers(self) -> list[psutil.Process]:
        """Processes of actors."""
        return self._find(lambda p: p.name().startswith(("ray::UapWorker", "ray::worker-")))

    def kill_node(self, worker: psutil.Process | None = None) -> None:
        """SIGKILL to the raylet of a worker's node, or of the oldest node but the head, and to all that runs below it."""
        raylet = self.raylets()[1] if worker is None else worker.parent()
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self) -> None:
        """Kill everything."""
        for process in self._processes[::-1]:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for each in [psutil.Process(process.pid), *children] if process.poll() is None else []:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()

    def _start(self, within: list[str], options: list[str], extra: dict) -> subprocess.Popen:
        ray = str(Path(sys.executable).parent / "ray")
        with self.log.open("a") as log:
            return subprocess.Popen(
                [*within, ray, "start", "--block", *options],
                env=self._env | extra,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait(self, is_so) -> None:
        deadline = time.monotonic() + 90
        while not is_so():
            assert time.monotonic() < deadline and self._processes[-1].poll() is None, self.log.read_text()
            time.sleep(0.1)

    def _find(self, is_wanted) -> list[psutil.Process]:
        found = []
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                for each in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        if is_wanted(each):
                            found.append(each)
        return sorted(found, key=lambda p: p.create_time())


@contextmanager
def ray_cluster(folder: Path, **options):
    cluster = None
    try:
        cluster = RayCluster(folder, **options)
        yield cluster
    finally:
        if cluster is not None:
            cluster.stop()


def can_hide_folders() -> bool:
    """Whether this user may mount something that only one process sees."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


def _autoscaler(address: str, node_types: dict, idle_s: float) -> dict:
    """Nodes are processes of this machine. Ray knows this provider as an external one only: its defaults are not in the wheel."""
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "pretended",
        "max_workers": 16,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 100,
        "provider": {
            "type": "external",
            "module": module,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "auth": {},
        "head_node_type": HEAD_TYPE,
        "available_node_types": {HEAD_TYPE: head, **{n: {"node_config": {}, **t} for n, t in node_types.items()}},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in NO_COMMANDS},
    }


def _free_port() -> int:
    """Below those that Ray gives to workers."""
    for port in range(6400, 9900):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")
