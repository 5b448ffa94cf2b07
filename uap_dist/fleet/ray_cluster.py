"""The Ray cluster that a job joins or starts, and the room that it has for workers."""

import os
import secrets

LOCAL = "local"


def _address() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip() or LOCAL


# Ray reads these when it is imported
if _address() == LOCAL:
    # despite its name, the first one makes a local Ray listen on loopback only, where it obeys the owner of this token only
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import atexit
import logging
import re
import shutil
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from uap_dist.data.locations import make_own_folder
from uap_dist.errors import ConfigError
from uap_dist.foreign_text import first_line, redact

ANSWER_TIMEOUT_S = 10.0
FOLDER_TIMEOUT_S = 60.0  # for a node to look for a folder, which starts a process
NUM_NODES_NAMED = 3
MAX_SOCKET_BYTES = 107  # length of the path of a Unix socket
FOLDER_PREFIX = "uap-"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"  # first frame of both sides in HTTP/2, which Ray speaks
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS
PORT_ADVICE = "the port of a cluster's head is 6379 by default; unset RAY_ADDRESS to start a Ray on this machine"


@dataclass(frozen=True)
class Need:
    """What one worker takes of a node: CPUs, and GPUs or a fraction of one."""

    cpus: int
    gpus: float

    def __str__(self) -> str:
        """In words, such as "1 CPU and 0.5 GPU"."""
        return f"{self.cpus} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")

    def room(self) -> int:
        """How many such workers fit on the nodes that are alive, if nothing else ran there."""
        return sum(self.room_on(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def room_on(self, resources: dict[str, float]) -> int:
        """How many such workers fit on a node with these resources, if nothing else ran there."""
        by_cpu = int(resources.get("CPU", 0) // self.cpus)
        num_gpus = int(resources.get("GPU", 0))
        if not self.gpus:
            return by_cpu
        if self.gpus < 1:  # a fraction comes from a single GPU: the rests of two GPUs cannot be combined
            return min(by_cpu, num_gpus * int(1 / self.gpus))
        return min(by_cpu, num_gpus // int(self.gpus))

    def share_of_cpus(self, max_workers: int | None) -> int:
        """CPUs of this process's node for each of the workers that fit there, of which there are at most `max_workers`; at least 1."""
        node = ray.get_runtime_context().get_node_id()
        resources = next(each["Resources"] for each in ray.nodes() if each["NodeID"] == node)
        room = self.room_on(resources)
        return max(1, int(resources.get("CPU", 0)) // max(1, min(room, max_workers or room)))


def connect() -> None:
    """Join the cluster at RAY_ADDRESS (which submitted jobs have set); if it is unset, start a Ray on loopback.

    Raises:
        ConfigError: the address is invalid, the cluster does not answer, or Ray's files cannot be written.
    """
    if ray.is_initialized():
        return
    address = _address()
    if address == LOCAL:
        _start_own()
        return
    _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        has_token = os.environ.get("RAY_AUTH_MODE") == "token"
        hint = "" if has_token else "; if it has token authentication, set RAY_AUTH_MODE=token"
        reason = first_line(error)
        raise ConfigError(f"cannot join the Ray cluster at {redact(address)} (RAY_ADDRESS): {reason}{hint}") from error


def _start_own() -> None:
    """Start a Ray whose files (logs, sockets) only this user may open, and which are deleted when the process ends."""
    place = _place_for_sockets()
    try:
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place))
    except OSError as error:
        raise ConfigError(
            f"cannot create a folder for Ray in {place}: {error.strerror}; set RAY_TMPDIR to another folder"
        ) from error
    atexit.register(_end_own, folder)  # runs before Ray's own handler
    # Ray lets all users read the files that it creates, but not through this folder
    ray.init(
        address=LOCAL,
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=False,
        _temp_dir=str(folder / "r"),
    )


def _end_own(folder: Path) -> None:
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _place_for_sockets() -> Path:
    """RAY_TMPDIR if that is set, else TMPDIR, or /tmp if TMPDIR is too long for sockets.

    Raises:
        ConfigError: RAY_TMPDIR is too long.
    """
    longest = f"/{FOLDER_PREFIX}12345678/r/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    room = MAX_SOCKET_BYTES - len(longest)
    asked = os.environ.get("RAY_TMPDIR")
    place = os.path.abspath(asked or tempfile.gettempdir())
    size = len(os.fsencode(place))
    if size <= room:
        return Path(place)
    if not asked:
        return Path("/tmp")
    raise ConfigError(
        f"RAY_TMPDIR is {place}, {size} bytes long: the paths of Ray's sockets in it would exceed the system's limit of "
        f"{MAX_SOCKET_BYTES} bytes; set RAY_TMPDIR to a path of at most {room} bytes, such as /tmp (decoded images go to TMPDIR, "
        "which may be long)"
    )


def _check_answers(address: str) -> None:
    """Check that a Ray cluster answers: Ray itself would try for minutes, and would misunderstand invalid addresses."""
    shown = redact(address)
    if address == "auto":
        return
    if re.match("https?://", address, re.IGNORECASE):
        raise ConfigError(
            f"RAY_ADDRESS is {shown}, an address to submit jobs to: unset it and use `ray job submit --address {shown} -- COMMAND`, "
            "or set it to HOST:6379 for a job that is started on a machine of the cluster"
        )
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"RAY_ADDRESS is {shown!r}; it must be HOST:PORT of the cluster's head, such as 10.0.0.1:6379 (Ray Client, ray://, is "
            "not supported); unset it to start a Ray on this machine"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S) as connection:
            connection.sendall(GREETING)
            answer = connection.recv(len(SETTINGS))
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {shown} (RAY_ADDRESS): {error.strerror or error}; {PORT_ADVICE}"
        ) from error
    if answer[3:4] != SETTINGS[3:4]:
        raise ConfigError(f"the server at {shown} (RAY_ADDRESS) is not a Ray cluster; {PORT_ADVICE}")


def can_grow() -> bool:
    """Whether nodes may join the cluster, which is so unless the job has started a Ray itself."""
    return _address() != LOCAL


def hide_gpus_of_others() -> None:
    """Have this process, a worker, compute on the CPU if it asked Ray for no GPU; call it before torch looks for any.

    Ray shows all GPUs to a process that asked for none.
    """
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def has_gpus() -> bool:
    """Whether the cluster has a GPU now."""
    return ray.cluster_resources().get("GPU", 0) > 0


def living_nodes() -> set[str]:
    """Ray's ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def check_shared(folder: Path, need: Need, advice: str) -> None:
    """Check that all nodes with room for a worker see a folder of the driver.

    Args:
        folder: local folder that workers read from or write to. If it does not exist, it is created for this check.
        need: what a worker takes of a node.
        advice: end of the error message, which says what to do.

    Raises:
        ConfigError: a node does not see the folder.
    """
    if not can_grow():  # there is only this machine
        return
    sees: Any = ray.remote(num_cpus=0, max_retries=0)(_sees)
    nodes = [node for node in ray.nodes() if node["Alive"] and need.room_on(node["Resources"])]
    created = [path for path in (folder, *folder.parents) if not path.is_dir()]
    make_own_folder(folder)
    answers = [
        sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(folder))
        for node in nodes
    ]
    blind = [node["NodeManagerAddress"] for node, answer in zip(nodes, answers, strict=True) if not _answer(answer)]
    with suppress(OSError):  # another job may have put something there
        for path in created:
            path.rmdir()
    if blind:
        named = ", ".join(blind[:NUM_NODES_NAMED]) + ", …" * (len(blind) > NUM_NODES_NAMED)
        raise ConfigError(f"{len(blind)} of {len(nodes)} nodes ({named}) do not see the folder {folder}; {advice}")


def _sees(folder: str) -> bool:
    return Path(folder).is_dir()


def _answer(ref: "ray.ObjectRef[bool]") -> bool:
    """A node's answer; True if the node is lost, which is no reason to refuse a job."""
    try:
        return ray.get(ref, timeout=FOLDER_TIMEOUT_S)
    except RayError:
        return True


def describe() -> str:
    """What the cluster has now, such as "2 nodes with 8 CPU and 1 GPU"."""
    total, num_nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    return f"{num_nodes} node{'s' * (num_nodes > 1)} with {total.get('CPU', 0):g} CPU and {total.get('GPU', 0):g} GPU"
