r"""An attention's last product, the sum and the LayerNorm after it in one kernel: whether it is worth its place.

    python load_tests/tune_linear_norm.py
    TRITON_INTERPRET=1 python load_tests/tune_linear_norm.py --check

Where all of a row's 320 channels fit into a program, the product need not go through memory. With 2 and 16 rows of 16
frames of 256x256: microseconds of the two kernels as they are, and of each choice.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from bench_kernels import Timer
from torch import Tensor, nn
from trials import any_device, check, compare, only_checked
from triton.tools.tensor_descriptor import TensorDescriptor

from t2v_core.kernels import plain, triton_rows

_CHANNELS, _FIRST, _SECOND = 320, 256, 64  # a program's columns, as powers of two
_PIXELS, _FRAMES = 1024, 16
_BLOCK_K = 64


class Choice(NamedTuple):
    """Rows of a tile, warps, and stages."""

    block_m: int
    num_warps: int
    stages: int


_CHOICES = (Choice(64, 4, 3), Choice(64, 4, 4), Choice(64, 8, 3), Choice(128, 8, 3), Choice(128, 8, 4))


class Inputs(NamedTuple):
    """x: the residual stream, attended: (rows, 320), and what is applied to them."""

    x: Tensor
    attended: Tensor
    linear: nn.Linear
    norm: nn.LayerNorm


def main() -> None:
    if only_checked(__doc__):
        _check()
        return
    timer = Timer(torch.device("cuda"))
    for num_rows in (2, 16):
        given = _inputs(num_rows * _FRAMES * _PIXELS, "cuda")
        tried = {str(tuple(choice)): partial(_fused, given, choice) for choice in _CHOICES}
        compare(f"{num_rows} rows", timer, {"as it is": partial(_as_it_is, given)}, tried)


def _inputs(rows: int, device: str) -> Inputs:
    torch.manual_seed(0)
    x, attended = torch.randn(2, rows, _CHANNELS, device=device, dtype=torch.float16).unbind()
    linear, norm = nn.Linear(_CHANNELS, _CHANNELS), nn.LayerNorm(_CHANNELS)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    return Inputs(x, attended, *(m.requires_grad_(False).to(device, torch.float16) for m in (linear, norm)))


def _check() -> None:
    given = _inputs(300, any_device())
    exact = _as_exact(*(part.double() for part in _inputs(300, any_device())))
    for choice in _CHOICES:
        check(str(tuple(choice)), _fused(given, choice), exact, 1e-3)


def _as_exact(x: Tensor, attended: Tensor, linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return plain.add_layer_norm(x, F.linear(attended, linear.weight), linear.bias, norm)


def _as_it_is(given: Inputs) -> tuple[Tensor, Tensor]:
    product = F.linear(given.attended, given.linear.weight)
    return triton_rows.add_layer_norm(given.x, product, given.linear.bias, given.norm)


def _fused(given: Inputs, choice: Choice) -> tuple[Tensor, Tensor]:
    x, attended, linear, norm = given
    summed, out = torch.empty_like(x), torch.empty_like(x)

    def both(tensor: Tensor, rows: int) -> list[TensorDescriptor]:
        return [TensorDescriptor.from_tensor(tensor, [rows, columns]) for columns in (_FIRST, _SECOND)]

    _linear_add_norm[(triton.cdiv(len(x), choice.block_m),)](
        TensorDescriptor.from_tensor(attended, [choice.block_m, _BLOCK_K]),
        *(TensorDescriptor.from_tensor(linear.weight, [columns, _BLOCK_K]) for columns in (_FIRST, _SECOND)),
        *both(x, choice.block_m), *both(summed, choice.block_m), *both(out, choice.block_m),
        linear.bias, norm.weight, norm.bias, norm.eps,
        WIDTH=_CHANNELS, FIRST=_FIRST, SECOND=_SECOND, BLOCK_M=choice.block_m, BLOCK_K=_BLOCK_K,
        num_warps=choice.num_warps, num_stages=choice.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return summed, out


@triton.jit
def _linear_add_norm(
    attended, weight, weight2, x, x2, summed, summed2, out, out2, offset, gamma, beta, eps,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of all columns of some rows: the FIRST ones, and the SECOND ones after them."""
    m = tl.program_id(0) * BLOCK_M
    one, two = tl.zeros((BLOCK_M, FIRST), tl.float32), tl.zeros((BLOCK_M, SECOND), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        rows = attended.load([m, k])
        one = tl.dot(rows, weight.load([0, k]).T, one)
        two = tl.dot(rows, weight2.load([FIRST, k]).T, two)
    column, column2 = tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND)
    one += x.load([m, 0]).to(tl.float32) + tl.load(offset + column).to(tl.float32)[None, :]
    two += x2.load([m, FIRST]).to(tl.float32) + tl.load(offset + column2).to(tl.float32)[None, :]
    summed.store([m, 0], one.to(summed.dtype))
    summed2.store([m, FIRST], two.to(summed2.dtype))
    mean = ((tl.sum(one, 1) + tl.sum(two, 1)) / WIDTH)[:, None]
    one, two = one - mean, two - mean
    rstd = tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / WIDTH + eps)[:, None]
    one = one * rstd * tl.load(gamma + column).to(tl.float32)[None, :] + tl.load(beta + column).to(tl.float32)[None, :]
    two = two * rstd * tl.load(gamma + column2).to(tl.float32)[None, :]
    two += tl.load(beta + column2).to(tl.float32)[None, :]
    out.store([m, 0], one.to(out.dtype))
    out2.store([m, FIRST], two.to(out2.dtype))


if __name__ == "__main__":
    main()
