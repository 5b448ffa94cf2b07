"""The label graph (figure 7 of the paper): an edge from each clean label to the label that most of its fooled images get."""

from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uap_dist.foreign_text import printable


def label_graph(
    clean: np.ndarray, perturbed: np.ndarray, class_names: Sequence[str] = (), target: int | None = None
) -> nx.DiGraph:
    """A node for each label that occurs, and an edge from each label of which an image was fooled.

    Args:
        clean: N labels of the unperturbed images.
        perturbed: N labels of the perturbed images.
        class_names: names by label index; without them, nodes are named by their index.
        target: label that the images shall get, a node in any case; None if there is none.

    Returns:
        Nodes are label indices with `name` and `num_images` (images with that clean label). An edge leads to the label that
        most of the fooled images get, the smallest index among equals; it has `num_images` (fooled images that get it) and
        `share` (their share of all images with the clean label). The target has `is_target`.

    Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.1.
    """
    graph = nx.DiGraph()
    labels = {*clean.tolist(), *perturbed.tolist(), *(() if target is None else (target,))}
    for label in sorted(labels):
        name = class_names[label] if class_names else str(label)
        graph.add_node(label, name=name, num_images=int((clean == label).sum()))
    for label in np.unique(clean[clean != perturbed]).tolist():
        targets, counts = np.unique(perturbed[(clean == label) & (perturbed != label)], return_counts=True)
        count = int(counts.max())
        share = count / graph.nodes[label]["num_images"]
        graph.add_edge(label, int(targets[counts.argmax()]), num_images=count, share=share)
    if target is not None:
        graph.nodes[target]["is_target"] = True
    return graph


def dominant_labels(perturbed: np.ndarray, clean: np.ndarray) -> list[tuple[int, int]]:
    """Labels that fooled images get, each with the number of images, in descending order of that number."""
    labels, counts = np.unique(perturbed[perturbed != clean], return_counts=True)
    order = np.lexsort((labels, -counts))
    return [(int(labels[i]), int(counts[i])) for i in order]


def save_label_graph(folder: Path, graph: nx.DiGraph) -> None:
    """Write label-graph.parquet (one row per edge) and label-graph.graphml."""
    names, sizes = graph.nodes(data="name"), graph.nodes(data="num_images")
    rows = [
        {
            "clean_label": source,
            "clean_name": names[source],
            "perturbed_label": target,
            "perturbed_name": names[target],
            "num_images": edge["num_images"],
            "share": edge["share"],
            "num_clean_images": sizes[source],
        }
        for source, target, edge in graph.edges(data=True)
    ]
    types = [("clean_label", pa.int64()), ("clean_name", pa.string()), ("perturbed_label", pa.int64())]
    types += [("perturbed_name", pa.string()), ("num_images", pa.int64()), ("share", pa.float64())]
    schema = pa.schema([*types, ("num_clean_images", pa.int64())])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "label-graph.parquet")
    readable = graph.copy()  # XML allows no control characters
    nx.set_node_attributes(readable, {node: printable(name) for node, name in names}, "name")
    nx.write_graphml(readable, folder / "label-graph.graphml")
