"""A UNet whose calls on a GPU are replayed from CUDA graphs, so that small batches do not wait for their launches."""

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.shapes import LatentShape
from t2v_core.unet3d import TextKeysValues, UNet3D

_WARM_UP_CALLS = 2
_MAX_GRAPHS = 32


class _Key(NamedTuple):
    """What one graph serves."""

    latents: torch.Size
    dtype: torch.dtype
    num_rows: int
    num_tokens: int


@dataclass(slots=True)
class _Captured:
    """A graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    latents: Tensor
    timesteps: Tensor
    rows: Tensor
    text: list[Tensor]
    text_is_of: weakref.ref[Tensor]
    out: Tensor


class GraphedUNet:
    """The same predictions as the network's own. Calls up to `max_latents` in all rows are captured when first seen.

    Larger ones keep a GPU busy for longer than it takes to launch them, and are called as they are. All graphs share
    one pool of memory, since only one runs at a time: calls must come from one thread. The least recently used of too
    many is dropped.
    """

    def __init__(self, unet: UNet3D, *, max_latents: int = 8 * 16 * 32 * 32) -> None:
        self.config = unet.config
        self._unet, self._max_latents = unet, max_latents
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[_Key, _Captured] = OrderedDict()

    def read_text(self, text_embeds: Tensor) -> TextKeysValues:
        """See `UNet3D.read_text`."""
        return self._unet.read_text(text_embeds)

    @torch.inference_mode()
    def __call__(self, latents: Tensor, timesteps: Tensor, text: TextKeysValues, rows: Tensor) -> Tensor:
        """See `UNet3D.forward`. Raises OutOfMemory."""
        shape = LatentShape(*latents.shape[1:])
        if len(rows) * shape.num_frames * shape.height * shape.width > self._max_latents:
            return self._unet(latents, timesteps, text, rows)
        tensors = [tensor for pair in text.values() for tensor in pair]
        key = _Key(latents.shape, latents.dtype, len(rows), tensors[0].shape[2])
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(latents, timesteps, text, rows)
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        captured.latents.copy_(latents)
        captured.timesteps.copy_(timesteps)
        captured.rows.copy_(rows)
        if captured.text_is_of() is not tensors[0]:
            torch._foreach_copy_(captured.text, tensors)
            captured.text_is_of = weakref.ref(tensors[0])
        captured.graph.replay()
        return captured.out.clone()  # the next replay writes there again

    @out_of_memory_explained()
    def _capture(self, latents: Tensor, timesteps: Tensor, text: TextKeysValues, rows: Tensor) -> _Captured:
        latents, timesteps, rows = latents.clone(), timesteps.clone(), rows.clone()
        copies = {module: (k.clone(), v.clone()) for module, (k, v) in text.items()}
        stream = torch.cuda.Stream(latents.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):  # compiles kernels and chooses algorithms, which cannot be captured
                self._unet(latents, timesteps, copies, rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = self._unet(latents, timesteps, copies, rows)
        tensors = [tensor for pair in copies.values() for tensor in pair]
        first = next(iter(text.values()))[0]
        return _Captured(graph, latents, timesteps, rows, tensors, weakref.ref(first), out)
