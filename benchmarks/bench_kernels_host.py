"""What a call of a kernel costs the host: CPU time, with kernels compiled for sm_90 and a driver that launches none.

    pytest benchmarks/bench_kernels_host.py --benchmark-enable -o addopts= -s

Three numbers a call, in microseconds: as it is, its launches remembered (``_replay``); built anew each time; and built
anew with Triton looking each kernel up by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from fake_driver import FakeDriver, installed
from torch import Tensor

import fastsample_kernels as fk
from fastsample_kernels import _replay, _runtime
from fastsample_kernels._launch import Launch

CALLS = 2000


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver()
    monkeypatch.setattr(fake, "launcher_cls", lambda source, metadata: lambda *args: None)
    monkeypatch.setattr(*installed(fake))
    monkeypatch.setattr(_runtime, "_why_not_device", lambda *args: None)


def cases() -> dict[str, Callable[[], Tensor | tuple[Tensor, Tensor]]]:
    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    small, large, weight, bias = made(2, 320, 16, 16), made(2, 320, 64, 64), made(320), made(320)
    rows, vector, scale = made(2, 64, 64), made(2, 64), made(2, 64)
    q, k, v, angles, mask = (
        made(2, 4, 64, 64),
        made(2, 4, 64, 64),
        made(2, 4, 64, 64),
        made(64, 64),
        made(2, 1, 1, 64),
    )
    return {
        "GroupNorm + SiLU, one launch": lambda: fk.group_norm(small, 32, weight, bias, activation="silu"),
        "GroupNorm + SiLU, two launches": lambda: fk.group_norm(large, 32, weight, bias, activation="silu"),
        "LayerNorm + modulate": lambda: fk.layer_norm(rows, scale=scale, shift=vector),
        "gated residual + norm + modulate": lambda: fk.gated_residual_norm(
            rows, rows, vector, scale=scale, shift=vector
        ),
        "attention": lambda: fk.attention(q, k, v),
        "attention, bias": lambda: fk.attention(q, k, v, bias=mask),
        "QK norm + RoPE": lambda: fk.norm_rope(q, angles, angles),
        "GEGLU": lambda: fk.geglu(rows),
    }


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of a call, the least of five."""
    for _ in range(3):
        call()
    least = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(CALLS):
            call()
        least = min(least, time.process_time() - began)
    return least / CALLS * 1e6


def test_host_time_of_calls(device: None, benchmark: object) -> None:
    if _runtime.launcher() is None:
        pytest.skip("kernels are interpreted, or Triton launches them in a way that is not known")
    table = ["| call | remembered | built anew | by Triton's search |", "|---|---:|---:|---:|"]
    with torch.no_grad():
        for name, call in cases().items():
            times = [microseconds(call)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_replay, "REMEMBERS", False)
                times.append(microseconds(call))
                patch.setattr(Launch, "__call__", lambda launch: launch._run() and None)
                times.append(microseconds(call))
            table.append(f"| {name} | {' | '.join(f'{t:.1f}' for t in times)} |")
    print("\n" + "\n".join(table))
    benchmark.pedantic(cases()["GEGLU"], rounds=3, iterations=100)  # type: ignore[attr-defined]
