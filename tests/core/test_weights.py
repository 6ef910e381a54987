"""Checkpoints are found in every layout that users have, loaded strictly, and never run."""

import ctypes
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from hub_server import HubServer, Revision
from safetensors.torch import load_file, save_file

from t2v_core.errors import CheckpointError, CheckpointNotFound, InvalidRequest, OutputError, UnsafeCheckpoint
from t2v_core.pipeline import load
from t2v_core.weights import DEMO, convert, find, load_autoencoder, load_text_encoder, load_unet, open_checkpoint
from t2v_core.weights.checkpoint import NETWORKS
from t2v_core.weights.diffusers_layout import needed_files
from t2v_core.weights.files import read_tensors

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model"
VAE = "vae/diffusion_pytorch_model"
TEXT = "text_encoder/model"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def tensors_of(folder, half=False, dtype=torch.float32):
    opened = open_checkpoint(folder, half=half)
    networks = (load_network(opened, CPU, dtype) for load_network in (load_unet, load_autoencoder, load_text_encoder))
    return {f"{type(network).__name__}.{name}": t for network in networks for name, t in network.state_dict().items()}


def assert_equal_tensors(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def edit(path, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def write_half(checkpoint):
    for stem in (UNET, VAE, TEXT):
        half = {name: tensor.half() for name, tensor in load_file(checkpoint / f"{stem}.safetensors").items()}
        save_file(half, checkpoint / f"{stem}.fp16.safetensors")


def test_pickled_weights_of_the_diffusers_layout_are_those_of_its_safetensors(checkpoint, tiny_checkpoint):
    for stem, pickled in ((UNET, UNET), (VAE, VAE), (TEXT, "text_encoder/pytorch_model")):
        path = checkpoint / f"{stem}.safetensors"
        torch.save(load_file(path), checkpoint / f"{pickled}.bin")
        path.unlink()
    assert_equal_tensors(tensors_of(checkpoint), tensors_of(tiny_checkpoint))


def test_half_precision_files_are_read_when_half_is_wanted_and_whole_ones_otherwise(checkpoint, tiny_checkpoint):
    write_half(checkpoint)
    halves = tensors_of(checkpoint, half=True)
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in halves.values())
    assert_equal_tensors(tensors_of(checkpoint), tensors_of(tiny_checkpoint))


def test_whole_precision_in_a_pickle_goes_before_half_precision_in_safetensors(checkpoint, tiny_checkpoint):
    path = checkpoint / f"{UNET}.safetensors"
    torch.save(load_file(path), checkpoint / f"{UNET}.bin")
    save_file({name: t.half() for name, t in load_file(path).items()}, checkpoint / f"{UNET}.fp16.safetensors")
    path.unlink()
    assert_equal_tensors(tensors_of(checkpoint), tensors_of(tiny_checkpoint))


def test_unsuffixed_files_of_half_precision_load_in_any_precision(checkpoint, tiny_checkpoint):
    """As zeroscope ships them: fp16 pickles under the plain name."""
    for stem, pickled in ((UNET, UNET), (VAE, VAE), (TEXT, "text_encoder/pytorch_model")):
        path = checkpoint / f"{stem}.safetensors"
        torch.save({name: t.half() for name, t in load_file(path).items()}, checkpoint / f"{pickled}.bin")
        path.unlink()
    expected = tensors_of(tiny_checkpoint, dtype=torch.float16)
    assert_equal_tensors(tensors_of(checkpoint, dtype=torch.float16), expected)
    assert {tensor.dtype for tensor in tensors_of(checkpoint).values()} == {torch.float32}


def write_shards(path, variant=""):
    """A file's tensors in two shards and an index, named as diffusers names them; the file itself goes."""
    tensors = load_file(path)
    stem = path.name.removesuffix(".safetensors")
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard = f"{stem}{variant}-0000{number}-of-00002.safetensors"
        half = {name: tensors[name].half() if variant else tensors[name] for name in names}
        save_file(half, path.parent / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = path.with_name(f"{stem}.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return set(weight_map.values())


def test_sharded_weights_are_joined_and_only_those_of_one_precision_fetched(checkpoint, tiny_checkpoint):
    path = checkpoint / f"{UNET}.safetensors"
    whole, half = write_shards(path), write_shards(path, ".fp16")
    path.unlink()
    assert_equal_tensors(tensors_of(checkpoint), tensors_of(tiny_checkpoint))
    halves = tensors_of(checkpoint, half=True)
    assert torch.equal(halves["UNet3D.conv_in.weight"], halves["UNet3D.conv_in.weight"].half().float())

    everything = [p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()]
    for wanted, left_out, is_half in ((whole, half, False), (half, whole, True)):
        needed = {name.removeprefix("unet/") for name in needed_files(everything, is_half, NETWORKS)}
        assert wanted <= needed
        assert not left_out & needed


@pytest.mark.parametrize("network", NETWORKS)
def test_a_checkpoint_opened_for_one_network_needs_the_weights_of_no_other(checkpoint, tiny_checkpoint, network):
    loaders = {"unet": load_unet, "autoencoder": load_autoencoder, "text_encoder": load_text_encoder}
    own = {"unet": UNET, "autoencoder": VAE, "text_encoder": TEXT}[network] + ".safetensors"
    everything = [p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()]
    needed = needed_files(everything, False, [network])
    for name in set(everything) - set(needed):
        (checkpoint / name).unlink()
    assert [name for name in needed if name.endswith(".safetensors")] == [own]
    opened, whole = open_checkpoint(checkpoint, networks=[network]), open_checkpoint(tiny_checkpoint)
    assert opened.config == whole.config
    for name, load_network in loaders.items():
        if name == network:
            ours, expected = (load_network(c, CPU, torch.float32).state_dict() for c in (opened, whole))
            assert_equal_tensors(ours, expected)
        else:
            with pytest.raises(CheckpointError, match=f"opened for {network} only; name {name}"):
                load_network(opened, CPU, torch.float32)


def test_a_configuration_is_read_without_any_weights(checkpoint, tiny_checkpoint):
    for path in checkpoint.rglob("*.safetensors"):
        path.unlink()
    opened = open_checkpoint(checkpoint, networks=())
    assert opened.config == open_checkpoint(tiny_checkpoint).config
    with pytest.raises(CheckpointError, match="opened for its configuration only"):
        load_unet(opened, CPU, torch.float32)


@pytest.fixture
def hub(checkpoint):
    """A hub whose repository a test may change before it is asked."""
    server = HubServer("owner/tiny", {"main": Revision("1" * 40, checkpoint)})
    yield server
    server.close()


def opened_in_its_own_process(hub, home, arguments, **environment):
    """What of its networks could be read, as the process that opened "owner/tiny" with these arguments says it."""
    script = (
        "from t2v_core.weights import open_checkpoint\n"
        f"opened = open_checkpoint('owner/tiny', {arguments})\n"
        "print(sorted(network for network in opened.readers if opened.read(network)))"
    )
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    places |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, env=os.environ | places | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_of_a_hub_id_weights_are_fetched_of_those_networks_that_are_asked_for(hub, tmp_path):
    for networks, own in (([], []), (["text_encoder"], [TEXT]), (["unet", "autoencoder"], [UNET, VAE])):
        num_before = len(hub.fetched())
        done = opened_in_its_own_process(hub, tmp_path / "home", f"networks={networks}")
        assert done.stdout.strip() == str(sorted(networks)), done.stderr
        fetched = [name for name in hub.fetched()[num_before:] if not name.endswith(".json")]
        assert sorted(fetched) == [f"{stem}.safetensors" for stem in own]


@pytest.mark.parametrize("is_half", [False, True])
def test_offline_what_was_fetched_in_one_precision_serves_in_the_other(hub, checkpoint, tmp_path, is_half):
    write_half(checkpoint)
    online = opened_in_its_own_process(hub, tmp_path / "home", f"half={is_half}")
    assert online.returncode == 0, online.stderr
    assert f"{UNET}{'.fp16' if is_half else ''}.safetensors" in hub.fetched()
    offline = opened_in_its_own_process(hub, tmp_path / "home", f"half={not is_half}", HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout == "['autoencoder', 'text_encoder', 'unet']\n", offline.stderr


def test_offline_shards_of_the_other_precision_serve_when_all_are_there(hub, checkpoint, tmp_path):
    write_half(checkpoint)
    shards = write_shards(checkpoint / f"{UNET}.safetensors")
    (checkpoint / f"{UNET}.safetensors").unlink()
    assert opened_in_its_own_process(hub, tmp_path / "home", "networks=['unet']").returncode == 0
    arguments, offline = "networks=['unet'], half=True", {"HF_HUB_OFFLINE": "1"}
    served = opened_in_its_own_process(hub, tmp_path / "home", arguments, **offline)
    assert served.stdout == "['unet']\n", served.stderr

    (shard,) = (tmp_path / "home").rglob(f"snapshots/*/unet/{min(shards)}")
    shard.unlink()
    refused = opened_in_its_own_process(hub, tmp_path / "home", arguments, **offline)
    assert "The cache cannot serve" in refused.stderr
    assert f"lacks {UNET}.fp16.safetensors" in refused.stderr  # what was wanted, not what could have stood in


def test_whole_shards_go_before_an_index_that_lacks_some(checkpoint, tiny_checkpoint):
    path = checkpoint / f"{UNET}.safetensors"
    whole, half = write_shards(path), write_shards(path, ".fp16")
    path.unlink()
    (path.parent / min(half)).unlink()
    assert_equal_tensors(tensors_of(checkpoint, half=True), tensors_of(tiny_checkpoint))
    (path.parent / min(whole)).unlink()
    with pytest.raises(CheckpointError, match=f"{min(whole)}: no such file"):
        load(checkpoint)


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "diffusion_pytorch_model.safetensors.index.json"])
def test_an_index_leads_neither_out_of_its_folder_nor_back_to_itself(checkpoint, shard):
    (checkpoint / f"{UNET}.safetensors").unlink()
    index = checkpoint / f"{UNET}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load(checkpoint)


def test_an_autoencoder_with_the_old_names_of_its_attention_is_the_same(checkpoint, tiny_checkpoint):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in [name for name in tensors if ".attentions." in name]:
            for new_part, old_part in old.items():
                if f".{new_part}." in name:
                    tensors[name.replace(new_part, old_part)] = tensors.pop(name)

    edit(checkpoint / f"{VAE}.safetensors", rename)
    assert_equal_tensors(tensors_of(checkpoint), tensors_of(tiny_checkpoint))


@pytest.mark.parametrize("version", ["transformers 5", "transformers 4"])
def test_the_text_encoder_of_either_transformers_is_read(checkpoint, tiny_checkpoint, version):
    def rename(tensors):
        for name in list(tensors):
            if version == "transformers 5":
                tensors[name.removeprefix("text_model.")] = tensors.pop(name)
        if version == "transformers 4":
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    edit(checkpoint / f"{TEXT}.safetensors", rename)
    assert_equal_tensors(tensors_of(checkpoint), tensors_of(tiny_checkpoint))


@pytest.mark.parametrize("stem", [UNET, VAE])
def test_a_missing_tensor_is_named(checkpoint, stem):
    edit(checkpoint / f"{stem}.safetensors", lambda tensors: tensors.pop(sorted(tensors)[0]))
    name = sorted(load_file(checkpoint / f"{stem}.safetensors"))
    with pytest.raises(CheckpointError, match="lacks") as caught:
        load(checkpoint)
    assert not any(f"lacks {kept}:" in str(caught.value) for kept in name)


@pytest.mark.parametrize(
    ("stem", "name", "named"),
    [
        (UNET, "conv_in.weight", "conv_in.weight"),
        (TEXT, "text_model.final_layer_norm.bias", "tower.ln_final.bias"),
        (TEXT, "text_model.encoder.layers.1.self_attn.k_proj.weight", "k_proj is missing for .*resblocks.1"),
    ],
)
def test_a_missing_tensor_is_named_as_ours(checkpoint, stem, name, named):
    edit(checkpoint / f"{stem}.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=named):
        load(checkpoint)


@pytest.mark.parametrize("stem", [UNET, VAE, TEXT])
def test_an_unexpected_tensor_is_named(checkpoint, stem):
    edit(checkpoint / f"{stem}.safetensors", lambda tensors: tensors.update({"lora.up.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"has unexpected lora\.up\.weight"):
        load(checkpoint)


def test_a_misshapen_tensor_is_named_with_both_shapes(checkpoint):
    edit(checkpoint / f"{UNET}.safetensors", lambda tensors: tensors.update({"conv_out.bias": torch.zeros(5)}))
    with pytest.raises(CheckpointError, match=r"misshapen conv_out\.bias \(5,\), must be \(4,\)"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu', must be 'silu'"),
        ("unet/config.json", {"use_motion_module": True}, "use_motion_module is True"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ("unet/config.json", {"up_block_types": ["UpBlock3D"] * 4}, "must mirror"),
        ("unet/config.json", {"block_out_channels": "large"}, "block_out_channels"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels is 16"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("text_encoder/config.json", {"hidden_act": "quick_gelu"}, "quick_gelu"),
        ("text_encoder/config.json", {"hidden_size": 64}, "64 wide and the UNet reads 32"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
        ("generation_config.json", {"width": None}, "width"),
        ("unet/config.json", {"norm_num_groups": 0}, "norm_num_groups is 0"),
        ("unet/config.json", {"norm_num_groups": 3}, "must be multiples of norm_num_groups 3"),
        ("unet/config.json", {"attention_head_dim": 0}, "attention_head_dim is 0"),
        ("vae/config.json", {"norm_num_groups": 0}, "norm_num_groups is 0"),
        ("text_encoder/config.json", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "must be a multiple of num_attention_heads"),
    ],
)
def test_a_setting_that_this_model_does_not_have_is_named(checkpoint, path, change, message):
    settings = json.loads((checkpoint / path).read_text())
    (checkpoint / path).write_text(json.dumps(settings | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint)
    assert path.split("/")[0] in str(caught.value) or str(checkpoint) in str(caught.value)


@pytest.mark.parametrize("kept_bytes", [0, 7, 1000, 100_000])
def test_a_cut_off_safetensors_file_is_a_clear_error(checkpoint, kept_bytes):
    os.truncate(checkpoint / f"{UNET}.safetensors", kept_bytes)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: not a whole safetensors file"):
        load(checkpoint)


@pytest.mark.parametrize("kept_bytes", [0, 7, 1000, 100_000])
def test_a_cut_off_pickle_is_a_clear_error(checkpoint, kept_bytes):
    path = checkpoint / f"{UNET}.bin"
    torch.save(load_file(checkpoint / f"{UNET}.safetensors"), path)
    (checkpoint / f"{UNET}.safetensors").unlink()
    os.truncate(path, kept_bytes)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin: not a"):
        load(checkpoint)


def test_a_file_without_tensors_is_a_clear_error(checkpoint):
    (checkpoint / f"{UNET}.safetensors").unlink()
    torch.save({"epoch": 3}, checkpoint / f"{UNET}.bin")
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        load(checkpoint)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_never_runs(checkpoint, tmp_path, legacy):
    victim = tmp_path / "was_run"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {victim}",)

    (checkpoint / f"{UNET}.safetensors").unlink()
    path = checkpoint / f"{UNET}.bin"
    torch.save({"conv_in.weight": torch.zeros(1), "x": Malicious()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpoint, match=r"diffusion_pytorch_model\.bin: refused") as caught:
        load(checkpoint)
    assert "posix.system" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not victim.exists()


def test_code_in_a_bare_pickle_is_refused_and_never_runs(checkpoint, tmp_path):
    victim = tmp_path / "was_run"

    class Malicious:
        def __reduce__(self):
            return exec, (f"open({str(victim)!r}, 'w')",)

    (checkpoint / f"{UNET}.safetensors").unlink()
    (checkpoint / f"{UNET}.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        load(checkpoint)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["unet/config.json", f"{VAE}.safetensors", "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name.split("/")[-1].split(".")[0]):
        load(checkpoint)


FILES_OF_EACH_KIND = ("unet/config.json", f"{UNET}.safetensors", f"{UNET}.bin")


@pytest.mark.parametrize("name", FILES_OF_EACH_KIND)
def test_a_folder_in_the_place_of_a_file_is_a_clear_error(checkpoint, name):
    if name.endswith(".bin"):
        (checkpoint / f"{UNET}.safetensors").unlink()
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: is a folder and must be a file"):
        load(checkpoint)


@pytest.mark.parametrize("name", FILES_OF_EACH_KIND)
def test_a_file_that_may_not_be_read_is_told_so_and_not_called_damaged(checkpoint, name):
    path = checkpoint / name
    if name.endswith(".bin"):
        torch.save(load_file(checkpoint / f"{UNET}.safetensors"), path)
        (checkpoint / f"{UNET}.safetensors").unlink()
    path.chmod(0)
    with without_the_powers_of_root(), pytest.raises(CheckpointError, match=f"{name}: cannot be read.*permit it"):
        open_checkpoint(checkpoint).read("unet")


def test_a_checkpoint_whose_folder_is_closed_is_a_clear_error(checkpoint):
    checkpoint.chmod(0o600)
    with without_the_powers_of_root(), pytest.raises(CheckpointError, match=r"cannot be read .*Permission denied"):
        open_checkpoint(checkpoint)
    checkpoint.chmod(0o700)


def test_converting_into_a_closed_folder_is_a_clear_error(tiny_checkpoint, tmp_path):
    opened = open_checkpoint(tiny_checkpoint)
    (tmp_path / "closed" / "in").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    with without_the_powers_of_root(), pytest.raises(OutputError, match=r"cannot be written .*Permission denied"):
        convert(opened, tmp_path / "closed" / "in" / "new", torch.float32)
    (tmp_path / "closed").chmod(0o700)


@contextmanager
def without_the_powers_of_root():
    """Root may read any file but for these two capabilities, which this thread lays down meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, held) == 0
    laid_down = (ctypes.c_uint32 * 6)(*held)
    laid_down[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, laid_down) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


def test_a_folder_that_is_no_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model_index\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "panda", "./panda", "a/b/c", "~nosuchuser/x", "x" * 300])
def test_a_name_that_is_neither_folder_nor_hub_id_is_a_clear_error(name):
    with pytest.raises(CheckpointNotFound, match="no such folder, and not a hub id"):
        load(name)


def test_an_empty_name_is_not_the_current_folder(tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint)
    with pytest.raises(CheckpointNotFound, match="model '': is empty; give demo"):
        load("")
    assert open_checkpoint(".").config == open_checkpoint(tiny_checkpoint).config


def test_a_folder_has_no_revision(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="a folder has no revision 'main'"):
        load(tiny_checkpoint, revision="main")


def test_demo_is_the_checkpoint_that_comes_along_whatever_folder_lies_around(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEMO).symlink_to(tiny_checkpoint)
    pipeline = load()
    assert pipeline.name == load(DEMO).name == DEMO
    assert (pipeline.defaults.width, pipeline.defaults.num_frames) == (128, 16)
    for own in (f"./{DEMO}", tmp_path / DEMO, Path(DEMO)):
        assert load(own).defaults == open_checkpoint(tiny_checkpoint).config.defaults != pipeline.defaults


def test_demo_has_no_revision():
    with pytest.raises(CheckpointError, match="demo: the demo checkpoint has no revision 'main'"):
        load(DEMO, revision="main")


def test_an_installation_without_its_demo_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "_DEMO_FOLDER", tmp_path / "checkpoint")
    with pytest.raises(CheckpointNotFound, match=r"demo: .*checkpoint is missing.*install that again"):
        load(DEMO)


def test_what_is_no_model_is_answered_with_all_that_can_be_one():
    with pytest.raises(CheckpointNotFound, match="give demo, a folder, or a hub id like damo-vilab"):
        load("panda")


@pytest.mark.parametrize("dtype", ["int4", torch.int8])
def test_a_type_that_networks_cannot_have_is_a_clear_error(tiny_checkpoint, dtype):
    with pytest.raises(InvalidRequest, match="must be one of fp32, bf16, fp16"):
        load(tiny_checkpoint, dtype=dtype)


def test_a_device_that_holds_no_values_is_a_clear_error(tiny_checkpoint):
    with pytest.raises(InvalidRequest, match="device meta"):
        load(tiny_checkpoint, device="meta")


def test_a_device_that_is_not_there_is_a_clear_error(tiny_checkpoint):
    with pytest.raises(InvalidRequest, match="device cuda:99"):
        load(tiny_checkpoint, device="cuda:99")


def test_a_checkpoint_of_the_family_is_known_by_its_name(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "zeroscope_v2_576w")
    (folder / "generation_config.json").unlink()
    defaults = open_checkpoint(folder).config.defaults
    assert (defaults.width, defaults.height, defaults.num_frames) == (576, 320, 24)


@pytest.mark.parametrize(
    "called", [".", "../zeroscope_v2_576w/", "unet/..", "../link", "../potat1/../zeroscope_v2_576w"]
)
def test_a_checkpoint_of_the_family_is_known_however_its_folder_is_called(
    tiny_checkpoint, tmp_path, monkeypatch, called
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "zeroscope_v2_576w")
    (folder / "generation_config.json").unlink()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "potat1").mkdir()
    monkeypatch.chdir(folder)
    assert open_checkpoint(called).config.defaults.width == 576


def test_a_link_may_carry_the_name_of_a_checkpoint_of_the_family(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").unlink()
    (tmp_path / "zeroscope_v2_576w").symlink_to(checkpoint)
    assert open_checkpoint(tmp_path / "zeroscope_v2_576w").config.defaults.width == 576


def test_converting_keeps_every_tensor_and_setting(tiny_checkpoint, tmp_path):
    convert(open_checkpoint(tiny_checkpoint), tmp_path / "copy", torch.float32)
    assert_equal_tensors(tensors_of(tmp_path / "copy"), tensors_of(tiny_checkpoint))
    assert open_checkpoint(tmp_path / "copy").config == open_checkpoint(tiny_checkpoint).config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_converting_never_writes_over_a_folder(tiny_checkpoint, tmp_path):
    (tmp_path / "copy").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        convert(open_checkpoint(tiny_checkpoint), tmp_path / "copy", torch.float32)


def test_converting_touches_nothing_beside_its_destination(tiny_checkpoint, tmp_path):
    (tmp_path / "copy.unfinished").mkdir()
    (tmp_path / "copy.unfinished" / "thesis.txt").write_text("precious")
    convert(open_checkpoint(tiny_checkpoint), tmp_path / "copy", torch.float32)
    assert (tmp_path / "copy.unfinished" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("command", ["convert", "random-checkpoint"])
def test_a_full_disk_while_writing_weights_is_a_clear_error_and_leaves_nothing(tiny_checkpoint, tmp_path, command):
    """A limit on the size of a file stands in for a disk: it breaks the same write in the same way."""
    arguments = [command, *([str(tiny_checkpoint)] if command == "convert" else []), str(tmp_path / "new")]
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21));"
        f"from t2v_core.cli import app; app({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_read_by_many_threads_at_once(tmp_path):
    """torch's list of safe names belongs to the process: two readers must not take each other's away."""
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "score": numpy.float64(0.5)}, path)
    with ThreadPoolExecutor(4) as pool:
        assert all(list(tensors) == ["a"] for tensors in pool.map(lambda _: read_tensors(path), range(200)))


def test_converting_a_damaged_checkpoint_leaves_nothing(checkpoint, tmp_path):
    edit(checkpoint / f"{TEXT}.safetensors", lambda tensors: tensors.pop("text_model.final_layer_norm.bias"))
    with pytest.raises(CheckpointError):
        convert(open_checkpoint(checkpoint), tmp_path / "copy", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_loading_needs_no_memory_but_for_what_is_converted(tmp_path):
    """Of a UNet of 430 MB: mapped as it is in fp32; in fp16 one copy of half the size, and never both."""
    script = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from t2v_core.config import ModelConfig, UNetConfig
        from t2v_core.weights import load_unet, open_checkpoint

        def anonymous_mib(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(key + ":"))

        folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
        before = anonymous_mib("RssAnon")
        unet = load_unet(open_checkpoint(folder), torch.device("cpu"), dtype)
        print(anonymous_mib("RssAnon") - before, sum(p.numel() * p.element_size() for p in unet.parameters()) // 2**20)
        """
    )
    from t2v_core.config import ModelConfig, TextEncoderConfig, UNetConfig
    from t2v_core.weights.random_init import TINY, write_random_checkpoint

    config = ModelConfig(
        unet=UNetConfig(block_out_channels=(160, 320, 640, 640), layers_per_block=1, cross_attention_dim=64),
        autoencoder=TINY.autoencoder,
        text_encoder=TextEncoderConfig(width=64, heads=2, layers=1, mlp_width=64),
    )
    write_random_checkpoint(tmp_path / "large", config)

    def measured(dtype):
        command = [sys.executable, "-c", script, str(tmp_path / "large"), dtype]
        return [int(word) for word in subprocess.run(command, capture_output=True, check=True).stdout.split()]

    grown, size = measured("float32")
    assert size > 300
    assert grown < 0.15 * size
    grown, size = measured("float16")
    assert grown < 1.15 * size + 20
