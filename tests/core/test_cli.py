"""The command line, as a user types it: in processes of its own where that matters, since each imports torch."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import av
import pytest
from hub_server import HubServer, Revision
from typer.testing import CliRunner

from t2v_core.cli import app
from t2v_core.video_input import read_metadata

PROMPT = "A panda eating bamboo on a rock."
QUICK = ("--num-frames", "4", "--num-inference-steps", "3", "--size", "64x64", "--device", "cpu")


def t2v(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "t2v_core.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environment,
    )


def t2v_here(*arguments, cwd="."):
    """In this process, which has imported torch already."""
    with contextlib.chdir(cwd):
        return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def test_generate_makes_a_video_and_says_how(tiny_checkpoint, tmp_path):
    output = tmp_path / "panda.mp4"
    done = t2v("generate", PROMPT, "-o", output, "--model", tiny_checkpoint, "--seed", "7", "--fps", "4", *QUICK)
    assert done.returncode == 0, done.stderr
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (len(frames), frames[0].width, frames[0].height, stream.average_rate) == (4, 64, 64, 4)
    assert "3/3" in done.stderr
    assert "seed 7, 3 steps of dpmpp_2m at guidance 9" in done.stderr
    assert "on cpu in float32, peak memory" in done.stderr
    assert list(tmp_path.iterdir()) == [output]


def test_without_a_model_the_demo_makes_the_video(tmp_path):
    prompt = "A red circle moving right on a white background."
    done = t2v_here("generate", prompt, "--num-inference-steps", "2", "--device", "cpu", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "Loading demo" in done.stderr
    assert "16 frames of 128x128" in done.stderr
    assert read_metadata(tmp_path / "video.mp4")["model"] == "demo"


def test_the_same_command_writes_the_same_bytes_and_the_seed_it_names_makes_it_again(tiny_checkpoint, tmp_path):
    first = t2v("generate", PROMPT, "-o", tmp_path / "1.mp4", "--model", tiny_checkpoint, *QUICK)
    seed = first.stderr.split("seed ")[1].split(",")[0]
    t2v("generate", PROMPT, "-o", tmp_path / "2.mp4", "--model", tiny_checkpoint, "--seed", seed, *QUICK)
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "2.mp4").read_bytes()


def test_what_is_faster_and_not_exact_is_done_when_asked_for(tiny_checkpoint, tmp_path):
    files = []
    for name, options in (("exact", []), ("fp8", ["--precision", "fp8"]), ("cached", ["--cached-steps", "1"])):
        files.append(tmp_path / f"{name}.mp4")
        arguments = [PROMPT, "--model", str(tiny_checkpoint), "--seed", "1", *QUICK, *options, "-o", str(files[-1])]
        assert CliRunner().invoke(app, ["generate", *arguments]).exit_code == 0
    assert len({file.read_bytes() for file in files}) == 3


def test_video_to_video_and_every_format(tiny_checkpoint, tmp_path):
    made = t2v_here("generate", PROMPT, "--model", tiny_checkpoint, "--format", "webm", *QUICK, cwd=tmp_path)
    assert made.exit_code == 0, made.stderr
    edited = t2v_here(
        *("generate", "A red panda", "--model", tiny_checkpoint, "-o", tmp_path / "edited.gif"),
        *("--input-video", tmp_path / "video.webm", "--strength", "0.7", "--sampler", "euler_a", *QUICK),
    )
    assert edited.exit_code == 0, edited.stderr
    assert "2 steps of euler_a" in edited.stderr
    with av.open(str(tmp_path / "edited.gif")) as container:
        assert len(list(container.decode(video=0))) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "100x64"], 2, "width 100: must be a multiple of 8; try 96 or 104"),
        (["--size", "large"], 2, "size large: must be like 256x256"),
        (["--num-frames", "0"], 2, "num_frames 0: must be from 1"),
        (["--num-inference-steps", "1000"], 2, "must be from 1 to 999"),
        (["--guidance-scale", "nan"], 2, "guidance_scale nan"),
        (["--sampler", "plms"], 2, "plms"),
        (["--strength", "0.5"], 2, "without an input video"),
        (["--input-video", "missing.mp4"], 2, "missing.mp4"),
        (["-o", "panda.avi"], 2, ".avi"),
        (["-o", "panda.mp4", "--format", "gif"], 2, "they differ"),
        (["-o", "no/such/folder/panda.mp4"], 1, "create it first"),
        (["-o", ".", "--format", "mp4", "--model", "org/unknown"], 1, ".: is a folder; name a file in it"),
        (["-o", "/"], 1, "/: is a folder; name a file in it"),
        (["-o", "..", "--format", "mp4", "--model", "org/unknown", "--num-frames", "0"], 2, "num_frames 0"),
        (["--model", "org/unknown", "--input-video", "missing.mp4"], 2, "missing.mp4"),
        (["--model", "org/unknown", "--crf", "99"], 2, "crf 99"),
        (["--model", "org/unknown", "--input-video", __file__, "--strength", "1.5"], 2, "strength 1.5"),
        (["--model", "org/unknown", "--input-video", __file__, "--strength", "0.1"], 2, "less than one step"),
        (["--model", "org/unknown", "--input-video", __file__], 2, "check that it plays"),
        (["--input-video", f"{'x' * 300}.mp4"], 2, "File name too long"),
        (["-o", f"{'x' * 300}.mp4"], 1, "cannot be written (File name too long); choose another path"),
        (["-o", f"{'x' * 300}/panda.mp4"], 1, "cannot be written (File name too long); choose another path"),
        (["--model", "org/unknown", "--eta", "2"], 2, "eta 2.0"),
        (["--model", "org/unknown", "--eta", "0.5", "--sampler", "euler"], 2, "only ddim has an eta"),
        (["--eta", "0.5"], 2, "eta 0.5 with sampler dpmpp_2m"),
        (["--fps", "60", "--format", "gif"], 2, "a gif plays at most 50"),
        (["--crf", "99"], 2, "crf 99"),
        (["--device", "cuda:7"], 2, "device cuda:7"),
        (["--model", "no-such-model"], 1, "no such folder, and not a hub id"),
    ],
)
def test_a_mistake_is_one_clear_message_and_leaves_nothing(
    tiny_checkpoint, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["generate", PROMPT, "--model", str(tiny_checkpoint), *QUICK, *arguments])
    assert done.exit_code == code, done.output
    assert message in " ".join(done.output.split())
    assert isinstance(done.exception, SystemExit)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_video_is_found_at_once(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "panda.mp4").mkdir()
    arguments = ["generate", PROMPT, "--model", "org/unknown", "-o", str(tmp_path / "panda.mp4")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "cannot be written there" in " ".join(done.output.split())


def test_a_format_completes_a_name_that_does_not_say_one(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, ["generate", PROMPT, "--model", str(tiny_checkpoint), *QUICK, "-o", "panda.v2", "--format", "webm"]
    )
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["panda.v2.webm"]


def test_an_eta_goes_with_a_checkpoint_whose_own_sampler_is_ddim(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    defaults = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(defaults | {"sampler": "ddim"}))
    arguments = ["--model", str(folder), "--eta", "0.5", "-o", str(tmp_path / "panda.mp4"), *QUICK]
    done = CliRunner().invoke(app, ["generate", PROMPT, *arguments])
    assert done.exit_code == 0, done.output
    assert "steps of ddim" in " ".join(done.output.split())


def test_an_empty_prompt_is_refused(tiny_checkpoint, tmp_path):
    done = t2v_here("generate", "  ", "--model", tiny_checkpoint, cwd=tmp_path)
    assert done.exit_code == 2
    assert "prompt is empty" in done.stderr


def test_ctrl_c_leaves_no_half_file(tiny_checkpoint, tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "t2v_core.cli", "generate", PROMPT, "--model", tiny_checkpoint),
            *("--num-inference-steps", "999", "--device", "cpu"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TTY_COMPATIBLE": "1", "COLUMNS": "200"},
    )
    seen = ""
    deadline = time.monotonic() + 120
    while "/999" not in seen or " 0/999" in seen.splitlines()[-1]:
        assert time.monotonic() < deadline
        seen += process.stderr.read(40)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Cancelled; nothing was written." in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_convert_writes_a_checkpoint_that_generates_the_same(tiny_checkpoint, tmp_path):
    converted = t2v_here("convert", tiny_checkpoint, tmp_path / "converted")
    assert converted.exit_code == 0, converted.stderr
    for model, name in ((tiny_checkpoint, "1.gif"), (tmp_path / "converted", "2.gif")):
        t2v_here("generate", PROMPT, "-o", tmp_path / name, "--model", model, "--seed", "7", *QUICK)
    with av.open(str(tmp_path / "1.gif")) as first, av.open(str(tmp_path / "2.gif")) as second:
        frames = [[frame.to_ndarray(format="rgb24") for frame in c.decode(video=0)] for c in (first, second)]
    assert all((a == b).all() for a, b in zip(*frames, strict=True))
    again = t2v_here("convert", tiny_checkpoint, tmp_path / "converted")
    assert again.exit_code == 1
    assert "already exists" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "org/unknown", "."], 1, ".: already exists; remove it"),
        (["convert", "org/unknown", "x" * 300], 1, "File name too long"),
        (["convert", "demo", f"{'x' * 300}/new"], 1, "File name too long"),
        (["random-checkpoint", "x" * 300], 1, "File name too long"),
        (["random-checkpoint", "new", "--seed", "9" * 23], 2, "less than or equal to 4294967295"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, type(done.exception)) == (code, SystemExit)
    assert message in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["convert", "random-checkpoint"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_weights_are_written_leaves_nothing(tiny_checkpoint, tmp_path, command, number):
    arguments = [command, *([str(tiny_checkpoint)] if command == "convert" else []), str(tmp_path / "new")]
    script = (
        "import os, sys, t2v_core.cli;"
        f"module = sys.modules['t2v_core.weights.{'convert' if command == 'convert' else 'random_init'}'];"
        f"module.write_autoencoder = lambda *_: [os.kill(os.getpid(), {number:d}) for _ in range(2)];"
        "t2v_core.cli.app()"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_is_fetched_once_and_without_what_is_not_needed(tiny_checkpoint, tmp_path):
    repository = shutil.copytree(tiny_checkpoint, tmp_path / "repository")
    (repository / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not needed")
    (repository / "samples.mp4").write_bytes(b"not needed")
    hub = HubServer("owner/tiny", {"main": Revision("1" * 40, repository)})
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    places |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    arguments = ("generate", PROMPT, "--seed", "7", *QUICK, "--model")
    try:
        fetched = t2v(*arguments, "owner/tiny", "-o", tmp_path / "1.mp4", **places)
        assert fetched.returncode == 0, fetched.stderr
        assert sorted(hub.fetched()) == sorted(
            ["model_index.json", "generation_config.json", "scheduler/scheduler_config.json"]
            + [f"{network}/config.json" for network in ("unet", "vae", "text_encoder")]
            + [f"{network}/diffusion_pytorch_model.safetensors" for network in ("unet", "vae")]
            + ["text_encoder/model.safetensors"]
        )
        unknown = t2v(*arguments, "owner/tiny", "--revision", "v9", **places, cwd=tmp_path)
        assert unknown.returncode == 1
        assert "no such branch, tag or commit" in unknown.stderr
    finally:
        hub.close()
    offline = t2v(*arguments, "owner/tiny", "-o", tmp_path / "2.mp4", **places, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert av.open(str(tmp_path / "2.mp4")).streams.video[0].frames == 4


def test_a_random_checkpoint_needs_no_download(tmp_path):
    made = t2v_here("random-checkpoint", tmp_path / "random", "--dtype", "fp16")
    assert made.exit_code == 0, made.stderr
    done = t2v_here("generate", PROMPT, "--model", tmp_path / "random", "-o", tmp_path / "x.mp4", *QUICK)
    assert done.exit_code == 0, done.stderr


def test_names_with_brackets_are_told_as_they_are(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    source = "[/foo]"
    shutil.copytree(tiny_checkpoint, source)
    converted = CliRunner().invoke(app, ["convert", source, "a [final] copy"])
    assert "a [final] copy: written in fp32" in converted.output
    output = "my [final] :cat: clip.mp4"
    done = CliRunner().invoke(app, ["generate", PROMPT, "--model", source, "-o", output, *QUICK])
    assert done.exit_code == 0, done.output
    assert f"Loading {source}" in done.output
    assert f"{output}: 4 frames of 64x64" in done.output
    missing = CliRunner().invoke(app, ["generate", PROMPT, "--model", "[bar]"])
    assert "Error: [bar]: no such folder" in missing.output
