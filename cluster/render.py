"""Writes the manifests' Serve configurations: each is a file of cluster/serve, and what an overlay changes of it.

`python -m cluster.render` writes them, `python -m cluster.render --check` says which ones are not what it would write.
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent
SERVE, KUBERAY = ROOT / "serve", ROOT / "kuberay"
SOURCE, MADE = "serve.yaml", "serve-config.yaml"

Config = dict[str, Any]  # YAML, which may hold anything


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Changes(_Section):
    """What differs from cluster/serve's file; `args` are the application's. Mappings are merged, the rest replaced."""

    proxy_location: Literal["EveryNode", "HeadOnly"] | None = None
    http_options: dict[str, str | int] = {}
    args: Config = {}


class Source(_Section):
    """An overlay's serve.yaml. `plain` writes the configuration itself, and not a RayService's patch."""

    base: str
    plain: bool = False
    changes: Changes = Changes()


def serve_config(source: Source, serve: Path = SERVE) -> Config:
    """The file of cluster/serve, changed."""
    config: Config = yaml.safe_load((serve / source.base).read_text(encoding="utf-8"))
    (application,) = config["applications"]
    options = source.changes.model_dump(exclude_none=True, exclude={"args"})
    merged = merge(config, options)
    return merged | {"applications": [application | {"args": merge(application["args"], source.changes.args)}]}


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> Config:
    """Mappings within mappings are merged; anything else replaces what was there."""
    merged = dict(old)
    for key, value in new.items():
        before = old.get(key)
        merged[key] = merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def rendered(path: Path) -> tuple[Path, str]:
    """The file that a serve.yaml makes, and what is in it."""
    source = Source.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    config, made_by = serve_config(source), f"# Made by `python -m cluster.render` of cluster/serve/{source.base} and"
    note = f"{made_by} {SOURCE} beside this: change those.\n"
    if source.plain:
        return path.with_name(MADE), note + _yaml(config)
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "t2v"},
        "spec": {"serveConfigV2": _Text(_yaml(config))},
    }
    return path.with_name(MADE), note + _yaml(patch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file would change")
    check = parser.parse_args().check
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stale = []
    for path, text in map(rendered, sorted(KUBERAY.rglob(SOURCE))):
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        logger.info("%s: %s", path, "is not what cluster/serve says" if check else "written")
        if not check:
            path.write_text(text, encoding="utf-8")
    sys.exit(1 if check and stale else 0)


class _Text(str):
    """Written as it is, line by line, and not as a quoted string."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def _yaml(content: Config) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    main()
