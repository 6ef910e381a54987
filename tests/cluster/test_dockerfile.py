"""The image, as far as can be told without building it; it never was built by these tests."""

import os
import re
import shutil
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


def test_its_own_steps_install_all_of_the_code(tmp_path):
    """What the building stage runs, in a folder and without what the service depends on."""
    stage, source = tmp_path / "t2v", tmp_path / "src"
    source.mkdir()
    env = {**os.environ, "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    building = DOCKERFILE.split("FROM ")[1].replace("\\\n", " ")
    for line in building.splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "COPY":
            *paths, target = rest.split()
            for path in paths:
                _copy(PROJECT / path, source / target)
        elif instruction == "RUN":
            command = re.sub(r"--mount=\S+", "", rest).replace("python -m venv", f"{sys.executable} -m venv")
            command = command.replace("/opt/t2v", str(stage))
            subprocess.run(command, shell=True, check=True, cwd=source, env=env, capture_output=True)
    site = next(stage.glob("lib/python*/site-packages"))
    for package in ("t2v_core", "serve_app"):
        installed = {path.relative_to(site): path.read_bytes() for path in (site / package).rglob("*.py")}
        assert installed == {path.relative_to(PROJECT): path.read_bytes() for path in (PROJECT / package).rglob("*.py")}


def _copy(path: Path, target: Path) -> None:
    """As COPY does: what is in a folder, or a file; times are kept."""
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        to = target / path.name if target.is_dir() else target
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to)
