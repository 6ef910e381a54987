"""The demo's sizes: the released model's architecture, a hundred times smaller."""

from t2v_core.config import (
    AutoencoderConfig,
    GenerationDefaults,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)

CONFIG = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        attention_head_dim=32,
        cross_attention_dim=128,
        norm_num_groups=8,
    ),
    autoencoder=AutoencoderConfig(
        block_out_channels=(32, 64, 96, 96), layers_per_block=1, norm_num_groups=8, mid_block_attention=False
    ),
    text_encoder=TextEncoderConfig(width=128, heads=4, layers=4, mlp_width=512),
    # The released model's last timestep still shows where a figure is and goes (sigma / alpha is 15 there), so that
    # training need not read the words of motion while sampling has nothing else. Here it is 64.
    schedule=ScheduleConfig(beta_end=0.02),
    defaults=GenerationDefaults(width=128, height=128, num_frames=16, num_inference_steps=25, guidance_scale=4.0),
)
