"""What the manifests take for granted of a running service: Ray's own metrics, and the call by handle."""

import os
import subprocess
import sys

import httpx2
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from running import config, ray_started, running, wait_for

from cluster.monitoring import RAYS_OWN
from cluster.ray_nodes import free_port
from cluster.render import KUBERAY
from t2v_core.video_input import read_video

pytestmark = pytest.mark.service


def test_rays_own_metrics_have_these_names_and_the_example_calls_by_handle(tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    with ray_started(metrics_port=port), running(config(tmp_path / "service")) as service:
        assert service.client.get("/v1/models").status_code == 200

        def told() -> bool:
            families = text_string_to_metric_families(httpx2.get(url, timeout=10).text)
            samples = {sample.name: set(sample.labels) for family in families for sample in family.samples}
            return all(set(labels) <= samples[name] for name, labels in RAYS_OWN.items())

        wait_for(told, 60, every_s=1)

        address = ray.get_runtime_context().gcs_address
        environment = {**os.environ, "RAY_ADDRESS": address, "TMPDIR": str(tmp_path)}
        example = KUBERAY / "examples" / "handle-caller" / "call.py"
        ran = subprocess.run([sys.executable, example], env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        for path in ran.stdout.split():
            assert len(read_video(path, width=128, height=128, fps=8, num_frames=16)) == 16
        assert len(ran.stdout.split()) == 2
