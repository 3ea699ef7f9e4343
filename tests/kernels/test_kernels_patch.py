"""patch and unpatch in plain torch: what is found, that nothing else changes, and that all of it comes back."""

from __future__ import annotations

import copy
import functools
import importlib
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
from fastsample_kernels._rewrite import Wanted, fused


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
    counts: dict[str, int] = {}
    for part in (part for what in report.replaced.values() for part in what.split(", ")):
        number, _, what = part.partition(" ") if part[0].isdigit() else ("1", "", part)
        counts[what] = counts.get(what, 0) + int(number)
    assert counts.get("group_norm + silu", 0) == models.FUSED[name]
    modulated = sum(n for what, n in counts.items() if what.endswith("modulate"))
    assert modulated == models.MODULATED[name] - (name == "SD3.5")
    assert counts.pop("geglu", 0) == models.GATED[name]
    assert sum(counts.values()) == len(norms)
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


WANTED = Wanted(
    pairs=frozenset({("norm", None), ("norm", "act")}),
    norms=frozenset({"rows", "rows2"}),
    gates=frozenset({"act", "gelu"}),
)


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

    found = fused(cls.forward, WANTED, {"pair": helper})
    assert [site.kind for site in found.sites] == ["pair"] * pairs
    assert (found.forward is None) == (not pairs)
    if found.forward is None:
        return
    for arguments in calls:
        torch.testing.assert_close(found.forward(block, X, *arguments), block(X, *arguments), rtol=0, atol=0)
    assert runs


@pytest.mark.parametrize("cls", [ScaleIsTheVariable, ShiftIsTheVariable, PrivateNames])
def test_patched_they_compute_the_same(cls: type[Block]) -> None:
    block = cls()
    wanted = block(X)
    fk.patch(block)
    assert torch.equal(block(X), wanted)


def test_defaults_and_keywords_are_kept() -> None:
    made = fused(Functional.forward, WANTED, {"pair": lambda self, norm, act, x, *_: x}).forward
    block = Functional()
    assert torch.equal(made(block, X), X)
    assert torch.equal(made(block, X, scale=3.0), 3 * X)
    assert made.__qualname__ == "Functional.forward"


# -- modulated norms and gated linear units ---------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As in the code of DiT."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulated_by_keyword(scale: Tensor, hidden: Tensor) -> Tensor:
    hidden = (1.0 + scale)[:, None] * hidden
    return hidden


def nearly_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1) + x


def counting(function):
    """A decorator that hides what it decorates."""
    return lambda *args: function(*args)


@counting
def decorated_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Rows(nn.Module):
    """Norms over the last axis and what may follow them; forwards take x, scale and shift."""

    forward: object

    def __init__(self, forward=None) -> None:
        super().__init__()
        self.rows, self.rows2 = nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)
        self.linear, self.drop = nn.Linear(4, 8), nn.Dropout(0.5)
        self.act, self.act2 = nn.SiLU(), nn.ReLU()
        self.kind = "a"

    def gelu(self, gate: Tensor) -> Tensor:
        if gate.device.type == "mps" and gate.ndim:
            return F.gelu(gate.float()).to(gate.dtype)
        return F.gelu(gate, approximate="tanh")

    def other(self, gate: Tensor) -> Tensor:
        return F.gelu(gate) + 1


def one_expression(self, x, s, t):
    return self.rows(x) * (1 + s[:, None]) + t[:, None]


def turned_round(self, x, s, t):
    x = t.unsqueeze(1) + (s + 1)[:, None, :] * self.rows(2 * x)
    return self.linear(x)


def without_a_shift(self, x, s, t):
    return (self.rows(x) * (1.0 + s).unsqueeze(1)).to(x.dtype)


def two_statements(self, x, s, t):
    v = self.rows(x)
    v = v * (1 + s[:, None]) + t[:, None]
    return v + x


def another_name(self, x, s, t):
    y = x + 1
    v = self.rows(y)
    return self.linear(v * (1 + s[:, None]) + t[:, None]), y


