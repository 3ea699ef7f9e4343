"""How the zoo's networks are trained: the diffusion teachers and the feature extractors.

``train_digits`` and ``train_fashion`` are the commands. A run is determined by its seed: bit for bit on one
machine with one number of threads; elsewhere it gives an equally good network, not the same.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..process import Process
from .data import NUM_CLASSES
from .features import Classifier
from .unet import UNet
from .weights import FOLDER


def _batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of endless shuffled epochs, cut into batches."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]


def noised(images: Tensor, process: Process, u: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """``x_t`` and ``t`` for times uniform in [t_end, t_start]: t = t_end + u (t_start - t_end)."""
    t = process.t_end + u.double() * (process.t_start - process.t_end)
    alpha, sigma = process.alpha(t).float(), process.sigma(t).float()
    return alpha[:, None, None, None] * images + sigma[:, None, None, None] * eps, t.float()


def target(images: Tensor, eps: Tensor, prediction: str) -> Tensor:
    """What a network is trained to say: the noise, or a straight flow's velocity ``eps - x_0``."""
    return {"eps": lambda: eps, "flow": lambda: eps - images}[prediction]()


@torch.no_grad()
def denoising_loss(
    net: UNet,
    images: Tensor,
    labels: Tensor,
    process: Process,
    prediction: str = "eps",
    repeats: int = 8,
    seed: int = 0,
) -> float:
    """Mean squared error of the prediction over uniform times, with fixed noise."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(repeats):
        eps = torch.randn(images.shape, generator=generator)
        u = (torch.randperm(len(images), generator=generator) + 0.5) / len(images)
        x, t = noised(images, process, u, eps)
        total += F.mse_loss(net(x, t, labels), target(images, eps, prediction)).item()
    return total / repeats


def train_unet(
    images: Tensor,
    labels: Tensor,
    process: Process,
    config: dict[str, Any],
    *,
    prediction: str = "eps",
    precision: torch.dtype = torch.float32,
    steps: int = 4000,
    batch_size: int = 256,
    lr: float = 2e-3,
    dropout: float = 0.1,
    label_drop: float = 0.12,
    ema: float = 0.999,
    seed: int = 0,
    log_every: int = 500,
) -> tuple[UNet, list[float]]:
    """Train a UNet (eps: Ho et al. 2020, eq. 14; flow: Liu et al. 2023, eq. 1) with continuous times.

    Args:
        images: ``[N, C, H, W]`` in [-1, 1].
        labels: ``[N]``; a share ``label_drop`` of them is replaced by the null class.
        process: the noise process; times are uniform in its range, spread evenly over each batch.
        prediction: "eps" or "flow".
        precision: of the forward pass; weights are float32.
        config: arguments of :class:`UNet`.
        steps, batch_size, lr: AdamW with a linear warm-up over 200 steps and a cosine to zero.
        dropout: dropout during training.
        ema: decay of the exponential moving average of the weights.
        seed: of the initial weights, the batches and the noise.
        log_every: steps between printed lines; 0 prints nothing.

    Returns:
        The averaged network in evaluation mode, and the loss of every step.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = UNet(**config, dropout=dropout).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(net).eval().requires_grad_(False)
    null = NUM_CLASSES if net.num_classes is None else net.num_classes
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    start = time.perf_counter()
    batches = _batches(len(images), batch_size, generator)
    for step in range(steps):
        factor = min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = lr * factor
        index = next(batches)
        eps = torch.randn((batch_size, *images.shape[1:]), generator=generator)
        u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        dropped = torch.rand(batch_size, generator=generator) < label_drop
        x, t = noised(images[index], process, u, eps)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = net(x, t, labels[index].masked_fill(dropped, null))
        loss = F.mse_loss(out.float(), target(images[index], eps, prediction))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        # a shorter memory at the start, so that the average forgets the initial weights
        decay = min(ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        losses.append(loss.item())
        if log_every and (step + 1) % log_every == 0:
            recent = sum(losses[-log_every:]) / log_every
            print(f"unet {step + 1}/{steps} loss {recent:.5f} {time.perf_counter() - start:.0f}s", flush=True)
    return average, losses


def _jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small random rotations, scalings and translations, for the classifier alone."""
    n = len(images)
    angle = (torch.rand(n, generator=generator) - 0.5) * 0.35  # +-10 degrees
    scale = 1 + (torch.rand(n, generator=generator) - 0.5) * 0.2
    shift = (torch.rand(n, 2, generator=generator) - 0.5) * 0.25  # +-half a pixel
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).reshape(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # zero padding is background


def train_classifier(
    images: Tensor,
    labels: Tensor,
    config: dict[str, Any],
    *,
    steps: int = 3000,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
) -> Classifier:
    """Train the feature extractor: cross-entropy with label smoothing on jittered images.

    Args:
        images: ``[N, 1, H, W]`` in [-1, 1], -1 being the background; labels: ``[N]``.
        config: arguments of :class:`Classifier`.
        steps, batch_size, lr: AdamW with a cosine to zero.
        seed: of the initial weights, the batches and the jitter.

    Returns:
        The classifier in evaluation mode, its normalisation statistics those of the training images.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Classifier(**config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    batches = _batches(len(images), batch_size, generator)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = next(batches)
        loss = F.cross_entropy(net(_jittered(images[index], generator)), labels[index], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    net.eval()
    head = net.body[-1]
    assert isinstance(head, torch.nn.BatchNorm1d)
    # the features' mean and variance over the images themselves, not over the jittered batches
    head.reset_running_stats()
    head.momentum = None
    with torch.no_grad():
        head.train()(torch.cat([net.body[:-1](part) for part in images.split(1000)]))
    return net.eval()


def options(
    doc: str | None, parser: argparse.ArgumentParser, steps: int, argv: list[str] | None
) -> argparse.Namespace:
    """The arguments of the training commands; sets the number of threads."""
    parser.description, parser.formatter_class = doc, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", choices=("all", "unet", "features"), default="all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps, help="training steps of the UNet")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args
