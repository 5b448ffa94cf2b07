"""The Ray cluster that a job joins or starts, and what it has room for."""

import os

if "RAY_ADDRESS" not in os.environ:
    # Ray reads these on import. The first, despite its name, is what makes a local Ray listen on loopback only.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from uap_dist.errors import ConfigError

LOCAL = "local"
ANSWER_TIMEOUT_S = 10.0
LOOK_TIMEOUT_S = 60.0  # of a node for a folder: it starts a process for that
NUM_NODES_NAMED = 3


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
        ConfigError: the cluster does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", LOCAL)
    _check_answers(address)
    include_dashboard = False if address == LOCAL else None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=include_dashboard)
    except (ConnectionError, RuntimeError, ValueError) as error:
        has_token = os.environ.get("RAY_AUTH_MODE") == "token"
        hint = "" if has_token else "; if it has token authentication, set RAY_AUTH_MODE=token"
        raise ConfigError(f"cannot join the Ray cluster at {address} (RAY_ADDRESS): {error}{hint}") from error


def _check_answers(address: str) -> None:
    """Ray itself would try a host and port for minutes."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}") from error


def can_grow() -> bool:
    """Whether nodes may join: not where the job started a Ray of its own."""
    return os.environ.get("RAY_ADDRESS", LOCAL) != LOCAL


def has_gpus() -> bool:
    """Whether a node that is alive has a GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0


def living_nodes() -> set[str]:
    """Ray's ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def check_shared(folder: Path, need: Need, advice: str) -> None:
    """Raise ConfigError where nodes with room for such a worker do not see a folder that the driver has just made.

    Args:
        folder: local; workers read or write there.
        need: of a worker.
        advice: what to do, for the complaint.
    """
    if not can_grow():  # all is on this machine
        return
    sees: Any = ray.remote(num_cpus=0, max_retries=0)(_sees)
    nodes = [node for node in ray.nodes() if node["Alive"] and need.room_on(node["Resources"])]
    answers = [
        sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(folder))
        for node in nodes
    ]
    blind = [node["NodeManagerAddress"] for node, answer in zip(nodes, answers, strict=True) if not _answer(answer)]
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
