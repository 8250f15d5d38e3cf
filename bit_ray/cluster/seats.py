"""Room for training workers on a cluster that changes: placement groups that wait, and nodes that are about to go.

All that this project asks Ray about nodes and groups by private names stands here and in `autoscaler.py`.
"""

import re
import time
from collections.abc import Mapping
from contextlib import suppress

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group

# Ray takes longer for each group the more are waiting: 500 stand after seconds, 2,000 after more than a minute
# (benchmarks/control_plane.py).
_MOST_GROUPS = 256


class Seats:
    """Placement groups of one worker each: an autoscaler sees them as demand, and those that stand say how many fit.

    For more than 256 workers each group is of several, and their number is known to within one group. They hold what
    they got until `release`.
    """

    def __init__(self, bundle: Mapping[str, float], number: int) -> None:
        """Ask for room for a number of workers, each of which takes ``bundle``."""
        size = max(1, -(-number // _MOST_GROUPS))
        sizes = [min(size, number - start) for start in range(0, number, size)]
        self._groups = [(placement_group([dict(bundle)] * workers), workers) for workers in sizes]

    def ready(self) -> int:
        """How many workers there is room for now."""
        # `wait(0)` of a group is sometimes False for one that stands.
        states = ray.util.placement_group_table()
        return sum(
            workers for group, workers in self._groups if states.get(group.id.hex(), {}).get("state") == "CREATED"
        )

    def release(self) -> None:
        """Give the room back, and withdraw the demand."""
        for group, _ in self._groups:
            ray.util.remove_placement_group(group)
        self._groups = []


def free_group(group_id: str) -> None:
    """Remove a placement group by its hexadecimal id, with what runs in it; nothing if there is none."""
    if not re.fullmatch("[0-9a-f]{36}", group_id):
        return
    known = ray.util.placement_group_table().get(group_id, {})
    if known.get("state") in ("CREATED", "RESCHEDULING", "PENDING"):
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))


def as_text(bundle: Mapping[str, float]) -> str:
    """Say what a bundle takes, as in ``3 CPU and 1 GPU``."""
    return " and ".join(f"{number:g} {kind}" for kind, number in bundle.items())


def is_waited_for(bundle: Mapping[str, float]) -> bool:
    """Whether a placement group of just this bundle waits for room."""
    groups = ray.util.placement_group_table().values()
    return any(group["state"] == "PENDING" and list(group["bundles"].values()) == [bundle] for group in groups)


def nodes_alive() -> set[str]:
    """Return the ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def nodes_leaving() -> dict[str, float]:
    """Return the ids of nodes that are being drained, with the seconds they have left; infinite where not known."""
    try:
        draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
    except AttributeError:  # a later Ray has another name for it: nodes then leave without a notice
        return {}
    now = time.time()
    return {node: deadline / 1000 - now if deadline else float("inf") for node, deadline in draining.items()}


def keep_ray_data_here() -> None:
    """Start the two actors of Ray Data that outlive a run, for statistics and for its demand for nodes, on this node.

    Otherwise the first worker that reads starts them on its node. That node then never counts as idle: an autoscaler
    keeps it, and it does not go when it is drained.
    """
    with suppress(Exception):  # private
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )
        from ray.data._internal.stats import get_or_create_stats_actor

        get_or_create_stats_actor()
        get_or_create_autoscaling_coordinator()
