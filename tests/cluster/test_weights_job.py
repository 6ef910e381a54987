"""The job that fetches the weights, as its shell runs it, with a `t2v` that only says which process it is."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.render import KUBERAY

(CONTAINER,) = (
    container
    for manifest in yaml.safe_load_all((KUBERAY / "components" / "weights" / "weights.yaml").read_text())
    if manifest["kind"] == "Job"
    for container in manifest["spec"]["template"]["spec"]["containers"]
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / ".text-to-video-ms-1.7b-k1ll3d" / "unet").mkdir(parents=True)
    (folder / ".zeroscope_v2_576w-0ther").mkdir()
    return folder


def run(models: Path) -> tuple[int, str]:
    """Its process's id, and what it prints."""
    (t2v := models.parent / "t2v").write_text('#!/bin/sh\necho $$ "$@"\n')
    t2v.chmod(0o755)
    given = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    environment = given | {"TARGET": str(models / Path(given["TARGET"]).name)}
    environment |= {"PATH": f"{models.parent}:{os.environ['PATH']}"}
    command = [*CONTAINER["command"], *CONTAINER["args"]]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return process.pid, printed


def test_what_a_killed_attempt_left_goes_and_a_signal_reaches_the_next(models):
    pid, printed = run(models)
    assert printed.split()[:2] == [str(pid), "convert"]  # the process that Kubernetes ends
    assert [path.name for path in models.iterdir()] == [".zeroscope_v2_576w-0ther"]


def test_weights_that_are_there_stay(models):
    (models / "text-to-video-ms-1.7b").mkdir()
    (models / "text-to-video-ms-1.7b" / "model_index.json").write_text("{}")
    assert "already there" in run(models)[1]
