"""patch and unpatch in plain torch: what is found, that nothing else changes, and that all of it comes back."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsample_kernels as fk
from fastsample_kernels._rewrite import fused


def test_importing_is_cheap() -> None:
    code = (
        "import sys, fastsample_kernels; "
        "print([m for m in ('triton', 'fastsample', 'torch._dynamo', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("attention", [False, True], ids=["norms", "norms and attention"])
@pytest.mark.parametrize("name", models.CASES)
def test_on_a_cpu_the_patched_model_is_the_same_to_the_bit(name: str, attention: bool) -> None:
    model, call = models.CASES[name]()
    keys = list(model.state_dict())
    before, gradients = models.gradients(model, call)
    report = fk.patch(model, attention=attention)
    assert report.replaced
    assert report.runs_here is not None
    assert "CPU tensors run in plain torch" in str(report)
    after, again = models.gradients(model, call)
    assert torch.equal(before, after)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert list(model.state_dict()) == keys
    fk.unpatch(model)
    assert not any("forward" in vars(m) or "_fastsample_patched" in vars(m) for m in model.modules())
    assert torch.equal(call(model), before)


@pytest.mark.parametrize("name", models.CASES)
def test_every_norm_is_replaced_or_reported(name: str) -> None:
    model, _ = models.CASES[name]()
    norms = {n for n, m in model.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))}
    report = fk.patch(model)
    alone = {n for n, what in report.replaced.items() if not what.endswith("silu")}
    with_activation = sum(int(what.split()[0]) for what in report.replaced.values() if what.endswith("silu"))
    assert len(alone) + with_activation == len(norms)
    assert with_activation == models.FUSED[name]
    attention = {n for n, m in model.named_modules() if hasattr(m, "processor") and hasattr(m, "to_q")}
    assert len(attention) == models.ATTENDING[name]
    assert attention <= set(report.kept)
    assert "patch(model, attention=True) puts ours in" in str(report)
    report = fk.patch(model, attention=True)
    assert {n for n, what in report.replaced.items() if what == "attention"} == attention
    assert attention.isdisjoint(report.kept)


def test_attention_that_is_not_pytorchs_stays() -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    report = fk.patch(nn.Sequential(Attention(8, heads=2, processor=AttnProcessor())), attention=True)
    assert report.kept == {"0": "its attention does not call PyTorch's scaled_dot_product_attention"}


def test_a_block_with_a_pair_and_attention_gets_both() -> None:
    class Both(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            h = self.act(h)
            return F.scaled_dot_product_attention(h, h, h)

    block = Both()
    wanted = block(X)
    report = fk.patch(block, attention=True)
    assert report.replaced == {"Both": "1 group_norm + silu, attention"}
    assert torch.equal(block(X), wanted)
    fk.unpatch(block)
    assert "forward" not in vars(block)


def test_a_copy_has_its_own_weights_and_patching_twice_is_patching_once() -> None:
    model, call = models.unet2d()
    first, second = str(fk.patch(model)), str(fk.patch(model))
    assert first == second
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert not torch.equal(call(other), call(model))
    fk.unpatch(model)
    fk.unpatch(other)
    assert not any("forward" in vars(m) for m in (*model.modules(), *other.modules()))


def test_the_patched_model_compiles_whole() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.GroupNorm(2, 8))
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = net(x)
    fk.patch(net)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)


def test_hooks_on_the_modules_still_run() -> None:
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    seen: list[str] = []
    net[0].register_forward_hook(lambda *_: seen.append("norm"))
    net[1].register_forward_hook(lambda *_: seen.append("act"))
    fk.patch(net)
    net(torch.randn(1, 4, 3))
    assert seen == ["norm", "act"]


def test_subclasses_with_a_forward_of_their_own_stay() -> None:
    class Mine(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class RandomNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net = nn.Sequential(Mine(2, 4), nn.SiLU(), RandomNorm())
    report = fk.patch(net)
    assert not report.replaced
    assert report.kept == {
        "0": "Mine is no norm that the kernels know",
        "2": "RandomNorm is no norm that the kernels know",
    }
    with pytest.raises(TypeError, match=r"give an nn\.Module"):
        fk.patch(lambda x: x)


# -- the rewriting of forwards --------------------------------------------------------------------------


class Block(nn.Module):
    """A norm and its activation; subclasses have a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.other = nn.GroupNorm(2, 4), nn.SiLU(), nn.ReLU()


class Straight(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.act(h)
        return h + x


class Functional(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.norm(x * scale)
        x = F.silu(x)
        return x


class Modulated(Block):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = self.norm(x)
        x = x * (1 + scale) + shift
        x = self.act(x)
        return x


class AfterBranches(Block):
    def forward(self, x: Tensor, kind: int) -> Tensor:
        if kind == 0:
            x = x + 1
            x = self.norm(x)
        elif kind == 1:
            s = x[:, :, :1]
            x = self.norm(x)
            x = x * (1 + s) + s
        elif kind == 2:
            return x
        elif kind == 3:
            x = 3 * x
        x = self.act(x)
        return x


def twice(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return wrapper


class Decorated(Block):
    @twice
    @torch.no_grad()
    def forward(self, x: Tensor, *, scale: float = 3.0) -> Tensor:
        x = self.norm(x * scale)
        x = self.act(x)
        return x


class DecoratedElsewhere(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.act(x)
        return x


DecoratedElsewhere.forward = twice(DecoratedElsewhere.forward)


class UsedBetween(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        kept = h
        h = self.act(h)
        return h + kept


class AnotherName(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.act(h)
        return h + y


class AnotherActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.other(h)
        return h


class Twisted(Block):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = self.norm(x)
        x = x * (1 - scale) + shift
        x = self.act(x)
        return x


X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
S = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(2))
FORWARDS = [
    (Straight, [()], 1),
    (Functional, [(), (2.0,)], 1),
    (Modulated, [(S, 2 * S)], 1),
    (AfterBranches, [(0,), (1,), (2,), (3,), (4,)], 2),
    (Decorated, [()], 1),
    (DecoratedElsewhere, [()], 0),
    (UsedBetween, [()], 0),
    (AnotherName, [()], 0),
    (AnotherActivation, [()], 0),
    (Twisted, [(S, 2 * S)], 0),
]


@pytest.mark.parametrize(("cls", "calls", "pairs"), FORWARDS, ids=lambda v: getattr(v, "__name__", ""))
def test_only_what_the_source_proves_is_fused(cls: type[Block], calls: list, pairs: int) -> None:
    """The rewritten forward computes the same, and the helper gets exactly the pairs that are private."""
    block = cls()
    runs: list[tuple] = []

    def helper(self, norm, activation, x, scale, shift):
        runs.append((norm, activation))
        y = getattr(self, norm)(x)
        y = y if scale is None else y * (1 + scale) + shift
        return F.silu(y) if activation is None else getattr(self, activation)(y)

    found = fused(cls.forward, helper, lambda norm, act: norm == "norm" and act in (None, "act"))
    assert (0 if found is None else len(found[1])) == pairs
    if found is None:
        return
    for arguments in calls:
        torch.testing.assert_close(found[0](block, X, *arguments), block(X, *arguments), rtol=0, atol=0)
    assert runs


def test_defaults_and_keywords_are_kept() -> None:
    made, _ = fused(Functional.forward, lambda self, norm, act, x, *_: x, lambda *_: True)
    block = Functional()
    assert torch.equal(made(block, X), X)
    assert torch.equal(made(block, X, scale=3.0), 3 * X)
    assert made.__qualname__ == "Functional.forward"