def on_the_device_of_the_value(self, x, s, t):
    x = self.rows(x)
    x = x * (1 + s[:, None].to(x.device)) + t[:, None].to(x.device)
    return x


def pure_statements_between(self, x, s, t):
    v = self.rows(x)
    a, b = (s[:, None] + t[:, None]).chunk(2, dim=0)
    v = v * (1 + a) + b
    return v


def two_norms_between(self, x, s, t):
    v = self.rows(x)
    w = self.rows2(x)
    v = v * (1 + s[:, None]) + t[:, None]
    x = w * (1 + t[:, None]) + s[:, None]
    return v, x


def two_modulations(self, x, s, t):
    v = self.rows(x)
    x = v * (1 + s[:, None]) + t[:, None]
    w = v * (1 + t[:, None])
    return x, w


def modulated_on_a_condition(self, x, s, t):
    if self.kind == "a":
        v = self.rows(x)
    elif self.kind not in ("b", "c"):
        v = self.rows(x, s)
    if s.ndim == 2:
        v = v * (1 + s[:, None]) + t[:, None]
    return v


def in_a_loop(self, x, s, t):
    for _ in range(2):
        v = self.rows(x)
        x = v * (1 + s[:, None]) + t[:, None]
    return x


def by_a_function(self, x, s, t):
    x = x + self.linear(modulate(self.rows(x), t, s))[..., :4]
    v = self.rows2(x)
    v = modulate(v, scale=s, shift=t)
    return v, modulated_by_keyword(s, hidden=self.rows(x))


def nested(self, x, s, t):
    return self.rows(self.rows2(x) * (1 + s[:, None]) + t[:, None]) * (1 + t[:, None]) + s[:, None]


def used_again(self, x, s, t):
    v = self.rows(x)
    y = v * (1 + s[:, None]) + t[:, None]
    return y + v


def deleted_afterwards(self, x, s, t):
    v = self.rows(x)
    y = v * (1 + s[:, None]) + t[:, None]
    del v
    h, gate = self.linear(y).chunk(2, dim=-1)
    y = h * self.act(gate)
    del h, gate
    return y


def added_to_afterwards(self, x, s, t):
    v = self.rows(x)
    y = v * (1 + s[:, None]) + t[:, None]
    v += 1
    return y, v


def self_bound_again(self, x, s, t):
    self = self.rows
    return self(x) * (1 + s[:, None]) + t[:, None]


def used_again_in_the_next_round(self, x, s, t):
    v = x
    for _ in range(2):
        x = x + v
        v = self.rows(x)
        x = v * (1 + s[:, None]) + t[:, None]
    return x


def seen_by_a_function(self, x, s, t):
    def see():
        return v

    v = self.rows(x)
    y = v * (1 + s[:, None]) + t[:, None]
    return y + see()


def seen_by_locals(self, x, s, t):
    v = self.rows(x)
    y = v * (1 + s[:, None]) + t[:, None]
    return y + locals()["v"]


def seen_after_an_error(self, x, s, t):
    try:
        v = self.rows(x)
        return v * (1 + s[:, None]) + t[:, None] + self.missing
    except AttributeError:
        return v


def twice_the_scale(self, x, s, t):
    return self.rows(x) * (2 + s[:, None]) + t[:, None]


def one_minus_the_scale(self, x, s, t):
    return self.rows(x) * (1 - s[:, None]) + t[:, None]


def true_plus_the_scale(self, x, s, t):
    return self.rows(x) * (True + s[:, None]) + t[:, None]


def dropout_between(self, x, s, t):
    torch.manual_seed(0)
    v = self.rows(x)
    v = self.drop(v)
    v = v * (1 + s[:, None]) + t[:, None]
    return v + self.drop(self.rows2(x)) * (1 + s[:, None]) + t[:, None]


def changed_between(self, x, s, t):
    x = x.clone()
    v = self.rows(x)
    x += 1
    v = v * (1 + s[:, None]) + t[:, None]
    return v


