"""The application: which deployments there are, what each is given, and who calls whom.

HTTP, handles -> Ingress -> Generator -> TextEncoder
                                      -> Denoiser
                                      -> Decoder
"""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig

from serve_app.config import AppConfig, Fixed, Placement, Scaling, StorageConfig
from serve_app.decoder import Decoder
from serve_app.denoiser import Denoiser
from serve_app.generator import Generator
from serve_app.ingress import Ingress
from serve_app.text_encoder import TextEncoder

_SQLITE = "sqlite:///"


def build(args: AppConfig) -> Application:
    """The service as Ray Serve runs it: `serve run --name t2v serve_app.app:build model=demo`, or in a config file."""
    config, storage, webhooks = args, _anchored(args), args.webhooks.with_secret()
    weights = config.model, config.revision
    reserve = config.denoiser.urgent_reserve
    text_encoder = _deployed(TextEncoder, _scaled(config.text_encoder), config).bind(*weights, config.text_encoder)
    denoiser = _deployed(Denoiser, _scaled(config.denoiser, reserve), config).bind(*weights, config.denoiser)
    decoder = _deployed(Decoder, _scaled(config.decoder), config).bind(*weights, config.decoder)
    stages = text_encoder, denoiser, decoder
    generator = _deployed(Generator, _fixed(config.generator, config.ingress.max_ongoing), config).bind(
        config.generator, storage, webhooks, *weights, config.jobs_per_generator, reserve, *stages
    )
    ingress = _deployed(serve.ingress()(Ingress), _fixed(config.ingress, config.ingress.max_ongoing), config)
    expires_in_s = config.generator.expires_in_s  # also of what is cancelled before any Generator has it
    return ingress.bind(config.ingress, storage, config.keys, webhooks, expires_in_s, *weights, generator, denoiser)


def _deployed(cls: type, options: dict[str, Any], config: AppConfig) -> Deployment:
    """A replica that dies is noticed soon, and one that is stopped may finish what it has begun."""
    return serve.deployment(
        health_check_period_s=config.health_check_s,
        health_check_timeout_s=max(10.0, 5 * config.health_check_s),
        graceful_shutdown_timeout_s=config.longest_generation_s,
        graceful_shutdown_wait_loop_s=0.5,
        **options,
    )(cls)


def _fixed(config: Fixed, max_ongoing: int) -> dict[str, Any]:
    return _placed(config) | {"num_replicas": config.num_replicas, "max_ongoing_requests": max_ongoing}


def _scaled(scaling: Scaling, reserve: int = 0) -> dict[str, Any]:
    """A stage's replicas take as many requests as they are scaled by: else the first takes all, and others idle."""
    options = _placed(scaling, scaling.num_gpus) | {"max_ongoing_requests": scaling.max_ongoing}
    if scaling.min_replicas == scaling.max_replicas:
        # While others are being started, the first replicas would fill the reserve as well.
        options["max_ongoing_requests"] = scaling.max_ongoing + reserve
        return options | {"num_replicas": scaling.max_replicas}
    autoscaling = AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.max_ongoing,
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        metrics_interval_s=1.0,
        look_back_period_s=3.0,
    )
    return options | {"autoscaling_config": autoscaling}


def _placed(placement: Placement, num_gpus: float = 0.0) -> dict[str, Any]:
    """Serve spreads a deployment's replicas over the nodes that have room for one and the labels asked for."""
    actor = {"num_cpus": placement.num_cpus, "num_gpus": num_gpus, "resources": placement.resources}
    if placement.label_selector:
        actor["label_selector"] = placement.label_selector
    return {
        "ray_actor_options": actor,
        "max_replicas_per_node": placement.max_replicas_per_node,
        "max_surge_percent": placement.max_surge_percent,
    }


def _anchored(config: AppConfig) -> StorageConfig:
    """Where things are kept, with relative paths made absolute: replicas run in folders of their own."""
    storage = config.storage
    database, artifacts = storage.database, storage.artifacts
    if database.startswith(_SQLITE):
        path = Path(database.removeprefix(_SQLITE)).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        database = f"{_SQLITE}{path}"
    if "://" not in artifacts:
        artifacts = str(Path(artifacts).absolute())
    return storage.model_copy(update={"database": database, "artifacts": artifacts})
