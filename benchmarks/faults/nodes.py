"""Nodes that die and that join."""

from collections.abc import Iterator

from faults.lab import Lab
from faults.runs import Line, Trial


def node_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL of a raylet and all on its node, with two and three nodes."""
    for num_nodes in lab.size.num_nodes:
        for _ in range(num_nodes - 1):
            lab.cluster.add_node(num_cpus=2)
        trial = Trial(lab, f"nodes-{num_nodes}", "--num-workers", str(5 + num_nodes - 1))
        trial.start()
        trial.reach(lab.num_rounds // 12)
        lab.cluster.kill_node(2)
        trial.finish()
        yield trial.line(f"SIGKILL of a raylet, {num_nodes} worker nodes", 1)
        lab.remove_nodes()


def node_added(lab: Lab) -> Iterator[Line]:
    """A node joins during the run, and is put to use."""
    trial = Trial(lab, "node-added")
    trial.options = tuple(word for word in lab.options if word not in ("--num-workers", "2"))
    trial.start()
    trial.reach(1)
    with lab.paused():
        lab.cluster.add_node(num_cpus=2)
    trial.finish()
    at_end = trial.run.data.tags["num_workers_at_end"]
    yield trial.line(f"a node joins: 5 workers before, {at_end} after", 1)
