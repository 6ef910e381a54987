"""The command line of the whole: what `t2v_core.cli` has, `t2v serve`, and the commands for a running service.

Torch and Ray are imported only by the commands that need them.
"""

import contextlib
import io
import logging
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from typer.core import TyperGroup

from serve_app.commands import commands

if TYPE_CHECKING:
    from serve_app.config import AppConfig

__all__ = ["app"]

_OBJECT_STORE_BYTES = 256 << 20  # latents and videos on their way are a few MB
_APP_NAME = "t2v"


class _WithCore(TyperGroup):
    """Has the commands of `t2v_core.cli` as well, which imports torch, once one of them or all are asked for."""

    # Any: typer has moved the types of click between its releases.
    def list_commands(self, ctx: Any) -> list[str]:
        return [*_core().list_commands(ctx), *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _core().get_command(ctx, cmd_name)


def _core() -> TyperGroup:
    _let_threads_sleep()
    from t2v_core.cli import app

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _let_threads_sleep() -> None:
    """Those of torch that wait: beside a busy core they would take another from those that work, for most of the time.

    Before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


app = typer.Typer(
    cls=_WithCore,
    help="Text to video with ModelScope's 1.7 B diffusion model.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(commands)


@app.callback()
def _logging() -> None:
    handler = RichHandler(console=Console(stderr=True))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="0.0.0.0 lets others in: give it keys then.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the HTTP API and the page.")] = 8000,
    model: Annotated[str | None, typer.Option(help="demo, a folder, or a Hugging Face id.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file for `serve deploy`, or the args of one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Of the metrics for Prometheus; else some free one.")] = None,
    first_prompt: Annotated[
        str | None, typer.Option(help="Make a video of this through the API, once it is up.")
    ] = None,
    first_output: Annotated[Path, typer.Option(help="Where that video goes.")] = Path("outputs/first.mp4"),
    once: Annotated[bool, typer.Option("--once", help="Stop after the first video.")] = False,
) -> None:
    """Serve the model on this machine, in the foreground: HTTP API and web page. Ctrl-C stops it; jobs are kept.

    Without --config, a model other than the demo runs on a GPU where there is one.
    """
    from t2v_core.cli import errors_explained
    from t2v_core.errors import InvalidRequest

    console = Console(stderr=True)
    with errors_explained(console):
        app_config = _app_config(config, model)
        if not _is_loopback(host) and app_config.keys.file is None and app_config.keys.keys is None:
            raise InvalidRequest(
                f"host {host} without keys: anybody who reaches it could use it; set keys.file in --config",
                param="host",
            )
        _check_port(host, port)
        is_configured = config is not None
        _serve(console, app_config, is_configured, host, port, metrics_port, first_prompt, first_output, once)


@app.command("webhook-secret")
def webhook_secret(
    owner: Annotated[str, typer.Argument(help='Name of the API key, or "local" where the service has no keys.')],
    config: Annotated[Path, typer.Option(help="The YAML file that the service is started with.")],
) -> None:
    """Print the secret with which that key's webhooks are signed, for whoever receives them."""
    from t2v_core.cli import errors_explained
    from t2v_core.errors import InvalidRequest

    with errors_explained(Console(stderr=True)):
        from serve_app.webhooks import signing_secret

        secret = _app_config(config, None).webhooks.with_secret().secret
        if secret is None:
            raise InvalidRequest(f"config {config}: has no webhooks.secret; set one first", param="config")
        typer.echo(signing_secret(secret, owner))


def _serve(
    console: Console,
    config: "AppConfig",
    is_configured: bool,
    host: str,
    port: int,
    metrics_port: int | None,
    first_prompt: str | None,
    first_output: Path,
    once: bool,
) -> None:
    _let_threads_sleep()
    import ray
    from ray import serve

    from serve_app import starting
    from serve_app.app import build

    started = time.monotonic()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    starting_model = f"Starting {escape(config.model)}"
    with console.status(starting_model):
        ray.init(
            address="local",  # whatever RAY_ADDRESS says
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _metrics_export_port=metrics_port,
        )
        machine = ray.cluster_resources()  # type: ignore[no-untyped-call]
        if not is_configured:
            config = starting.on_its_gpu(config, machine)
        starting.check_fits(config, machine)
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    address = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{address}:{port}"
    try:
        with console.status(starting_model):
            tell = partial(console.print, markup=False, soft_wrap=True, highlight=False)
            starting.run(build(config), _APP_NAME, tell)
        console.print(
            f"{url}: the page, and the API under /v1 ({time.monotonic() - started:.0f} s)",
            markup=False,
            highlight=False,
        )
        if first_prompt is not None:
            _make_first(console, url, first_prompt, first_output, os.environ.get("T2V_KEY"))
        if not once:
            console.print("Ctrl-C stops it.")
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except KeyboardInterrupt:
        pass
    finally:
        # Ray prints there that the controller ended while it was asked to end.
        with console.status("Stopping"), contextlib.redirect_stdout(io.StringIO()):
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def _make_first(console: Console, url: str, prompt: str, output: Path, key: str | None) -> None:
    """A video through the HTTP API, as any client makes one."""
    from serve_app.client import ApiError, Client
    from serve_app.commands import watched
    from t2v_core.errors import GenerationFailed, OutputError

    try:
        with Client(url, key) as client:
            video = watched(console, client, client.create(prompt).id)
            if video.status != "completed":
                raise GenerationFailed(f"video {video.id}: {video.status} ({video.error}); see the logs in /tmp/ray")
            output.parent.mkdir(parents=True, exist_ok=True)
            client.download(video.id, output)
    except ApiError as error:
        raise GenerationFailed(f"the first video: {error}") from error
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another path") from error
    console.print(
        f"{output}: {video.size}, {video.num_frames} frames, seed {video.seed}", markup=False, highlight=False
    )


def _app_config(path: Path | None, model: str | None) -> "AppConfig":
    """The configuration of a file, with the model of the command line. Raises InvalidRequest."""
    import yaml
    from pydantic import ValidationError

    from serve_app.config import AppConfig
    from t2v_core.errors import InvalidRequest

    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidRequest(
                f"config {path}: cannot be read ({error}); name a YAML file", param="config"
            ) from error
        values = _args_of(loaded)
        if not isinstance(values, dict):
            raise InvalidRequest(
                f"config {path}: is neither a file for `serve deploy` nor its args; see cluster/serve/local.yaml",
                param="config",
            )
    if model is not None:
        values = {**values, "model": model}
    try:
        return AppConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "config"
        what = "no such field" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidRequest(f"config {path}: {name}: {what}; see cluster/serve/local.yaml", param=name) from error


def _args_of(loaded: Any) -> Any:
    """Of the first application, where the file names any. Any: as it was written."""
    applications = loaded.get("applications") if isinstance(loaded, dict) else None
    if not applications:
        return loaded
    first = applications[0] if isinstance(applications, list) else None
    return (first.get("args") or {}) if isinstance(first, dict) else None


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_port(host: str, port: int) -> None:
    from t2v_core.errors import InvalidRequest

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise InvalidRequest(
                f"port {port} on {host}: cannot be used ({error}); choose another --port", param="port"
            ) from error


if __name__ == "__main__":
    app()
