"""Patched diffusers models with the kernels running, under the interpreter: outputs and gradients agree."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor, nn

import fastsample_kernels as fk
from fastsample_kernels import patching


@pytest.mark.parametrize("name", models.CASES)
def test_outputs_and_gradients_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = models.CASES[name]()
    before, gradients = models.gradients(model, call)
    report = fk.patch(model)
    assert report.runs_here is None
    runs: list[str] = []
    for kernel in ("group_norm", "layer_norm", "rms_norm"):
        original = getattr(patching, kernel)

        def counting(*args, kernel=kernel, original=original, **kwargs) -> Tensor:
            assert "Triton" in fk.explain(kernel, *args, **kwargs)
            runs.append(kernel + ("+silu" if kwargs.get("activation") else ""))
            return original(*args, **kwargs)

        monkeypatch.setattr(patching, kernel, counting)
    after, again = models.gradients(model, call)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert runs.count("group_norm+silu") == models.FUSED[name]
    assert len(runs) >= len(report.replaced)


def test_a_modulation_that_is_not_per_channel_runs_the_modules() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            x = self.norm(x)
            x = x * (1 + scale) + shift
            x = self.act(x)
            return x

    block = Block()
    x, wide = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    narrow = torch.randn(2, 4, 1)
    expected = [block(x, s, s) for s in (wide, narrow)]
    assert fk.patch(block).replaced == {"Block": "1 group_norm + silu"}
    for s, y in zip((wide, narrow), expected, strict=True):
        torch.testing.assert_close(block(x, s, s), y, rtol=1e-5, atol=1e-5)
