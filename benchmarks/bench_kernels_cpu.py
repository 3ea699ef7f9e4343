"""On a CPU a patched model is as fast as the unpatched one: the same calls, interleaved, in one run.

pytest benchmarks/bench_kernels_cpu.py -o addopts= --benchmark-enable -s
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import fastsample_kernels as fk

ROUNDS = 15
NOISE = 1.05  # a ratio of medians within this is noise on a shared machine


def unet() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    net = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(64, 128),
        norm_num_groups=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    x, t = torch.randn(4, 3, 32, 32), torch.tensor(5)
    return net, lambda model: model(x, t).sample


def dit() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=16,
        num_embeds_ada_norm=10,
    )
    x, t, labels = torch.randn(4, 4, 16, 16), torch.tensor([5] * 4), torch.tensor([1] * 4)
    return net, lambda model: model(x, timestep=t, class_labels=labels).sample


@pytest.mark.parametrize("make", [unet, dit], ids=["UNet", "DiT"])
def test_patched_is_not_slower(make: Any, benchmark: Any) -> None:
    torch.manual_seed(0)
    model, call = make()
    model.eval()

    def seconds() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            call(model)
        return time.perf_counter() - began

    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for patched in (False, True):
            (fk.patch if patched else fk.unpatch)(model)
            seconds()
            times[patched].append(seconds())
    ratio = statistics.median(times[True]) / statistics.median(times[False])
    benchmark.extra_info["patched over unpatched"] = ratio
    benchmark.pedantic(seconds, rounds=3)
    print(f"\npatched over unpatched: {ratio:.3f} ({statistics.median(times[False]) * 1e3:.1f} ms unpatched)")
    assert ratio <= NOISE
