"""Starting the service on this machine: on its GPU, whether it fits, and what keeps it waiting or from starting."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import DeploymentStatusOverview

from serve_app.config import AppConfig
from serve_app.errors import Unavailable
from t2v_core.errors import InvalidRequest

_LOOK_EVERY_S = 1.0
_SLACK = 1e-6  # shares of a core or a GPU are added up

# As in cluster/serve/gpu.yaml, but for cores, of which this machine may have few.
_ON_A_GPU: dict[str, dict[str, Any]] = {
    "text_encoder": {"num_threads": 0, "dtype": "bf16"},
    "denoiser": {"num_gpus": 0.75, "max_ongoing": 8, "urgent_reserve": 2},
    "decoder": {"num_gpus": 0.25},
}


def on_its_gpu(config: AppConfig, machine: Mapping[str, float]) -> AppConfig:
    """The defaults with denoiser and decoder on a GPU of the machine, if it has one. The demo does without."""
    if config.model == AppConfig().model or machine.get("GPU", 0.0) < 1.0:
        return config
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in _ON_A_GPU.items()}
    return config.model_copy(update=sections)


def check_fits(config: AppConfig, machine: Mapping[str, float]) -> None:
    """Raises InvalidRequest where the fewest replicas that can make a video take more than the machine has.

    Serve would wait for ever. `machine`: what it has in all, by Ray's names, "CPU" and "GPU" among them.
    """
    wanted: dict[str, dict[str, float]] = {}  # by resource and part
    for name, part in config.parts.items():
        fewest, _ = part.replicas
        for resource, amount in part.taken.items():
            wanted.setdefault(resource, {})[name] = max(1, fewest) * amount
    for resource, parts in wanted.items():
        has, wants = machine.get(resource, 0.0), sum(parts.values())
        if wants > has + _SLACK:
            shares = ", ".join(f"{part} {amount:g}" for part, amount in parts.items() if amount)
            raise InvalidRequest(
                f"config: takes {wants:g} {resource} ({shares}), and this machine has {has:g}; "
                "ask for less, or for fewer replicas",
                param="config",
            )


def run(application: Application, name: str, tell: Callable[[str], None]) -> None:
    """Start it, and return when it can work. What it waits for, if that takes long, is told meanwhile.

    Raises Unavailable, with what each deployment said, where they do not start.
    """
    try:
        with _waiting_is_told(name, tell):
            serve.run(application, name=name, blocking=False)
    except RuntimeError as error:
        deployments = serve.status().applications[name].deployments.values()
        reasons = dict.fromkeys(filter(None, map(_reason, deployments)))  # each but once
        raise Unavailable(
            f"the service did not start ({'; '.join(reasons) or error}): all that it said is in "
            "/tmp/ray/session_latest/logs/serve"
        ) from error


@contextmanager
def _waiting_is_told(name: str, tell: Callable[[str], None]) -> Iterator[None]:
    is_over = threading.Event()
    thread = threading.Thread(target=_tell_reasons, args=(name, tell, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _tell_reasons(name: str, tell: Callable[[str], None], is_over: threading.Event) -> None:
    """What Serve says of deployments that are not up, each but once."""
    told: set[str] = set()
    while not is_over.wait(_LOOK_EVERY_S):
        with suppress(Exception):  # the application is not known yet, or the controller busy: it is asked again
            for deployment in serve.status().applications[name].deployments.values():
                reason = None if deployment.status.name == "HEALTHY" else _reason(deployment)
                if reason and reason not in told:
                    told.add(reason)
                    tell(reason)


def _reason(deployment: DeploymentStatusOverview) -> str:
    """The line of Serve's message that says most: the last of a traceback, the first of a hint. May be empty."""
    lines = deployment.message.strip().splitlines()
    if not lines:
        return ""
    return lines[-1] if "Traceback" in deployment.message else lines[0]