def rebound_between(self, x, s, t):
    v = self.rows(x)
    x = x + 1
    s = s + v.mean()
    v = v * (1 + s[:, None]) + t[:, None]
    return v


def scale_of_the_value(self, x, s, t):
    v = self.rows(x)
    v = v * (1 + v) + t[:, None]
    return v


def scale_that_does_something(self, x, s, t):
    return self.rows(x) * (1 + self.act2(s)[:, None]) + t[:, None]


def shift_that_does_something(self, x, s, t):
    return self.rows(x) * (1 + s[:, None]) + self.act2(t)[:, None]


def nearly_by_a_function(self, x, s, t):
    return nearly_modulate(self.rows(x), t, s) + decorated_modulate(self.rows(x), t, s)


def function_of_the_same_name(self, x, s, t):
    def modulate(x, shift, scale):
        return x + scale[:, None] - shift[:, None]

    return modulate(self.rows(x), t, s)


def of_another_self(other, x, s, t):
    self = other
    return self.rows(x) * (1 + s[:, None]) + t[:, None]


def gated_residual(self, x, s, t):
    y = t.unsqueeze(1) * self.linear(x)[..., :4]
    x = x + y
    v = self.rows(x)
    v = v * (1 + s[:, None]) + t[:, None]
    return x + v


def gated_residual_by_a_function(self, x, s, t):
    x = x + s.unsqueeze(1) * self.linear(modulate(self.rows(x), s, t))[..., :4]
    x = x + t.unsqueeze(1) * self.linear(modulate(self.rows2(x), s, t))[..., :4]
    return x


def gated_residual_in_another_order(self, x, s, t):
    h = self.linear(x)[..., 4:] * s[:, None] + x
    return self.linear((1 + t)[:, None] * self.rows(h)), h


def gated_residual_of_itself(self, x, s, t):
    x = s[:, None] * x
    x = self.drop(x) * t[:, None] + x if s is None else x
    y = x * t[:, None]
    x = y + x
    x = self.rows(x) * (1 + t[:, None])
    return x


def gated_residual_seen(self, x, s, t):
    y = t.unsqueeze(1) * self.linear(x)[..., :4]
    x = x + y
    return self.rows(x) * (1 + s[:, None]) + t[:, None] + y


def gated_difference(self, x, s, t):
    x = x - t.unsqueeze(1) * self.linear(x)[..., :4]
    return self.rows(x) * (1 + s[:, None]) + t[:, None]


def gated_residual_in_place(self, x, s, t):
    x = x.clone()
    x += t.unsqueeze(1) * self.linear(x)[..., :4]
    return self.rows(x) * (1 + s[:, None]) + t[:, None]


def scaled_by_the_residual(self, x, s, t):
    x = x + t.unsqueeze(1) * self.linear(x)[..., :4]
    return self.rows(x) * (1 + x) + t[:, None]


def norm_of_another_value(self, x, s, t):
    h = x + t.unsqueeze(1) * self.linear(x)[..., :4]
    return self.rows(x) * (1 + s[:, None]) + t[:, None] + h


def something_happens_before_the_norm(self, x, s, t):
    h = x + t.unsqueeze(1) * self.linear(x)[..., :4]
    return self.act(h.mul_(2)) + self.rows(h) * (1 + s[:, None]) + t[:, None]


def swiglu(self, x, s, t):
    h = self.linear(x)
    h, gate = h.chunk(2, dim=-1)
    return h * self.act(gate)


def geglu_of_functions(self, x, s, t):
    a, b = torch.chunk(self.linear(x), 2, -1)
    y = F.gelu(b) * a
    c, d = self.linear(x).chunk(2, -1)
    z = c * torch.nn.functional.gelu(d, approximate="tanh")
    e, f = self.linear(x).chunk(2, -1)
    return y + z, self.linear(e * F.silu(f))


def geglu_of_a_method(self, x, s, t):
    if s is None:
        return None
    else:
        x, gate = self.linear(x).chunk(2, dim=-1)
        return self.drop(x * self.gelu(gate)) if s is None else x


