"""What the networks spend their time on: plain PyTorch, which says what is meant, and kernels of our own.

`ops` picks these where they run and are faster; plain PyTorch serves CPUs and training.
"""

from t2v_core.kernels.ops import (
    add,
    add_group_norm,
    conv_frames,
    conv_over_time,
    geglu,
    group_norm,
    group_norm_conv,
    join_quarters,
    join_quarters_group_norm,
    linear,
    linear_norm,
    sampler_update,
    single_head_attention,
    spatial_attention,
    temporal_attention,
    text_attention,
    unfolds_over_time,
)
from t2v_core.kernels.plain import conv_corners

__all__ = [
    "add",
    "add_group_norm",
    "conv_corners",
    "conv_frames",
    "conv_over_time",
    "geglu",
    "group_norm",
    "group_norm_conv",
    "join_quarters",
    "join_quarters_group_norm",
    "linear",
    "linear_norm",
    "sampler_update",
    "single_head_attention",
    "spatial_attention",
    "temporal_attention",
    "text_attention",
    "unfolds_over_time",
]
