"""What a diffusers scheduler's config says of a model: its noise process and its prediction type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..hooks import Clip, DynamicThreshold, Hook
from ..process import VP, Flow, Process

FLOW_TIME = 1000.0  # diffusers tells flow transformers 1000 t

_REMEDY = "say what the network means by hand: fastsample.wrap(net, process, prediction=...)"


@dataclass(frozen=True)
class Meaning:
    """What a scheduler's config says.

    Attributes:
        process: the noise process.
        prediction: what the network predicts.
        flow: whether time runs in [0, 1]; diffusers' timesteps are 1000 times that.
        dynamic_shift: whether the flow's shift depends on the image size (``mu``).
        hooks: clipping or thresholding of the predicted clean sample.
    """

    process: Process
    prediction: str
    flow: bool
    dynamic_shift: bool = False
    hooks: tuple[Hook, ...] = ()


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is that of a flow-matching model."""
    matching = "shift" in config and "beta_schedule" not in config  # the FlowMatch schedulers
    return bool(
        matching or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    )


def read(config: Mapping[str, Any], mu: float | None = None) -> Meaning:
    """The meaning of a scheduler's config.

    Args:
        config: the config of a diffusers scheduler, with its ``_class_name``.
        mu: the logarithm of the flow's shift for this image size, where it is dynamic.

    Raises:
        ValueError: a config that is not understood; the message says what to do.
    """
    name = str(config.get("_class_name", "the scheduler"))
    if is_flow(config):
        if config.get("invert_sigmas"):
            raise ValueError(f"{name} runs time backwards (invert_sigmas); {_REMEDY}")
        dynamic = bool(config.get("use_dynamic_shifting"))
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        if dynamic and mu is not None:
            shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
        return Meaning(Flow(shift=shift), "flow", True, dynamic)
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise ValueError(f"{name} has neither betas nor flow sigmas; {_REMEDY}")
    prediction = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}.get(
        str(config.get("prediction_type", "epsilon"))
    )
    if prediction is None:
        raise ValueError(f"prediction_type={config.get('prediction_type')!r} is not understood; {_REMEDY}")
    hooks: tuple[Hook, ...] = ()
    if config.get("thresholding"):
        ratio, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        hooks = (DynamicThreshold(float(ratio), ceiling=max(1.0, float(most))),)
    elif config.get("clip_sample"):
        limit = float(config.get("clip_sample_range", 1.0))
        hooks = (Clip(-limit, limit),)
    return Meaning(_vp(config), prediction, False, hooks=hooks)


def _vp(config: Mapping[str, Any]) -> VP:
    name, steps = config.get("beta_schedule"), int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    betas = config.get("trained_betas")
    if betas is not None:
        process = VP.from_betas(torch.as_tensor(betas, dtype=torch.float64))
    elif name == "linear":
        process = VP.linear(start, end, steps)
    elif name == "scaled_linear":
        process = VP.scaled_linear(start, end, steps)
    elif name == "squaredcos_cap_v2":
        process = VP.cosine(num_train_steps=steps)
    else:
        raise ValueError(f"beta_schedule={name!r} is not understood; {_REMEDY}")
    snr_shift = float(config.get("snr_shift_scale") or 1.0)
    if snr_shift != 1.0:  # CogVideoX
        times = torch.arange(steps, dtype=torch.float64)
        bar = process.alpha(times) ** 2
        process = VP.from_alphas_cumprod(bar / (snr_shift + (1 - snr_shift) * bar))
    return process.rescaled_zero_snr() if config.get("rescale_betas_zero_snr") else process
