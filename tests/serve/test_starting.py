"""What `t2v serve` says of a file that this machine cannot hold, or that keeps it waiting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from running import kill_tree

from cluster.ray_nodes import free_port
from serve_app.config import AppConfig
from serve_app.starting import check_fits, on_its_gpu
from t2v_core.errors import InvalidRequest


def test_the_fewest_replicas_are_what_must_fit():
    config = AppConfig.model_validate(
        {
            "denoiser": {"num_gpus": 0.75, "min_replicas": 2, "max_replicas": 9, "num_cpus": 1},
            "decoder": {"num_gpus": 0.25, "min_replicas": 0, "num_cpus": 1},  # without one there is no video
            "text_encoder": {"num_cpus": 0.5},
            "generator": {"num_cpus": 0.5, "num_replicas": 2},
            "ingress": {"num_cpus": 0, "resources": {"front": 1}},
        }
    )
    check_fits(config, {"CPU": 4.5, "GPU": 1.75, "front": 1.0})
    for short, message in [
        (
            {"CPU": 4.0},
            r"takes 4.5 CPU \(text_encoder 0.5, denoiser 2, decoder 1, generator 1\), and .* machine has 4;",
        ),
        ({"GPU": 1.5}, r"takes 1.75 GPU \(denoiser 1.5, decoder 0.25\)"),
        ({"front": 0.0}, r"takes 1 front \(ingress 1\), and this machine has 0; ask for less"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            check_fits(config, {"CPU": 4.5, "GPU": 1.75, "front": 1.0} | short)


def test_shares_that_add_up_but_for_rounding_fit():
    stages = {stage: {"num_cpus": 0.1} for stage in ("text_encoder", "decoder", "generator", "ingress")}
    config = AppConfig.model_validate(stages | {"denoiser": {"num_cpus": 0.6}})
    check_fits(config, {"CPU": 1.0})


def test_without_a_file_a_model_runs_on_the_gpu_that_there_is():
    config = AppConfig(model="some/model")
    assert on_its_gpu(config, {"CPU": 8.0}) == config
    assert on_its_gpu(AppConfig(), {"CPU": 8.0, "GPU": 1.0}) == AppConfig()
    placed = on_its_gpu(config, {"CPU": 2.0, "GPU": 1.0})
    check_fits(placed, {"CPU": 2.0, "GPU": 1.0})
    assert placed.model == "some/model"
    file = Path(__file__).parents[2] / "cluster" / "serve" / "gpu.yaml"
    (application,) = yaml.safe_load(file.read_text())["applications"]
    configured = AppConfig.model_validate(application["args"])
    for section, names in (("text_encoder", ["dtype"]), ("denoiser", ["num_gpus", "max_ongoing", "urgent_reserve"])):
        for name in names:
            assert getattr(getattr(placed, section), name) == getattr(getattr(configured, section), name)
    assert placed.decoder.num_gpus == configured.decoder.num_gpus


@pytest.mark.service
def test_what_it_waits_for_is_told(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("text_encoder: {label_selector: {pool: none}}")
    command = ["-m", "serve_app.cli", "serve", "--port", str(free_port()), "--config", str(file)]
    soon = {f"RAY_SERVE_SLOW_STARTUP_WARNING_{name}": "1" for name in ("S", "PERIOD_S")}
    process = subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        env={**os.environ, **soon},
        cwd=tmp_path,
        text=True,
    )
    try:
        # On a slow machine others are told of before it: their replicas, too, take more than a second.
        assert any("'TextEncoder'" in line and "scheduled" in line for line in process.stderr)
    finally:
        kill_tree(process.pid)
        process.wait()
