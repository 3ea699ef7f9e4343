"""Hooks: clipping, dynamic thresholding, inpainting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastsample as fs
from fastsample.hooks import At, Clip, DynamicThreshold, Inpaint


def at(x0: Tensor, samples: slice = slice(None)) -> At:
    return At(0, 500.0, 0.5, 0.8, x0, samples)


def samples(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(3 * x)


def test_clip() -> None:
    x0 = samples(2, 3, 4)
    assert torch.equal(Clip()(x0, at(x0)), x0.clamp(-1, 1))
    assert torch.equal(Clip(0.0, 2.0)(x0, at(x0)), x0.clamp(0, 2))


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_is_diffusers_(ratio: float) -> None:
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=4.0
    )
    x0 = samples(5, 3, 8, 8) * torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0]).reshape(-1, 1, 1, 1)
    ours = DynamicThreshold(ratio, ceiling=4.0)(x0, at(x0))
    torch.testing.assert_close(ours, theirs._threshold_sample(x0), rtol=1e-6, atol=1e-6)


def test_dynamic_threshold_leaves_small_samples_and_treats_each_alone() -> None:
    small = samples(1, 3, 4).clamp(-1, 1)
    hook = DynamicThreshold()
    assert torch.equal(hook(small, at(small)), small)
    both = torch.cat([small, 5 * small])
    assert torch.equal(hook(both, at(both))[:1], small)
    assert float(hook(both, at(both)).abs().max()) <= 1


@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 3, 4), (6, 3, 4)])
def test_inpaint_keeps_what_is_known(shape: tuple[int, ...]) -> None:
    x0 = samples(6, 3, 4)
    mask, known = (torch.rand(shape) > 0.5).float(), samples(*shape)
    got = Inpaint(mask, known)(x0, at(x0))
    want = torch.where(mask.expand_as(x0) > 0, known.expand_as(x0), x0)
    torch.testing.assert_close(got, want)


def test_soft_masks_mix() -> None:
    x0, known = samples(2, 3), torch.ones(3)
    got = Inpaint(torch.full((3,), 0.25), known)(x0, at(x0))
    torch.testing.assert_close(got, 0.75 * x0 + 0.25)


def test_inpaint_per_sample_is_the_same_in_chunks() -> None:
    mask = (torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    known = samples(5, 3, 4)
    sampler = fs.Sampler(fs.wrap(net, fs.VP.linear(), "v"), "ddim", 5, hooks=(Inpaint(mask, known),))
    whole = sampler(shape=(5, 3, 4))
    assert torch.equal(sampler(shape=(5, 3, 4), batch_size=2), whole)
    # at the end, where there is no noise, the known part is there
    torch.testing.assert_close(torch.where(mask > 0, whole, known), known, rtol=1e-4, atol=1e-4)


def test_the_sampler_s_hooks_come_before_the_call_s() -> None:
    order: list[str] = []

    def named(name: str) -> fs.hooks.Hook:
        def hook(x0: Tensor, at: At) -> Tensor:
            order.append(name)
            return x0

        return hook

    sampler = fs.Sampler(fs.wrap(net, fs.VP.linear(), "v"), "ddim", 2, hooks=(named("own"),))
    sampler(shape=(2, 3), hooks=(named("call"),))
    assert order == ["own", "call"] * 2
    order.clear()
    sampler(shape=(2, 3))
    assert order == ["own"] * 2


def test_clipping_bounds_the_last_prediction() -> None:
    sampler = fs.Sampler(fs.wrap(net, fs.VP.linear()), "ddim", 10, hooks=(Clip(-0.3, 0.3),))
    assert float(sampler(shape=(4, 3)).abs().max()) <= 0.3 + 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(1.0, 1.0), "low=1.0 must be below high=1.0"),
        (lambda: DynamicThreshold(0.0), "ratio=0.0"),
        (lambda: DynamicThreshold(1.1), "ratio=1.1"),
        (lambda: DynamicThreshold(floor=0.0), "floor=0.0"),
        (lambda: DynamicThreshold(floor=2.0, ceiling=1.0), "floor=2.0, ceiling=1.0"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
