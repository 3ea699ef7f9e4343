"""The fused kernels on a GPU beside their peers, in one run; then whole networks, seconds a step.

    pytest benchmarks -m gpu -s

Each group of cases writes its rows to results/kernels-gpu.json and the table kernels-gpu.md, with machine, versions
and the copy bandwidth measured in the same run. Peers that are not installed, or cannot take a case, are named with
the reason. Every case first checks that ours and the first peer compute the same.

``rows(GROUPS[name], dry())`` runs the same code on a CPU at tiny sizes, with the kernels in Triton's interpreter
(TRITON_INTERPRET=1): a test does that, since times are the only thing that needs a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsample_kernels as fk
from fastsample.bench.provenance import provenance
from fastsample_kernels import dit

# The package's attributes of these names are functions.
norms, softmax, updates = (
    importlib.import_module(f"fastsample_kernels.{name}") for name in ("group_norm", "attention", "update")
)

RESULTS = Path(__file__).parent / "results" / "kernels-gpu.json"
Call = Callable[[], Any]


# -- where and how -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A GPU at full sizes, or (dry) the CPU at sizes for the interpreter."""

    device: torch.device
    dry: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def size(self, full: Any, small: Any) -> Any:
        return small if self.dry else full

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def compiled(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False, backend="eager" if self.dry else "inductor")


def gpu() -> Place:
    return Place(torch.device("cuda"), False)


def dry() -> Place:
    return Place(torch.device("cpu"), True)


def own_stream(place: Place) -> Any:
    """Context: a backward pass runs on the stream of its forward pass, and PyTorch's first one cannot be captured."""
    if place.dry:
        return contextlib.nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def graphed(call: Call, place: Place) -> Call:
    """The call as a CUDA graph; on a CPU, which has none, the call."""
    if place.dry:
        return call
    for _ in range(3):  # kernels compile and libraries set up outside of the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def launched(call: Call, place: Place) -> float:
    """Median time of a call with its launches, whichever of host and GPU is slower; the L2 cache is flushed before."""
    if place.dry:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    from triton.testing import do_bench

    return do_bench(call, warmup=25, rep=100, return_mode="median") / 1e3


def seconds(call: Call, place: Place, cached: bool = False) -> float:
    """Median time of a call on the GPU alone, as a CUDA graph; ``cached``: repeated, with what the cache holds."""
    if place.dry or not cached:
        return launched(graphed(call, place), place)
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=100, return_mode="median") / 1e3


def host_seconds(call: Call, place: Place) -> float:
    """Time until a call returns to the host, the GPU not waited for."""
    count = 1 if place.dry else 100
    if not place.dry:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


