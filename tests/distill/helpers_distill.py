"""Small trainings for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsample as fs
from fastsample import distill
from fastsample.zoo.data import digits
from fastsample.zoo.unet import UNet

SHAPE = (1, 8, 8)
STEPS = 40


def tiny_teacher(**settings: Any) -> fs.Denoiser:
    """A small random network with classes; eps on DDPM's schedule."""
    torch.manual_seed(0)
    net = UNet(8, 1, channels=8, multipliers=[1], patch=2, dropout=0.1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return fs.wrap(net, fs.VP.linear(), "eps", sample_shape=SHAPE, **settings)


def exact_trainer(name: str, method: dict[str, Any], net: Any = None, **settings: Any) -> distill.Trainer:
    """The same in float64 and without dropout, where only the order of sums is left to chance."""
    teacher = tiny_teacher()
    unet = teacher.net.double()  # type: ignore[attr-defined]
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    teacher = fs.wrap(unet if net is None else net(unet), teacher.process, "eps", sample_shape=SHAPE)
    x, labels = digits("train")
    kind = getattr(distill, distill.METHODS[name][1])
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 16, "warmup": 1, "ema": [0.5], "device": "cpu"}
    return distill.Trainer(kind(teacher, **method), (x.double(), labels), **(defaults | settings))


def tiny_trainer(
    name: str = "shortcut", method: dict[str, Any] | None = None, **settings: Any
) -> distill.Trainer:
    """A training of a few seconds on the digits."""
    kind = getattr(distill, distill.METHODS[name][1])
    defaults: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 16,
        "warmup": 2,
        "save_every": 4,
        "evaluate_every": 8,
        "log_every": 1,
        "metric": "fd-digits",
        "samples": 40,
        "final_samples": 50,
        "device": "cpu",
    }
    return distill.Trainer(kind(tiny_teacher(), **(method or {})), "digits", **(defaults | settings))


def final_state(folder: Path, step: int) -> dict[str, Any]:
    """Everything that the checkpoint of a step holds, flat."""
    state = torch.load(folder / "checkpoints" / f"{step:08d}" / "state.pt", weights_only=True)
    return flat(state)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{name}/{i}").items()}
    return {name: value}


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal bit for bit."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        equal = torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key]
        assert equal, key


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without its timings."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def text_unet(channels: int) -> Any:
    """A small text-conditional UNet of diffusers, for 8x8 samples and contexts of width 8."""
    import pytest

    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(16,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=4, mid_block_type=None,
    )  # fmt: skip
