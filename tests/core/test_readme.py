"""What the README says works, word by word."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from serve_app.cli import app
from t2v_core.demo.measuring import look_at
from t2v_core.video_input import read_video

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run_one_after_the_other(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL))
    assert "damo-vilab/text-to-video-ms-1.7b" in code
    smaller = code.replace("damo-vilab/text-to-video-ms-1.7b", str(tiny_checkpoint))
    for setting, small in (("width=256", "width=64"), ("height=256", "height=64"), ("num_frames=16", "num_frames=4")):
        assert setting in smaller
        smaller = smaller.replace(setting, small)
    names: dict[str, object] = {}
    exec(smaller, names)
    assert "t2v_core.load()" in code
    circle = look_at(read_video(tmp_path / "circle.mp4", width=128, height=128, fps=8, num_frames=16))
    assert (circle.background, circle.colour, circle.shape, circle.motion) == ("white", "red", "circle", "right")
    assert (tmp_path / "panda.mp4").stat().st_size > 1000
    assert names["edited"].params.num_frames == 8
    assert "step 10 of 10" in capsys.readouterr().out


@pytest.mark.parametrize("path", re.findall(r"`([a-z_]+(?:\.py|/))`", README))
def test_every_file_of_the_tour_exists(path):
    assert any((folder / path).exists() for folder in (ROOT, ROOT / "t2v_core", ROOT / "serve_app"))


def test_the_options_named_exist():
    group = get_command(app)
    named = [group.get_command(None, name) for name in group.list_commands(None)]
    options = {option for command in named for parameter in command.params for option in parameter.opts}
    commands = re.findall(r"^    t2v .+$", README, flags=re.MULTILINE)
    assert commands
    for option in re.findall(r"\s(--?[a-z][a-z-]*)", "\n".join(commands)):
        assert option in options


def test_make_test_looks_for_tests_where_they_are():
    commands = re.findall(r"^\t\$\(BIN\)/pytest (tests/.+) -m \"?(\w+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    looked_for = {mark: set(folders.split()) for folders, mark in commands}
    assert looked_for.keys() == {"service", "cluster", "full_size"}
    for mark, folders in looked_for.items():
        files = [file for file in (ROOT / "tests").rglob("test_*.py") if f"pytest.mark.{mark}" in file.read_text()]
        assert {f"tests/{file.relative_to(ROOT / 'tests').parts[0]}" for file in files} == folders


def set_up(folder: Path, python_script: str) -> subprocess.CompletedProcess[str]:
    """`make` up to an environment, with a Python that is this script."""
    python = folder / "python3.x"
    python.write_text(f"#!/bin/sh\n{python_script}\n")
    python.chmod(0o755)
    command = ["make", "-C", str(folder), "-f", str(ROOT / "Makefile"), f"PYTHON={python}", ".venv/bin/python"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_first_set_up_that_fails_leaves_nothing_for_the_second_to_trip_over(tmp_path):
    # as Debian's Python does without python3-venv
    fails = f'[ "$2" = venv ] && {sys.executable} -m venv --without-pip "$3" && exit 1; exec {sys.executable} "$@"'
    failed = set_up(tmp_path, fails)
    assert failed.returncode != 0
    assert not (tmp_path / ".venv").exists()
    done = set_up(tmp_path, f'[ "$2" = venv ] && set -- "$@" --without-pip; exec {sys.executable} "$@"')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv" / "pyvenv.cfg").exists()


def test_a_python_that_is_too_old_is_told_with_the_remedy(tmp_path):
    old = f'[ "$1" = -c ] && set -- -c "import sys; sys.version_info = (3, 10); $2"; exec {sys.executable} "$@"'
    failed = set_up(tmp_path, old)
    assert failed.returncode != 0
    assert "must be Python 3.11 or later; name one: make PYTHON=python3.11" in failed.stderr
    assert not (tmp_path / ".venv").exists()
