import networkx as nx
import numpy as np
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from uap_dist.evaluation import plots
from uap_dist.evaluation.label_graph import dominant_labels, label_graph, save_label_graph

LABELS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


def test_an_example_by_hand(tmp_path):
    clean, perturbed = np.array([0, 0, 0, 1, 2, 2, 3]), np.array([5, 5, 4, 5, 2, 0, 3])
    graph = label_graph(clean, perturbed, "abcdef")
    assert sorted(graph.edges) == [(0, 5), (1, 5), (2, 0)] and graph.edges[0, 5] == {"num_images": 2, "share": 2 / 3}
    assert dict(graph.nodes(data="num_images")) == {0: 3, 1: 1, 2: 2, 3: 1, 4: 0, 5: 0}
    assert dominant_labels(perturbed, clean) == [(5, 3), (0, 1), (4, 1)]
    save_label_graph(tmp_path, graph)
    plots.save_label_graph(tmp_path / "graph.png", graph)
    rows = pq.read_table(tmp_path / "label-graph.parquet").to_pylist()
    assert [(r["clean_name"], r["perturbed_name"], r["num_images"], r["num_clean_images"]) for r in rows] == [
        ("a", "f", 2, 3),
        ("b", "f", 1, 1),
        ("c", "a", 1, 2),
    ]
    assert nx.read_graphml(tmp_path / "label-graph.graphml").number_of_edges() == 3
    assert (tmp_path / "graph.png").stat().st_size > 1000


@given(LABELS)
def test_every_fooled_label_has_one_edge_to_the_label_that_most_of_its_images_get(pairs):
    clean, perturbed = np.array(pairs).T
    graph = label_graph(clean, perturbed)
    for label in range(7):
        moved = perturbed[(clean == label) & (perturbed != label)]
        assert graph.out_degree(label) == (len(moved) > 0) if label in graph else len(moved) == 0
        for _, target, edge in graph.out_edges(label, data=True) if label in graph else ():
            assert edge["num_images"] == (moved == target).sum() == max((moved == t).sum() for t in range(7))
    assert sum(count for _, count in dominant_labels(perturbed, clean)) == (clean != perturbed).sum()


def test_names_with_formulas_markup_or_control_characters_are_drawn_and_saved(tmp_path):
    names = [r"$\frac{1$", "<b>&", "a\0b\x1b[31m"]
    graph = label_graph(np.array([0, 1, 2]), np.array([1, 0, 0]), names)
    save_label_graph(tmp_path, graph)
    assert nx.read_graphml(tmp_path / "label-graph.graphml").nodes["2"]["name"] == "a�b"
    assert pq.read_table(tmp_path / "label-graph.parquet")["clean_name"].to_pylist() == names
    plots.save_label_graph(tmp_path / "graph.png", graph)
    plots.save_matrix(tmp_path / "m.png", np.eye(3), names, names, title="", limits=(0, 1))


def test_nobody_fooled(tmp_path):
    labels = np.array([1, 2, 3])
    save_label_graph(tmp_path, label_graph(labels, labels))
    plots.save_label_graph(tmp_path / "graph.png", label_graph(labels, labels))
    assert pq.read_table(tmp_path / "label-graph.parquet").num_rows == 0