def copy_bandwidth(place: Place) -> float:
    """Bytes a second of a large copy, reads and writes counted: by the driver or by a kernel, whichever is faster."""
    x = place.randn(place.size(1 << 29, 1 << 16))
    y = torch.empty_like(x)
    copies: list[Call] = [lambda: y.copy_(x), lambda: torch.neg(x, out=y)]
    fastest = min(statistics.median([seconds(copy, place) for _ in range(3)]) for copy in copies)
    return 2 * x.numel() * x.element_size() / fastest


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        name: what is computed, on what.
        ours: runs the kernel.
        peers: the others, the first of which ours must agree with; a text says why a peer is not here.
        bytes, flops: least that must be moved, and the useful operations.
        goal: (measure, least value): "copy" is the part of the copy bandwidth, "tflops" 1e12 operations a second,
            a peer's name how many times faster than it, "sdpa" than the best of PyTorch's attention backends,
            "us" (most, not least) microseconds.
        cached: whether the calls are timed one after the other, with what the cache holds.
    """

    name: str
    ours: Call
    peers: dict[str, Call | str]
    bytes: int = 0
    flops: float = 0.0
    goal: tuple[str, float] | None = None
    cached: bool = False


def tensors_of(out: Any) -> list[Tensor]:
    return (
        [out]
        if isinstance(out, Tensor)
        else [t for part in out if part is not None for t in tensors_of(part)]
    )


def assert_same(case: Case) -> None:
    """Ours and the first peer agree to low precision."""
    first = next(iter(case.peers.values()))
    assert callable(first), case.name
    for got, wanted in zip(tensors_of(case.ours()), tensors_of(first()), strict=True):
        error, size = (
            (got.double() - wanted.double()).square().mean() ** 0.5,
            wanted.double().square().mean() ** 0.5,
        )
        assert error <= 0.02 * size, f"{case.name}: relative error {error / size:.3g}"


def warm(case: Case) -> None:
    """Everything of the case is compiled, and ours is right."""
    assert_same(case)
    for peer in case.peers.values():
        if callable(peer):
            with contextlib.suppress(Exception):  # which is told when it is timed
                peer()


def row(case: Case, place: Place, bandwidth: float) -> dict[str, Any]:
    """The measured line of a case."""
    ours = seconds(case.ours, place, case.cached)
    peers: dict[str, float | str] = {}
    for name, peer in case.peers.items():
        if isinstance(peer, str):
            peers[name] = peer
            continue
        try:
            peers[name] = seconds(peer, place, case.cached)
        except (
            Exception
        ) as error:  # a peer that cannot take the case is a line of the table, not the end of it
            peers[name] = str(error).strip().splitlines()[0][:80]
    made: dict[str, Any] = {"seconds": ours, "host": host_seconds(case.ours, place), "peers": peers}
    if case.bytes:
        made |= {"bytes/s": case.bytes / ours, "copy": case.bytes / ours / bandwidth}
    if case.flops:
        made["tflops"] = case.flops / ours / 1e12
    if case.goal is not None:
        made |= {"goal": case.goal, "met": _met(case.goal, made)}
    return made


def _met(goal: tuple[str, float], made: dict[str, Any]) -> bool | str:
    measure, value = goal
    if measure == "us":
        return made["seconds"] * 1e6 <= value
    if measure in made:
        return made[measure] >= value
    names = [n for n in made["peers"] if n.startswith("sdpa")] if measure == "sdpa" else [measure]
    times = [t for n in names if isinstance(t := made["peers"].get(n), float)]
    return min(times) / made["seconds"] >= value if times else "no such peer ran"


# -- helpers of the cases ------------------------------------------------------------------------------------


def gradient(function: Any, tensors: list[Tensor], gy: Any = None) -> Call:
    """Backward pass alone, of a graph that is kept."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = tensors_of(function(*leaves))
    gys = [torch.ones_like(y) if gy is None else gy for y in out]
    return lambda: torch.autograd.grad(out, leaves, gys, retain_graph=True)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def optional(module: str, make: Callable[[Any], Call]) -> Call | str:
    """A peer of another package, or that it is not installed."""
    try:
        return make(importlib.import_module(module))
    except ImportError:
        return f"{module.split('.')[0]} is not installed"


# -- the groups ----------------------------------------------------------------------------------------------


def group_norm(place: Place) -> Iterator[Case]:
    shapes = place.size(
        {"(2,320,64,64)": (2, 320, 64, 64), "(8,320,64,64)": (8, 320, 64, 64), "(4,128,512,512)": (4, 128, 512, 512),
         "(1,128,20,256,256)": (1, 128, 20, 256, 256)},
        {"(2,8,4,4)": (2, 8, 4, 4)},
    )  # fmt: skip
    groups = place.size(32, 4)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fk.group_norm(x, groups, weight, bias, activation="silu")

    for name, shape in shapes.items():
        for last in (False, True):
            x, weight, bias = place.randn(*shape), place.randn(shape[1]), place.randn(shape[1])
            if last:
                x = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
            assert "Triton" in fk.explain(fk.group_norm, x, groups, weight, bias, activation="silu")
            given = [x, weight, bias]
            where = f"{name} {'channels last' if last else 'NCHW'}"
            large = nbytes(x) > 50e6
            compiled = place.compiled(plain)

            def apex(module: Any, x: Tensor = x, last: bool = last) -> Call:
                if not last:
                    raise ImportError
                layer = module.GroupNorm(groups, x.shape[1], act="silu").to(x.device, x.dtype)
                return lambda: layer(x)

            goal: tuple[str, float] = ("copy", 0.6 if last else 0.8) if large else ("torch.compile", 3.0)
            peers = {
                "eager": lambda given=given: plain(*given),
                "torch.compile": lambda given=given, compiled=compiled: compiled(*given),
                "apex": optional("apex.contrib.group_norm", apex),
            }
            yield Case(f"forward {where}", lambda given=given: ours(*given), peers, 2 * nbytes(x), goal=goal)
            gy = torch.randn_like(x)
            yield Case(
                f"backward {where}",
                gradient(ours, given, gy),
                {"eager": gradient(plain, given, gy), "torch.compile": gradient(compiled, given, gy)},
                3 * nbytes(x),
                goal=("copy", 0.5) if large else None,
            )
            if not large and not last:
                short = {name: call for name, call in peers.items() if name != "apex"}
                yield Case(
                    f"forward {where}, in cache", lambda given=given: ours(*given), short, 2 * nbytes(x),
                    goal=("us", 7.0) if shape[0] == 2 else None, cached=True,
                )  # fmt: skip


