"""Who may import whom, as CONTRIBUTING.md draws it: arrows point one way."""

import ast
from pathlib import Path

import pytest

import serve_app
import t2v_core

ROOT = Path(t2v_core.__file__).parent
SERVICE = Path(serve_app.__file__).parent
CLUSTER = ROOT.parent / "cluster"

# Each part of t2v_core, and the parts that it may import.
ALLOWED = {
    "errors": set(),
    "shapes": set(),
    "config": {"shapes"},
    "schedule": {"config"},
    "transfers": set(),
    "kernels": set(),
    "layers": {"kernels"},
    "transformers": {"kernels", "layers"},
    "unet3d": {"config", "kernels", "layers", "transformers"},
    "autoencoder": {"config", "kernels", "layers", "shapes"},
    "graphs": {"autoencoder", "out_of_memory", "shapes", "unet3d"},
    "text_encoder": {"config", "errors"},
    "samplers": {"config", "kernels", "schedule"},
    "guidance": {"out_of_memory", "transfers", "unet3d"},
    "trajectory": {"errors", "shapes", "transfers"},
    "out_of_memory": {"errors"},
    "denoising": {"guidance", "out_of_memory", "samplers", "trajectory", "transfers", "unet3d"},
    "truncation": set(),
    "upright": set(),
    "video_input": {"errors", "truncation", "upright"},
    "media": {"errors"},
    "pictures": {"errors", "media", "video_input"},
    "params": {"config", "errors", "media", "out_of_memory", "shapes", "video_input"},
    "video": {"media", "params"},
    "weights": {"autoencoder", "config", "errors", "out_of_memory", "text_encoder", "unet3d"},
    "demo": {
        "autoencoder",
        "config",
        "layers",
        "params",
        "pictures",
        "pipeline",
        "schedule",
        "text_encoder",
        "unet3d",
        "weights",
    },
    "engine": {
        "autoencoder",
        "denoising",
        "errors",
        "guidance",
        "out_of_memory",
        "shapes",
        "trajectory",
        "transfers",
        "unet3d",
    },
    "stages": {
        "autoencoder",
        "errors",
        "guidance",
        "out_of_memory",
        "params",
        "samplers",
        "schedule",
        "text_encoder",
        "trajectory",
        "transfers",
    },
    "pipeline": {
        "autoencoder",
        "config",
        "denoising",
        "errors",
        "graphs",
        "guidance",
        "kernels",
        "out_of_memory",
        "params",
        "samplers",
        "schedule",
        "stages",
        "text_encoder",
        "trajectory",
        "unet3d",
        "video",
        "weights",
    },
    "cli": {"config", "errors", "media", "params", "pipeline", "video", "video_input", "weights"},
    "__init__": {"errors", "params", "pipeline", "trajectory", "video"},
}
# The same of serve_app. All of it may use t2v_core.
SERVICE_ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "config": set(),
    "calls": set(),
    "owners": set(),
    "draining": set(),
    "bounds": {"errors"},
    "turns": set(),
    "jobs": {"bounds", "errors"},
    "folder": {"errors"},
    "bucket": {"errors"},
    "artifacts": {"bucket", "errors", "folder", "jobs"},
    "auth": {"errors"},
    "remote": {"errors"},
    "metrics": set(),
    "job_logs": set(),
    "job_metrics": {"jobs", "metrics"},
    "memory": {"metrics"},
    "engine_metrics": {"memory", "metrics"},
    "devices": {"config"},
    "sizes": set(),
    "sweeper": {"artifacts", "errors", "jobs"},
    "schemas": {"errors", "jobs"},
    "webhooks": {"config", "jobs"},
    "bodies": {"errors"},
    "inputs": {"sizes"},
    "requests": {"bodies", "inputs", "jobs", "schemas", "sizes"},
    "failures": {"errors", "requests", "schemas"},
    "document": {"schemas"},
    "content": {"artifacts", "errors", "failures", "jobs", "schemas"},
    "events": {"artifacts", "errors", "jobs", "schemas"},
    "parts": {"artifacts", "auth", "bounds", "errors", "events", "jobs", "sizes"},
    "videos": {
        "bodies",
        "content",
        "errors",
        "events",
        "inputs",
        "job_logs",
        "jobs",
        "parts",
        "requests",
        "schemas",
        "sizes",
    },
    "cross_site": {"errors", "parts"},
    "api": {"cross_site", "document", "failures", "parts", "schemas", "videos"},
    "health": {"errors"},
    "text_encoder": {"config", "devices", "health", "job_logs", "metrics"},
    "decoder": {"calls", "config", "devices", "health", "job_logs", "memory", "metrics"},
    "denoiser": {
        "calls",
        "config",
        "devices",
        "draining",
        "engine_metrics",
        "errors",
        "health",
        "job_logs",
        "memory",
        "metrics",
        "owners",
        "sizes",
    },
    "chain": {"calls", "remote"},
    "origin": {"jobs"},
    "tracing": set(),
    "attempt": {"artifacts", "calls", "chain", "config", "errors", "inputs", "job_logs", "jobs", "metrics", "origin"},
    "generator": {
        "artifacts",
        "attempt",
        "calls",
        "chain",
        "config",
        "errors",
        "job_logs",
        "job_metrics",
        "jobs",
        "metrics",
        "owners",
        "sweeper",
        "turns",
        "webhooks",
    },
    "ingress": {
        "api",
        "artifacts",
        "auth",
        "bounds",
        "calls",
        "config",
        "events",
        "inputs",
        "job_logs",
        "job_metrics",
        "jobs",
        "metrics",
        "origin",
        "owners",
        "remote",
        "sizes",
        "webhooks",
    },
    "app": {"config", "decoder", "denoiser", "generator", "ingress", "text_encoder"},
    "starting": {"config", "errors"},
    "client": set(),
    "commands": {"client"},
    "cli": {"app", "client", "commands", "config", "starting", "webhooks"},
}
# The same of cluster, which checks what is deployed and is no part of it.
CLUSTER_ALLOWED = {
    "__init__": set(),
    "manifests": set(),
    "render": set(),
    "schemas": {"manifests"},
    "operator_rules": {"manifests"},
    "placement": {"manifests"},
    "serving": {"manifests", "placement"},
    "security": {"manifests"},
    "monitoring": {"manifests"},
    "validate": {"manifests", "monitoring", "operator_rules", "render", "schemas", "security", "serving"},
    "ray_nodes": set(),
    "local": {"ray_nodes", "render"},
}
CLUSTER_OTHERS = {
    "placement": {"serve_app.config", "serve_app.config.AppConfig", "serve_app.config.Placement"},
    "serving": {
        "ray.serve.schema",
        "ray.serve.schema.ServeDeploySchema",
        "serve_app.config",
        "serve_app.config.AppConfig",
    },
    "monitoring": {"serve_app.metrics", "serve_app.metrics.METRICS", "serve_app.metrics.MetricSpec"},
}
# Only the deployments know Ray, only the API knows HTTP, only the store knows SQL.
LIBRARIES = {
    "ray": {
        "memory",
        "metrics",
        "text_encoder",
        "chain",
        "generator",
        "ingress",
        "app",
        "starting",
        "cli",
        "draining",
        "origin",
        "owners",
        "remote",
    },
    "fastapi": {"api", "content", "cross_site", "document", "failures", "ingress", "parts", "videos"},
    "sqlalchemy": {"jobs"},
    "fsspec": {"bucket", "artifacts"},
}
FORBIDDEN = {"ray", "fastapi", "starlette", "sqlalchemy", "serve_app", "load_tests", "diffusers", "transformers"}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def part_of(path: Path, root: Path = ROOT) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path):
    part = part_of(path)
    assert part in ALLOWED, f"say in this test what {part} may import"
    for name in imports_of(path):
        first, *rest = name.split(".")
        assert first not in FORBIDDEN
        if first == "t2v_core" and rest and rest[0] in ALLOWED and rest[0] != part:
            assert rest[0] in ALLOWED[part], f"{part} must not import {rest[0]}"


