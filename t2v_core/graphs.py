"""Networks whose calls on a GPU are replayed from CUDA graphs, so that small batches do not wait for their launches."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2v_core.autoencoder import Autoencoder
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.shapes import LatentShape
from t2v_core.unet3d import NoisePredictor, TextKeysValues, UNet3D

_WARM_UP_CALLS = 2
_MAX_GRAPHS = 32
_MAX_LATENTS = 2**19  # in all rows: 2 of 24 frames of 1024x576, or 32 of 16 frames of 256x256
_MAX_PIXELS = 2**20
_CAPTURING = threading.Lock()  # of a process, one graph at a time can be captured

Sizes = tuple[tuple[torch.Size, torch.dtype], ...]


def replayed_unet(unet: UNet3D) -> NoisePredictor:
    """The UNet itself on a CPU, and on a GPU one that gives the same with fewer launches."""
    return GraphedUNet(unet) if next(unet.parameters()).is_cuda else unet


def replay_decoder(autoencoder: Autoencoder) -> Autoencoder:
    """The same autoencoder; on a GPU, its decoder is replayed from now on."""
    if next(autoencoder.parameters()).is_cuda:
        autoencoder.decoder = _GraphedDecoder(autoencoder.decoder)
    return autoencoder


class GraphedUNet:
    """The same predictions as the network's own, from graphs where a call has at most `max_latents` in all rows."""

    def __init__(self, unet: UNet3D, *, max_latents: int = _MAX_LATENTS) -> None:
        self.config = unet.config
        self._unet, self._max_latents = unet, max_latents
        pool = GraphPool()
        self._whole, self._kept, self._reusing = (
            Graphs(function, pool) for function in (self._call, self._predict, self._reuse)
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's own."""
        return self._unet.parameters()

    def read_text(self, text_embeds: Tensor) -> TextKeysValues:
        """See `UNet3D.read_text`."""
        return self._unet.read_text(text_embeds)

    def __call__(self, latents: Tensor, timesteps: Tensor, text: TextKeysValues, rows: Tensor) -> Tensor:
        """See `UNet3D.forward`."""
        if self._is_large(latents, rows):
            return self._unet(latents, timesteps, text, rows)
        (eps,) = self._whole((latents, timesteps, rows), self._listed(text))
        return eps

    def predict(
        self, latents: Tensor, timesteps: Tensor, text: TextKeysValues, rows: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `UNet3D.predict`."""
        if self._is_large(latents, rows):
            return self._unet.predict(latents, timesteps, text, rows, features)
        if features is None:
            eps, features = self._kept((latents, timesteps, rows), self._listed(text))
        else:
            (eps,) = self._reusing((latents, timesteps, rows, features), self._listed(text))
        return eps, features

    def _is_large(self, latents: Tensor, rows: Tensor) -> bool:
        shape = LatentShape(*latents.shape[1:])
        return len(rows) * shape.num_frames * shape.height * shape.width > self._max_latents

    def _listed(self, text: TextKeysValues) -> list[Tensor]:
        return [tensor for reader in self._unet.text_readers for tensor in text[reader]]

    def _text(self, listed: Sequence[Tensor]) -> TextKeysValues:
        pairs = zip(listed[::2], listed[1::2], strict=True)
        return dict(zip(self._unet.text_readers, pairs, strict=True))

    def _call(self, latents: Tensor, timesteps: Tensor, rows: Tensor, *text: Tensor) -> tuple[Tensor]:
        return (self._unet(latents, timesteps, self._text(text), rows),)

    def _predict(self, latents: Tensor, timesteps: Tensor, rows: Tensor, *text: Tensor) -> tuple[Tensor, Tensor]:
        return self._unet.predict(latents, timesteps, self._text(text), rows)

    def _reuse(
        self, latents: Tensor, timesteps: Tensor, rows: Tensor, features: Tensor, *text: Tensor
    ) -> tuple[Tensor]:
        return (self._unet.predict(latents, timesteps, self._text(text), rows, features)[0],)


class _GraphedDecoder(nn.Module):
    """The same frames as the decoder's own, from graphs where there are at most `_MAX_PIXELS`, sides 8 times z's."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self._graphs = Graphs(lambda z: (decoder(z),))

    def forward(self, z: Tensor) -> Tensor:
        """z: (b, f, h, w, c) -> (b, f, 8h, 8w, 3)."""
        if 64 * z[..., 0].numel() > _MAX_PIXELS:
            return self.decoder(z)
        (frames,) = self._graphs((z,))
        return frames


@dataclass(slots=True)
class _Captured:
    """A graph, and where it reads and writes. `copied` are what was copied to the `kept` inputs."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    kept: list[Tensor]
    copied: list[weakref.ref[Tensor]]
    outs: tuple[Tensor, ...]


class GraphPool:
    """Memory that graphs share, of which one runs at a time: each writes where others had what they need no more."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.lock = threading.Lock()


class Graphs:
    """A function of tensors, captured once for each of their sizes when it first sees them, and replayed from then on.

    All graphs of a pool share its memory. The least recently used of too many is dropped.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], pool: GraphPool | None = None) -> None:
        self._function = function
        self._captured: OrderedDict[Sizes, _Captured] = OrderedDict()
        self._pool = pool or GraphPool()

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[Tensor], kept: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """What the function gives. `kept` inputs come after the others, and do not change while they are the same."""
        sizes = tuple((tensor.shape, tensor.dtype) for tensor in (*inputs, *kept))
        with self._pool.lock:
            captured = self._captured.get(sizes)
            if captured is None:
                captured = self._captured[sizes] = self._capture(inputs, kept)
                if len(self._captured) > _MAX_GRAPHS:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(sizes)
            torch._foreach_copy_(captured.inputs, list(inputs))
            if any(was() is not tensor for was, tensor in zip(captured.copied, kept, strict=True)):
                torch._foreach_copy_(captured.kept, list(kept))
                captured.copied = [weakref.ref(tensor) for tensor in kept]
            captured.graph.replay()
            return tuple(out.clone() for out in captured.outs)  # the next replay writes there again

    @out_of_memory_explained()
    def _capture(self, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> _Captured:
        inputs, kept_copies = [tensor.clone() for tensor in inputs], [tensor.clone() for tensor in kept]
        stream = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):  # compiles kernels and chooses algorithms, which cannot be captured
                self._function(*inputs, *kept_copies)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode="thread_local"):
            outs = self._function(*inputs, *kept_copies)
        return _Captured(graph, inputs, kept_copies, [weakref.ref(tensor) for tensor in kept], outs)
