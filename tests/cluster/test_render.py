"""The Serve configurations on Kubernetes are those of cluster/serve, but for what an overlay says it changes."""

import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cluster import render
from cluster.local import configuration
from cluster.render import KUBERAY, SERVE, SOURCE, Changes, Source, merge, rendered, serve_config
from serve_app.config import AppConfig

SOURCES = sorted(KUBERAY.rglob(SOURCE))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_the_committed_file_is_what_is_made(path):
    made, text = rendered(path)
    assert made.read_text() == text, "run python -m cluster.render"


def test_every_overlay_has_one():
    assert {path.parent.name for path in SOURCES} >= {path.name for path in (KUBERAY / "overlays").iterdir()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_only_what_the_overlay_names_differs(path):
    source = Source.model_validate(yaml.safe_load(path.read_text()))
    before, after = yaml.safe_load((SERVE / source.base).read_text()), serve_config(source)
    assert before != after
    changes = source.changes.model_dump(exclude_none=True)
    differing = {key for key in after if after[key] != before.get(key)}
    assert differing <= {*changes, "applications"} - {"args"}
    (old,), (new,) = before["applications"], after["applications"]
    assert {key for key in new if new[key] != old.get(key)} == {"args"}
    assert {key for key in new["args"] if new["args"][key] != old["args"].get(key)} == set(changes["args"])


def test_the_cluster_of_this_machine_gets_local_yaml_and_its_own_storage():
    local = yaml.safe_load((SERVE / "local.yaml").read_text())
    made = configuration("postgresql://t2v@/t2v", Path("/srv/store"), 8123)
    assert (made["proxy_location"], made["http_options"]) == ("HeadOnly", {"host": "127.0.0.1", "port": 8123})
    before, after = (AppConfig.model_validate(config["applications"][0]["args"]) for config in (local, made))
    assert (after.storage.database, after.storage.artifacts) == ("postgresql://t2v@/t2v", "/srv/store")
    stages = "text_encoder", "denoiser", "decoder"
    assert [getattr(after, stage).label_selector for stage in stages] == [{"pool": "work"}] * 3
    restored = {stage: getattr(after, stage).model_copy(update={"label_selector": {}}) for stage in stages}
    assert after.model_copy(update={"storage": before.storage, **restored}) == before


def test_mappings_are_merged_and_the_rest_is_replaced():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merge(old, {"a": {"c": [3]}, "d": {"e": 5}}) == {"a": {"b": 1, "c": [3]}, "d": {"e": 5}}
    assert old == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_nothing_changed_gives_the_file_itself():
    assert serve_config(Source(base="gpu.yaml")) == yaml.safe_load((SERVE / "gpu.yaml").read_text())
    changed = serve_config(Source(base="gpu.yaml", changes=Changes(http_options={"host": "0.0.0.0"})))
    assert changed["http_options"] == {"host": "0.0.0.0", "port": 8000}


def test_an_unknown_change_is_refused():
    with pytest.raises(ValidationError, match="http_option"):
        Source.model_validate({"base": "gpu.yaml", "changes": {"http_option": {"host": "0.0.0.0"}}})


def test_a_stale_file_is_told_and_then_written(tmp_path, monkeypatch):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    stale = tmp_path / "kuberay" / "overlays" / "dev" / "serve-config.yaml"
    right = stale.read_text()
    stale.write_text(right.replace("0.0.0.0", "127.0.0.1"))
    monkeypatch.setattr(render, "KUBERAY", tmp_path / "kuberay")
    assert [exit_code(monkeypatch, "--check"), exit_code(monkeypatch), exit_code(monkeypatch, "--check")] == [1, 0, 0]
    assert stale.read_text() == right


def exit_code(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["render", *arguments])
    with pytest.raises(SystemExit) as ended:
        render.main()
    return int(ended.value.code)
