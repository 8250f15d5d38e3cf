"""To what size an autoscaler may bring the cluster, by the file or the Kubernetes object that configures it.

Ray's own state has a field for this, but only Anyscale's autoscaler fills it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_SECONDS_TO_ASK = 60.0
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Later(NamedTuple):
    """What an autoscaler may bring; both are empty without one."""

    size: dict[str, float]
    """Resources of the cluster at its largest size."""
    nodes: list[dict[str, float]]
    """Resources of each type of its nodes."""


def later() -> Later:
    """Return what an autoscaler may bring.

    Asks on the head, where a job's program runs by default.
    """
    try:
        stated: dict[str, float] | None = ray._private.state.state.get_max_resources_from_cluster_config()
        if stated:
            return Later(stated, [])
        context = ray.get_runtime_context()
        alive = [node for node in ray.nodes() if node["Alive"]]
        heads = [node["NodeID"] for node in alive if "node:__internal_head__" in node["Resources"]]
        if heads and heads[0] != context.get_node_id():
            there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
            ask = ray.remote(num_cpus=0, scheduling_strategy=there)(_settings)
            settings = ray.get(ask.remote(context.gcs_address), timeout=_SECONDS_TO_ASK)
        else:
            settings = _settings(context.gcs_address)
        return Later(size(settings), node_types(settings))
    except Exception:  # another Ray, or an odd file: then the cluster counts as one that does not grow
        return Later({}, [])


def node_types(settings: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the resources of each type of node that may come, by settings in the form of `ray up`."""
    kinds = settings.get("available_node_types", {}).items()
    some = [kind for name, kind in kinds if kind.get("max_workers", name != settings.get("head_node_type"))]
    return [kind.get("resources", {}) for kind in some]


def size(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return how much of each resource the nodes can have together, by settings in the form of `ray up`.

    Each resource for itself: with a limit on all nodes, the types that have most of it.
    """
    kinds = settings.get("available_node_types", {})
    most = settings.get("max_workers", 2)  # Ray's own default
    found: dict[str, float] = {}
    for resource in {name for kind in kinds.values() for name in kind.get("resources", {})}:
        total, left = 0.0, most
        amounts = [(kind.get("resources", {}).get(resource, 0), name) for name, kind in kinds.items()]
        for amount, name in sorted(amounts, reverse=True):
            is_head = name == settings.get("head_node_type")
            number = min(left, kinds[name].get("max_workers", 0 if is_head else most))
            total += amount * (number + is_head)
            left -= number
        found[resource] = total
    return found


def _settings(gcs_address: str) -> Mapping[str, Any]:
    """Return what the autoscaler of this node's cluster was told; empty without one. Runs on the head."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    if name and _NAMESPACE.exists():
        return _kuberay(name, _NAMESPACE.read_text().strip())
    for process in psutil.process_iter(["cmdline", "uids"]):
        words = process.info["cmdline"] or []
        if f"--gcs-address={gcs_address}" not in words or process.info["uids"].real != os.getuid():
            continue
        files = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
        if files:
            told = yaml.safe_load(Path(files[0]).expanduser().read_bytes())
            return told if isinstance(told, dict) else {}
    return {}


def _kuberay(name: str, namespace: str) -> Mapping[str, Any]:
    """Ask Kubernetes, as the autoscaler does: with it, KubeRay lets the head's pod read the RayCluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    cluster = KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return {}
    settings: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    return settings
