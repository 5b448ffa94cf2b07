"""Which type of node Ray's autoscaler launches next; cluster.yaml names it on the head, nothing else calls it."""

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
    """Ray's score of a type of node; between equal ones, whether its last launch in half an hour succeeded. None: it cannot help.

    Ray's own score asks for the same type again and again, whether or not the cloud has any. Of types that still are equal Ray takes
    the last name in the alphabet.
    """
    score = _resource_based_utilization_scorer(
        node_resources, demands, node_availability_summary=node_availability_summary
    )
    launch = node_availability_summary.node_availabilities.get(node_type)
    return score and (*score, launch is None or launch.is_available)
