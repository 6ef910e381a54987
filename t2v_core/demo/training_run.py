"""One network's training: what is common to the demo's autoencoder and its denoiser."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

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
    """One network's training: its optimiser, its learning rate, a moving average, and a state file to go on from."""

    def __init__(
        self, path: Path, network: nn.Module, schedule: LearningSchedule, *, seed: int, deadline: float
    ) -> None:
        self.path, self.network, self.schedule, self.seed, self.deadline = path, network, schedule, seed, deadline
        network.eval()  # without dropout: the data are endless, and a step draws from nothing but its generator
        fused = next(network.parameters()).is_cuda
        self.optimiser = torch.optim.AdamW(
            network.parameters(), schedule.learning_rate, (0.9, 0.99), weight_decay=0.0, fused=fused
        )
        self.step = 0
        self.is_finished = False
        self.notes: dict[str, float] = {}
        self.averaged: dict[str, Tensor] = {}  # from the first step on
        if path.exists():
            state = torch.load(path, map_location=next(network.parameters()).device, weights_only=True)
            network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.averaged, self.step = state["averaged"], state["step"]
            self.is_finished, self.notes = state["is_finished"], state["notes"]

    def train(self, loss_of: Callable[[torch.Generator], Tensor], device: torch.device) -> None:
        """Take the steps that are left. Each step draws from a generator of its own number."""
        if self.step == 0:
            self.averaged = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        generator = torch.Generator(device)
        saved, total, started = time.monotonic(), torch.zeros((), device=device), time.monotonic()
        parameters = dict(self.network.named_parameters())
        averages = [self.averaged[name] for name in parameters]
        while self.step < self.schedule.steps:
            generator.manual_seed((self.seed << 32) + self.step)
            for group in self.optimiser.param_groups:
                group["lr"] = self.schedule.at(self.step)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = loss_of(generator)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            self.step += 1
            decay = min(self.schedule.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(averages, [p.detach() for p in parameters.values()], 1 - decay)
            total += loss.detach()
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
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "averaged": self.averaged,
            "step": self.step,
            "is_finished": self.is_finished,
            "notes": self.notes,
        }
        save_state(state, self.path)
