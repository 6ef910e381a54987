"""What every sampler comes down to: a table of scalars, one row a step, and the update that applies a row.

In the variance-preserving frame, x_t = alpha_t x0 + sigma_t noise, each sampler here is linear in what it knows:

    D_i     = (x_i - sigma_i eps_i) / alpha_i                               the prediction of x0
    x_{i+1} = a_i x_i + b_i0 D_i + b_i1 D_{i-1} + b_i2 D_{i-2} + c_i noise
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2v_core.kernels import sampler_update


@dataclass(frozen=True, slots=True)
class Coefficients:
    """A sampler's plan for n steps, in float64. All are (n,), but b: (n, 3).

    Latents start as `noise_scale` times noise or, from a video's x0, as alpha[0] x0 + sigma[0] noise.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    noise_scale: float = 1.0
    _rows: Tensor = field(init=False, repr=False)
    _draws_noise: tuple[bool, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Made once: steps of many requests read them, while a GPU waits.
        rows = torch.stack([self.alpha, self.sigma, self.a, *self.b.unbind(1), self.c], dim=1)
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_draws_noise", tuple((self.c != 0.0).tolist()))

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def draws_noise(self, step: int) -> bool:
        """Whether the sampler is stochastic at this step."""
        return self._draws_noise[step]

    def row(self, step: int) -> Tensor:
        """The scalars of one step, as `update` reads them: (7,)."""
        return self._rows[step]


def update(latents: Tensor, eps: Tensor, history: Tensor, noise: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One step of every request in a batch, whatever its sampler.

    latents, eps, noise: (b, c, f, h, w), noise None where no request draws any;
    history: (b, 2, c, f, h, w), earlier predictions of x0, newest first; rows: (b, 7), of `Coefficients.row`.
    Returns the next latents and the next history.
    """
    return sampler_update(latents, eps, history, noise, rows.to(latents))
