"""Ray clusters on loopback, with a token, as `ray start` creates them: with an autoscaler, or with nodes that share no files."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

HEAD_ID = "f" * 51 + "00000"  # id of the head in Ray's provider of fake nodes
HEAD_TYPE = "ray.head.default"  # its node type there
STARTED = "Ray runtime started"
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # despite its name, this keeps Ray on 127.0.0.1
JOIN = f"""
import os
from ray._private import services
from ray.scripts.scripts import main
services.get_node_ip_address = lambda address=None: "127.0.0.1"
os.environ |= {ON_LOOPBACK}
main()
"""  # starts a second node, which `ray start` refuses on loopback
NO_COMMANDS = (
    *(f"{which}setup_commands" for which in ("", "head_", "worker_")),
    *("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


class RayCluster:
    """A head node, by default without room for workers, and further nodes.

    Attributes:
        env: environment of processes that join the cluster.
        log: file with the output of the cluster's processes.
        dashboard: address for `ray job`, if the cluster takes jobs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        node_types: dict | None = None,
        idle_s: float = 5,
        head_cpus: int = 0,
        takes_jobs: bool = False,
        env: Mapping[str, str] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Start the head.

        Args:
            folder: for the log and the autoscaler's configuration.
            node_types: with these, an autoscaler starts such nodes on demand and ends idle ones.
            idle_s: seconds after which the autoscaler ends an idle node.
            head_cpus: CPUs of the head for workers.
            takes_jobs: whether to start the dashboard, for `ray job submit`.
            env: environment variables of the cluster's processes.
            settings: Ray's `_system_config`.
        """
        self.log = folder / "ray.log"
        port, *others = _free_ports(3)
        self.dashboard = f"http://127.0.0.1:{others[0]}"
        base = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
        ray_env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._env = base | ray_env | ON_LOOPBACK | dict(env or {})
        options = ["--head", "--port", str(port), "--num-cpus", str(head_cpus), "--num-gpus", "0"]
        options += ["--include-dashboard", str(takes_jobs).lower(), "--dashboard-host", "127.0.0.1"]
        options += ["--dashboard-port", str(others[0]), "--dashboard-agent-listen-port", str(others[1])]
        options += ["--system-config", json.dumps(dict(settings or {}))]
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
        self._processes = [self._start(["ray"], options, extra)]
        self._wait(lambda: STARTED in self.log.read_text())
        self._address = f"127.0.0.1:{port}"
        self.env = self._env | {"RAY_ADDRESS": self._address}

    def add_node(self, *, num_cpus: int = 1, hidden: Path | None = None, python_path: Path | None = None) -> None:
        """Start one more node, to which the folder `hidden` is empty, or whose Python finds packages in `python_path` first."""
        before = self.log.read_text().count(STARTED)
        words = ["python", "-c", JOIN]
        if hidden is not None:
            words = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs none "{hidden}" && exec "$@"', "sh", *words]
        extra = dict.fromkeys(ON_LOOPBACK, "1")
        if python_path is not None:
            extra["PYTHONPATH"] = os.pathsep.join(filter(None, (str(python_path), self._env.get("PYTHONPATH"))))
        options = ["--address", self._address, "--num-cpus", str(num_cpus)]
        self._processes.append(self._start(words, options, extra))
        self._wait(lambda: self.log.read_text().count(STARTED) > before)

    def raylets(self) -> list[psutil.Process]:
        """The raylets, one per node, the head's first."""
        return self.find(lambda p: p.name() == "raylet")

    def workers(self) -> list[psutil.Process]:
        """Processes of workers."""
        return self.find(lambda p: p.name().startswith(("ray::UapWorker", "ray::worker-")))

    def job_status(self, job: str) -> str:
        """Status of a submitted job: RUNNING, STOPPED, SUCCEEDED, …"""
        headers = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        with urlopen(Request(f"{self.dashboard}/api/jobs/{job}", headers=headers), timeout=30) as answer:
            return json.load(answer)["status"]

    def listens_at(self) -> set[str]:
        """IP addresses at which the cluster's processes listen."""
        processes = self.find(lambda p: True)
        return {c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}

    def kill_node(self, number: int = 1, *, worker: psutil.Process | None = None) -> None:
        """Kill a raylet and all its children: that of a node, numbered by age from the head (0), or that of a worker."""
        raylet = self.raylets()[number] if worker is None else worker.parent()
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

    def _start(self, ray: list[str], options: list[str], extra: dict) -> subprocess.Popen:
        env = self._env | extra
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
        with self.log.open("a") as log:
            words = [*ray, "start", "--block", *options]
            return subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT)

    def _wait(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not is_true():
            assert time.monotonic() < deadline and self._processes[-1].poll() is None, self.log.read_text()
            time.sleep(0.1)

    def find(self, is_wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
        """Processes of the cluster, the oldest first."""
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
    """Whether this user may mount a file system that only one process sees."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


def _autoscaler(address: str, node_types: dict, idle_s: float) -> dict:
    """Configuration of an autoscaler whose nodes are processes of this machine.

    The provider is declared as external because Ray's wheel lacks its defaults.
    """
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake",
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


def _free_ports(count: int) -> list[int]:
    """Free ports below those that Ray assigns to workers."""
    found: list[int] = []
    for port in range(6400, 9900):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            found.append(port)
            if len(found) == count:
                return found
    raise OSError("no free port")
