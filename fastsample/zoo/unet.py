"""A small class-conditional UNet.

The architecture of Ho et al. (2020, arXiv:2006.11239) with the adaptive group normalisation of Dhariwal &
Nichol (2021, arXiv:2105.05233) and, as a choice, space-to-depth patches at the ends (Hoogeboom et al. 2023,
arXiv:2301.11093), which make it cheap on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of continuous times (Ho et al. 2020): ``[B]`` -> ``[B, dim]``, cosines first."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    args = t[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResBlock(nn.Module):
    """norm, SiLU, conv, adaptive norm (scale, shift from the embedding), SiLU, dropout, conv; plus a skip."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # every block starts as its skip
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        q, k, v = qkv.unbind(dim=1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class _Stage(nn.Module):
    """A residual block with, where the resolution asks for it, attention."""

    def __init__(
        self, in_ch: int, out_ch: int, emb_ch: int, dropout: float, attention: bool, head_channels: int
    ) -> None:
        super().__init__()
        self.block = ResBlock(in_ch, out_ch, emb_ch, dropout)
        self.attention = SelfAttention(out_ch, head_channels) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.block(x, emb)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """Class-conditional UNet with continuous time.

    Args:
        image_size: height and width in pixels; divisible by ``patch * 2**(len(multipliers) - 1)``.
        in_channels: image channels.
        out_channels: output channels (default: ``in_channels``).
        channels: base width.
        multipliers: width of each resolution level, in units of ``channels``; each further level halves the
            resolution.
        blocks: residual blocks a level, on the way down and on the way up.
        attention: feature-map sizes (in patches) at which blocks are followed by self-attention.
        head_channels: channels an attention head.
        num_classes: number of classes, or None for an unconditional network. Index ``num_classes`` is the
            null class of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).
        patch: side of the space-to-depth patches.
        dropout: dropout probability inside the residual blocks.
        time_scale: the network's time is multiplied by this before it is embedded; 1 for times in 0..999,
            1000 for times in [0, 1].

    Attributes:
        config: all of these, by name.

    Raises:
        ValueError: a size that the levels do not divide, or attention at a size that no level has.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int | None = None,
        *,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (),
        head_channels: int = 32,
        num_classes: int | None = 10,
        patch: int = 1,
        dropout: float = 0.0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = {
            "image_size": image_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": channels,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "head_channels": head_channels,
            "num_classes": num_classes,
            "patch": patch,
            "dropout": dropout,
            "time_scale": time_scale,
        }
        divisor = patch * 2 ** (len(multipliers) - 1)
        if image_size % divisor:
            raise ValueError(
                f"image_size={image_size} is not divisible by {divisor} = patch * 2**(levels - 1): "
                "use fewer multipliers, another patch, or pad the images"
            )
        sizes = [image_size // patch // 2**i for i in range(len(multipliers))]
        if missing := sorted(set(attention) - set(sizes)):
            raise ValueError(f"attention={tuple(attention)} names sizes {missing}; the levels have {sizes}")
        self.sample_shape = (in_channels, image_size, image_size)
        self.num_classes = num_classes
        self.patch = patch
        self.time_scale = time_scale
        self.channels = channels
        out_channels = in_channels if out_channels is None else out_channels
        widths = [channels * m for m in multipliers]
        emb_ch = 2 * channels

        def stage(in_ch: int, out_ch: int, size: int) -> _Stage:
            return _Stage(in_ch, out_ch, emb_ch, dropout, size in attention, head_channels)

        self.time_mlp = nn.Sequential(nn.Linear(channels, emb_ch), nn.SiLU(), nn.Linear(emb_ch, emb_ch))
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes + 1, emb_ch)
        self.stem = nn.Conv2d(in_channels * patch**2, widths[0], 3, padding=1)

        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        ch = widths[0]
        skips = []
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            for _ in range(blocks):
                self.down.append(stage(ch, width, size))
                ch = width
                skips.append(ch)
            if level < len(widths) - 1:
                self.downsample.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
        self.middle = stage(ch, ch, sizes[-1])
        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(blocks):
                self.up.append(stage(ch + skips.pop(), widths[level], sizes[level]))
                ch = widths[level]
            if level > 0:
                self.upsample.append(nn.Conv2d(ch, widths[level - 1], 3, padding=1))
                ch = widths[level - 1]
        self.norm = _norm(ch)
        self.head = nn.Conv2d(ch, out_channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.blocks = blocks

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's raw output.

        Args:
            x: noisy images ``[B, C, H, W]``, in the parameters' dtype.
            t: times, ``[B]`` or a scalar, fractional allowed, in the model's units (see ``time_scale``).
            labels: class indices ``[B]``, int64; ``num_classes`` or None is the null class.

        Returns:
            ``[B, out_channels, H, W]``.

        Raises:
            ValueError: an image shape other than the network's, or labels for a network without classes.
        """
        if x.shape[1:] != self.sample_shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, the network takes [B, {self.sample_shape}]")
        # half precision would not tell 998 from 1,000
        precise = torch.promote_types(x.dtype, torch.float32)
        t = torch.as_tensor(t, dtype=precise, device=x.device).expand(len(x))
        emb = self.time_mlp(timestep_embedding(t * self.time_scale, self.channels).to(x.dtype))
        if self.label_emb is not None:
            if labels is None:
                labels = torch.full((len(x),), self.label_emb.num_embeddings - 1, device=x.device)
            emb = emb + self.label_emb(labels)
        elif labels is not None:
            raise ValueError("labels given to a network without classes (num_classes=None)")
        emb = F.silu(emb)

        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = []
        for i, block in enumerate(self.down):
            h = block(h, emb)
            skips.append(h)
            level, last = divmod(i + 1, self.blocks)
            if last == 0 and level <= len(self.downsample):
                h = self.downsample[level - 1](h)
        h = self.middle(h, emb)
        for i, block in enumerate(self.up):
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
            level, last = divmod(i + 1, self.blocks)
            if last == 0 and level <= len(self.upsample):
                h = self.upsample[level - 1](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)
