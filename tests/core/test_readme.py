"""What the README says works, word by word."""

import re
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
