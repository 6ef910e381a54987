"""What is deployed is what the files say, and mistakes in them are told before anything starts."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from serve_app.app import build
from serve_app.cli import app
from serve_app.config import AppConfig

SERVE = Path(__file__).parents[2] / "cluster" / "serve"
FILES = sorted(SERVE.glob("*.yaml"))


def deployments(application):
    """What would be deployed, by name."""
    found, waiting = {}, [application]
    while waiting:
        deployment = waiting.pop()._bound_deployment
        found[deployment.name] = deployment
        waiting += [argument for argument in deployment.init_args if isinstance(argument, Application)]
    return found


def test_the_local_file_says_the_defaults():
    (application,) = yaml.safe_load((SERVE / "local.yaml").read_text())["applications"]
    assert AppConfig.model_validate(application["args"]) == AppConfig()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_what_serve_deploys(file):
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    (application,) = deployed.applications
    assert (application.name, application.import_path) == ("t2v", "serve_app.app:build")
    assert deployed.http_options.host  # Ray's own default would be all interfaces with HAProxy
    AppConfig.model_validate(application.args)


@pytest.mark.parametrize("name", ["cluster", "gpu"])
def test_a_deployment_logs_json(name):
    deployed = ServeDeploySchema.model_validate(yaml.safe_load((SERVE / f"{name}.yaml").read_text()))
    assert deployed.logging_config is not None
    assert deployed.logging_config.encoding == "JSON"


def test_several_nodes_never_share_a_folder_or_sqlite():
    config = AppConfig.model_validate(yaml.safe_load((SERVE / "cluster.yaml").read_text())["applications"][0]["args"])
    assert config.storage.database.startswith("postgresql://")
    assert config.storage.artifacts.startswith("s3://")


def test_a_stage_takes_as_many_requests_as_it_is_scaled_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"denoiser": {"min_replicas": 0, "max_replicas": 4, "max_ongoing": 3, "urgent_reserve": 2, "num_gpus": 0.5}}
    config = AppConfig.model_validate({**args, "generator": {"num_replicas": 5}})
    denoiser = deployments(build(config))["Denoiser"]
    assert denoiser._deployment_config.autoscaling_config.target_ongoing_requests == 3
    assert denoiser._deployment_config.max_ongoing_requests == 3
    assert denoiser.ray_actor_options["num_gpus"] == 0.5
    fixed = AppConfig.model_validate({"denoiser": {**args["denoiser"], "min_replicas": 4}})
    denoiser = deployments(build(fixed))["Denoiser"]
    assert denoiser._deployment_config.max_ongoing_requests == 3 + 2
    assert config.jobs_per_generator * 5 >= 4 * 3
    assert (config.jobs_per_generator - 1) * 5 < 4 * 3


def test_a_part_is_placed_as_its_section_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_gpus = {"label_selector": {"pool": "gpu"}, "max_replicas_per_node": 1, "max_surge_percent": 50}
    config = AppConfig.model_validate({"decoder": on_gpus, "ingress": {"label_selector": {"pool": "cpu"}}})
    deployed = deployments(build(config))
    assert deployed["Decoder"].ray_actor_options["label_selector"] == {"pool": "gpu"}
    assert deployed["Decoder"]._replica_config.max_replicas_per_node == 1
    assert deployed["Decoder"]._deployment_config.max_surge_percent == 50
    assert deployed["Ingress"].ray_actor_options["label_selector"] == {"pool": "cpu"}
    assert "label_selector" not in deployed["Generator"].ray_actor_options


def test_a_version_that_does_not_start_displaces_no_part_that_needs_no_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    surges = {
        name: deployment._deployment_config.max_surge_percent
        for name, deployment in deployments(build(AppConfig())).items()
    }
    assert surges == {"Ingress": 100, "Generator": 100, "TextEncoder": 100, "Denoiser": 0, "Decoder": 0}


def test_all_that_has_ended_is_kept_for_as_long_whoever_ends_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deployed = deployments(build(AppConfig.model_validate({"generator": {"expires_in_s": 7200.0}})))
    assert deployed["Generator"].init_args[0].expires_in_s == 7200.0
    assert 7200.0 in deployed["Ingress"].init_args  # which ends what is cancelled while it waits


def test_relative_paths_are_taken_from_where_the_service_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = deployments(build(AppConfig()))["Ingress"].init_args[1]
    assert storage.database == f"sqlite:///{tmp_path}/outputs/t2v.db"
    assert storage.artifacts == f"{tmp_path}/outputs/store"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "demo"}, "modle"),
        ({"denoiser": {"max_ongoing": 0}}, "greater than or equal to 1"),
        ({"denoiser": {"precision": "fp4"}}, "'exact' or 'fp8'"),
        ({"denoiser": {"cached_steps": 10}}, "less than or equal to 9"),
        ({"decoder": {"precision": "fp8"}}, "decoder.precision"),
        ({"decoder": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas 3 is more than max_replicas 2"),
    ],
)
def test_a_mistake_in_the_arguments_is_told(args, message):
    with pytest.raises(ValidationError, match=message):
        AppConfig.model_validate(args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no.yaml"], "cannot be read"),
        (["--host", "0.0.0.0"], "without keys"),
        (["--port", "70000"], "choose another --port"),
    ],
)
def test_serve_tells_a_mistake_before_it_starts_ray(arguments, message):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


def test_a_file_with_an_unknown_field_is_refused_by_name(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("denoiser: {max_ongonig: 3}")
    result = CliRunner().invoke(app, ["serve", "--config", str(file)])
    assert result.exit_code == 2
    assert "denoiser.max_ongonig" in result.stderr


@pytest.mark.parametrize("text", ["- 1", "applications: [7]", "applications: {a: 1}"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["serve", "--config", str(file)])
    assert result.exit_code == 2
    assert "is neither a file" in result.stderr.replace("\n", " ")


def test_a_secret_that_is_refused_is_not_told():
    for values in ({"webhooks": {"secret": "hush"}}, {"webhook": {"secret": "hush"}}):
        with pytest.raises(ValidationError) as told:
            AppConfig.model_validate(values)
        assert "hush" not in str(told.value)
