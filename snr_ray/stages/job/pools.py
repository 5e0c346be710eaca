"""Nodes that an autoscaler brings: no driver can count them, so it asks for what it needs."""

import time

import ray
import ray.util
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

ANSWER_S = 60.0
"""Seconds after which an autoscaler that says nothing is taken for none."""
ASK_S = 1
"""Ray waits for whole seconds."""


def has_autoscaler() -> bool:
    """Whether the cluster has an autoscaler, of Ray's second version, that has spoken."""
    return state_of(_address()).autoscaling_state.autoscaler_state_version > 0


def brings(bundle: dict[str, float], count: int) -> bool:
    """Whether there is room for `count` times these resources, or an autoscaler makes it.

    It is asked for all at once, and so begins to bring nodes; a cluster without one answers at
    once, by what it has free.

    Args:
        bundle: Ray resources that must be on one node.
        count: how many of them.
    """
    if count < 1:
        return True
    group = ray.util.placement_group([bundle] * count)
    late, asked = time.monotonic() + ANSWER_S, 0
    try:
        while not group.wait(ASK_S):
            status = state_of(_address())
            said = status.autoscaling_state
            if not said.autoscaler_state_version or time.monotonic() > late:
                return False
            known = status.cluster_resource_state
            if not asked and _named(group, known.pending_gang_resource_requests):
                asked = known.cluster_resource_state_version
            if asked and said.last_seen_cluster_resource_state_version > asked:
                return not _named(group, said.infeasible_gang_resource_requests)
        return True
    finally:
        ray.util.remove_placement_group(group)


def _named(group: "ray.util.placement_group.PlacementGroup", requests: object) -> bool:
    """Whether a group is among these requests."""
    return any(group.id.hex() in request.details for request in requests)  # type: ignore[attr-defined]


def _address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def state_of(address: str) -> GetClusterStatusReply:
    """What the cluster at HOST:PORT knows of its nodes, and its autoscaler of what is asked for."""
    client = GcsClient(address=address)
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10))
