"""The node providers of `ray up` for AWS and Google, which also tell Ray's autoscaler what was refused.

Ray 2.60 tries other types of machines only after one that was promised came too late. If the cloud refuses a type, as
it often does with spot machines, Ray asks for the same type again and again.
"""

from typing import Any

from ray.autoscaler.v2 import autoscaler
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.core.generated.instance_manager_pb2 import InstanceUpdateEvent

_monitors: list[CloudResourceMonitor] = []


class _Monitor(CloudResourceMonitor):
    """The autoscaler's list of types to try later; `tell_refused` finds it in `_monitors`."""

    def __init__(self) -> None:
        super().__init__()
        _monitors.append(self)


autoscaler.CloudResourceMonitor = _Monitor  # the autoscaler makes its own after it has loaded the provider


def tell_refused(kind: str) -> None:
    """Have the autoscaler of this process try other types before this one for a while.

    For how long is ``RAY_AUTOSCALER_AVAILABILITY_RECOVERY_S``, ten minutes by default.
    """
    for monitor in _monitors:
        monitor.allocation_timeout(InstanceUpdateEvent(instance_type=kind))


def __getattr__(name: str) -> type:
    """Return the provider ``AWS`` or ``GCP``, each of which needs its cloud's client."""
    if name == "AWS":
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider as OfRay
    elif name == "GCP":
        from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider as OfRay
    else:
        raise AttributeError(name)
    return type(name, (_ReportsRefusals, OfRay), {})


class _ReportsRefusals:
    """Is put in front of a provider of Ray: reports each type that the cloud refuses."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> Any:
        try:
            return super().create_node_with_resources_and_labels(  # type: ignore[misc]
                node_config, tags, count, resources, labels
            )
        except Exception:
            tell_refused(tags["ray-user-node-type"])
            raise
