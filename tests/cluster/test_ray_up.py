"""The file for `ray up` is one, by Ray's own schema, and its nodes have room for what is deployed on them."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray._private.label_utils import validate_node_labels

from serve_app.config import AppConfig

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.fixture
def file():
    return yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())


@pytest.fixture
def schema():
    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def test_ray_takes_the_file(file, schema):
    jsonschema.validate(file, schema)
    for node_type in file["available_node_types"].values():
        validate_node_labels(node_type["labels"])
    assert file["head_node_type"] in file["available_node_types"]


def test_the_token_is_where_ray_looks_for_it_in_the_image(file):
    (home,) = re.findall(r"^ +HOME=(\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert f"{home}/.ray/auth_token" in file["file_mounts"]


def test_ray_refuses_a_field_that_it_does_not_know(file, schema):
    file["available_node_types"]["gpu"]["max_wokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        jsonschema.validate(file, schema)


def test_the_nodes_have_room_for_all_that_is_deployed(file):
    serve = yaml.safe_load((CLUSTER / "serve" / "cluster.yaml").read_text())
    config = AppConfig.model_validate(serve["applications"][0]["args"])
    types = file["available_node_types"].values()
    gpus = [t["resources"]["GPU"] for t in types for _ in range(t["max_workers"]) if "GPU" in t["resources"]]
    stages = config.denoiser, config.decoder
    assert sum(stage.max_replicas * stage.num_gpus for stage in stages) <= sum(gpus)
    assert sum(stage.num_gpus for stage in stages) <= min(gpus)  # one of each to a GPU, and none is left over
    assert config.decoder.max_replicas_per_node == max(gpus)
    with_gpus = [t for t in types if "GPU" in t["resources"]]
    assert sum(stage.num_cpus for stage in stages) <= min(t["resources"]["CPU"] for t in with_gpus)


def test_what_needs_no_gpu_has_nodes_of_its_own(file):
    serve = yaml.safe_load((CLUSTER / "serve" / "cluster.yaml").read_text())
    config = AppConfig.model_validate(serve["applications"][0]["args"])
    counts = [
        (config.text_encoder, config.text_encoder.max_replicas),
        *((part, part.num_replicas) for part in (config.generator, config.ingress)),
    ]
    (selector,) = {tuple(part.label_selector.items()) for part, _ in counts}
    chosen = [t for t in file["available_node_types"].values() if dict(selector).items() <= t["labels"].items()]
    assert chosen
    assert not any("GPU" in t["resources"] for t in chosen)
    cores = sum(t["max_workers"] * t["resources"]["CPU"] for t in chosen)
    assert sum(part.num_cpus * count for part, count in counts) <= cores