def pieces(place: Place) -> Iterator[Case]:
    batch, length, dim, heads, width = place.size((8, 4096, 1152, 16, 128), (2, 3, 16, 2, 8))
    x, branch = place.randn(batch, length, dim), place.randn(batch, length, dim)
    gate, scale, shift = (place.randn(batch, dim) for _ in range(3))

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def residual(
        x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = x + gate[:, None] * branch
        return h, modulated(h, scale, shift)

    def ours_modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return fk.layer_norm(x, eps=1e-6, scale=scale, shift=shift)

    def ours_residual(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return fk.gated_residual_norm(x, branch, gate, scale=scale, shift=shift)

    cos, sin = (place.randn(length, width, dtype=torch.float32) for _ in range(2))
    q, k = (place.randn(batch, length, heads, width).transpose(1, 2) for _ in range(2))

    def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return dit.reference_norm_rope(q, cos, sin), dit.reference_norm_rope(k, cos, sin)

    def ours_rotated(q: Tensor, k: Tensor) -> Any:
        return fk.qk_norm_rope(q, k, cos, sin)

    wide = place.randn(batch * length, 2 * 4 * dim)

    def liger(function: str) -> Callable[[Any], Call]:
        return lambda module: (
            lambda: getattr(module, function).apply(*(t.contiguous() for t in wide.chunk(2, -1)))
        )

    def geglu(x: Tensor) -> Tensor:
        return dit.reference_glu(x, "gelu")

    def swiglu(x: Tensor) -> Tensor:
        return dit.reference_glu(x, "silu")

    calls: list[tuple[str, Any, Any, list[Tensor], int, float | None, dict[str, Call | str]]] = [
        ("norm + modulate", ours_modulated, modulated, [x, scale, shift], 2 * nbytes(x), 0.85, {}),
        ("gated residual + norm + modulate", ours_residual, residual, [x, branch, gate, scale, shift], 4 * nbytes(x),
         0.85, {}),
        ("QK norm + RoPE", ours_rotated, rotated, [q, k], 2 * nbytes(q, k), 0.85, {}),
        ("rms_norm", lambda x: fk.rms_norm(x, gate[0]), lambda x: F.rms_norm(x, x.shape[-1:], gate[0], 1e-6), [x],
         2 * nbytes(x), None,
         {"liger": optional("liger_kernel.ops.rms_norm",
                            lambda module: lambda: module.LigerRMSNormFunction.apply(x, gate[0], 1e-6))}),
        ("geglu", fk.geglu, geglu, [wide], nbytes(wide) * 3 // 2, None, {}),
        ("swiglu", fk.swiglu, swiglu, [wide], nbytes(wide) * 3 // 2, None,
         {"liger, the gate second": optional("liger_kernel.ops.swiglu", liger("LigerSiLUMulFunction"))}),
    ]  # fmt: skip
    for name, ours, plain, given, moved, part, others in calls:
        compiled = place.compiled(plain)
        peers: dict[str, Call | str] = {
            "eager": lambda plain=plain, given=given: plain(*given),
            "torch.compile": lambda compiled=compiled, given=given: compiled(*given),
        }
        goal = None if part is None else ("copy", part)
        yield Case(name, lambda ours=ours, given=given: ours(*given), peers | others, moved, goal=goal)
        yield Case(
            f"{name}, backward",
            gradient(ours, given),
            {"eager": gradient(plain, given), "torch.compile": gradient(compiled, given)},
        )


_BACKENDS = {
    "sdpa math": SDPBackend.MATH,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attention(place: Place) -> Iterator[Case]:
    batch, heads = place.size((4, 16), (1, 2))
    tokens = place.size(4096, 8)
    for dim in place.size((40, 64, 72, 80, 128, 160, 256), (8, 40)):
        for keys in place.size((tokens, 77), (tokens, 5)):
            q = place.randn(batch, tokens, heads, dim).transpose(1, 2)
            k, v = (place.randn(batch, keys, heads, dim).transpose(1, 2) for _ in range(2))
            assert "Triton" in fk.explain(fk.attention, q, k, v)
            flops = 4.0 * batch * heads * tokens * keys * dim
            where = f"D={dim}, {tokens} queries, {keys} keys"

            def backend(which: SDPBackend, gradients: bool, given: list[Tensor] = [q, k, v]) -> Call:  # noqa: B006
                def call() -> Any:
                    with sdpa_kernel(which):
                        return F.scaled_dot_product_attention(*given)

                if not gradients:
                    return call

                def backward() -> Any:
                    if not made:
                        with sdpa_kernel(which):
                            made.append(gradient(F.scaled_dot_product_attention, given))
                    return made[0]()

                made: list[Call] = []
                return backward

            def flash(module: Any, given: list[Tensor] = [q, k, v]) -> Call:  # noqa: B006
                blhd = [t.transpose(1, 2) for t in given]
                return lambda: module.flash_attn_func(*blhd)

            goals: dict[int, tuple[str, float]] = {64: ("sdpa", 1.0), 128: ("tflops", 480)}
            goals |= dict.fromkeys((40, 80, 160), ("sdpa", 1.15))
            own = keys == tokens
            peers: dict[str, Call | str] = {n: backend(which, False) for n, which in _BACKENDS.items()}
            peers["flash-attn"] = optional("flash_attn", flash)
            given = [q, k, v]
            yield Case(
                f"forward {where}", lambda given=given: fk.attention(*given), peers, nbytes(q, k, v, q), flops,
                goals.get(dim) if own else None,
            )  # fmt: skip
            peers = {n: backend(which, True) for n, which in _BACKENDS.items()}
            goal = ("tflops", 330) if dim == 128 and own else None
            yield Case(
                f"backward {where}", gradient(fk.attention, given), peers, flops=2.5 * flops, goal=goal
            )
            tangents = tuple(torch.randn_like(t) for t in given)

            def along(function: Any, given: Any = tuple(given), tangents: Any = tangents) -> Call:
                return lambda: torch.func.jvp(function, given, tangents)

            yield Case(
                f"value and JVP {where}", along(fk.attention), {"eager": along(softmax.reference)}, flops=3 * flops,
                goal=("tflops", 300) if dim == 128 and own else None,
            )  # fmt: skip


def update(place: Place) -> Iterator[Case]:
    shape = place.size((64, 16, 128, 128), (2, 3, 5))
    xs = [place.randn(*shape, dtype=torch.float32) for _ in range(3)]
    output, null = place.randn(*shape), place.randn(*shape)
    index = torch.arange(shape[0], device=place.device)
    options: dict[str, Any] = {
        "output": output,
        "null": null,
        "guidance": 7.5,
        "state": 0,
        "convert": (1.0, -0.5),
    }
    options["weight"] = 0.3
    noise = fk.Noise(0.1, 5, 1, index)
    for name, more in (("guided, three states", {}), ("guided, three states, noise", {"noise": noise})):

        def ours(more: dict[str, Any] = more) -> Any:
            return fk.update(xs, [0.5, 0.3, 0.2], **options, **more)

        def plain(more: dict[str, Any] = more) -> Any:
            return updates.reference(xs, [0.5, 0.3, 0.2], **options, **more)

        assert "one launch" in fk.explain(fk.update, xs, [0.5, 0.3, 0.2], **options, **more)
        moved = nbytes(*xs, output, null, xs[0], xs[0])
        yield Case(
            name, ours, {"eager": plain, "torch.compile": place.compiled(plain)}, moved, goal=("copy", 0.85)
        )


# -- whole networks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network with random weights and one evaluation of it."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Any] = field(default_factory=dict)


def _diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module("diffusers"), name)(**config)


def networks(place: Place) -> dict[str, Network]:
    """SD1.5- and SDXL-shaped UNets at two rows (guidance), and DiT-XL/2 at 256 pixels."""
    small = place.dry
    side, tokens = (4, 5) if small else (64, 77)
    x, t = place.randn(2, 4, side, side), torch.tensor([500, 500], device=place.device)
    sd15: dict[str, Any] = {"sample_size": side, "cross_attention_dim": 768, "attention_head_dim": 8}
    sdxl: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    xl2: dict[str, Any] = {
        "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32, "in_channels": 4,
        "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, "activation_fn": "gelu-approximate",
    }  # fmt: skip
    if small:
        tiny = {
            "layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4, "cross_attention_dim": 12,
            "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        }  # fmt: skip
        sd15 |= tiny
        sdxl |= tiny | {
            "sample_size": side, "transformer_layers_per_block": [1], "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12 + 6 * 4,
        }  # fmt: skip
        xl2 |= {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    large = x if small else place.randn(2, 4, 128, 128)
    added = {"text_embeds": place.randn(2, 12 if small else 1280), "time_ids": place.randn(2, 6)}
    latent = place.randn(2, 4, *[xl2["sample_size"]] * 2)
    labels = torch.tensor([1, 2], device=place.device)

    def context(dim: int) -> Tensor:
        return place.randn(2, tokens, dim)

    return {
        "SD1.5 UNet, 512 px, 2 rows": Network(
            _diffusers("UNet2DConditionModel", **sd15),
            {"sample": x, "timestep": t, "encoder_hidden_states": context(sd15["cross_attention_dim"])},
        ),
        "SDXL UNet, 1024 px, 2 rows": Network(
            _diffusers("UNet2DConditionModel", **sdxl),
            {"sample": large, "timestep": t, "encoder_hidden_states": context(sdxl["cross_attention_dim"]),
             "added_cond_kwargs": added},
        ),
        "DiT-XL/2, 256 px, 2 rows": Network(
            _diffusers("DiTTransformer2DModel", **xl2),
            {"hidden_states": latent, "timestep": t, "class_labels": labels},
        ),
    }  # fmt: skip


# How a network is run: patched (and with attention), and as what.
VARIANTS: dict[str, tuple[bool | None, str]] = {
    "eager": (None, "eager"),
    "compiled": (None, "compiled"),
    "CUDA graph": (None, "graph"),
    "patched": (False, "eager"),
    "patched + compiled": (False, "compiled"),
    "patched + CUDA graph": (False, "graph"),
    "patched with attention": (True, "eager"),
    "patched with attention + CUDA graph": (True, "graph"),
}


def network_row(network: Network, place: Place) -> dict[str, Any]:
    """Seconds of one evaluation in each of the variants."""
    torch.manual_seed(0)
    with place.device:  # weights are drawn there, which takes a CPU minutes
        model = network.make().to(place.dtype).eval()
    with own_stream(place):
        return {"variants": _times_of_variants(model, network.inputs, place)}


def _times_of_variants(model: nn.Module, inputs: dict[str, Any], place: Place) -> dict[str, float]:
    models: dict[bool | None, nn.Module] = {None: model}

    def call(run: Any) -> Tensor:
        with torch.no_grad():
            return run(**inputs, return_dict=False)[0]

    wanted = call(model).double()
    calls: dict[str, Call] = {}
    for name, (patched, how) in VARIANTS.items():
        if patched not in models:
            models[patched] = copy.deepcopy(model)
            report = fk.patch(models[patched], attention=bool(patched))
            assert report.replaced, report
            assert report.runs_here is None, report
        run: Any = models[patched]
        if how == "compiled":
            run = place.compiled(run)
        calls[name] = lambda run=run: call(run)
        if how == "graph":
            calls[name] = graphed(calls[name], place)
        error = (call(run).double() - wanted).square().mean() ** 0.5
        assert error <= 0.05 * wanted.square().mean() ** 0.5, f"{name}: {error:.3g}"
    return {name: launched(run, place) for name, run in calls.items()}


# -- tables --------------------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[Place], Iterator[Case]]] = {
    "group_norm + silu": group_norm,
    "pieces of a DiT block": pieces,
    "attention": attention,
    "solver update": update,
}


def rows(group: Callable[[Place], Iterator[Case]], place: Place) -> dict[str, Any]:
    """The measured lines of a group."""
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    with _kept_graphs(), own_stream(place):
        bandwidth = copy_bandwidth(place)
        for case in group(place):
            warm(case)
            made[case.name] = row(case, place, bandwidth)
            torch._dynamo.reset()  # and with it the compiled graphs' memory
    return {"copy bytes/s": bandwidth, "rows": made}


@contextlib.contextmanager
def _kept_graphs() -> Iterator[None]:
    """Backward passes are timed on graphs that are kept, whose buffers a compiled one would else reuse; and a
    function is compiled for each shape."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    total = f"accumulated_{limit}"
    with functorch.patch(donated_buffer=False), dynamo.patch({limit: 64, total: 1024}):
        yield


def record(path: Path, name: str, found: dict[str, Any], place: Place) -> None:
    """Add a group's lines to the results, and write the table."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = found | {"provenance": provenance(place.device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(known))


def _time(value: float | str) -> str:
    return f"{value * 1e6:.1f}" if isinstance(value, float) else value


def markdown(known: dict[str, Any]) -> str:
    """The results for people."""
    made = "Made by `pytest benchmarks -m gpu`. Medians, of kernels within CUDA graphs; host: until a call returns."
    lines = ["# Kernels on a GPU", "", made, ""]
    for name, found in known.items():
        origin = found["provenance"]
        versions = ", ".join(f"{package} {version}" for package, version in origin["packages"].items())
        lines += [f"## {name}", "", f"{origin['device']}; {versions}; commit {origin['commit']}.", ""]
        if "copy bytes/s" in found:
            lines += [
                f"Copy bandwidth in this run: {found['copy bytes/s'] / 1e12:.2f} TB/s. Times in microseconds.",
                "",
            ]
            lines += _kernel_table(found["rows"])
        else:
            variants = list(next(iter(found["rows"].values()))["variants"])
            lines += [f"| milliseconds a step | {' | '.join(variants)} |", "|---|" + "---:|" * len(variants)]
            for case, made in found["rows"].items():
                times = [f"{made['variants'][variant] * 1e3:.2f}" for variant in variants]
                lines.append(f"| {case} | {' | '.join(times)} |")
        lines.append("")
    return "\n".join(lines)


def _kernel_table(rows: dict[str, Any]) -> list[str]:
    peers = list(dict.fromkeys(name for made in rows.values() for name in made["peers"]))
    lines = [
        f"| case | ours | of copy | TFLOP/s | host | {' | '.join(peers)} | goal |",
        "|---|" + "---:|" * (5 + len(peers)),
    ]
    for case, made in rows.items():
        cells = [case, _time(made["seconds"])]
        cells.append(f"{made['copy']:.0%}" if "copy" in made else "")
        cells.append(f"{made['tflops']:.0f}" if "tflops" in made else "")
        cells.append(_time(made["host"]))
        cells += [_time(made["peers"].get(name, "")) for name in peers]
        met = {True: "met", False: "missed"}.get(made.get("met"), made.get("met"))
        cells.append(f"{made['goal'][0]} {made['goal'][1]:g}: {met}" if "goal" in made else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# -- the suite -----------------------------------------------------------------------------------------------

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytestmark = needs_gpu


@pytest.mark.parametrize("name", GROUPS)
def test_kernels(name: str) -> None:
    record(RESULTS, name, rows(GROUPS[name], gpu()), gpu())
    print(RESULTS.with_suffix(".md").read_text())


def test_networks() -> None:
    pytest.importorskip("diffusers", reason="the networks are those of diffusers")
    found = {name: network_row(network, gpu()) for name, network in networks(gpu()).items()}
    record(RESULTS, "networks", {"rows": found}, gpu())
    print(RESULTS.with_suffix(".md").read_text())
