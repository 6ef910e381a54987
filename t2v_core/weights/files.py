"""Tensor files: safetensors and PyTorch's pickles, memory-mapped, without running anything they contain."""

import pickle
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, StringConstraints, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2v_core.errors import CheckpointError, CheckpointNotFound, UnsafeCheckpoint

FileT = TypeVar("FileT", bound=BaseModel)

_REDOWNLOAD = "fetch it again, or convert the checkpoint again"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU and memory-mapped: nothing is read before it is used.

    A `.index.json` stands for the shards that it lists. A training checkpoint's `state_dict` is unwrapped.
    Raises CheckpointNotFound, CheckpointError for a file that is damaged or may not be read, UnsafeCheckpoint for a
    pickle with code.
    """
    with _refusals_explained(path), path.open("rb"):
        pass  # what the parsers below make of it would be told as damage
    if is_index(path.name):
        index = read_json(path, _ShardIndex)
        shards = sorted(set(index.weight_map.values()))
        return {name: tensor for shard in shards for name, tensor in read_tensors(path.parent / shard).items()}
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {_REDOWNLOAD}") from error
    return _tensors_of(_unpickle(path), path)


def read_json(path: Path, model: type[FileT]) -> FileT:
    """A JSON file as the given type. Raises CheckpointNotFound or CheckpointError."""
    with _refusals_explained(path):
        content = path.read_bytes()
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise CheckpointError(
            f"{path}: {where} is {first['input']!r}: {first['msg']}; this checkpoint is not of the ModelScope family"
        ) from error


def is_index(name: str) -> bool:
    """Whether a file lists shards: `.index.json` or, of a variant, `.index.fp16.json`."""
    return re.search(r"\.index(\.\w+)?\.json$", name) is not None


@contextmanager
def _refusals_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(f"{path}: no such file; {_REDOWNLOAD}") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: is a folder and must be a file; {_REDOWNLOAD}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); permit it, or {_REDOWNLOAD}") from error


class _ShardIndex(BaseModel):
    # Bare names of weights: an index must not lead out of its folder, nor back to itself.
    weight_map: dict[str, Annotated[str, StringConstraints(pattern=r"^[\w.-]+\.(safetensors|bin)$")]]


class _Inert:
    """Stands in for whatever a training checkpoint pickled beside its tensors. Takes any state, does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What the files of this family are known to hold beside tensors. Their contents are thrown away.
_INERT_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


_UNPICKLING = threading.Lock()  # torch's list of safe names is one for the whole process


def _unpickle(path: Path) -> Any:  # Any: a pickle may hold anything
    try:
        with _UNPICKLING, torch.serialization.safe_globals([(_Inert, name) for name in _INERT_NAMES]):
            # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to switch the protection off: it is not handed on.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise CheckpointError(f"{path}: not a whole PyTorch file; {_REDOWNLOAD}") from error
        raise UnsafeCheckpoint(
            f"{path}: refused, for it asks to run {code[1]} and only tensors and plain values are allowed; "
            "get the checkpoint as .safetensors, from a source that you trust"
        ) from error
    except Exception as error:  # torch's and zipfile's parsers raise a dozen kinds, depending on where bytes are wrong
        raise CheckpointError(f"{path}: not a whole PyTorch file; {_REDOWNLOAD}") from error


def _tensors_of(loaded: object, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name; it is not a model's weights")
    return tensors