@pytest.mark.parametrize("path", sorted(SERVICE.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVICE)))
def test_a_module_of_the_service_imports_only_what_lies_below_it(path):
    part = part_of(path, SERVICE)
    assert part in SERVICE_ALLOWED, f"say in this test what {part} may import"
    for name in imports_of(path):
        first, *rest = name.split(".")
        assert part in LIBRARIES.get(first, {part}), f"{part} must not import {first}"
        if first == "serve_app" and rest and rest[0] in SERVICE_ALLOWED and rest[0] != part:
            assert rest[0] in SERVICE_ALLOWED[part], f"{part} must not import {rest[0]}"


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.py")), ids=lambda path: str(path.relative_to(CLUSTER)))
def test_a_module_of_the_cluster_imports_only_what_lies_below_it(path):
    part = part_of(path, CLUSTER)
    assert part in CLUSTER_ALLOWED, f"say in this test what {part} may import"
    for name in imports_of(path):
        first, *rest = name.split(".")
        if first in ("ray", "serve_app", "t2v_core", "load_tests"):
            assert name in CLUSTER_OTHERS.get(part, set()), f"{part} must not import {name}"
        if first == "cluster" and rest:
            assert rest[0] in CLUSTER_ALLOWED[part], f"{part} must not import {rest[0]}"


@pytest.mark.parametrize(
    "allowed", [ALLOWED, SERVICE_ALLOWED, CLUSTER_ALLOWED], ids=["t2v_core", "serve_app", "cluster"]
)
def test_the_drawing_has_no_circles(allowed):
    def reaches(part: str, seen: frozenset[str] = frozenset()) -> None:
        assert part not in seen, f"{part} imports itself through {sorted(seen)}"
        for below in allowed[part]:
            reaches(below, seen | {part})

    for part in allowed:
        reaches(part)
