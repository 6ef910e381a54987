"""A cluster of a head without work, a node for what needs no GPU, and two of one "GPU" each; and the service for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clustered import NOT_NICE, Storage
from running import config

from cluster.ray_nodes import RayNodes
from serve_app.config import AppConfig

HEAD = ("--num-cpus=0",)
CPUS = ("--num-cpus=8", "--labels=pool=cpu")
GPU = ("--num-cpus=8", '--resources={"gpu": 1}', "--labels=pool=gpu")
NUM_GPUS = 2
DRAIN_S, HAND_BACK_S = 12, 9


@contextmanager
def four_nodes(folder: Path) -> Iterator[RayNodes]:
    """In the order above. They end with the block."""
    nodes = RayNodes(folder, {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S), **NOT_NICE})
    try:
        nodes.start_head(*HEAD)
        nodes.start_worker(*CPUS)
        for _ in range(NUM_GPUS):
            nodes.start_worker(*GPU)
        yield nodes
    finally:
        nodes.close()


def app_config(storage: Storage, **sections: Any) -> AppConfig:
    on_cpus = {"label_selector": {"pool": "cpu"}}
    values: dict[str, Any] = {
        "storage": storage,
        "text_encoder": on_cpus,
        "denoiser": {
            "min_replicas": 2, "max_replicas": 2, "urgent_reserve": 1, "num_threads": 1, "resources": {"gpu": 0.75},
            "hand_back_s": HAND_BACK_S, "checkpoint_every_s": 1.0,
        },
        "decoder": {
            "min_replicas": 2, "max_replicas": 2, "num_threads": 1, "resources": {"gpu": 0.25},
            "max_replicas_per_node": 1,
        },
        "generator": {"num_replicas": 2, "lease_s": 10.0, **on_cpus},
        "ingress": {"num_replicas": 2, **on_cpus},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return config(Path(), **values)
