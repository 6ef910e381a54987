"""One network's training: what is common to the demo's autoencoder and its denoiser."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, ...]

_SAVE_EVERY_S = 60.0
_LOG_EVERY_STEPS = 200


@dataclass(frozen=True, slots=True)
class LearningSchedule:
    """How many steps, how large, and how long the moving average of the weights remembers."""

    steps: int
    learning_rate: float
    warmup_steps: int
    ema_decay: float

    def at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then half a cosine down to a hundredth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


class OutOfTime(Exception):
    """The time given is used up; the state is saved."""


def save_state(state: dict[str, Any], path: Path) -> None:  # Any: what torch.save takes
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


class TrainingRun:
    """One network's training: its optimiser, its learning rate, a moving average, and a state file to go on from.

    The weights that learn are kept in float32, beside the network's own, whatever type it runs in.
    """

    def __init__(
        self, path: Path, network: nn.Module, schedule: LearningSchedule, *, seed: int, deadline: float
    ) -> None:
        self.path, self.network, self.schedule, self.seed, self.deadline = path, network, schedule, seed, deadline
        network.eval()  # without dropout: the data are endless, and a step draws from nothing but its generator
        self.weights = {name: parameter.detach().float().clone() for name, parameter in network.named_parameters()}
        self.device = next(iter(self.weights.values())).device
        self.optimiser = torch.optim.AdamW(
            list(self.weights.values()),
            schedule.learning_rate,
            (0.9, 0.99),
            weight_decay=0.0,
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.is_finished = False
        self.notes: dict[str, float] = {}
        self.averaged: dict[str, Tensor] = {}
        self.set_weights(dict(network.named_parameters()))
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.set_weights(state["weights"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.averaged, self.step = state["averaged"], state["step"]
            self.is_finished, self.notes = state["is_finished"], state["notes"]

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from these, in the network and its average too."""
        self.averaged = {name: tensor.detach().float().clone() for name, tensor in weights.items()}
        for name, parameter in self.network.named_parameters():
            self.weights[name].copy_(weights[name])
            parameter.copy_(weights[name])

    def train(self, draw: Callable[[torch.Generator], Batch], loss_of: Callable[[Batch], Tensor]) -> None:
        """Take the steps that are left. Each draws its batch, all of one shape, from a generator of its own number."""
        generator = torch.Generator(self.device)
        parameters: list[Tensor] = list(self.network.parameters())
        weights = list(self.weights.values())
        averages = list(self.averaged.values())
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        gradients = _gradients(weights)
        backward = _graphed if self.device.type == "cuda" else _eager
        take_gradients = backward(loss_of, parameters, draw(generator.manual_seed(self.seed)))
        total = torch.zeros((), device=self.device)
        saved = started = time.monotonic()
        while self.step < self.schedule.steps:
            generator.manual_seed((self.seed << 32) + self.step)
            for group in self.optimiser.param_groups:
                group["lr"] = self.schedule.at(self.step)
            total += take_gradients(draw(generator))
            torch._foreach_copy_(gradients, _gradients(parameters))
            nn.utils.clip_grad_norm_(weights, 1.0)
            self.optimiser.step()
            with torch.no_grad():
                torch._foreach_copy_(parameters, weights)
            self.step += 1
            decay = min(self.schedule.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(averages, weights, 1 - decay)
            if self.step % _LOG_EVERY_STEPS == 0:
                mean = total.item() / _LOG_EVERY_STEPS
                seconds = (time.monotonic() - started) / _LOG_EVERY_STEPS
                logger.info("%s step %d: loss %.5f, %.4f s a step", self.path.stem, self.step, mean, seconds)
                total.zero_()
                started = time.monotonic()
            if time.monotonic() > self.deadline:
                self._save()
                raise OutOfTime(f"{self.path}: stopped at step {self.step} of {self.schedule.steps}")
            if time.monotonic() - saved > _SAVE_EVERY_S:
                self._save()
                saved = time.monotonic()

    def finish(self, notes: dict[str, float]) -> None:
        self.is_finished, self.notes = True, notes
        self._save()

    def _save(self) -> None:
        state = {
            "weights": self.weights,
            "optimiser": self.optimiser.state_dict(),
            "averaged": self.averaged,
            "step": self.step,
            "is_finished": self.is_finished,
            "notes": self.notes,
        }
        save_state(state, self.path)


def _gradients(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def _eager(loss_of: Callable[[Batch], Tensor], parameters: list[Tensor], _: Batch) -> Callable[[Batch], Tensor]:
    """From a batch to its loss, with the gradients left in the parameters."""

    def take_gradients(batch: Batch) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return take_gradients


def _graphed(loss_of: Callable[[Batch], Tensor], parameters: list[Tensor], example: Batch) -> Callable[[Batch], Tensor]:
    """The same as one CUDA graph: networks this small are done sooner than their thousands of kernels are launched."""
    inputs = tuple(part.clone() for part in example)
    eager = _eager(loss_of, parameters, example)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are chosen and workspaces taken before the capture
        for _ in range(3):
            eager(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_loss = eager(inputs)

    def take_gradients(batch: Batch) -> Tensor:
        for static, part in zip(inputs, batch, strict=True):
            static.copy_(part)
        graph.replay()
        return captured_loss

    return take_gradients
