"""Pipelines of diffusers' real classes with small random networks."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

diffusers.logging.set_verbosity_error()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddpm(**settings: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()
    scheduler = diffusers.DDIMScheduler(**({"clip_sample": False, "set_alpha_to_one": False} | settings))
    return _quiet(diffusers.DDIMPipeline(unet, scheduler))


def dit() -> Any:
    torch.manual_seed(1)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    ).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return _quiet(diffusers.DiTPipeline(transformer, vae(), scheduler))


def vae(channels: int = 4) -> Any:
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.18215,
        shift_factor=0.0,
    ).eval()


def condition_unet(channels: int = 4, **more: Any) -> Any:
    torch.manual_seed(3)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        **more,
    ).eval()


def scheduler_of(prediction: str = "epsilon", **more: Any) -> Any:
    return diffusers.DDIMScheduler(**BETAS, **PLAIN, prediction_type=prediction, **more)


def sd(kind: str = "StableDiffusionPipeline", prediction: str = "epsilon", **more: Any) -> Any:
    unet = condition_unet(9 if kind == "StableDiffusionInpaintPipeline" and more.pop("nine", False) else 4)
    parts = {
        "vae": vae(),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "scheduler": more.pop("scheduler", None) or scheduler_of(prediction),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **more,
    }
    return _quiet(getattr(diffusers, kind)(**parts))


def controlnet() -> Any:
    net = diffusers.ControlNetModel.from_unet(condition_unet(), conditioning_embedding_out_channels=(4, 4))
    torch.manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return sd("StableDiffusionControlNetPipeline", controlnet=net.eval())


def sdxl() -> Any:
    unet = condition_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
        use_linear_projection=True,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler_of(),
        force_zeros_for_empty_prompt=True,
    )
    return _quiet(pipe)


def sd3(kind: str = "StableDiffusion3Pipeline", **settings: Any) -> Any:
    torch.manual_seed(6)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        out_channels=4,
    ).eval()
    parts = {f"{a}{b}": None for a in ("text_encoder", "tokenizer") for b in ("", "_2", "_3")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | settings))
    return _quiet(getattr(diffusers, kind)(transformer=transformer, vae=vae(), scheduler=scheduler, **parts))


def flux() -> Any:
    torch.manual_seed(7)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    return _quiet(
        diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )
    )


def wan() -> Any:
    torch.manual_seed(8)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    torch.manual_seed(9)
    autoencoder = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder.eval(),
        scheduler=scheduler,
        transformer=transformer,
    )
    return _quiet(pipe)


def cogvideox() -> Any:
    torch.manual_seed(10)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=12,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    ).eval()
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    return _quiet(
        diffusers.CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=autoencoder, transformer=transformer, scheduler=scheduler
        )
    )


def qwen() -> Any:
    torch.manual_seed(11)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    autoencoder = diffusers.AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1)
    return _quiet(
        diffusers.QwenImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0),
            vae=autoencoder.eval(),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
    )


def embeddings(n: int = 1, length: int = 6, dim: int = 12, seed: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, length, dim, generator=generator)
