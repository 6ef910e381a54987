"""A node provider for Ray's own autoscaler, whose machines are loopback addresses. It runs in the head's monitor.

Ray's provider for its own tests makes nodes inside the monitor; here each is begun with `ray start`, as on any machine.
"""

import json
import os
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.ray_nodes import RayNode, RayNodes, start_node

_FIRST = 100  # the last number of the first address; lower ones are for nodes that a test itself starts

# Of these there is no default for a provider that Ray does not know.
_COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip


class LoopbackProvider(FakeMultiNodeProvider):
    """Starts and ends nodes. What it knows of them is enough for Ray to tell which of them have come up."""

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        for _ in range(count):
            with self.lock:
                node_id = self._next_hex_node_id()
                self._nodes[node_id] = {
                    "tags": {
                        TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                        TAG_RAY_NODE_NAME: node_id,
                        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
                        **tags,
                    },
                    "node": self._start(node_id, tags[TAG_RAY_USER_NODE_TYPE], dict(resources)),
                }

    def terminate_node(self, node_id: str) -> None:
        with self.lock:
            self._nodes.pop(node_id)["node"].kill()

    def _start(self, node_id: str, node_type: str, resources: dict[str, float]) -> RayNode:
        config = self.provider_config
        return start_node(
            Path(config["folder"]),
            f"{config['network']}.{_FIRST + self._next_node_id}",
            {
                **os.environ,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
                "RAY_CLOUD_INSTANCE_ID": node_id,
                "RAY_NODE_TYPE_NAME": node_type,
            },
            f"--address={config['gcs_address']}",
            f"--num-cpus={resources.pop('CPU', 0):.0f}",
            f"--resources={json.dumps({name: value for name, value in resources.items() if name != 'memory'})}",
            f"--labels=ray.io/node-group={node_type}",
        )


def autoscaling_config(nodes: RayNodes, head_node_id: str, node_types: dict[str, Any]) -> dict[str, Any]:
    """What `ray start --head --autoscaling-config` is given: `node_types` can come, the head is there."""
    head = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    return {
        "cluster_name": "loopback",
        "max_workers": sum(node_type["max_workers"] for node_type in node_types.values()),
        "provider": {
            "type": "external",
            "module": "loopback_provider.LoopbackProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head_node_id": head_node_id,
            "gcs_address": nodes.address,
            "network": nodes.network,
            "folder": str(nodes.folder),
        },
        "available_node_types": node_types | head,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.3,
        "auth": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in _COMMANDS},
        "file_mounts": {},
        "docker": {},
    }
