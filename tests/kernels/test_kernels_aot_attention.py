"""Machine code of attention and of the pieces of a DiT block without a GPU: tensor cores, no spills, 16-byte loads."""

import importlib

import pytest
import torch
from compiled import ARCHITECTURES, compile_launch

from fastsample_kernels import _attention_kernels as kernels
from fastsample_kernels import _dit_kernels as pieces
from fastsample_kernels import dit

module = importlib.import_module("fastsample_kernels.attention")
PASSES = ("forward", "tangent", "dq", "dkdv")
TENSOR_CORES = {80: r"\bHMMA", 90: r"\b(HGMMA|HMMA)", 100: r"\b(UTC\w*MMA|HMMA)"}
SHARED = {
    80: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # 8.6 and 8.9 share the tiles of 8.0 and have 99 KiB


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_launch(
    which, architecture, dim, *, length=4096, keys=None, kind="none", causal=False, dtype=torch.bfloat16
):
    """What ``attention`` launches on that GPU."""
    keys = keys or length
    q, k = (meta(2, n, 8, dim, dtype=dtype).transpose(1, 2) for n in (length, keys))
    rows = meta(2, 8, length, dtype=torch.float32)
    bias = None
    if kind == "per_key":
        bias = meta(2, 1, 1, keys, dtype=torch.bool)
    elif kind == "per_query":
        bias = meta(2, 8, length, keys, dtype=dtype)
    tiles = module.tiles(
        which,
        dim,
        keys,
        element_size=q.element_size(),
        capability=divmod(architecture, 10),
        bias=kind,
    )
    common = (q, k, k, bias)
    last = (module._precision(q), tiles)
    if which == "forward":
        return kernels.forward_launch(*common, causal, 0.125, q, rows, *last)
    if which == "tangent":
        return kernels.tangent_launch(*common, q, k, k, causal, 0.125, q, rows, q, *last)
    if which == "dq":
        return kernels.dq_launch(*common, causal, 0.125, q, rows, q, rows, q, *last)
    dlogits = meta(2, 8, length, keys, dtype=torch.float32) if kind == "per_query" else None
    return kernels.dkdv_launch(*common, causal, 0.125, rows, q, rows, k, k, dlogits, *last)


def check(launch, architecture, directory):
    code = compile_launch(launch, architecture, directory)
    assert code.stack == 0, f"{code.stack} bytes of stack"
    assert code.count(r"\b(LDL|STL)\b") == 0, "spills"
    assert code.count(r"\b(ATOM|ATOMG|RED|REDG)\b") == 0, "atomics on global memory"
    assert code.shared <= SHARED[architecture], f"{code.shared} bytes of shared memory"
    assert code.count(r"\b(LDG|LDGSTS)\.E(\.\w+)*\.128") > 0, "no 16-byte loads"
    return code


def check_attention(launch, architecture, directory):
    code = check(launch, architecture, directory)
    assert code.count(TENSOR_CORES[architecture]) > 0, "no tensor-core instructions"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dim", [40, 128])
def test_forward(dim, architecture, tmp_path):
    check_attention(attention_launch("forward", architecture, dim), architecture, tmp_path)


@pytest.mark.parametrize(
    ("which", "architecture"), [("tangent", 90), ("dq", 80), ("dq", 90), ("dkdv", 80), ("dkdv", 90)]
)
def test_derivatives(which, architecture, tmp_path):
    check_attention(attention_launch(which, architecture, 64), architecture, tmp_path)


def test_wide_tensor_core_instructions_on_hopper(tmp_path):
    code = check(attention_launch("forward", 90, 64), 90, tmp_path)
    assert code.count(r"\bHGMMA") > 0


CALLS = {
    "even": {},
    "ragged": {"length": 1000},
    "77 keys": {"keys": 77},
    "causal": {"length": 1000, "causal": True},
    "per_key": {"length": 1000, "kind": "per_key"},
    "per_query": {"length": 1024, "keys": 1000, "kind": "per_query"},
    "float32": {"dtype": torch.float32},
}
# A bias for each query in the backward pass and the tangent of wide heads spills; it is rare.
SPILLS = {(which, dim, "per_query") for which in ("tangent", "dkdv") for dim in (160, 256)}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dim", [40, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("which", PASSES)
def test_every_configuration(which, dim, call, tmp_path):
    if (which, dim, call) in SPILLS:
        pytest.skip("known to spill")
    for architecture in ARCHITECTURES:
        check_attention(attention_launch(which, architecture, dim, **CALLS[call]), architecture, tmp_path)


# -- pieces of a DiT block -----------------------------------------------------------------------------------


def dit_launches(dtype=torch.bfloat16):
    """A block of DiT-XL/2 at 256 tokens; attention with heads of 128."""
    x, vector, modulation = (
        meta(4, 256, 1152, dtype=dtype),
        meta(1152, dtype=dtype),
        meta(4, 1152, dtype=dtype),
    )
    rows = dit.row_tiles(*x.shape)
    summed = dit.row_tiles(*x.shape, dit._SUMMED)
    partial = meta(4, -(-256 // summed.chunk), 3, 1152, dtype=torch.float32)
    yield pieces.norm_forward_launch(
        x, x, modulation, vector, vector, modulation, modulation, 1e-6, False, x, x, rows
    )
    yield pieces.norm_backward_launch(
        x, x, x, x, modulation, vector, modulation, 1e-6, False, True, x, x, partial, summed
    )
    heads, angles = meta(4, 24, 4096, 128, dtype=dtype), meta(4, 4096, 128, dtype=torch.float32)
    heads_rows = dit.row_tiles(4 * 24, 4096, 128)
    for interleaved in (True, False):
        options = (meta(128, dtype=dtype), 1e-6, True, interleaved)
        yield pieces.rope_forward_launch(heads, angles, angles, *options, heads, heads_rows)
        chunks = meta(4, 24, -(-4096 // heads_rows.chunk), 128, dtype=torch.float32)
        yield pieces.rope_backward_launch(heads, heads, angles, angles, *options, heads, chunks, heads_rows)
    wide, narrow, columns = meta(1024, 10240, dtype=dtype), meta(1024, 5120, dtype=dtype), dit.glu_tiles(5120)
    yield pieces.glu_forward_launch(wide, "gelu", narrow, columns)
    yield pieces.glu_backward_launch(narrow, wide, "gelu", wide, columns)


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.slow] * (a != 90)) for a in ARCHITECTURES]
)
def test_pieces_of_a_dit_block(architecture, tmp_path):
    for launch in dit_launches():
        name = launch.kernel.fn.__name__
        code = check(launch, architecture, tmp_path)
        assert code.registers <= 128, f"{name}: {code.registers} registers"
        assert code.count(r"STG\.E(\.\w+)*\.128") > 0, f"{name}: no 16-byte stores"