def geglu_of_a_method_alone(self, x, s, t):
    x, gate = self.linear(x).chunk(2, dim=-1)
    return self.linear(x * self.gelu(gate))


def first_half_activated(self, x, s, t):
    gate, up = self.linear(x).chunk(2, dim=-1)
    return self.act(gate) * up


def gate_seen_again(self, x, s, t):
    h, gate = self.linear(x).chunk(2, dim=-1)
    y = h * self.act(gate)
    return y + gate


def halves_of_another_axis(self, x, s, t):
    h, gate = x.chunk(2, dim=1)
    return h * self.act(gate)


def thirds(self, x, s, t):
    h, gate = self.linear(x)[..., :4].chunk(3, dim=-1)[:2]
    return h * self.act(gate)


def gate_of_relu(self, x, s, t):
    h, gate = self.linear(x).chunk(2, dim=-1)
    return h * self.act2(gate)


def gate_of_another_method(self, x, s, t):
    h, gate = self.linear(x).chunk(2, dim=-1)
    return h * self.other(gate)


def gate_activated_twice(self, x, s, t):
    h, gate = self.linear(x).chunk(2, dim=-1)
    return h * self.act(self.act(gate))


APART = "rows and its modulation stay apart: what is between them may be seen or changed"
HALVES = "the halves of its gated linear unit may be seen by others"
# (forward, what the report says is replaced, what it says is kept)
NEW = [
    (one_expression, "1 layer_norm + modulate", None),
    (turned_round, "1 layer_norm + modulate", None),
    (without_a_shift, "1 layer_norm + modulate", None),
    (shift_that_does_something, "1 layer_norm + modulate", None),
    (two_statements, "1 layer_norm + modulate", None),
    (another_name, "1 layer_norm + modulate", None),
    (on_the_device_of_the_value, "1 layer_norm + modulate", None),
    (pure_statements_between, "1 layer_norm + modulate", None),
    (two_norms_between, "2 layer_norm + modulate", None),
    (two_modulations, "1 layer_norm + modulate", None),
    (modulated_on_a_condition, "1 layer_norm + modulate", None),
    (in_a_loop, "1 layer_norm + modulate", None),
    (by_a_function, "3 layer_norm + modulate", None),
    (nested, "2 layer_norm + modulate", None),
    (gated_residual, "1 residual + layer_norm + modulate", None),
    (gated_residual_by_a_function, "1 layer_norm + modulate, 1 residual + layer_norm + modulate", None),
    (gated_residual_in_another_order, "1 residual + layer_norm + modulate", None),
    (gated_residual_of_itself, "1 residual + layer_norm + modulate", None),
    (gated_residual_seen, "1 layer_norm + modulate", None),
    (gated_difference, "1 layer_norm + modulate", None),
    (gated_residual_in_place, "1 layer_norm + modulate", None),
    (scaled_by_the_residual, "1 layer_norm + modulate", None),
    (norm_of_another_value, "1 layer_norm + modulate", None),
    (something_happens_before_the_norm, "1 layer_norm + modulate", None),
    (used_again, None, APART),
    (deleted_afterwards, None, f"{APART}; {HALVES}"),
    (added_to_afterwards, None, APART),
    (self_bound_again, None, None),
    (used_again_in_the_next_round, None, APART),
    (seen_by_a_function, None, APART),
    (seen_by_locals, None, APART),
    (seen_after_an_error, None, APART),
    (twice_the_scale, None, None),
    (one_minus_the_scale, None, None),
    (true_plus_the_scale, None, None),
    (dropout_between, None, f"{APART}; {APART.replace('rows', 'rows2')}"),
    (changed_between, None, APART),
    (rebound_between, None, APART),
    (scale_of_the_value, None, APART),
    (scale_that_does_something, None, APART),
    (nearly_by_a_function, None, "nearly_modulate() is not just x * (1 + scale) + shift"),
    (function_of_the_same_name, None, None),
    (of_another_self, None, None),
    (swiglu, "1 swiglu", None),
    (geglu_of_functions, "2 geglu, 1 swiglu", None),
    (geglu_of_a_method, None, HALVES),
    (geglu_of_a_method_alone, "1 geglu", None),
    (first_half_activated, None, "its gate is the first half, the kernels' the second"),
    (gate_seen_again, None, HALVES),
    (halves_of_another_axis, None, None),
    (thirds, None, None),
    (gate_of_relu, None, None),
    (gate_of_another_method, None, None),
    (gate_activated_twice, None, None),
]


