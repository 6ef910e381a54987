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


def quantised(weight: Tensor) -> Tensor:
    """A weight as products in fp8 read it; the same one, where it has numbers that are too large for that."""
    return to_fp8(weight * WEIGHT_SCALE) if weight.abs().amax() <= LARGEST / WEIGHT_SCALE else weight


def quantise(*layers: nn.Conv2d | nn.Conv3d | nn.Linear) -> None:
    """Let layers have weights as `quantised` gives them."""
    for layer in layers:
        layer.weight = nn.Parameter(quantised(layer.weight), requires_grad=False)


def scale_of(weight: Tensor) -> float:
    """What a product with this weight is multiplied by, in the end."""
    return 1.0 / WEIGHT_SCALE if weight.dtype == FP8 else 1.0


def dtype_for(weight: Tensor) -> torch.dtype | None:
    """What a product with this weight must be given: fp8, or None for what there is."""
    return FP8 if weight.dtype == FP8 else None
