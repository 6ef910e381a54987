"""Numbers of 8 bits for products: e4m3, with 4 bits of exponent and 3 of mantissa (Micikevicius et al. 2022).

What a norm gives is near 1, and goes in as it is. Weights are small, and go in WEIGHT_SCALE times as large: so neither
loses more than its digits, and no tensor needs a scale of its own. The last product of a transformer also takes what no
norm has bounded, a sum and gated values: what is beyond LARGEST there becomes that.
"""

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
WEIGHT_SCALE = 64.0
LARGEST = 448.0


def to_fp8(x: Tensor) -> Tensor:
    """The nearest numbers; what is too large becomes the largest there is."""
    return x.clamp(-LARGEST, LARGEST).to(FP8)


def quantised(*weights: Tensor) -> tuple[Tensor, ...]:
    """Weights as products in fp8 read them; the same ones, where any has numbers that are too large for that.

    What goes from one product to the next is made for both, so either all are in fp8 or none is.
    """
    if any(weight.abs().amax() > LARGEST / WEIGHT_SCALE for weight in weights):
        return weights
    return tuple(to_fp8(weight * WEIGHT_SCALE) for weight in weights)


def quantise(*layers: nn.Conv2d | nn.Conv3d | nn.Linear) -> None:
    """Let layers have weights as `quantised` gives them."""
    for layer, weight in zip(layers, quantised(*(layer.weight for layer in layers)), strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)


def scale_of(weight: Tensor) -> float:
    """What a product with this weight is multiplied by, in the end."""
    return 1.0 / WEIGHT_SCALE if weight.dtype == FP8 else 1.0


def dtype_for(weight: Tensor) -> torch.dtype | None:
    """What a product with this weight must be given: fp8, or None for what there is."""
    return FP8 if weight.dtype == FP8 else None
