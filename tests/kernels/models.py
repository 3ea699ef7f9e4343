"""Small random diffusers models whose sizes the kernels take, with their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

diffusers.logging.set_verbosity_error()
Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet2d(scale_shift: bool = False) -> Case:
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    )
    x = _randn(2, 3, 8, 8)
    return net, lambda model: model(x, torch.tensor([3, 500])).sample


def unet2d_condition() -> Case:
    torch.manual_seed(1)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    x, context = _randn(2, 4, 8, 8), _randn(2, 5, 12, seed=1)
    return net, lambda model: model(x, torch.tensor([3, 500]), encoder_hidden_states=context).sample


def autoencoder() -> Case:
    torch.manual_seed(2)
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    x = _randn(2, 3, 8, 8)
    return net, lambda model: model(x).sample


def dit() -> Case:
    torch.manual_seed(3)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    x = _randn(2, 4, 8, 8)
    t, labels = torch.tensor([3, 500]), torch.tensor([1, 2])
    return net.eval(), lambda model: model(x, timestep=t, class_labels=labels).sample


def sd3() -> Case:
    return _sd3(4, sample_size=8, num_layers=1)


def sd35() -> Case:
    """With norms of queries and keys, and a second attention in its block."""
    return _sd3(6, sample_size=4, num_layers=2, dual_attention_layers=(0,), qk_norm="rms_norm")


def _sd3(seed: int, *, sample_size: int, **settings: Any) -> Case:
    torch.manual_seed(seed)
    net = diffusers.SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=1,
        in_channels=4,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        out_channels=4,
        **settings,
    )
    given: dict[str, Any] = {
        "hidden_states": _randn(2, 4, sample_size, sample_size),
        "encoder_hidden_states": _randn(2, 5, 12, seed=1),
        "pooled_projections": _randn(2, 12, seed=2),
        "timestep": torch.tensor([3.0, 500.0]),
    }
    return net, lambda model: model(**given).sample


def pixart() -> Case:
    torch.manual_seed(7)
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=4,
        caption_channels=12,
        use_additional_conditions=False,
    )
    x, context = _randn(2, 4, 4, 4), _randn(2, 5, 12, seed=1)
    t = torch.tensor([3, 500])
    return net.eval(), lambda model: model(x, encoder_hidden_states=context, timestep=t).sample


def flux() -> Case:
    torch.manual_seed(5)
    net = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
    )
    given: dict[str, Any] = {
        "hidden_states": _randn(2, 9, 4),
        "encoder_hidden_states": _randn(2, 5, 12, seed=1),
        "pooled_projections": _randn(2, 12, seed=2),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return net, lambda model: model(**given).sample


CASES: dict[str, Callable[[], Case]] = {
    "UNet2DModel": unet2d,
    "UNet2DModel, scale-shift": lambda: unet2d(scale_shift=True),
    "UNet2DConditionModel": unet2d_condition,
    "AutoencoderKL": autoencoder,
    "DiT": dit,
    "SD3": sd3,
    "SD3.5": sd35,
    "PixArt": pixart,
    "Flux": flux,
}
# group norms that run with their activation
FUSED = {
    "UNet2DModel": 17,  # two a residual block, and the last one
    "UNet2DModel, scale-shift": 17,
    "UNet2DConditionModel": 17,  # the last one in a forward that is decorated
    "AutoencoderKL": 22,
    "DiT": 0,
    "SD3": 0,
    "SD3.5": 0,
    "PixArt": 0,
    "Flux": 0,
}
# norms that run with their modulation
MODULATED = {
    "UNet2DModel": 0,
    "UNet2DModel, scale-shift": 0,
    "UNet2DConditionModel": 0,
    "AutoencoderKL": 0,
    "DiT": 5,  # two a block, and the last one
    "SD3": 4,  # the block's own two, one of the context, and the last one
    "SD3.5": 9,  # one of the first block runs twice, for each attention
    "PixArt": 3,
    "Flux": 6,
}
# and those of them that run with the gated residual before them
RESIDUAL = {name: {"SD3.5": 1, "Flux": 2}.get(name, 0) for name in CASES}
# gated linear units
GATED = {name: 4 if name == "UNet2DConditionModel" else 0 for name in CASES}
# modules that call PyTorch's attention
ATTENDING = {
    "UNet2DModel": 4,
    "UNet2DModel, scale-shift": 4,
    "UNet2DConditionModel": 8,  # self and cross
    "AutoencoderKL": 2,
    "DiT": 2,
    "SD3": 1,
    "SD3.5": 3,
    "PixArt": 2,
    "Flux": 2,
}


def gradients(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of a fixed weighting of it with respect to all parameters."""
    model.zero_grad()
    out = call(model)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out * weights).sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
