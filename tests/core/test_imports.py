"""Who may import whom, as CONTRIBUTING.md draws it: arrows point one way."""

import ast
from pathlib import Path

import pytest

import t2v_core

ROOT = Path(t2v_core.__file__).parent

# Each part of t2v_core, and the parts that it may import.
ALLOWED = {
    "errors": set(),
    "shapes": set(),
    "config": set(),
    "schedule": {"config"},
    "layers": set(),
    "unet3d": {"config", "layers"},
    "autoencoder": {"config", "layers", "shapes"},
    "text_encoder": {"config", "errors"},
    "samplers": {"config", "schedule"},
    "guidance": {"out_of_memory", "unet3d"},
    "trajectory": {"errors", "shapes"},
    "out_of_memory": {"errors"},
    "denoising": {"guidance", "out_of_memory", "samplers", "trajectory", "unet3d"},
    "truncation": set(),
    "video_input": {"errors", "truncation"},
    "media": {"errors"},
    "pictures": {"errors", "media", "video_input"},
    "params": {"config", "errors", "media", "shapes", "video_input"},
    "video": {"media", "params"},
    "weights": {"autoencoder", "config", "errors", "text_encoder", "unet3d"},
    "demo": {
        "autoencoder",
        "config",
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
    },
    "pipeline": {
        "autoencoder",
        "config",
        "denoising",
        "errors",
        "guidance",
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
    "cli": {"config", "errors", "media", "params", "pipeline", "video", "weights"},
    "__init__": {"errors", "params", "pipeline", "trajectory", "video"},
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


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


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


def test_the_drawing_has_no_circles():
    def reaches(part: str, seen: frozenset[str] = frozenset()) -> None:
        assert part not in seen, f"{part} imports itself through {sorted(seen)}"
        for below in ALLOWED[part]:
            reaches(below, seen | {part})

    for part in ALLOWED:
        reaches(part)
