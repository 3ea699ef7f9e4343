"""attention and the pieces of a DiT block on a CPU without the interpreter: plain torch, and no Triton."""

import importlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastsample_kernels import _runtime, dit, explain
from fastsample_kernels.attention import attention, reference

module = importlib.import_module("fastsample_kernels.attention")


def test_import_is_light():
    code = (
        "import sys, fastsample_kernels.attention, fastsample_kernels.dit; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_attention_is_pytorchs():
    q, k, v = (normal(2, 3, n, 8, seed=n) for n in (5, 7, 7))
    assert "plain torch, because CPU tensors" in explain(attention, q, k, v)
    mask = normal(2, 1, 1, 7) > -0.5
    mask[..., 0] = True
    assert torch.equal(attention(q, k, v, bias=mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    for options in (
        {"bias": mask, "is_causal": True},
        {"bias": normal(5, 7, seed=3), "is_causal": True, "scale": 0.3},
        {"is_causal": True, "scale": -0.3},
        {"bias": normal(5, 7, seed=3, dtype=torch.float64)},
    ):
        wanted = reference(q.double(), k.double(), v.double(), **options)
        torch.testing.assert_close(attention(q, k, v, **options).double(), wanted, rtol=1e-5, atol=1e-5)


def test_attention_has_tangents_and_compiles():
    q, k, v = (normal(1, 2, 5, 8, seed=seed) for seed in range(3))
    got, wanted = (torch.func.jvp(f, (q, k, v), (v, q, k)) for f in (attention, reference))
    torch.testing.assert_close(got, wanted)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), reference(q, k, v))


X, VECTOR, ROW, TABLE = normal(2, 3, 8), normal(2, 8, seed=1), normal(8, seed=2), normal(3, 8, seed=3)
CALLS = {
    "layer_norm": (dit.layer_norm, (X, ROW, ROW), {"scale": VECTOR, "shift": VECTOR}),
    "rms_norm": (dit.rms_norm, (X, ROW), {}),
    "gated_residual_norm": (dit.gated_residual_norm, (X, X, VECTOR), {"norm": "rms"}),
    "norm_rope": (dit.norm_rope, (X[:, None], TABLE, X), {}),
    "geglu": (dit.geglu, (X,), {}),
    "swiglu": (dit.swiglu, (X,), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_pieces_run_in_plain_torch_and_compile(name):
    function, args, options = CALLS[name]
    assert "plain torch, because CPU tensors" in explain(name, *args, **options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, **options), function(*args, **options))


def test_tf32_is_read_from_either_setting(monkeypatch):
    class Old:
        allow_tf32 = True

    class New:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self):
            raise RuntimeError("mix of the legacy and new APIs")

    for settings in (Old(), New()):
        monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
        assert _runtime.tf32_allowed()


def test_tf32_is_a_constant_for_the_compiler():
    compiled = torch.compile(lambda: torch.ones(1) + _runtime.tf32_allowed(), fullgraph=True, backend="eager")
    assert compiled().item() == 1 + _runtime.tf32_allowed()