def rows_block(forward) -> Rows:
    torch.manual_seed(0)
    block = type("Block", (Rows,), {"forward": forward})()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape))
    return block


@pytest.mark.parametrize(("forward", "replaced", "kept"), NEW, ids=lambda v: getattr(v, "__name__", ""))
def test_modulations_and_gates_are_found_where_the_source_proves_them(forward, replaced, kept) -> None:
    block = rows_block(forward)
    args = X[:, :, :4], S[:, :, 0], 2 * S[:, :, 0] + 1
    if forward is pure_statements_between:
        args = args[0][:1].expand(2, 4, 4), *args[1:]
    wanted = block(*args)
    report = fk.patch(block)
    assert report.replaced.pop("Block", None) == replaced
    assert report.kept.get("Block") == kept
    # A norm that is in none of them is replaced by itself.
    fused_norms = sum(int(part[0]) for part in (replaced or "").split(", ") if part.endswith("modulate"))
    alone = {"rows", "rows2"} - set(report.replaced)
    assert len(alone) == min(fused_norms, 2)
    got = block(*args)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, wanted)), strict=True):
        assert torch.equal(a, b)
    fk.unpatch(block)
    assert not patched(block)


def test_the_function_that_modulates_may_be_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    block = rows_block(by_a_function)
    fk.patch(block)
    monkeypatch.setattr(sys.modules[__name__], "modulate", lambda x, shift, scale: 0 * x)
    x, s = X[:, :, :4], S[:, :, 0]
    assert torch.equal(block(x, s, s)[0], torch.zeros_like(x))


@pytest.mark.parametrize("kind", ["layer_norm", "ada_norm_zero", "ada_norm_single", "ada_norm"])
def test_code_that_never_runs_is_not_reported(kind: str) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(8, 2, 4, norm_type=kind, num_embeds_ada_norm=5, cross_attention_dim=8)
    report = fk.patch(block)
    wanted = {"ada_norm_zero": "1 layer_norm + modulate", "ada_norm_single": "2 layer_norm + modulate"}
    assert report.replaced.get("BasicTransformerBlock") == wanted.get(kind)
    assert "BasicTransformerBlock" not in report.kept
    assert report.replaced["ff.net.0"] == "1 geglu"


@pytest.mark.parametrize(
    ("place", "name", "options", "replaced"),
    [
        ("wan", "WanTransformerBlock", {"ffn_dim": 8, "num_heads": 2}, "2 layer_norm + modulate"),
        ("ltx", "LTXVideoTransformerBlock", {"cross_attention_dim": 8}, "2 rms_norm + modulate"),
        ("hunyuan_video", "HunyuanVideoTransformerBlock", {"mlp_ratio": 2}, "2 layer_norm + modulate"),
        ("cogview4", "CogView4TransformerBlock", {}, "2 layer_norm + modulate"),
        ("flux2", "Flux2SingleTransformerBlock", {}, "1 layer_norm + modulate"),
        ("flux", "FluxTransformerBlock", {}, "2 residual + layer_norm + modulate"),
    ],
)
def test_blocks_of_other_models_are_found_by_what_they_do(place, name, options, replaced) -> None:
    module = importlib.import_module(f"diffusers.models.transformers.transformer_{place}")
    heads = {} if "num_heads" in options else {"num_attention_heads": 2, "attention_head_dim": 4}
    with torch.device("meta"):
        block = getattr(module, name)(**({} if place == "hunyuan_video" else {"dim": 8}), **heads, **options)
    report = fk.patch(block)
    assert report.replaced[name] == replaced
    assert name not in report.kept
