"""Ray's own autoscaler brings nodes for the denoisers that jobs ask for, and takes them away again."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from clustered import LONG_S, NOT_NICE, Clustered, Storage, all_ended, clustered
from loopback_provider import autoscaling_config
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from running import config, wait_for

from cluster.ray_nodes import RayNodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

GPU_NODES = {"gpu": {"resources": {"CPU": 4, "gpu": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3}}


@pytest.fixture
def nodes(folder: Path) -> Iterator[RayNodes]:
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    environment = {
        "PYTHONPATH": f"{root}:{here}",  # of the provider, beside the service
        **NOT_NICE,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    nodes = RayNodes(folder, environment)
    file = folder / "autoscaling.yaml"
    file.write_text(yaml.safe_dump(autoscaling_config(nodes, FAKE_HEAD_NODE_ID, GPU_NODES)))
    try:
        nodes.start_head("--num-cpus=4", f"--autoscaling-config={file}")
        yield nodes
    finally:
        nodes.close()


@pytest.fixture
def service(nodes: RayNodes, storage: Storage) -> Iterator[Clustered]:
    on_demand = {"min_replicas": 0, "num_threads": 1, "upscale_delay_s": 0.5, "downscale_delay_s": 8.0}
    app_config = config(
        Path(),
        storage=storage,
        denoiser={
            **on_demand,
            "max_replicas": 3,
            "max_ongoing": 1,
            "urgent_reserve": 0,
            "resources": {"gpu": 0.75},
            "checkpoint_every_s": 2.0,
        },
        decoder={**on_demand, "max_replicas": 3, "resources": {"gpu": 0.25}, "max_replicas_per_node": 1},
    )
    with clustered(nodes, app_config) as service:
        yield service


def test_from_no_denoiser_to_three_on_new_nodes_and_back_and_no_job_is_lost(service: Clustered):
    assert living(service) == 1
    assert service.all_replicas("Denoiser") == service.all_replicas("Decoder") == []
    began = time.monotonic()
    videos = [service.create(seed=seed, num_inference_steps=30) for seed in range(6)]
    wait_for(lambda: len(service.all_replicas("Denoiser")) >= 1, LONG_S, every_s=0.2)
    note("the first denoiser runs", began)
    wait_for(lambda: len(service.all_replicas("Denoiser")) == 3, LONG_S, every_s=0.2)
    note("three denoisers run", began)
    assert len({replica.ip for replica in service.all_replicas("Denoiser")}) == 3
    wait_for(lambda: service.all_replicas("Decoder"), LONG_S, every_s=0.2)
    assert living(service) == 4
    assert all_ended(service, videos) == ["completed"] * len(videos)
    note("six jobs are done", began)
    assert sorted(service.completions()) == sorted(videos)
    began = time.monotonic()
    wait_for(lambda: not service.all_replicas("Denoiser") and not service.all_replicas("Decoder"), LONG_S, every_s=0.5)
    note("no denoiser is left", began)
    wait_for(lambda: living(service) == 1, LONG_S, every_s=1.0)
    note("no node is left but the head", began)


def living(service: Clustered) -> int:
    """How many nodes there are, the head among them, by the processes that run."""
    sessions = [file.read_text() for file in service.nodes.folder.glob("n*/session")]
    return sum(Path("/proc", session).exists() for session in sessions)


def note(what: str, began: float) -> None:
    """For the guide, with pytest -s."""
    print(f"\n{what}: {time.monotonic() - began:.1f} s")  # noqa: T201
