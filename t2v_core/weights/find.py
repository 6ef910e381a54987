"""From what a user calls a checkpoint to one that is on this machine and understood."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

from t2v_core.config import GenerationDefaults
from t2v_core.errors import CheckpointError, CheckpointNotFound
from t2v_core.weights import diffusers_layout, modelscope_layout
from t2v_core.weights.checkpoint import NETWORKS, Checkpoint, NetworkName

DEMO = "demo"  # what a user calls the checkpoint that comes with this package

# A path, not an import: the demo is made with this package, which knows nothing else of it.
_DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"

_LAYOUTS = (diffusers_layout, modelscope_layout)

# Checkpoints of this family that were trained at another size than the first, by folder or repository name.
_FAMILY = {
    "zeroscope_v2_576w": GenerationDefaults(width=576, height=320, num_frames=24),
    "zeroscope_v2_XL": GenerationDefaults(width=1024, height=576, num_frames=24),
    "potat1": GenerationDefaults(width=1024, height=576, num_frames=24),
    "animov-0.1": GenerationDefaults(width=384, height=384),
    "animov-0.1.1": GenerationDefaults(width=448, height=384),
    "animov-512x": GenerationDefaults(width=512, height=512),
}


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    half: bool = False,
    networks: Collection[NetworkName] = NETWORKS,
) -> Checkpoint:
    """Find a checkpoint, fetch what is missing of it, and read its configuration.

    `model` is "demo", a folder or a hub id; `revision` is a hub id's branch, tag or commit; `half` prefers files of
    fp16. Weights are fetched of `networks` only, and no others can be read. Raises CheckpointNotFound or
    CheckpointError.
    """
    name = str(model)
    if not name:
        raise CheckpointNotFound(f"model {name!r}: is empty; give {DEMO}, a folder, or a hub id")
    if revision is not None and (model == DEMO or is_folder(model)):
        kind = "the demo checkpoint" if model == DEMO else "a folder"
        raise CheckpointError(f"{name}: {kind} has no revision {revision!r}; leave it out, or give a hub id")
    if model == DEMO:
        folder = _demo()
    elif is_folder(model):
        folder = Path(model).expanduser()
    else:
        folder = _fetch(name, revision, half, networks)
    try:
        markers = [layout.MARKER for layout in _LAYOUTS if (folder / layout.MARKER).is_file()]
        checkpoint: Checkpoint = _layout(markers, name).open_folder(folder, name, half, networks)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error}); permit it, or give another") from error
    # A link may carry the name, or what it leads to; "." has neither.
    family_name = next((known for known in (Path(name).name, public_name(model)) if known in _FAMILY), None)
    if family_name is not None and checkpoint.config.defaults == GenerationDefaults():
        config = dataclasses.replace(checkpoint.config, defaults=_FAMILY[family_name])
        checkpoint = dataclasses.replace(checkpoint, config=config)
    return checkpoint


def is_folder(model: str | Path) -> bool:
    """Whether this is a folder of the user's.

    The string "demo" never is, so that no folder that happens to lie there changes what it means. "./demo" can be, and
    any Path.
    """
    try:
        return model != DEMO and Path(model).expanduser().is_dir()
    except (OSError, RuntimeError):  # too long a name, a folder that may not be seen, or no such user
        return False


def public_name(model: str | Path) -> str:
    """What a model is called in videos and answers. Where a folder lies is nobody's business."""
    return Path(model).expanduser().resolve().name if is_folder(model) else str(model)


def _demo() -> Path:
    if not _DEMO_FOLDER.is_dir():
        raise CheckpointNotFound(
            f"{DEMO}: {_DEMO_FOLDER} is missing, though it comes with t2v-serve; "
            "install that again, or give a folder or a hub id"
        )
    return _DEMO_FOLDER


def _fetch(name: str, revision: str | None, half: bool, networks: Collection[NetworkName]) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointNotFound(
            f"{name}: no such folder, and not a hub id; give {DEMO}, a folder, "
            "or a hub id like damo-vilab/text-to-video-ms-1.7b"
        )

    # Not at the top: the hub's client takes a second to import, and a folder does not need it.
    from t2v_core.weights.hub import download

    def select(names: Sequence[str]) -> Sequence[str]:
        return _layout(names, name).needed_files(names, half, networks)

    return download(name, revision=revision, select=select)


def _layout(names: Sequence[str], model: str) -> ModuleType:
    for layout in _LAYOUTS:
        if layout.MARKER in names:
            return layout
    raise CheckpointError(
        f"{model}: holds neither {diffusers_layout.MARKER} (diffusers) nor {modelscope_layout.MARKER} (ModelScope); "
        "it is no checkpoint of this family"
    )
