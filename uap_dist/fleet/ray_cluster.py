"""The Ray cluster that a job joins or starts, and what it has room for."""

import os
import secrets

LOCAL = "local"


def _address() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip() or LOCAL


# Ray reads these on import
if _address() == LOCAL:
    # despite its name, this is what makes a local Ray listen on loopback only; there it obeys who has this process's token
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import atexit
import logging
import re
import shutil
import socket
import sys
import tempfile
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
LOOK_TIMEOUT_S = 60.0  # of a node for a folder: it starts a process for that
NUM_NODES_NAMED = 3
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of the path of a Unix socket, at most
FOLDER_PREFIX = "uap-"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"  # the frame with which HTTP/2, that Ray speaks, begins on both sides
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS
ITS_PORT = (
    "its head's port is 6379 unless it was started with another; unset RAY_ADDRESS to start a Ray on this machine"
)


@dataclass(frozen=True)
class Need:
    """What one worker takes of a node: CPUs, and GPUs or a share of one."""

    cpus: int
    gpus: float

    def __str__(self) -> str:
        """As a person would say it."""
        return f"{self.cpus} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")

    def room(self) -> int:
        """So many such workers fit on the nodes that are alive, were nothing else on them."""
        return sum(self.room_on(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def room_on(self, resources: dict[str, float]) -> int:
        """So many fit on a node of these resources, were nothing else on it."""
        by_cpu = int(resources.get("CPU", 0) // self.cpus)
        num_gpus = int(resources.get("GPU", 0))
        if not self.gpus:
            return by_cpu
        if self.gpus < 1:  # a share is of one GPU: what two of them have left makes no third
            return min(by_cpu, num_gpus * int(1 / self.gpus))
        return min(by_cpu, num_gpus // int(self.gpus))


def connect() -> None:
    """Join the cluster of RAY_ADDRESS (as in a submitted job), else start a Ray of our own on loopback.

    Raises:
        ConfigError: the address is none, the cluster does not answer, or there is no place for Ray's files.
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
    """A Ray whose files (logs, sockets) only this user may open, and which are gone when the process ends."""
    place = _place_for_sockets()
    try:
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place))
    except OSError as error:
        raise ConfigError(
            f"cannot make a folder for Ray in {place}: {error.strerror}; set RAY_TMPDIR to another one"
        ) from error
    atexit.register(_end_own, folder)  # before Ray's own
    # Ray opens what it makes to all users, but not the folder around it
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
    """RAY_TMPDIR where that is set, else TMPDIR, or /tmp where TMPDIR is too long.

    Raises:
        ConfigError: RAY_TMPDIR is too long.
    """
    longest = f"/{FOLDER_PREFIX}12345678/r/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    room = SOCKET_BYTES - len(longest)
    asked = os.environ.get("RAY_TMPDIR")
    place = os.path.abspath(asked or tempfile.gettempdir())
    size = len(os.fsencode(place))
    if size <= room:
        return Path(place)
    if not asked:
        return Path("/tmp")
    raise ConfigError(
        f"RAY_TMPDIR is {place}, {size} bytes long: paths of Ray's sockets below it would be longer than {SOCKET_BYTES} bytes, all that "
        f"the system takes; set RAY_TMPDIR to a folder of at most {room}, as /tmp (decoded images go to TMPDIR, which may be long)"
    )


def _check_answers(address: str) -> None:
    """Ray itself would try a host and port for minutes, and take other forms for something else."""
    shown = redact(address)
    if address == "auto":
        return
    if re.match("https?://", address, re.IGNORECASE):
        raise ConfigError(
            f"RAY_ADDRESS is {shown}, an address to submit jobs to: unset it and use `ray job submit --address {shown} -- COMMAND`; "
            "for a job started by hand on a machine of the cluster it is HOST:6379"
        )
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"RAY_ADDRESS is {shown!r}; it must be HOST:PORT of the cluster's head, as 10.0.0.1:6379 (Ray Client, ray://, is not "
            "supported); unset it to start a Ray on this machine"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S) as connection:
            connection.sendall(GREETING)
            answer = connection.recv(len(SETTINGS))
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {shown} (RAY_ADDRESS): {error.strerror or error}; {ITS_PORT}"
        ) from error
    if answer[3:4] != SETTINGS[3:4]:
        raise ConfigError(f"what answers at {shown} (RAY_ADDRESS) is no Ray cluster; {ITS_PORT}")


def can_grow() -> bool:
    """Whether nodes may join: not where the job started a Ray of its own."""
    return _address() != LOCAL


def has_gpus() -> bool:
    """Whether a node that is alive has a GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0


def living_nodes() -> set[str]:
    """Ray's ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def check_shared(folder: Path, need: Need, advice: str) -> None:
    """Raise ConfigError where nodes with room for such a worker do not see a folder of the driver.

    Args:
        folder: local; workers read or write there. One that is not there yet is made for as long as this takes.
        need: of a worker.
        advice: what to do, for the complaint.
    """
    if not can_grow():  # all is on this machine
        return
    sees: Any = ray.remote(num_cpus=0, max_retries=0)(_sees)
    nodes = [node for node in ray.nodes() if node["Alive"] and need.room_on(node["Resources"])]
    made = [path for path in (folder, *folder.parents) if not path.is_dir()]
    make_own_folder(folder)
    answers = [
        sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(folder))
        for node in nodes
    ]
    blind = [node["NodeManagerAddress"] for node, answer in zip(nodes, answers, strict=True) if not _answer(answer)]
    for path in made:
        path.rmdir()
    if blind:
        named = ", ".join(blind[:NUM_NODES_NAMED]) + ", …" * (len(blind) > NUM_NODES_NAMED)
        raise ConfigError(f"{len(blind)} of {len(nodes)} nodes ({named}) do not see the folder {folder}; {advice}")


def _sees(folder: str) -> bool:
    return Path(folder).is_dir()


def _answer(ref: "ray.ObjectRef[bool]") -> bool:
    """What a node says; one that is lost meanwhile is no reason to refuse a job."""
    try:
        return ray.get(ref, timeout=LOOK_TIMEOUT_S)
    except RayError:
        return True


def describe() -> str:
    """What it has now, in words."""
    total, num_nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    return f"{num_nodes} node{'s' * (num_nodes > 1)} with {total.get('CPU', 0):g} CPU and {total.get('GPU', 0):g} GPU"
