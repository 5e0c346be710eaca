"""A Ray cluster whose nodes an autoscaler starts on this machine, from none, and ends when idle."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nodes import HERE, RAY, STORE, Node, Nodes, cluster, free_port, until
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from snr_ray.stages.job import pools

IDLE_MINUTES = 0.1
POOLS = {"cpu": ({"CPU": 2}, 2), "gpu": ({"CPU": 2, "GPU": 1}, 1)}
"""Of each pool what a node has, and how many nodes there may be."""
NO_COMMANDS = (
    "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
)  # fmt: skip


class Machines(FakeMultiNodeProvider):
    """Ray's own provider of nodes on one machine, for nodes with memory, started as users do."""

    def _create_node_with_resources_and_labels(
        self, node_config: object, tags: dict[str, str], count: int,
        resources: dict[str, float], labels: dict[str, str],
    ) -> None:  # fmt: skip
        del node_config, count
        with self.lock:
            name, pool = self._next_hex_node_id(), tags[TAG_RAY_USER_NODE_TYPE]
            folder = Path(self.provider_config["folder"])
            with (folder / f"{pool}{name[-5:]}.log").open("wb") as said:
                process = subprocess.Popen(
                    [RAY, "start", "--block", f"--address={self._gcs_address}",
                     f"--num-cpus={resources['CPU']}", f"--num-gpus={resources.get('GPU', 0)}",
                     f"--memory={resources['memory']}", f"--labels=pool={labels['pool']}",
                     f"--temp-dir={tempfile.mkdtemp(prefix='', dir=folder)}",
                     "--node-ip-address=127.0.0.1", "--disable-usage-stats",
                     f"--object-store-memory={STORE}",
                     f"--dashboard-agent-listen-port={free_port()}"],
                    env=os.environ | HERE | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": name,
                                             "RAY_CLOUD_INSTANCE_ID": name,
                                             "RAY_NODE_TYPE_NAME": pool},
                    stdout=said, stderr=said, start_new_session=True,
                )  # fmt: skip
            its = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: pool,
                TAG_RAY_NODE_NAME: name,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[name] = {"tags": its | tags, "node": Node(process, pool)}

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Without those that Ray gave up to start on a busy machine, in whose place others come."""
        with self.lock:
            for name, node in list(self._nodes.items()):
                if "node" in node and node["node"].process.poll() is not None:
                    del self._nodes[name]
        there: list[str] = super().non_terminated_nodes(tag_filters)
        return there

    def _terminate_node(self, node: dict[str, Any]) -> None:
        node["node"].stop()


@contextmanager
def from_nothing() -> Iterator[Nodes]:
    """A head without cores, and pools of which no node is there yet."""
    with cluster(head=_head) as nodes:
        until(lambda: pools.state_of(nodes.address).autoscaling_state.autoscaler_state_version,
              nodes.members[0].process)  # fmt: skip
        yield nodes


def _head(nodes: Nodes) -> dict[str, Any]:
    memory = {"memory": 4 * 2**30}
    kinds = {
        pool: {"resources": resources | memory, "labels": {"pool": pool}, "node_config": {},
               "min_workers": 0, "max_workers": most}
        for pool, (resources, most) in POOLS.items()
    }  # fmt: skip
    kinds[FAKE_HEAD_NODE_TYPE] = {
        "resources": {"CPU": 0}, "labels": {"pool": "head"}, "node_config": {},
        "min_workers": 0, "max_workers": 0,
    }  # fmt: skip
    file = nodes.folder / "autoscaler.yaml"
    asked = {
        "cluster_name": "pools",
        "max_workers": sum(most for _, most in POOLS.values()),
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external", "module": "autoscaling.Machines", "disable_node_updaters": True,
            "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": nodes.address, "folder": str(nodes.folder),
        },
        "available_node_types": kinds,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        "file_mounts": {},
        **{name: [] for name in NO_COMMANDS},
    }  # fmt: skip
    file.write_text(json.dumps(asked))
    here = Path(__file__).parent
    return {
        "more": [f"--autoscaling-config={file}"],
        "environment": {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        },
    }
