"""Whether a request can be a row of a model's batch: what cannot would fail all the others with it, or change them."""

import torch
from torch import Tensor

from t2v_core.denoising import Denoising
from t2v_core.errors import InvalidRequest
from t2v_core.unet3d import NoisePredictor


def check_fit(request_id: str, denoising: Denoising, unet: NoisePredictor) -> None:
    """Raises InvalidRequest for a request that was prepared for another model, device or precision, or not wholly."""
    trajectory, plan, (prompt, negative, _) = denoising.trajectory, denoising.plan, denoising.conditioning
    parameter = next(unet.parameters())
    latents_dtype = torch.promote_types(parameter.dtype, torch.float32)
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim

    def check(name: str, value: object, needed: object) -> None:
        if value != needed:
            raise InvalidRequest(
                f"request {request_id}: {name} must be {needed}, not {value}; prepare it for this model"
            )

    def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check(f"the shape of its {name}", tuple(tensor.shape), shape)
        check(f"the type of its {name}", tensor.dtype, dtype)
        check(f"the device of its {name}", tensor.device, parameter.device)

    check_tensor("latents", trajectory.latents, (channels, *trajectory.latents.shape[1:]), latents_dtype)
    check("the number of dimensions of its latents", trajectory.latents.dim(), 4)
    check_tensor("history", trajectory.history, (2, *trajectory.latents.shape), latents_dtype)
    check("the number of steps of its plan", plan.num_steps, trajectory.num_steps)
    check_tensor("prompt", prompt, (len(prompt), width), parameter.dtype)
    if negative is not None:
        check_tensor("negative prompt", negative, (len(prompt), width), parameter.dtype)
