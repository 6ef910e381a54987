r"""GroupNorm of middling groups by one kernel instead of three: what to set in `t2v_core/kernels/triton_group_norm.py`.

    python load_tests/tune_norm.py
    TRITON_INTERPRET=1 python load_tests/tune_norm.py --check

A group that does not fit into a program's registers is read twice by the program, part by part: for its sums, and to be
normalised, then from the cache. For norms over the frames of the released UNet, with 2 and 16 rows of 16 frames of
256x256, after an addition and without one: microseconds of the kernels as they are, and of each choice.
"""

import itertools
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bench_kernels import Timer
from torch import Tensor, nn
from trials import any_device, check, compare, only_checked

from t2v_core.kernels import plain, triton_group_norm
from t2v_core.kernels.triton_group_norm import _load

_FRAMES = 16
_SIZES = ((8, 1280), (16, 640), (32, 320))  # side, channels


class Choice(NamedTuple):
    """Values of a part, and warps."""

    part_values: int
    num_warps: int


_CHOICES = (Choice(8192, 8), Choice(8192, 16), Choice(16384, 8), Choice(16384, 16), Choice(32768, 16))


def main() -> None:
    if only_checked(__doc__):
        _check()
        return
    timer = Timer(torch.device("cuda"))
    for (side, channels), num_rows, has_delta in itertools.product(_SIZES, (2, 16), (False, True)):
        x, delta, norm = _inputs((num_rows, _FRAMES, side, side, channels), torch.float16, "cuda")
        given = x, delta if has_delta else None, norm
        tried = {str(tuple(choice)): partial(_in_parts, *given, choice) for choice in _CHOICES}
        title = f"{side}x{side}, {channels} channels, {num_rows} rows{', added' if has_delta else ''}"
        compare(title, timer, {"as it is": partial(_as_it_is, *given)}, tried)


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, nn.GroupNorm]:
    torch.manual_seed(0)
    x, delta = torch.randn(2, *shape, device=device, dtype=dtype).unbind()
    norm = nn.GroupNorm(32, shape[-1]).requires_grad_(False)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    return x, delta, norm.to(device, dtype)


def _check() -> None:
    x, delta, norm = _inputs((2, 3, 7, 9, 1280), torch.float32, any_device())
    for choice, has_delta in itertools.product((Choice(2048, 4), Choice(16384, 8)), (False, True)):
        found = _in_parts(x, delta if has_delta else None, norm, choice)
        exact = plain.group_norm(x + delta if has_delta else x, norm, over_frames=True, silu=True)
        check(f"{choice}, {has_delta}", found, exact, 1e-5)


def _as_it_is(x: Tensor, delta: Tensor | None, norm: nn.GroupNorm) -> Tensor:
    how = {"over_frames": True, "silu": True}
    if delta is None:
        return triton_group_norm.group_norm(x, norm, **how)
    return triton_group_norm.add_group_norm(x, delta, None, norm, **how)[1]


def _in_parts(x: Tensor, delta: Tensor | None, norm: nn.GroupNorm, choice: Choice) -> Tensor:
    """As `triton_group_norm._group_norm`, over frames, without an offset or a skip connection."""
    samples, channels = len(x), x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x)
    group_channels = channels // norm.num_groups
    block_g = triton.next_power_of_2(group_channels)
    _groups_in_parts[(samples, norm.num_groups)](
        x, x if delta is None else delta, norm.weight, norm.bias, total, out,
        x[0, ..., 0].numel(), channels, norm.eps,
        HAS_DELTA=delta is not None, SILU=True, GROUP_CHANNELS=group_channels, BLOCK_G=block_g,
        BLOCK_P=choice.part_values // block_g, num_warps=choice.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def _groups_in_parts(
    x, second, weight, bias, summed, out, positions, channels, eps,
    HAS_DELTA: tl.constexpr, SILU: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, group = tl.program_id(0), tl.program_id(1)
    in_group = tl.arange(0, BLOCK_G)[None, :]
    column = group * GROUP_CHANNELS + in_group
    total, squares = tl.zeros((BLOCK_P, BLOCK_G), tl.float32), tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (position < positions) & (in_group < GROUP_CHANNELS)
        row = sample * positions + position
        values = _load(x, second, row, column, mask, channels, channels, False, HAS_DELTA)
        if HAS_DELTA:
            tl.store(summed + row.to(tl.int64) * channels + column, values.to(summed.dtype.element_ty), mask=mask)
        total += values
        squares += values * values
    count = positions * GROUP_CHANNELS
    mean = tl.sum(total) / count
    rstd = tl.rsqrt(tl.maximum(tl.sum(squares) / count - mean * mean, 0.0) + eps)
    scale = rstd * tl.load(weight + column, mask=in_group < GROUP_CHANNELS, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=in_group < GROUP_CHANNELS, other=0.0).to(tl.float32) - mean * scale
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (position < positions) & (in_group < GROUP_CHANNELS)
        row = sample * positions + position
        source = summed if HAS_DELTA else x  # of which each thread reads what it has written itself
        values = _load(source, second, row, column, mask, channels, channels, False, False)
        y = values * scale + shift
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(out + row.to(tl.int64) * channels + column, y.to(out.dtype.element_ty), mask=mask)


if __name__ == "__main__":
    main()
