"""The guide's commands are run as far as there is no Kubernetes, and what it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.render import KUBERAY, ROOT
from cluster.validate import CRDS, crds_folder
from serve_app.webhooks import signing_secret

GUIDE = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for line in re.findall(r"^ {4,}(.+)$", GUIDE, re.MULTILINE)]
OURS = [part for line in COMMANDS for part in line.split(" && ") if part.startswith("python -m")]


@pytest.mark.parametrize("command", sorted({*OURS, "python -m cluster.render --check"} - {"python -m cluster.render"}))
def test_its_own_commands_run(command, known):
    words = [sys.executable, *shlex.split(command)[1:]]
    ran = subprocess.run(words, cwd=ROOT.parent, env={CRDS: str(crds_folder())}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_receivers_secret_is_printed_as_the_guide_says(trees):
    (line,) = (line.removeprefix("| ") for line in COMMANDS if "webhook-secret" in line)
    (template,) = re.findall(r"go-template='(.+)'", GUIDE)
    (values,) = (s["stringData"] for s in trees["overlays/gpu-pool"].secrets if s["metadata"]["name"] == "t2v-webhooks")
    config = re.sub(r"{{\.data\.(\w+) \| base64decode}}", lambda found: values[found[1]], template)
    words = [str(Path(sys.executable).with_name("t2v")), *shlex.split(line)[1:]]
    ran = subprocess.run(words, input=config, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, signing_secret(values["secret"], "somebody") + "\n"), ran.stderr


def test_kubectl_is_given_what_exists(trees):
    paths = re.findall(r"cluster/kuberay/[\w./-]+", "\n".join(COMMANDS))
    assert len(paths) > 5
    for path in paths:
        assert (ROOT.parent / path).exists(), path
    names = {f"{m['kind'].lower()}/{m['metadata']['name']}" for tree in trees.values() for m in tree.manifests}
    for name in re.findall(r"\b(?:job|rayservice)/[\w-]+", GUIDE):
        assert name in names


@pytest.mark.parametrize("path", re.findall(r"^\| `(\S+)` \|", GUIDE, re.MULTILINE))
def test_what_the_tables_list_exists(path, trees):
    alerts = {
        alert["alert"]
        for manifest in trees["overlays/gpu-pool"].manifests
        if manifest["kind"] == "PrometheusRule"
        for group in manifest["spec"]["groups"]
        for alert in group["rules"]
    }
    assert path in alerts or (ROOT / path).exists()


def test_the_settings_and_files_it_names_are_those_of_the_manifests():
    manifests = "\n".join(path.read_text() for path in KUBERAY.rglob("*.yaml"))
    for name in re.findall(r"`(t2v-[a-z0-9-]+|ray\.io/[a-z-]+|RAY_[A-Z_]+)`", GUIDE):
        assert name in manifests, name
