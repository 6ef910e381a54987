"""The image, as far as can be told without building it; it never was built by these tests."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet

from cluster.manifests import pods
from cluster.render import ROOT

PROJECT = ROOT.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing():
    ran = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


def test_what_is_copied_is_there_and_not_ignored():
    ignored = (ROOT / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()
    }
    assert copied == let_in
    assert "*" in ignored
    for path in copied:
        assert (PROJECT / path).exists(), path


def test_all_stages_have_one_pinned_python_that_the_project_allows():
    (version,) = set(re.findall(r"^FROM python:(\d+\.\d+\.\d+)-slim-bookworm", DOCKERFILE, re.MULTILINE))
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert version in SpecifierSet(project["requires-python"])
    assert re.findall(r"pip install --constraint (\S+)", DOCKERFILE) == [".ci/constraints.txt"]
    extras = set(re.findall(r'"\.\[(.+)\]"', DOCKERFILE)[0].split(","))
    assert extras == project["optional-dependencies"].keys() - {"test"}


def test_it_runs_as_the_user_that_the_manifests_name(trees):
    (user,) = re.findall(r"^USER (\d+):\1$", DOCKERFILE, re.MULTILINE)
    users = {pod.spec["securityContext"]["runAsUser"] for t in trees.values() for m in t.manifests for pod in pods(m)}
    assert users == {int(user)}
