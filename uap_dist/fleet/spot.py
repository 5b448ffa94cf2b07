"""A scorer for Ray's autoscaler: which type of node to launch next. Only cluster.yaml refers to it, on the head node."""

from numbers import Real

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _resource_based_utilization_scorer


def prefer_available(
    node_resources: dict[str, Real],
    demands: list[dict[str, Real]],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[bool, int, float, float, bool] | None:
    """Score a type of node as Ray does, and prefer among equal types one whose last launch did not fail.

    Ray's own score keeps asking for the same type, even while the cloud has none. Ray remembers a failed launch for half an hour;
    among types that are still equal it takes the last name in the alphabet.

    Returns:
        The score, of which the largest wins; None if nodes of this type do not help.
    """
    score = _resource_based_utilization_scorer(
        node_resources, demands, node_availability_summary=node_availability_summary
    )
    launch = node_availability_summary.node_availabilities.get(node_type)
    return score and (*score, launch is None or launch.is_available)
