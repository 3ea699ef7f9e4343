"""patch and unpatch in plain torch: what is found, that nothing else changes, and that all of it comes back."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys

import models
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import normalization
from torch import Tensor, nn

import fastsample as fs
import fastsample_kernels as fk
from fastsample_kernels import _runtime
from fastsample_kernels._rewrite import fused


def patched(model: nn.Module) -> bool:
    """Whether anything of patch is left in a model."""
    return any("_fastsample" in str(vars(m)) or hasattr(type(m), "_fastsample_base") for m in model.modules())


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
    assert not patched(model)
    assert torch.equal(call(model), before)


@pytest.mark.parametrize("name", models.CASES)
def test_every_norm_is_replaced_or_reported(name: str) -> None:
    model, _ = models.CASES[name]()
    classes = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, normalization.RMSNorm)
    norms = {n for n, m in model.named_modules() if isinstance(m, classes)}
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
    assert not patched(block)


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
    assert patched(other)
    fk.unpatch(other)
    assert not patched(model)
    assert not patched(other)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda m: m._replicate_for_data_parallel()],
    ids=["copy", "deepcopy", "replica"],
)
def test_copies_of_a_module_are_themselves(copied) -> None:
    norm = nn.LayerNorm(4)
    fk.patch(norm)
    other = copied(norm)
    assert patched(other)
    other._parameters = {}  # what the three share differs
    other.weight, other.bias, other.eps = torch.full((4,), 3.0), torch.ones(4), 1.0
    x = X[0, :, :4]
    torch.testing.assert_close(other(x), F.layer_norm(x, (4,), eps=1.0) * 3 + 1)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (4,)))


def test_a_patched_module_looks_like_its_class() -> None:
    block = Straight()
    before = repr(block)
    fk.patch(block)
    assert isinstance(block, Straight)
    assert (type(block).__name__, type(block).__module__) == ("Straight", Straight.__module__)
    assert repr(block) == before
    fk.unpatch(block)
    assert type(block) is Straight


def test_a_patched_model_is_pickled_unpatched() -> None:
    model, call = models.unet2d()
    wanted = call(model)
    fk.patch(model, attention=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert not patched(other)
        assert torch.equal(call(other), wanted)
        fk.patch(other)
        assert torch.equal(call(other), wanted)
    assert patched(model)


def test_copies_of_an_accelerated_network_are_undone_by_themselves() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.LayerNorm(5))
    wanted = model(X)
    fs.accelerate(model)
    other = copy.deepcopy(model)
    fs.unaccelerate(other)
    assert patched(model)
    assert not patched(other)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), wanted)
    fs.unaccelerate(loaded)
    assert patched(model)
    fs.unaccelerate(model)
    assert not patched(model)


def test_a_class_derived_from_a_patched_one_loses_the_kernels_all_the_same() -> None:
    """As FSDP's fully_shard and parametrizations make them."""
    block = Straight()
    fk.patch(block)
    block.__class__ = type("Sharded", (type(block),), {})
    fk.unpatch(block)
    block.act = nn.ReLU()
    assert torch.equal(block(X), F.relu(block.norm(X)) + X)
    assert "was derived from a patched one" in fk.patch(block).kept["Sharded"]


def test_parametrized_modules_stay() -> None:
    norm = nn.LayerNorm(4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    assert "it is parametrized" in str(fk.patch(norm))
    nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert fk.patch(norm).replaced == {"LayerNorm": "layer_norm"}
    with pytest.raises(TypeError, match=r"model is a str; give an nn\.Module"):
        fk.unpatch("x")


def test_norms_over_several_axes_are_reported() -> None:
    kept = fk.patch(nn.Sequential(nn.LayerNorm((4, 3)), normalization.RMSNorm((4, 3), 1e-6))).kept
    assert kept == dict.fromkeys("01", "it normalises over 2 axes, (4, 3); the kernels over the last")


def test_the_parameters_are_called_as_pytorchs() -> None:
    x = X[:, :, :4]
    for module, name in (
        (nn.GroupNorm(2, 4), "input"),
        (nn.LayerNorm(4), "input"),
        (nn.RMSNorm(4), "x"),
        (normalization.RMSNorm(4, 1e-6), "hidden_states"),
        (normalization.FP32LayerNorm(4), "inputs"),
        (nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), "input"),
    ):
        wanted = module(x)
        fk.patch(module)
        assert torch.equal(module(**{name: x}), wanted)


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


def test_hooks_of_the_backward_pass_and_of_all_modules_prevent_fusing() -> None:
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    assert not _runtime.hooked(net[0])
    handles = [net[0].register_full_backward_pre_hook(lambda *_: None)]
    assert _runtime.hooked(net[0])
    handles[0].remove()
    every = nn.modules.module
    for register in (
        every.register_module_forward_hook,
        every.register_module_forward_pre_hook,
        every.register_module_full_backward_hook,
        every.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            assert _runtime.hooked(net[0]), register
        finally:
            handle.remove()
    assert not _runtime.hooked(net[0])


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


class ScaleIsTheVariable(Block):
    def forward(self, h: Tensor, shift: float = 0.5) -> Tensor:
        h = self.norm(h)
        h = h * (1 + h) + shift
        h = self.act(h)
        return h


class ShiftIsTheVariable(Block):
    def forward(self, h: Tensor, scale: float = 0.5) -> Tensor:
        if scale:
            h = self.norm(h)
            h = h * (1 + scale) + h
        h = self.act(h)
        return h


class PrivateNames(Block):
    __factor = 2

    def __helper(self, x: Tensor) -> Tensor:
        return x * PrivateNames.__factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.__helper(x) + PrivateNames.__factor
        x = self.norm(x)
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
    (ScaleIsTheVariable, [()], 0),
    (ShiftIsTheVariable, [()], 0),
    (PrivateNames, [()], 1),
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


@pytest.mark.parametrize("cls", [ScaleIsTheVariable, ShiftIsTheVariable, PrivateNames])
def test_patched_they_compute_the_same(cls: type[Block]) -> None:
    block = cls()
    wanted = block(X)
    fk.patch(block)
    assert torch.equal(block(X), wanted)


def test_defaults_and_keywords_are_kept() -> None:
    made, _ = fused(Functional.forward, lambda self, norm, act, x, *_: x, lambda *_: True)
    block = Functional()
    assert torch.equal(made(block, X), X)
    assert torch.equal(made(block, X, scale=3.0), 3 * X)
    assert made.__qualname__ == "Functional.forward"
